"""Token ids of queries, put together from their words': BERT's tokenizers cut no word with regard to another.

A query of words that were seen before takes a dictionary a tenth of the time that its tokenizer takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

WORDS = 2**16  # kept: some 15 MB
LONGEST = 64  # characters of a word that is kept
FEW = 16  # words that are tokenised sooner one by one than by all cores


class WordCache:
    """What a tokenizer gives for a prompt and a text, without asking it for words it has been asked for before.

    A word is what stands between spaces. Safe to call from several threads.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str = "") -> None:
        self._tokenizer = tokenizer
        self._words: dict[str, list[int]] = {}
        whole, body = (tokenizer.encode("a", add_special_tokens=around).ids for around in (True, False))
        start = next(start for start in range(len(whole)) if whole[start : start + len(body)] == body)
        first, space, self._prompt = prompt.rpartition(" ")  # the rest is part of a text's first word
        self._before = whole[:start] + tokenizer.encode(first + space, add_special_tokens=False).ids
        self._after = whole[start + len(body) :]
        limit = (tokenizer.truncation or {}).get("max_length")
        self._room = None if limit is None else limit - len(self._after)

    @classmethod
    def of(cls, tokenizer: Tokenizer, prompt: str = "") -> WordCache | None:
        """None where words are not cut independently: another tokenizer than BERT's, or an added token that may stand
        for several words."""
        parts = tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.model, tokenizer.post_processor
        kinds = [type(part).__name__ for part in parts]
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        truncation = tokenizer.truncation or {"direction": "right", "max_length": LONGEST}
        independent = (
            kinds[:3] == ["BertNormalizer", "BertPreTokenizer", "WordPiece"]
            and kinds[3] in ("TemplateProcessing", "BertProcessing", "NoneType")
            and all(content.isascii() and content.isprintable() and " " not in content for content in added)
            and truncation["direction"] == "right"
            and truncation["max_length"] > tokenizer.num_special_tokens_to_add(False)
            and tokenizer.padding is None
        )
        return cls(tokenizer, prompt) if independent else None

    def forget(self) -> None:
        """Every word is new again."""
        self._words = {}

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        found: list[Any] = [self._put_together(text, self._words) for text in texts]
        if None in found:
            missing = [place for place, ids in enumerate(found) if ids is None]
            words = self._learn({word for place in missing for word in self._cut(texts[place])})
            for place in missing:
                found[place] = self._put_together(texts[place], words)
        return found

    def _cut(self, text: str) -> list[str]:
        return (self._prompt + text).split(" ")

    def _put_together(self, text: str, words: dict[str, list[int]]) -> list[int] | None:
        """None: a word that is not among `words`."""
        ids = self._before.copy()
        try:
            for word in self._cut(text):
                ids += words[word]
        except KeyError:
            return None
        if self._room is not None:
            del ids[self._room :]
        ids += self._after
        return ids

    def _learn(self, words: set[str]) -> dict[str, list[int]]:
        """The ids of all these words; those that were not known are kept, where they are short."""
        known = self._words  # grows only, so that another thread may read it meanwhile
        found = {word: known[word] for word in words if word in known}
        new = list(words - found.keys())
        if len(new) <= FEW:
            encodings = [self._tokenizer.encode(word, add_special_tokens=False) for word in new]
        else:
            encodings = self._tokenizer.encode_batch_fast(new, add_special_tokens=False)
        found |= (learnt := {word: encoding.ids for word, encoding in zip(new, encodings, strict=True)})
        short = [word for word in learnt if len(word) <= LONGEST][:WORDS]
        if len(known) + len(short) > WORDS:
            known = self._words = {}  # those in use come back
        known.update((word, learnt[word]) for word in short)
        return found
