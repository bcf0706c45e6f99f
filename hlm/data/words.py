"""Words of any script, as Unicode's text segmentation (UAX #29) cuts them, by the `regex` package.

Vowel signs and joiners belong to their word. Where a script writes no spaces between words (Chinese, Japanese, Thai,
Lao, Khmer, Burmese), finding them takes a dictionary: a word is then a whole run, and BM25 cuts the run, like one of
Korean, into overlapping pairs of characters, with which parts of it are found. Of Latin text, `'`, `.` and `:` within a
word separate, other than in UAX #29: product names are full of them.
"""

from __future__ import annotations

import itertools
import re
import unicodedata

import regex

# No apostrophe in it: "can't" is two words.
_WORDS = regex.compile(r"(?V1)\d+(?:[.,]\d+)+[\w\p{N}]*|[\w\p{N}--\p{M}][\w\p{N}]*")
_ASCII_WORDS = re.compile(r"\d+(?:[.,]\d+)+\w*|\w+")  # the same of ASCII, several times faster
# Scripts that are written without spaces: those of South East Asia are "complex context" to Unicode's line breaking.
_UNSPACED = r"\p{Line_Break=Complex_Context}\p{Han}\p{Hiragana}\p{Katakana}ー"
_HAS_UNSPACED = regex.compile(f"[{_UNSPACED}]")
_PAIRED = regex.compile(rf"[{_UNSPACED}\p{{Hangul}}][{_UNSPACED}\p{{Hangul}}\p{{M}}]*")
_CHARACTER = regex.compile(r"\X")
# What does not tell words apart: joiners and other invisible characters but the zero-width space, which separates;
# frames and variants of signs; vowel points of Arabic and Hebrew, which are seldom written; the stroke that lengthens.
_DROPPED = regex.compile(
    r"(?V1)[\p{Cf}--\u200b]|\p{Me}|\p{Variation_Selector}"
    r"|[[\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed]&&\p{Mn}]|\u0640"
)


def fold(text: str) -> str:
    """The same for texts that differ only in case or in the forms of their characters (NFKC, without invisible ones).

    All four i's of Turkish are one: which of them is meant takes knowing the language.
    """
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _DROPPED.sub("", folded).replace("i̇", "i").replace("ı", "i")


def lower(text: str) -> str:
    """In small letters and NFKC, to be shown; the capital dotted I becomes one letter, not two."""
    return unicodedata.normalize("NFKC", text).lower().replace("i̇", "i")


def terms(text: str, *, single: bool = False) -> list[str]:
    """What BM25 counts: folded words and numbers ("15.6" is one), pairs of characters of unspaced scripts and Korean.

    Args:
        single: such characters one by one, too, as a document needs to be found by a query of one character.
    """
    folded = fold(text)
    if folded.isascii():
        return _ASCII_WORDS.findall(folded)
    words = _WORDS.findall(folded)
    if not _PAIRED.search(folded):
        return words
    return [term for word in words for term in _parts(word, single)]


def _parts(word: str, single: bool) -> list[str]:
    parts: list[str] = []
    position = 0
    for run in _PAIRED.finditer(word):
        parts += [word[position : run.start()]] if run.start() > position else []
        characters = _CHARACTER.findall(run[0])
        if single or len(characters) == 1:
            parts += characters
        parts += map("".join, itertools.pairwise(characters))
        position = run.end()
    return parts + ([word[position:]] if position < len(word) else [])


def count_words(text: str) -> int:
    """How many words a text has: those between spaces, and of unspaced scripts one for two characters, which is about
    the length of a Chinese word."""
    if text.isascii():
        return len(text.split())
    words = 0
    for word in text.split():
        unspaced = sum(_HAS_UNSPACED.search(character) is not None for character in _CHARACTER.findall(word))
        words += max(1, (unspaced + 1) // 2)
    return words
