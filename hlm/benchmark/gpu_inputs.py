"""Random weights, made-up texts and random vectors: they stand in for models and data where only time counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from hlm.benchmark.random_weights import random_backbone, random_encoder
from hlm.training.batches import TokenTable
from hlm.vectors.store import VectorStore, write_store

WORDS = 4096  # distinct words of the made-up texts
SEED = 0


def made_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Reads made-up words: one token a word, and one that ends the text."""
    words = min(WORDS, vocab_size - 2)
    vocabulary = {"<pad>": 0, "<end>": 1} | {f"w{number}": number + 2 for number in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<end>")


def made_encoder(config: PretrainedConfig, dtype: str, device: str, limit: int | None) -> SentenceTransformer:
    """Random weights behind a tokenizer of made-up words."""
    fast = made_tokenizer(config.vocab_size)
    model = random_encoder(random_backbone(config, dtype, device=device), fast)
    model.max_seq_length = limit or 512
    return model


def made_texts(count: int, mean: float, longest: int, seed: int = SEED) -> list[str]:
    """Texts of made-up words: `mean` tokens about, one of them `longest`, none above; the end token counts."""
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.gamma(8.0, mean / 8.0, size=count).round().astype(int), 2, longest)
    lengths[count // 2] = longest
    words = generator.integers(16, size=(count, longest))
    return [" ".join(f"w{word}" for word in row[: length - 1]) for row, length in zip(words, lengths, strict=True)]


def token_table(model: SentenceTransformer, count: int, mean: float, longest: int) -> TokenTable:
    return TokenTable(model, made_texts(count, mean, longest))


def made_store(folder: str | Path, rows: int, dim: int) -> VectorStore:
    """A store of random unit vectors; the rows of 4096 ads again and again, for speed."""
    base = np.random.default_rng(SEED).standard_normal((min(rows, 4096), dim), dtype=np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    write_store(
        folder,
        lambda start, stop: ((str(row), "") for row in range(start, stop)),
        lambda texts: np.resize(base, (len(texts), dim)),
        dim=dim,
        encoder="random",
        source="random",
        n_rows=rows,
    )
    return VectorStore.open(folder)
