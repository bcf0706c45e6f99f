"""How much of exact search an index finds: its recall against the exact neighbours of a sample of queries."""

from __future__ import annotations

import logging
from typing import Any

import faiss
import numpy as np
from faiss.contrib.exhaustive_search import knn_ground_truth

from hlm.indexes.index import Index
from hlm.indexes.index_parts import checked_queries, normalised
from hlm.progress import progress
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)
logging.getLogger("faiss.contrib.exhaustive_search").setLevel(logging.WARNING)

ROWS_PER_BLOCK = 65_536
SAMPLE = 1000


def nearest(store: VectorStore, queries: np.ndarray, k: int) -> tuple[np.ndarray, list[list[str]]]:
    """The `k` documents with the largest inner products, read block by block from the store.

    Args:
        queries: float32 (n, dim), L2-normalised; narrower than the store, they are compared with its first components,
            normalised again.
        k: at most as many as there are come back.

    Returns:
        scores: float32 (n, k), the best first; ids: n lists.

    Raises:
        HlmError: queries that are not finite or not normalised.
    """
    queries = checked_queries(queries, queries.shape[1])
    total = -(-len(store) // ROWS_PER_BLOCK)
    blocks = progress(store.iter_blocks(ROWS_PER_BLOCK), what="exact neighbours", unit="block", total=total)
    vectors = (normalised(block, queries.shape[1], first_row=start) for start, block in blocks)
    scores, rows = knn_ground_truth(queries, vectors, min(k, len(store)), faiss.METRIC_INNER_PRODUCT)
    return scores, np.array(store.ids_of(rows.ravel()), dtype=object).reshape(rows.shape).tolist()


def exact_neighbours(store: VectorStore, queries: np.ndarray, k: int) -> list[list[str]]:
    """The ids of `nearest`."""
    return nearest(store, queries, k)[1]


def recalls(found: list[list[str]], exact: list[list[str]]) -> np.ndarray:
    """float64 (n,), of each query the share of its exact neighbours that were found. Ads of equal vectors are not told
    apart: of two at the last place one counts as missed where the other was found."""
    return np.array([len(set(mine) & set(best)) / len(best) for mine, best in zip(found, exact, strict=True)])


def measured(index: Index, store: VectorStore, queries: np.ndarray, k: int, of: str) -> dict[str, Any]:
    """What an index's manifest says of its recall, which is logged too.

    Args:
        queries: float32 (n, dim), L2-normalised.
        of: what the queries are, in words.

    Returns:
        {"recall": the mean, "k", "queries": how many, "of"}.
    """
    found = index.search(queries, k)[1]
    recall = float(recalls(found, exact_neighbours(store, queries, k)).mean())  # type: ignore[arg-type]
    logger.info("%s finds %.4f of the %d exact neighbours of %d %s", index.factory, recall, k, len(queries), of)
    return {"recall": recall, "k": k, "queries": len(queries), "of": of}


def sample_of(store: VectorStore, seed: int, *, rows: int = SAMPLE, dim: int | None = None) -> np.ndarray:
    """float32 (at most `rows`, dim), vectors of a store drawn without replacement, normalised."""
    chosen = np.arange(len(store))
    if len(store) > rows:
        chosen = np.sort(np.random.default_rng(seed).choice(len(store), rows, replace=False))
    return normalised(store.gather(chosen), dim or store.dim, first_row=0)
