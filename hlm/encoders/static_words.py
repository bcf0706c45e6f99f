"""A static student made from a teacher: its tokens are whole words of the log, and pieces of words for the rest.

They start as the teacher encodes them, the frequent ones lighter (Minishlab's model2vec; Arora, Liang and Ma, ICLR
2017). `align` and `refine` train it like any other student.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from hlm.artefacts import HlmError
from hlm.encoders.loading import encode
from hlm.encoders.static import StaticEmbedding

FREQUENCY = 1e-4  # a token that makes up so much of the log counts half (SIF's constant)
UNKNOWN, PREFIX = "[UNK]", "##"
UNUSED = re.compile(r"\[unused\d+\]")  # places in BERT's vocabulary that no text is cut to
PIECES = range(2, 6)  # characters of the pieces of words that are taken where the teacher's tokenizer has none


def static_student(teacher: SentenceTransformer, texts: Iterable[str], words: int) -> SentenceTransformer:
    """A static student of a teacher's width, its tokens encoded by the teacher, before any training.

    Args:
        texts: the log, from which whole words are taken, the most frequent first, and how often each token occurs.
        words: whole words, at most.

    Raises:
        HlmError: fewer than 1 word asked for, or no word in the texts.
    """
    if words < 1:
        raise HlmError(f"static: expected 1 word or more, found {words}")
    described = _word_tokenizer(json.loads(teacher.tokenizer.backend_tokenizer.to_str()))
    tokenizer = Tokenizer.from_str(json.dumps(described))
    counts = _count_words(tokenizer, texts)
    if not counts:
        raise HlmError("static: expected words in the unlabelled queries and titles, found none; check the data")
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    tokens = dict.fromkeys([UNKNOWN, *ranked[:words], *_pieces(described["model"]["vocab"], counts, words)])
    described["model"]["vocab"] = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer.from_str(json.dumps(described))
    frequency = np.zeros(len(tokens))
    for word, encoding in zip(ranked, tokenizer.encode_batch(ranked, is_pretokenized=False), strict=True):
        np.add.at(frequency, encoding.ids, counts[word])
    frequency /= max(1, frequency.sum())
    read = [token.removeprefix(PREFIX) if len(token) > len(PREFIX) else token for token in tokens]
    vectors = encode(teacher, read, prompt_name="query") * (FREQUENCY / (FREQUENCY + frequency))[:, None]
    module = StaticEmbedding(tokenizer, torch.from_numpy(vectors.astype(np.float32)))
    student = SentenceTransformer(modules=[module, Normalize()], device=str(teacher.device))
    return student.eval()


def most_tokens(described: dict[str, Any], words: int) -> int:
    """How many tokens `static_student` makes at most, from the teacher's tokenizer.json: words of the log that are
    tokens of the teacher's are counted twice, and characters that are none are left out."""
    return 1 + words + (len(_known(_word_tokenizer(described)["model"]["vocab"])) or words)


def _word_tokenizer(described: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json of kind WordPiece without special tokens: the teacher's own, or BERT's way to cut words."""
    settings = described["model"]
    if settings["type"] != "WordPiece" or settings["continuing_subword_prefix"] != PREFIX:
        plain = Tokenizer(models.WordPiece({UNKNOWN: 0}, unk_token=UNKNOWN))
        plain.normalizer = normalizers.BertNormalizer(lowercase=True)
        plain.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        described = json.loads(plain.to_str())
    described["model"] |= {"unk_token": UNKNOWN, "vocab": {UNKNOWN: 0} | described["model"]["vocab"]}
    special = {added["content"] for added in described["added_tokens"]}
    described["model"]["vocab"] = {token: n for token, n in described["model"]["vocab"].items() if token not in special}
    described["model"]["vocab"][UNKNOWN] = len(described["model"]["vocab"])
    return described | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}


def _count_words(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """Words as the tokenizer sees them, before it cuts them into pieces."""
    counts: Counter[str] = Counter()
    for text in texts:
        normal = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
        counts.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))
    return counts


def _known(own: Iterable[str]) -> list[str]:
    return [token for token in own if token != UNKNOWN and not UNUSED.fullmatch(token)]


def _pieces(own: Iterable[str], counts: Counter[str], most: int) -> list[str]:
    """Pieces of words beside every character: the teacher's, or where it has none the log's most frequent ones."""
    known = _known(own)
    characters = sorted({character for word in counts for character in word})
    single = [*characters, *(PREFIX + character for character in characters)]
    if known:
        return [*known, *single]
    found: Counter[str] = Counter()
    for word, count in counts.items():
        for size in PIECES:
            for start in range(len(word) - size + 1):
                found[(PREFIX if start else "") + word[start : start + size]] += count
    ranked = sorted(found, key=lambda piece: (-found[piece] * len(piece), piece))
    return [*single, *ranked[:most]]
