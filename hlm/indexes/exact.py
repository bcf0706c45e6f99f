"""Exact search over a store: by an index in memory where it fits there, else block by block from the store."""

from __future__ import annotations

import logging

import numpy as np

from hlm.indexes.faiss_index import AdIndex
from hlm.indexes.recall import nearest
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)
MOST_BYTES = 4 * 2**30  # of an index in memory


class StoreSearch:
    """Searches all vectors of a store, or their first components normalised again; reads the store in every search.

    Attributes:
        store: the vectors.
        dim: width of the queries.
    """

    def __init__(self, store: VectorStore, dim: int) -> None:
        self.store, self.dim = store, dim

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, list[list[str]]]:
        """As `hlm.indexes.index.Index.search`, of float32 (n, dim) queries."""
        return nearest(self.store, queries, k)


def exact_search(store: VectorStore, dim: int) -> AdIndex | StoreSearch:
    """What finds the exact neighbours among the ads' first `dim` components: in memory up to `MOST_BYTES`."""
    if 4 * len(store) * dim <= MOST_BYTES:
        return AdIndex.build(store, dim=dim)
    logger.info("%s: %d ads, %d wide, are searched from the disk", store.folder, len(store), dim)
    return StoreSearch(store, dim)
