"""Texts as they come in, checked at one place for every encoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from hlm.artefacts import HlmError


def as_texts(texts: Iterable[str]) -> list[str]:
    """The texts as a list of plain, well-formed str.

    Args:
        texts: str in an order: a list, a tuple, a generator, a column of a table, a 1-d array of NumPy.

    Raises:
        HlmError: no such collection, or the first text that is no str, with its place (counted from 0).
    """
    unordered = isinstance(texts, str | bytes | bytearray | Mapping | Set) or not isinstance(texts, Iterable)
    if unordered or getattr(texts, "ndim", 1) != 1:
        raise HlmError(f"expected texts to encode, found {_described(texts)}; pass a list of str")
    found = []
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise HlmError(f"expected texts to encode, found {_described(text)} at place {place}; pass a list of str")
        found.append(well_formed(text))
    return found


def well_formed(text: str) -> str:
    """`text` as a plain str; two halves of a surrogate pair are joined, and half a pair becomes U+FFFD, as browsers do.

    Such halves come from clients that cut an emoji in two, and from terminals that are not UTF-8; no tokenizer takes
    them.
    """
    text = str.__str__(text)  # of a subclass, such as NumPy's, the plain str
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _described(value: object) -> str:
    dimensions = getattr(value, "ndim", None)
    return f"{type(value).__name__} of {dimensions} dimensions" if dimensions else type(value).__name__
