"""How queries and titles are spelled: words, singular and plural, units, and which texts are the same query."""

from __future__ import annotations

import random
import re

import regex

from hlm.data.words import fold, lower

# Letters, digits and vowel signs; a sign does not begin a word.
WORD = regex.compile(r"(?V1)(?!\p{M})[[\w\p{N}]--\p{Pc}]+(?:[.\-/+'][[\w\p{N}]--\p{Pc}]+)*\+?")
_ASCII_WORD = re.compile(r"[^\W_]+(?:[.\-/+'][^\W_]+)*\+?")  # the same of ASCII, twice as fast
UNIT = re.compile(r"^(?:mm|cm|m|ft|in|inch|kg|g|w|v|va|mah|gb|tb|mb|ghz|mhz|hz|ml|l|dpi|ppm|mp)$")


def normalise(text: str) -> str:
    """Lower-case words without punctuation, separated by one space."""
    return " ".join(words_of(text))


def canonical(text: str) -> str:
    """The same for texts that differ only in the order of their words, singular and plural, hyphens, case."""
    return "".join(sorted(_parts(text)))


def spellings(text: str) -> frozenset[str]:
    """Two texts that share one of these are the same query: as `canonical`, or with and without a space."""
    return frozenset((canonical(text), "".join(_parts(text))))


def words_of(text: str) -> list[str]:
    """The lower-case words; "usb-c", "2.0" and "802.11n" stay whole, and so do runs of scripts without spaces."""
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return WORD.findall(lower(text).replace("®", " ").replace("™", " "))


def match_key(text: str) -> str:
    """The words in the singular, for looking them up; the singular of a word may be no word ("len")."""
    return " ".join(singular(word) for word in words_of(text))


def _parts(text: str) -> list[str]:
    return [singular(part) for word in words_of(fold(text)) for part in re.split(r"[-/]", word)]


def singular(word: str) -> str:
    """English plural endings off, by rule: good enough to match with, not to show."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def plural_of(name: str) -> str:
    """The English plural by rule, of the last word."""
    if name.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    return name[:-1] + "ies" if name.endswith("y") and name[-2:-1] not in "aeiou" else name + "s"


def vary_units(text: str, rng: random.Random) -> str:
    """Numbers and units as people write them, drawn at random: "4 gb" or "4gb", "15.6 in" or "15.6 inch"."""
    words = text.split()
    for i in range(len(words) - 1, 0, -1):
        if UNIT.match(words[i]) and words[i - 1].replace(".", "").isdigit() and rng.random() < 0.5:
            if words[i] == "in":
                words[i] = "inch"
            else:
                words[i - 1 : i + 1] = [words[i - 1] + words[i]]
    return " ".join(words)
