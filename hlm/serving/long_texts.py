"""Token ids of a text far longer than a model reads, without tokenising the rest of it."""

from __future__ import annotations

import math
import unicodedata

from tokenizers import Encoding, Tokenizer

LONG = 4096  # characters of a text that is tokenised whole
CHARACTERS_A_TOKEN = 8  # more than a token has in most texts; a text with more is read further
FURTHER = 4  # times as much is read of a text whose start did not give enough tokens
MARGIN = 64  # characters before the end of what was read that may belong to a token that ends beyond
SEARCHED = 64  # characters in which a place to cut is looked for


def whole_characters(tokenizer: Tokenizer) -> float:
    """The length, in characters, up to which a text is better tokenised whole; infinite where its end counts too."""
    truncation = tokenizer.truncation or {"direction": "left"}
    return max(LONG, CHARACTERS_A_TOKEN * truncation["max_length"]) if truncation["direction"] == "right" else math.inf


def first_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids that `tokenizer.encode(text)` gives, of a tokenizer that truncates on the right.

    A start of the text is tokenised, and a longer one until it decides: tokenizers cut a text into words from left to
    right, so that all words but the last two of a start are words of the whole text, and they compute the tokens of a
    word from that word alone. The start ends where no character is joined to the one before it.
    """
    margin = MARGIN + max((len(token.content) for token in tokenizer.get_added_tokens_decoder().values()), default=0)
    size = int(whole_characters(tokenizer))
    while size < len(text):
        end = _place_to_cut(text, size)
        if end is not None:
            # The batch leaves other threads of Python running, unlike `encode`.
            (encoding,) = tokenizer.encode_batch([text[:end]])
            if _decides(encoding, end - margin):
                return encoding.ids
        size *= FURTHER
    return tokenizer.encode_batch_fast([text])[0].ids


def _place_to_cut(text: str, size: int) -> int | None:
    """The first place from `size` on whose character normalisation never joins to the one before it."""
    for place in range(size, min(size + SEARCHED, len(text))):
        character = text[place]
        if character.isascii():
            return place
        joins = unicodedata.combining(character) or 0x1160 <= ord(character) < 0x1200  # vowels, finals of Hangul
        if not joins and unicodedata.category(character)[0] in "LNPSZ":
            return place
    return None


def _decides(encoding: Encoding, before: int) -> bool:
    """Whether the last token kept ends before this character, and two more words begin after its own."""
    kept = [(word, end) for word, (_, end) in zip(encoding.word_ids, encoding.offsets, strict=True) if word is not None]
    if not kept or not encoding.overflowing:
        return False
    last, end = kept[-1]
    beyond = [word for word in encoding.overflowing[-1].word_ids if word is not None]
    return end <= before and bool(beyond) and beyond[-1] >= last + 2
