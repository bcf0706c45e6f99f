"""How many texts are longer than a model reads: the rest of them is lost without a trace in any loss."""

from __future__ import annotations

import logging

import numpy as np
from sentence_transformers import SentenceTransformer

from hlm.encoders.loading import prompt_of, tokenise

logger = logging.getLogger(__name__)

LOOKED_AT = 2000  # texts, evenly spread over the table
LEAST, MOST = 0.01, 0.5  # shares below which nothing is said, and from which it is a warning


def looked_at(rows: int) -> np.ndarray:
    """Row numbers (int64, ascending) of the texts to look at, of so many."""
    return np.linspace(0, rows - 1, min(rows, LOOKED_AT)).astype(np.int64)


def say_what_is_cut(model: SentenceTransformer, texts: list[str], *, role: str) -> None:
    """Logs which share of the texts has more tokens than the model's `max_seq_length`, and than twice and four times as
    many.

    Args:
        texts: a sample of all, see `looked_at`.
        role: "query" or "document": its prompt goes before each text and counts.
    """
    limit = model.max_seq_length
    if limit is None or not texts:
        return
    tokens = np.array([len(row) for row in tokenise(model, texts, prompt_of(model, role), limit=4 * limit + 1)])
    shares = [float((tokens > times * limit).mean()) for times in (1, 2, 4)]
    if shares[0] < LEAST:
        return
    many = shares[0] >= MOST
    logger.log(
        logging.WARNING if many else logging.INFO,
        "%.0f%% of %d %s looked at have more tokens than max_seq_length, %d, and their ends are not read (%.0f%% have "
        "more than %d, %.0f%% more than %d)%s",
        100 * shares[0],
        len(texts),
        {"query": "queries", "document": "ads"}[role],
        limit,
        100 * shares[1],
        2 * limit,
        100 * shares[2],
        4 * limit,
        ": a higher one may find more, and takes longer" if many else "",
    )
