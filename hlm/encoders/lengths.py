"""How many texts are longer than a model reads: the rest of them is lost without a trace in any loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import numpy as np
from sentence_transformers import SentenceTransformer

from hlm.encoders.loading import prompt_of, tokenise

logger = logging.getLogger(__name__)

Rows = Callable[[int, int], Iterable[tuple[str, str]]]
LOOKED_AT, BLOCK = 2000, 100  # texts in all, and one after the other
LEAST, MOST = 0.01, 0.5  # shares below which nothing is said, and from which it is a warning


def looked_at(rows: int) -> list[slice]:
    """Where the texts to look at lie among so many: all of them, or blocks evenly spread."""
    if rows <= LOOKED_AT:
        return [slice(0, rows)]
    starts = np.linspace(0, rows - BLOCK, LOOKED_AT // BLOCK).astype(int).tolist()
    return [slice(start, start + BLOCK) for start in starts]


def say_what_is_cut(model: SentenceTransformer, rows: Rows, count: int, *, role: str) -> None:
    """Logs which share of `count` texts has more tokens than the model's `max_seq_length`, than twice, and than four
    times as many.

    Args:
        rows: (start, stop) -> (id, text), as `write_store` takes it; some blocks of all are read.
        role: "query" or "document": its prompt goes before each text and counts.
    """
    limit = model.max_seq_length
    if limit is None or not count:
        return
    texts = [text for block in looked_at(count) for _, text in rows(block.start, block.stop)]
    tokens = np.array([len(row) for row in tokenise(model, texts, prompt_of(model, role), limit=4 * limit + 1)])
    shares = [float((tokens > times * limit).mean()) for times in (1, 2, 4)]
    if shares[0] < LEAST:
        return
    many = shares[0] >= MOST
    logger.log(
        logging.WARNING if many else logging.INFO,
        "%.0f%% of %d %s looked at have more tokens than max_seq_length, %d, and their %s are not read (%.0f%% "
        "have more than %d, %.0f%% more than %d)%s",
        100 * shares[0],
        len(texts),
        {"query": "queries", "document": "ads"}[role],
        limit,
        "beginnings" if model.tokenizer.truncation_side == "left" else "ends",
        100 * shares[1],
        2 * limit,
        100 * shares[2],
        4 * limit,
        ": a higher one may find more, and takes longer" if many else "",
    )
