"""Searching FAISS for the rows of a selection, so that every list is full and holds the right rows.

FAISS's own filters let a search walk its usual cells or its usual part of the graph and drop what is not selected.
Where few rows are selected, or those far from the query, that leaves short lists and lists of the wrong rows. Here

- few rows are scored one by one,
- an IVF is searched in as many of the nearest cells as hold enough selected rows, and
- a graph is asked for so many neighbours that enough of them should be selected. Where they are not, the filter is far
  from the query, and all selected rows are scored.
"""

from __future__ import annotations

import math

import faiss
import numpy as np

from hlm.indexes import faiss_parts
from hlm.indexes.filters import Selection

# Measured at 384 dimensions and 70,000 rows on one thread: scoring a selected row takes as long as passing eight rows
# in the cells of an IVF, and a fiftieth of what fetching one more row from a graph takes.
ROWS_PASSED, ROWS_FETCHED = 8, 50
# Measured at a million rows of 384 values in float16: up to a tenth of the rows, copying their codes takes less than
# asking each row whether it is selected; a third as long for 1%.
ROWS_ASKED, ROWS_AT_ONCE = 10, 2048
# An IVF scores this many times the selected rows that an unfiltered search scores of all rows, and refines as many
# times the candidates: far from the query, neither centroids nor codes tell rows apart as well as near it.
MORE_ROWS = 4


