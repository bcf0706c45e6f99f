"""The module of a static student: it looks up a vector for each token and averages them.

It is sentence-transformers' `StaticEmbedding`: a saved folder loads there without code of its own. No layer is left, so
it cannot tell "shoe without laces" from "laces without shoe"; it is as fast as its tokenizer.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from hlm.artefacts import HlmError
from hlm.encoders.folder import MODULES, EncoderFolder


class StaticEmbedding(modules.StaticEmbedding):
    """The stock module, which reads padded rows of tokens as every other encoder here does, and its own bags too.

    Its tokenizer adds no special tokens, and texts are never cut.
    """

    def __init__(self, tokenizer: Tokenizer, weights: torch.Tensor) -> None:
        super().__init__(tokenizer, embedding_weights=weights)
        tokenizer.no_truncation()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    @property
    def max_seq_length(self) -> None:
        return None

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        if value is not None:
            raise HlmError(f"max_seq_length: expected none of a static student, which cuts no text, found {value}")

    def preprocess(self, inputs: list[str], prompt: str | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        ids = self.tokenizer([(prompt or "") + text for text in inputs], padding=False)["input_ids"]
        rows = np.zeros((len(ids), max(map(len, ids), default=0)), np.int64)
        mask = np.zeros_like(rows)
        for row, tokens in enumerate(ids):
            rows[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        return {"input_ids": torch.from_numpy(rows), "attention_mask": torch.from_numpy(mask)}

    def forward(self, features: dict[str, torch.Tensor], **kwargs: Any) -> dict[str, torch.Tensor]:
        present = features["attention_mask"].to(self.embedding.weight.dtype)[:, None, :]
        states = torch.nn.functional.embedding(features["input_ids"], self.embedding.weight)
        count = present.sum(dim=-1).clamp(min=1)
        features["token_embeddings"] = states
        features["sentence_embedding"] = (present @ states).squeeze(1) / count
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        stock = copy.copy(self)
        stock.__dict__["tokenizer"] = Tokenizer.from_str(_plain(self.tokenizer.backend_tokenizer))
        modules.StaticEmbedding.save(stock, output_path, *args, **kwargs)

    @classmethod
    def load(cls, *args: Any, **kwargs: Any) -> StaticEmbedding:
        return of_stock(modules.StaticEmbedding.load(*args, **kwargs))


def _plain(tokenizer: Tokenizer) -> str:
    described = json.loads(tokenizer.to_str())
    described["truncation"] = described["padding"] = None  # these two change with every call of the tokenizer
    return json.dumps(described, ensure_ascii=False)


def of_stock(module: modules.StaticEmbedding) -> StaticEmbedding:
    """The same module, reading padded rows."""
    if isinstance(module, StaticEmbedding):
        return module
    described = json.loads(module.tokenizer.to_str())
    described["post_processor"] = None  # the stock module adds no special tokens either
    return StaticEmbedding(Tokenizer.from_str(json.dumps(described)), module.embedding.weight.detach())


def is_static(model: SentenceTransformer) -> bool:
    return isinstance(model[0], modules.StaticEmbedding)


def is_static_folder(folder: str | Path) -> bool:
    """Whether a saved encoder is static, read from its list of modules."""
    return (Path(folder) / MODULES).is_file() and EncoderFolder(folder).is_static()
