"""The sample catalogue: ads, queries and judgements that follow from a rule, made from a seed in the data contract.

An ad is a category, a brand and a value on each of its department's three axes. An intent is what a query wants of
these: a category and/or a brand, and values. Grades follow from the intent alone:

    3  everything wanted is there
    2  all but the brand: a substitute
    1  the right category (and brand, if wanted), exactly one of the values wanted is another
    0  anything else

Ads and queries name the same thing in different words (`sample_vocabulary`), so most of a query must be learned.
Train, dev and test are disjoint by intent. Ad i depends on the seed and i alone, so any size streams.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hlm.artefacts import MANIFEST, HlmError, atomic_folder, check_output, read_manifest, write_manifest
from hlm.data.sample_vocabulary import AXES, DEPARTMENTS, PITCHES
from hlm.settings import keywords
from hlm.steps import CatalogueConfig

logger = logging.getLogger(__name__)

VERSION = 2  # of the catalogue's making; a change of words or rules raises it
NEAR, DISTRACTOR = 3, 4  # of every five ads the fourth repeats the first, the fifth alters one value of the second
CATEGORIES = [(name, ad, queries) for name, (_, _, items) in DEPARTMENTS.items() for ad, queries in items]
BRANDS = [(name, brand) for name, (_, brands, _) in DEPARTMENTS.items() for brand in brands]
OWN_PAIRS = {
    name: [
        pair
        for pair in itertools.combinations(range(3), 2)
        if sum({axes[i] for i in pair} <= set(others) for others, _, _ in DEPARTMENTS.values()) == 1
    ]
    for name, (axes, _, _) in DEPARTMENTS.items()
}
KINDS = {"head": 0.2, "torso": 0.35, "tail": 0.2, "brand": 0.1, "attribute": 0.15}
MAX_POSITIVES = 10  # of a training query
PLAIN, SYNONYM = 0.2, 0.45  # how often an ad states a value, and its category, in people's words
SPLITS = {"dev": (0.0, 0.08), "test": (0.08, 0.24), "train": (0.24, 1.0)}  # shares of the intents


class Ad(NamedTuple):
    category: int
    brand: int
    values: tuple[int, ...]  # of three axes


class Intent(NamedTuple):
    """What a query wants; -1 stands for "any". `department` is given by the category or by the values' axes."""

    department: str
    category: int
    brand: int
    values: tuple[int, ...]  # of three axes


def axes_of(category: int) -> list[str]:
    return DEPARTMENTS[CATEGORIES[category][0]][0]


def ad(seed: int, number: int) -> Ad:
    """What ad `number` is: the near-duplicates and distractors of a group of five point back into it."""
    place = number % 5
    if place == NEAR:
        return ad(seed, number - NEAR)
    if place == DISTRACTOR:
        original = ad(seed, number - DISTRACTOR + 1)
        rng = random.Random(f"distractor {seed} {number}")
        axis = rng.randrange(3)
        choices = [
            value for value in range(len(AXES[axes_of(original.category)[axis]])) if value != original.values[axis]
        ]
        values = list(original.values)
        values[axis] = rng.choice(choices)
        return original._replace(values=tuple(values))
    rng = random.Random(f"ad {seed} {number}")
    category = rng.randrange(len(CATEGORIES))
    department = CATEGORIES[category][0]
    first = next(i for i, (name, _) in enumerate(BRANDS) if name == department)
    brand = first + rng.randrange(len(DEPARTMENTS[department][1]))
    return Ad(category, brand, tuple(rng.randrange(len(AXES[axis])) for axis in axes_of(category)))


def row(seed: int, number: int) -> dict[str, Any]:
    """The ad as the catalogue writes it."""
    found = ad(seed, number)
    rng = random.Random(f"words {seed} {number}")
    department, name, colloquial = CATEGORIES[found.category]
    brand = BRANDS[found.brand][1]
    axes = axes_of(found.category)
    plain = [list(AXES[axis])[value] for axis, value in zip(axes, found.values, strict=True)]
    words = [
        rng.choice(AXES[axis][value][1 if rng.random() < PLAIN else 0]) for axis, value in zip(axes, plain, strict=True)
    ]
    model = f"{rng.choice('ABCDEFGHKLMNPRSTVX')}{rng.randrange(10, 999)}"
    title = rng.choice(
        [
            f"{brand} {name} {words[0]}, {words[1]}",
            f"{name} {model} by {brand}, {words[0]}",
            f"{brand} {model} {name}",
            f"{words[1]} {name} - {brand} {model}",
            f"{brand} {words[2]} {name}, {words[0]}",
        ]
    )
    price = round(5 * 1.6 ** rng.uniform(0, 9), 2)
    stated = set(re.findall(r"\w+", title))
    facts = [word for word in words if word not in title or not stated.issuperset(re.findall(r"\w+", word))]
    sentences = [", ".join(facts)] if facts else []
    if rng.random() < SYNONYM:
        sentences.append(f"for those who look for: {rng.choice(colloquial)}")
    text = " ".join([*(sentence[0].upper() + sentence[1:] + "." for sentence in sentences), rng.choice(PITCHES)])
    return {
        "_id": f"ad{number:07d}",
        "title": title[0].upper() + title[1:],
        "text": text,
        "brand": brand,
        "category": name,
        "department": department,
        "attributes": dict(zip(axes, plain, strict=True)),
        "price": price,
        "bid_keywords": [name, f"{brand} {name}", f"{plain[0]} {name}"],
        "oracle": f"{', '.join(colloquial)}: {', '.join(plain)}",
    }


