"""Token ids of plain queries, put together from their words': BERT's tokenizers cut one word without regard to others.

A query of words that were seen before takes a dictionary a fifth of the time that its tokenizer takes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import punctuation

from tokenizers import Tokenizer

WORDS = 2**16  # kept: some 15 MB
LONGEST = 64  # characters of a word that is kept
WORD = re.compile(r"[A-Za-z0-9]+|[^A-Za-z0-9\s]")  # as BERT cuts printable ASCII: a punctuation mark is a word


class WordCache:
    """What a tokenizer gives for a prompt and a text, without asking it for words it has been asked for before.

    Safe to call from several threads.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str = "") -> None:
        self._tokenizer, self._prompt = tokenizer, prompt
        self._words: dict[str, list[int]] = {}
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        # No special token ends in a text that has none of these characters.
        marks = re.escape("".join(sorted(set(punctuation) - set("".join(special)))))
        self._plain = re.compile(rf"[A-Za-z0-9 \t\r\n{marks}]*")
        whole, body = (tokenizer.encode("a", add_special_tokens=around).ids for around in (True, False))
        start = next(start for start in range(len(whole)) if whole[start : start + len(body)] == body)
        self._before = whole[:start] + tokenizer.encode(prompt, add_special_tokens=False).ids
        self._after = whole[start + len(body) :]
        limit = (tokenizer.truncation or {}).get("max_length")
        self._room = None if limit is None else limit - len(self._after)

    @classmethod
    def of(cls, tokenizer: Tokenizer, prompt: str = "") -> WordCache | None:
        """None where words are not cut independently: another tokenizer than BERT's, special tokens that may end
        within a word, or a prompt that runs into the first word."""
        parts = tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.model, tokenizer.post_processor
        kinds = [type(part).__name__ for part in parts]
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        truncation = tokenizer.truncation or {"direction": "right", "max_length": LONGEST}
        independent = (
            kinds[:3] == ["BertNormalizer", "BertPreTokenizer", "WordPiece"]
            and kinds[3] in ("TemplateProcessing", "BertProcessing", "NoneType")
            and all(content[-1:] in set(punctuation) for content in special)
            and (not prompt or prompt[-1] in set(punctuation) | set(" \t\n\r"))
            and truncation["direction"] == "right"
            and truncation["max_length"] > tokenizer.num_special_tokens_to_add(False)
            and tokenizer.padding is None
        )
        return cls(tokenizer, prompt) if independent else None

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        found = [self._put_together(text) for text in texts]
        missing = [place for place, ids in enumerate(found) if ids is None]
        if missing:
            self._learn([texts[place] for place in missing])
            for place in missing:
                found[place] = self._put_together(texts[place])
            left = [place for place in missing if found[place] is None]
            encodings = self._tokenizer.encode_batch_fast([self._prompt + texts[place] for place in left])
            for place, encoding in zip(left, encodings, strict=True):
                found[place] = encoding.ids
        return found

    def _put_together(self, text: str) -> list[int] | None:
        """None: not plain ASCII, or with a word that is not known."""
        if self._plain.fullmatch(text) is None:
            return None
        ids = self._before.copy()
        words = self._words
        try:
            for word in WORD.findall(text):
                ids += words[word]
        except KeyError:
            return None
        if self._room is not None:
            del ids[self._room :]
        ids += self._after
        return ids

    def _learn(self, texts: list[str]) -> None:
        words = {word for text in texts if self._plain.fullmatch(text) for word in WORD.findall(text)}
        new = [word for word in words if word not in self._words and len(word) <= LONGEST][:WORDS]
        if len(self._words) + len(new) > WORDS:
            self._words = {}  # those in use come back; another thread may still read the old ones
        encodings = self._tokenizer.encode_batch_fast(new, add_special_tokens=False)
        self._words.update((word, encoding.ids) for word, encoding in zip(new, encodings, strict=True))