def search_selected(
    index: faiss.Index, queries: np.ndarray, k: int, chosen: Selection, options: dict[str, float | None]
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` selected rows with the largest inner products.

    Args:
        queries: float32 (n, dim).
        k: at most `chosen.count`.
        options: nprobe, ef_search and k_factor of the unfiltered search.

    Returns:
        scores: float32 (n, k), descending.
        rows: int64 (n, k); none is -1.
    """
    index = faiss.downcast_index(index)
    storage = _storage(index)
    if storage is index:
        return _scored(index, queries, k, chosen)
    ivf = next((part for part in faiss_parts.parts(index) if faiss_parts.is_ivf(part)), None)
    few = index.ntotal / ROWS_PASSED if ivf is not None else ROWS_FETCHED * _fetch(index, k, chosen)
    if storage is not None and chosen.count <= few:
        return _scored(storage, queries, k, chosen)
    if ivf is not None:
        return _in_cells(index, ivf, queries, k, chosen, options)
    return _fetched(index, storage, queries, k, chosen, options)


def _storage(index: faiss.Index) -> faiss.Index | None:
    """The part that an index takes its final scores from, where it has one that gives the vectors of any rows."""
    if isinstance(index, faiss.IndexRefine):
        index = faiss.downcast_index(index.refine_index)
    elif isinstance(index, faiss.IndexHNSW):
        index = faiss.downcast_index(index.storage)
    return index if isinstance(index, faiss.IndexFlat | faiss.IndexScalarQuantizer) else None


def _scored(storage: faiss.Index, queries: np.ndarray, k: int, chosen: Selection) -> tuple[np.ndarray, np.ndarray]:
    """The best of all selected rows, each scored."""
    if isinstance(storage, faiss.IndexFlat):
        return storage.search(queries, k, params=faiss.SearchParameters(sel=faiss.IDSelectorArray(chosen.rows)))
    if chosen.count * ROWS_ASKED > storage.ntotal:
        return storage.search(queries, k, params=faiss.SearchParameters(sel=faiss.IDSelectorBitmap(chosen.bits)))
    return _scored_apart(storage, queries, k, chosen)


def _scored_apart(
    storage: faiss.Index, queries: np.ndarray, k: int, chosen: Selection
) -> tuple[np.ndarray, np.ndarray]:
    """The same, where FAISS would ask every row of codes whether it is selected: indexes of the selected ones alone ask
    none. Each is small enough to stay in the processor's cache."""
    codes = faiss.rev_swig_ptr(storage.codes.data(), storage.ntotal * storage.code_size)
    codes = codes.reshape(storage.ntotal, storage.code_size)
    some = faiss.IndexScalarQuantizer(storage.d, storage.sq.qtype, storage.metric_type)
    faiss.copy_array_to_vector(faiss.vector_to_array(storage.sq.trained), some.sq.trained)
    some.is_trained = True
    best = faiss.ResultHeap(len(queries), k, keep_max=True)
    for start in range(0, chosen.count, ROWS_AT_ONCE):
        rows = chosen.rows[start : start + ROWS_AT_ONCE]
        some.reset()
        some.add_sa_codes(codes[rows])
        scores, places = some.search(queries, min(k, len(rows)))
        best.add_result(scores, rows[places])
    best.finalize()
    return best.D, best.I


def _in_cells(
    index: faiss.Index,
    ivf: faiss.Index,
    queries: np.ndarray,
    k: int,
    chosen: Selection,
    options: dict[str, float | None],
) -> tuple[np.ndarray, np.ndarray]:
    """Searches as many cells as the query that needs the most of them does."""
    usual = int(options["nprobe"] or 1)
    if options["k_factor"]:
        options = options | {"k_factor": min(MORE_ROWS * options["k_factor"], index.ntotal / k)}
    wanted = max(MORE_ROWS * usual / ivf.nlist * index.ntotal, 2 * k * (options["k_factor"] or 1))
    nprobe = max(usual, _cells_with(wanted, index, ivf, queries, chosen)) if wanted < chosen.count else ivf.nlist
    while True:
        parameters = faiss_parts.parameters(index, options | {"nprobe": nprobe}, faiss.IDSelectorBitmap(chosen.bits))
        scores, rows = index.search(queries, k, params=parameters)
        if nprobe == ivf.nlist or (rows >= 0).all():
            return scores, rows
        nprobe = ivf.nlist


def _cells_with(wanted: float, index: faiss.Index, ivf: faiss.Index, queries: np.ndarray, chosen: Selection) -> int:
    """How many of the nearest cells hold so many selected rows, for the query that needs the most cells."""
    held, inner, cells = _selected_in(ivf, chosen), queries, min(ivf.nlist, 64)
    for transform in _before(index):
        inner = transform.apply(inner)
    while True:
        nearest = ivf.quantizer.search(inner, cells)[1]  # -1 where a graph over the cells found no more
        reached = np.cumsum(np.where(nearest >= 0, held[nearest], 0), axis=1) >= wanted
        if reached[:, -1].all():
            return int(reached.argmax(axis=1).max()) + 1
        if cells == ivf.nlist:
            return cells
        cells = min(ivf.nlist, 4 * cells)


def _before(index: faiss.Index) -> list[faiss.VectorTransform]:
    """The transforms that a query goes through before it meets the cells."""
    found = []
    for part in faiss_parts.parts(index):
        if isinstance(part, faiss.IndexPreTransform):
            found += [faiss.downcast_VectorTransform(part.chain.at(place)) for place in range(part.chain.size())]
        if faiss_parts.is_ivf(part):
            break
    return found


def _selected_in(ivf: faiss.Index, chosen: Selection) -> np.ndarray:
    """How many selected rows each cell holds; counted once for a selection."""
    if chosen.in_cells is None:
        lists, counts = ivf.invlists, np.zeros(ivf.nlist, dtype=np.int64)
        for cell in range(ivf.nlist):
            size = lists.list_size(cell)
            if size:
                counts[cell] = np.count_nonzero(chosen.mask[faiss.rev_swig_ptr(lists.get_ids(cell), size)])
        chosen.in_cells = counts
    return chosen.in_cells


def _fetched(
    index: faiss.Index,
    storage: faiss.Index | None,
    queries: np.ndarray,
    k: int,
    chosen: Selection,
    options: dict[str, float | None],
) -> tuple[np.ndarray, np.ndarray]:
    """The selected ones among the nearest rows. Where these are too few, the filter is far from the query: all selected
    rows are scored, or without vectors to score, more rows are fetched."""
    scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    left, fetch = np.arange(len(queries)), _fetch(index, k, chosen)
    while len(left):
        wider = dict(options)
        if options["ef_search"]:
            wider["ef_search"] = max(options["ef_search"], fetch)
        if options["k_factor"]:
            wider["k_factor"] = min(options["k_factor"], index.ntotal / fetch)
        found, near = index.search(queries[left], fetch, params=faiss_parts.parameters(index, wider))
        kept = chosen.mask[near] & (near >= 0)
        enough = kept.sum(axis=1) >= k
        order = np.argsort(~kept, axis=1, kind="stable")[:, :k]
        for into, values in ((scores, found), (rows, near)):
            into[left[enough]] = np.take_along_axis(values, order, 1)[enough]
        left = left[~enough]
        if len(left) and storage is not None:
            scores[left], rows[left] = _scored(storage, queries[left], k, chosen)
            break
        fetch = min(index.ntotal, 4 * fetch)
    return scores, rows


def _fetch(index: faiss.Index, k: int, chosen: Selection) -> int:
    """How many rows to fetch so that `k` of them are selected, where the filter has nothing to do with the query."""
    return min(index.ntotal, math.ceil(2 * k * index.ntotal / chosen.count))