def grades(intent: Intent, table: np.ndarray) -> np.ndarray:
    """int8 (ads,) grades of all ads by the rule above; `table` is int16 (ads, 5): category, brand, three values."""
    wanted = [axis for axis in range(3) if intent.values[axis] >= 0]
    missed = sum((table[:, 2 + axis] != intent.values[axis] for axis in wanted), np.zeros(len(table), dtype=np.int8))
    brand = np.ones(len(table), dtype=bool) if intent.brand < 0 else table[:, 1] == intent.brand
    if intent.category >= 0:
        place = table[:, 0] == intent.category
    else:
        place = np.isin(table[:, 0], [i for i, (name, _, _) in enumerate(CATEGORIES) if name == intent.department])
    found = np.zeros(len(table), dtype=np.int8)
    found[place & brand & (missed == 0)] = 3
    if intent.category >= 0:
        found[place & ~brand & (missed == 0)] = 2
        if len(wanted) > 1 or (wanted and intent.brand >= 0):
            found[place & brand & (missed == 1)] = 1
    return found


def draw_intent(rng: random.Random, found: Ad) -> tuple[str, Intent]:
    """A kind of query and an intent that this ad meets."""
    kind = rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
    choices: Sequence[int] = range(3)
    if kind == "attribute":
        # Two axes that another department has too would ask for its ads as well, and they would be judged 0.
        choices = rng.choice(OWN_PAIRS[CATEGORIES[found.category][0]])
    axes = rng.sample(choices, {"head": 1, "torso": 2, "tail": rng.choice([2, 3]), "attribute": 2, "brand": 0}[kind])
    values = tuple(found.values[axis] if axis in axes else -1 for axis in range(3))
    category = -1 if kind == "attribute" else found.category
    brand = found.brand if kind == "brand" or (kind == "tail" and len(axes) == 2) else -1
    if kind == "brand" and rng.random() < 0.2:
        category = -1
    return kind, Intent(CATEGORIES[found.category][0], category, brand, values)


def split_of(intent: Intent, seed: int) -> str:
    digest = hashlib.sha256(f"{seed} {tuple(intent)}".encode()).digest()
    share = int.from_bytes(digest[:6], "big") / 2**48
    return next(name for name, (low, high) in SPLITS.items() if low <= share < high)


def words_for(intent: Intent, rng: random.Random) -> str:
    """A query as people type it: their words for things, in their order, with a slip now and then."""
    axes = DEPARTMENTS[intent.department][0]
    attributes = [
        rng.choice(AXES[axis][list(AXES[axis])[value]][1])
        for axis, value in zip(axes, intent.values, strict=True)
        if value >= 0
    ]
    rng.shuffle(attributes)
    noun = []
    if intent.category >= 0:
        _, name, colloquial = CATEGORIES[intent.category]
        noun = [name if rng.random() < 0.25 else rng.choice(colloquial)]
    brand = [BRANDS[intent.brand][1]] if intent.brand >= 0 else []
    cut = rng.randrange(len(attributes) + 1) if rng.random() < 0.3 else len(attributes)
    text = " ".join(brand + attributes[:cut] + noun + attributes[cut:]).lower()
    if rng.random() < 0.08:
        text = misspell(text, rng)
    return text


def misspell(text: str, rng: random.Random) -> str:
    """One slip in a word of five letters or more: two letters swapped, one lost, one doubled."""
    words = text.split(" ")
    long = [i for i, word in enumerate(words) if len(word) >= 5]
    if long:
        i = rng.choice(long)
        word, at = words[i], rng.randrange(1, len(words[i]) - 2)
        slips = [
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
        ]
        words[i] = rng.choice([slip for slip in slips if slip != word])  # two equal letters swap to the same word
    return " ".join(words)


