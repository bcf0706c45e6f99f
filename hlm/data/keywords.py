"""Queries derived from a catalogue's own fields, the way bid keywords are: types, brands, models, attributes, crops.

A product's type is the noun phrase that names it ("toner cartridge"). Types are mined, not listed: phrases that stand
right after the model in the titles of several brands, and the values of a type attribute. A type query is satisfied by
products whose type *ends* with it, so that "printer" finds laser printers and not printer cables; everything else is
satisfied by products that contain all its words.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from hlm.artefacts import HlmError
from hlm.data.spelling import UNIT, WORD, canonical, match_key, normalise, plural_of, singular, vary_units, words_of
from hlm.data.words import lower

Row = dict[str, Any]

# Where a noun phrase ends: punctuation, and the words that introduce what the product is for or comes with.
_BREAK = re.compile(
    r"[,;:()\[\]{}|*•–—®™]|\s-|-\s|\s/\s|\s\+\s|<[^>]*>|\s(?:with|w/|for|f/|and|from|in|to|by|of|on|incl|&)(?=\s)", re.I
)
# Attributes nobody searches by.
_UNSEARCHED = re.compile(
    r"temperature|humidity|dimension|weight|country|certif|package|pallet|carton|code|status|date|altitude|"
    r"gtin|voltage|frequency|compliance|warranty|gender|segment|positioning|stepping|warning"
)
# Of a text without a title: how many of its first words queries are made of, and the share of all texts above which a
# word such as "with" says nothing.
LEADING_WORDS, COMMON_SHARE = 24, 0.1
# "2 pcs", "24 ports": what is counted, not what the product is.
_COUNTED = re.compile(r"^(?:pcs?|pieces?|packs?|sheets?|pages?|ports?|outlets?|pixels|discs?|years?)$")


@dataclass(frozen=True)
class Keyword:
    """A derived query: its text, the form it was made in, and the rows of the products that satisfy it.

    `rows` is empty where the fields cannot tell (an unspecific crop): good for alignment, not as a training pair.
    """

    text: str
    kind: str
    rows: tuple[int, ...]


class Catalogue:
    """Inverted indexes over a catalogue's products; `rows` must be re-iterable and in a fixed order.

    Args:
        rows: products with `title` and, where there is one, `text`, `brand`, `model` and the attributes. Where no
            product has a title, the texts stand in.
        attributes_column: the column with the attributes, a dict or its JSON.
        type_attribute: the attribute that names the product's type.
        min_count, min_brands: how many products and brands must show a phrase before it counts as a type.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        *,
        attributes_column: str = "attrs",
        type_attribute: str = "product_type",
        min_count: int = 3,
        min_brands: int = 2,
    ) -> None:
        self._column, self._type_attribute = attributes_column, type_attribute
        # Of plain texts the text is what a product is called.
        self._named_by = "title" if any(row.get("title") for row in rows) else "text"
        self._boundary, self._written = self._collect_words(rows)
        self.types = self._mine_types(rows, min_count, min_brands)
        self._in_title: dict[str, array[int]] = defaultdict(lambda: array("i"))
        self._anywhere: dict[str, array[int]] = defaultdict(lambda: array("i"))
        self.of_brand: dict[str, array[int]] = defaultdict(lambda: array("i"))
        self.of_type: dict[str, array[int]] = defaultdict(lambda: array("i"))
        spellings: dict[str, Counter[str]] = defaultdict(Counter)
        number = -1
        for number, row in enumerate(rows):
            attributes = self.attributes(row)
            title = f"{row.get('brand') or ''} {row.get(self._named_by) or ''}"
            for index, text in ((self._in_title, title), (self._anywhere, " ".join([title, *attributes.values()]))):
                for word in {singular(word) for word in words_of(text)}:
                    index[word].append(number)
            for word in words_of(title):
                spellings[singular(word)][word] += 1
            if row.get("brand"):
                self.of_brand[normalise(row["brand"])].append(number)
            for name in self._with_endings(self.types_of(row)):
                self.of_type[name].append(number)
        self._count = number + 1
        # Singular forms are for matching ("batterie", "len"); a query is spelled as the catalogue spells it.
        self._spelling = {word: counts.most_common(1)[0][0] for word, counts in spellings.items()}
        self.synonyms = self._mine_synonyms(rows)

    def attributes(self, row: Row) -> dict[str, str]:
        """The product's attributes as texts."""
        value = row.get(self._column) or {}
        if isinstance(value, str):
            value = json.loads(value)
        if not isinstance(value, dict):
            raise HlmError(f"expected attributes in '{self._column}', found {value!r}; name the column that has them")
        return {str(key): str(item) for key, item in value.items() if item is not None}

    def types_of(self, row: Row) -> set[str]:
        """The types a product shows: in its title and the type attribute, else at the head of its text."""
        attribute = self.attributes(row).get(self._type_attribute, "")
        found = {next(self._types_in(text), "") for text in (_without_brand(row), attribute)} - {""}
        # A notebook's text may begin with "Intel Core 2 Duo Processor": it decides only where nothing else does.
        return found or {next(self._types_in((row.get("text") or "").split(". ")[0]), "")} - {""}

    def head_keywords(self) -> Iterator[Keyword]:
        """Every type, synonym and brand once: the short queries that most people type."""
        for name, rows in sorted(self.of_type.items()):
            yield Keyword(self._spelled(name), "type", tuple(rows))
            if (plural := self._plural(name)) != self._spelled(name):
                yield Keyword(plural, "type", tuple(rows))
            for other in self.synonyms.get(name.split()[-1], ()):
                yield Keyword(" ".join([*name.split()[:-1], other]), "synonym", tuple(rows))
        for brand, rows in sorted(self.of_brand.items()):
            yield Keyword(brand, "brand", tuple(rows))

    def draw(self, number: int, row: Row, rng: random.Random) -> Keyword | None:
        """One query for a product, its form drawn at random; None where the product lacks the fields of that form."""
        brand, model = normalise(row.get("brand") or ""), normalise(row.get("model") or "")
        names = sorted(self._with_endings(self.types_of(row)))
        name = rng.choice(names) if names else ""
        shown = self._synonym(name, rng)
        kind = rng.choices(
            ("attribute type", "crop", "brand type", "word type", "word", "model", "brand model"),
            (28, 26, 14, 12, 8, 6, 6),
        )[0]
        if kind == "attribute type" and name:
            value = self._attribute(row, rng)
            rows = self._satisfying(self._anywhere, value, self.of_type[name]) if value else ()
            return self._keyword((value, shown), kind, rows, rng) if value and value not in name else None
        if kind == "word type" and name:
            words = [word for word in words_of(_without_brand(row)) if not word[0].isdigit() and len(word) > 2]
            word = rng.choice(words) if words else ""
            rows = self._satisfying(self._in_title, word, self.of_type[name])
            return (
                self._keyword((word, shown), kind, rows, rng) if word and singular(word) not in name.split() else None
            )
        if kind == "brand type" and name and brand:
            rows = tuple(sorted(set(self.of_brand[brand]) & set(self.of_type[name])))
            return self._keyword((brand, shown), kind, rows, rng)
        if kind in ("model", "brand model") and 3 <= len(model) <= 30 and any(c.isdigit() for c in model):
            rows = self._satisfying(self._in_title, f"{brand} {model}", None)
            return Keyword(model if kind == "model" else f"{brand} {model}", kind, rows or (number,))
        if kind in ("word", "crop"):
            words = self._told_by(row)
            length = 1 if kind == "word" else rng.choices((2, 3, 4, 5), (40, 30, 18, 12))[0]
            start = rng.randrange(max(1, len(words) - length + 1))
            crop = words[start : start + length]
            if not any(len(word) > 1 and not word[0].isdigit() and not UNIT.match(word) for word in crop):
                return None
            text = " ".join(crop)
            if match_key(text) in self.of_type or canonical(text) == canonical(brand):
                return None  # a type or a brand: those are judged by their own index, not by containment
            rows = self._satisfying(self._in_title, text, None)
            # A word of very many products says nothing about which of them is meant.
            return Keyword(vary_units(text, rng), kind, rows if len(rows) <= (200 if kind == "word" else 50) else ())
        return None

    def _told_by(self, row: Row) -> list[str]:
        """The words that crops are taken from: the title's; in a catalogue without titles the first of the text, but
        for those that most texts have."""
        words = words_of(row.get("title") or row.get("text") or "")
        if self._named_by == "title":
            return words
        leading = words[:LEADING_WORDS]
        most = COMMON_SHARE * self._count
        return [word for word in leading if len(self._in_title[singular(word)]) <= most] or leading

    def _keyword(self, parts: tuple[str, str], kind: str, rows: tuple[int, ...], rng: random.Random) -> Keyword:
        first, second = parts if rng.random() < 0.75 else parts[::-1]
        return Keyword(vary_units(f"{first} {second}", rng), kind, rows)

    def _attribute(self, row: Row, rng: random.Random) -> str:
        values = [
            normalise(value)
            for name, listed in sorted(self.attributes(row).items())
            if name != self._type_attribute and not _UNSEARCHED.search(name)
            for value in listed.split(",")
            if len(value) <= 30
        ]
        values = [v for v in values if len(v) > 1 and len(v.split()) <= 3 and not v.replace(" ", "").isdigit()]
        return rng.choice(values) if values else ""

    def _satisfying(self, index: dict[str, array[int]], text: str, among: array[int] | None) -> tuple[int, ...]:
        postings = [index.get(singular(word), array("i")) for word in words_of(text)]
        postings = sorted(postings + ([among] if among is not None else []), key=len)
        return tuple(sorted(set(postings[0]).intersection(*postings[1:]))) if postings else ()

    def _synonym(self, name: str, rng: random.Random) -> str:
        if not name:
            return ""
        others = self.synonyms.get(name.split()[-1])
        if others and rng.random() < 0.5:
            return " ".join([*name.split()[:-1], rng.choice(others)])
        return self._plural(name) if rng.random() < 0.15 else self._spelled(name)

    def _plural(self, name: str) -> str:
        """The plural where the catalogue writes it ("memories" it does not)."""
        plural = plural_of(name)
        return plural if plural.split()[-1] in self._written else self._spelled(name)

    def _spelled(self, name: str) -> str:
        *before, last = name.split()
        best = self._spelling.get(last, last)
        # Only repairs what singularising broke; a word seen in both numbers stays singular.
        return " ".join([*before, last if last in self._written else best])

    def _with_endings(self, names: set[str]) -> set[str]:
        endings = {" ".join(words[i:]) for words in map(str.split, names) for i in range(len(words))}
        return {ending for ending in endings if ending in self.types}

    def _collect_words(self, rows: Iterable[Row]) -> tuple[frozenset[str], frozenset[str]]:
        """Words that follow a type phrase without being part of it (colours, materials, brands); every word written."""
        boundary = {"original", "colour", "color", "gray", "multicolor"}
        written: set[str] = set()
        for row in rows:
            written.update(words_of(f"{row.get('title') or ''} {row.get('text') or ''}"))
            brand = words_of(row.get("brand") or "")
            boundary.update(brand if len(brand) == 1 else ())
            for name, listed in self.attributes(row).items():
                if "colour" in name or "color" in name or name == "material":
                    boundary.update(words_of(value)[0] for value in listed.split(",") if len(words_of(value)) == 1)
        return frozenset(boundary), frozenset(written)

    def _phrases(self, text: str) -> Iterator[tuple[list[str], bool]]:
        """Runs of words that could be a noun phrase, and whether one starts the text."""
        at_start = True
        for segment in _BREAK.split(text.replace("(s)", "s")):
            run: list[str] = []
            small = after_number = False
            for written in WORD.findall(unicodedata.normalize("NFKC", segment)):
                word = lower(written)
                # "toner cartridge Original": from small letters to a capital the phrase has ended.
                ends = any(c.isdigit() for c in word) or word in self._boundary or (small and written[0].isupper())
                if ends and run:
                    yield run, at_start
                    run = []
                if ends:
                    at_start = False
                if word in self._boundary or any(c.isdigit() for c in word):
                    small, after_number = False, word.replace(".", "").isdigit()
                    continue
                small = written[0].islower()
                if not (after_number and (UNIT.match(word) or _COUNTED.match(word))):
                    run.append(singular(word))
                after_number = False
            if run:
                yield run, at_start
            at_start = False

    def _mine_types(self, rows: Iterable[Row], min_count: int, min_brands: int) -> frozenset[str]:
        counts: Counter[str] = Counter()
        brands: dict[str, set[str]] = defaultdict(set)
        certain: Counter[str] = Counter()
        at_end: Counter[str] = Counter()
        as_value: Counter[str] = Counter()
        for row in rows:
            for name, value in self.attributes(row).items():
                if name not in (self._type_attribute, "type"):
                    as_value[match_key(value)] += 1
            title, model = row.get("title") or "", row.get("model") or ""
            position = title.find(model) if model else -1
            tail = title[position + len(model) :] if position >= 0 else ""
            for run, at_start in self._phrases(tail if tail[:1].isspace() else ""):
                if not at_start:
                    break
                for length in (1, 2, 3):
                    if len(run) >= length:
                        name = " ".join(run[-length:])
                        counts[name] += 1
                        brands[name].add(row.get("brand") or "")
            for run, _ in self._phrases(self.attributes(row).get(self._type_attribute, "")):
                certain[" ".join(run[-3:])] += 1
            for run, _ in self._phrases(title):
                at_end[run[-1]] += 1
        mined = {name for name, n in counts.items() if n >= min_count and len(brands[name]) >= min_brands}
        mined |= {name for name, n in certain.items() if n >= min_count}
        # "usb", "inkjet" and "box" are an attribute's value more often than they end a phrase: they name no product.
        mined = {name for name in mined if at_end[name.split()[-1]] >= as_value[name.split()[-1]] or name in certain}
        return frozenset(name for name in mined if len(name.split()[-1]) > 1 and not UNIT.match(name))

    def _types_in(self, text: str) -> Iterator[str]:
        for run, _ in self._phrases(text):
            for length in (3, 2, 1):
                name = " ".join(run[-length:])
                if len(run) >= length and name in self.types:
                    yield name
                    break

    def _mine_synonyms(self, rows: Iterable[Row]) -> dict[str, list[str]]:
        """{"notebook": ["laptop"]} where products call themselves both "notebook case" and "laptop case".

        The other word must go before many nouns ("laptop lock", "laptop bag"), or "messenger case" would do as well,
        and never stand beside the first: in "audio extension" each says something of its own.
        """
        seen: dict[tuple[str, str], set[str]] = defaultdict(set)
        nouns: dict[str, set[str]] = defaultdict(set)
        together: set[tuple[str, str]] = set()
        for row in rows:
            runs = [run for field in ("title", "text") for run, _ in self._phrases(row.get(field) or "")]
            together.update(pair for run in runs for pair in itertools.pairwise(run))
            pairs = {(run[-2], run[-1]) for run in runs if len(run) >= 2 and run[-1] in self.types}
            for modifier, noun in pairs:
                nouns[modifier].add(noun)
                for other, other_noun in pairs:
                    if noun == other_noun and modifier != other and modifier in self.types and other not in self.types:
                        seen[modifier, other].add(row.get("brand") or "")
        found: dict[str, list[str]] = defaultdict(list)
        for (name, other), brands in sorted(seen.items()):
            if len(brands) >= 2 and len(nouns[other]) >= 5 and not {(name, other), (other, name)} & together:
                found[name].append(other)
        return dict(found)


def _without_brand(row: Row) -> str:
    title, brand = row.get("title") or "", row.get("brand") or ""
    return title[len(brand) :] if brand and title.lower().startswith(brand.lower()) else title