def draw_queries(
    seed: int, ads: int, counts: dict[str, int]
) -> tuple[dict[str, list[tuple[str, str, Intent]]], list[str]]:
    """{split: [(text, kind, intent)]} and the unlabelled texts; no text stands in two splits.

    Raises:
        HlmError: the catalogue is too small for so many distinct queries.
    """
    queries: dict[str, list[tuple[str, str, Intent]]] = {}
    seen: set[str] = set()
    unlabelled: list[str] = []
    for split in ("test", "dev", "train", "unlabelled"):
        rng = random.Random(f"{split} {seed}")
        found: list[tuple[str, str, Intent]] = []
        bucket = "train" if split == "unlabelled" else split
        for _ in range(200 * counts[split] + 1000):
            if len(found) == counts[split]:
                break
            kind, intent = draw_intent(rng, ad(seed, rng.randrange(ads)))
            if split_of(intent, seed) != bucket:
                continue
            text = words_for(intent, rng)
            if text not in seen:
                seen.add(text)
                found.append((text, kind, intent))
        if len(found) < counts[split]:
            raise HlmError(
                f"{split}: expected {counts[split]} distinct queries, found {len(found)} that {ads} ads can give; ask "
                "for fewer, or make more ads"
            )
        if split == "unlabelled":
            unlabelled = [text for text, _, _ in found]
        else:
            queries[split] = found
    return queries, unlabelled


@keywords(CatalogueConfig)
def make_catalogue(config: CatalogueConfig) -> Path:
    """`write_catalogue`, unless the catalogue of these settings is there already. Every setting of `CatalogueConfig` is
    a keyword.

    Returns:
        `output`.
    """
    options = asdict(config)
    output = check_output(options.pop("output"), "catalogue")
    if (output / MANIFEST).is_file() and read_manifest(output, "catalogue")["config"] == options | {"version": VERSION}:
        logger.info("%s: up to date", output)
        return output
    write_catalogue(output, **options)
    logger.info("%s: %d ads", output, config.ads)
    return output


def write_catalogue(
    folder: str | Path,
    *,
    ads: int,
    unlabelled: int,
    train_queries: int,
    dev_queries: int,
    test_queries: int,
    seed: int = 0,
) -> None:
    """Writes the catalogue in the data contract: corpus, queries (with `kind` and `intent`), qrels, unlabelled.

    Dev and test judgements are complete; a training query lists at most ten ads of grade 3. The folder is written aside
    and renamed. In memory are ten bytes an ad and the queries.

    Raises:
        HlmError: a number below 1, or more distinct queries than so many ads can give.
    """
    config = {"ads": ads, "unlabelled": unlabelled, "train_queries": train_queries}
    config |= {"dev_queries": dev_queries, "test_queries": test_queries, "seed": seed, "version": VERSION}
    for name, value in config.items():
        if name not in ("seed", "version") and value < 1:
            raise HlmError(f"{name}: expected at least 1, found {value}")
    counts = {"train": train_queries, "dev": dev_queries, "test": test_queries, "unlabelled": unlabelled}
    queries, texts = draw_queries(seed, ads, counts)
    with atomic_folder(folder, "catalogue") as aside:
        table = np.empty((ads, 5), dtype=np.int16)
        with open(aside / "corpus.jsonl", "w", encoding="utf-8") as file:
            for number in range(ads):
                one = ad(seed, number)
                table[number] = (one.category, one.brand, *one.values)
                file.write(json.dumps(row(seed, number), ensure_ascii=False) + "\n")
        (aside / "qrels").mkdir()
        with open(aside / "queries.jsonl", "w", encoding="utf-8") as file:
            for split, found in queries.items():
                lines = ["query-id\tcorpus-id\tscore\n"]
                for number, (text, kind, intent) in enumerate(found):
                    name = f"{split}{number}"
                    cells = {"_id": name, "text": text, "kind": kind, "intent": json.dumps(intent)}
                    file.write(json.dumps(cells, ensure_ascii=False) + "\n")
                    lines += [f"{name}\tad{number:07d}\t{grade}\n" for number, grade in judge(intent, table, split)]
                (aside / "qrels" / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")
        with open(aside / "unlabelled.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        kinds = {split: dict(Counter(kind for _, kind, _ in found)) for split, found in queries.items()}
        write_manifest(aside, "catalogue", inputs={}, config=config, categories=len(CATEGORIES), kinds=kinds)


def judge(intent: Intent, table: np.ndarray, split: str) -> Iterator[tuple[int, int]]:
    """(ad number, grade): all graded ads for dev and test, some of grade 3 for train."""
    found = grades(intent, table)
    rows = np.flatnonzero(found > 0)
    if split == "train":
        rows = np.flatnonzero(found == 3)
        if len(rows) > MAX_POSITIVES:
            rows = rows[np.linspace(0, len(rows) - 1, MAX_POSITIVES).astype(int)]
    return ((int(number), int(found[number])) for number in rows)
