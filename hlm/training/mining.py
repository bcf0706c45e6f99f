"""Hard negatives: documents that a retriever ranks high for a query and that are probably no answers to it.

Positive-aware (NV-Retriever, arXiv 2407.15831, "TopK-PercPos"): a document that scores nearly as high as the known
positive is likely an unlabelled positive, so only those clearly below it are taken. The ranking is exact: every vector
of the store is read once, block by block, and no index is needed.

Scores are inner products of the vectors as they are; with L2-normalised vectors (`encode`, `VectorStore`) cosines.
Queries may be narrower than the store, as a smaller student's are: they meet the documents' first components,
L2-normalised again (Matryoshka).
Documents are row numbers of the store (int64), -1 is padding.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from sentence_transformers import SentenceTransformer
from torch import Tensor

from hlm.artefacts import HlmError
from hlm.progress import progress
from hlm.training.losses import id_mask, matryoshka
from hlm.vectors.store import VectorStore

# Queries scored at once: bounds the score matrix at _QUERIES x rows_per_block floats (256 MiB by default).
_QUERIES = 1024


def top_k_documents(
    query_vectors: np.ndarray,
    store: VectorStore,
    k: int,
    *,
    rows_per_block: int = 65536,
    device: str | torch.device = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """The k best documents of every query by exact search: scores (n, k) float32 and rows (n, k) int64, best first.

    query_vectors (n, dim) float32, dim up to the store's. Equal scores are ordered by row, so the result does not
    depend on `rows_per_block` (beyond the last bit of a product). Holds one block of documents and n x k results.

    Raises:
        HlmError: widths differ, a query is not finite, or k is not within 1..len(store).
    """
    queries = _checked_queries(query_vectors, store)
    if not 1 <= k <= len(store):
        raise HlmError(f"expected k within 1..{len(store)} (the documents in the store), found {k}")
    width = queries.shape[1]
    parts = [part.to(device) for part in queries.split(_QUERIES)]
    # The best so far stay on the device: copied to the host and sorted there, they would take longer than the products.
    best = [
        (part.new_empty(len(part), 0), torch.empty(len(part), 0, dtype=torch.long, device=device)) for part in parts
    ]
    count = -(-len(store) // rows_per_block)
    blocks = progress(store.iter_blocks(rows_per_block), what="search all documents", unit="block", total=count)
    for start, block in blocks:
        documents = torch.from_numpy(block[:, :width]).to(device)
        if width < store.dim:
            documents = matryoshka(documents, width)
        for number, part in enumerate(parts):
            scores, columns = _top(part @ documents.T, min(k, len(documents)))
            # What was found before has lower rows and stands first: a stable sort keeps ties in row order.
            scores = torch.cat([best[number][0], scores], dim=1)
            rows = torch.cat([best[number][1], columns + start], dim=1)
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            best[number] = scores[:, :k].clone(), rows.gather(1, order[:, :k])
    scores, rows = (torch.cat(found).cpu().numpy() for found in zip(*best, strict=True))
    return scores, rows


def shared_rows(count: int) -> np.ndarray:
    """Which of `count` queries this process searches for: int64 rows. Every process has whole parts of `_QUERIES`, so
    that each product has the shape, and gives the bits, that it has where one process does all."""
    state = PartialState()
    starts = range(state.process_index * _QUERIES, count, state.num_processes * _QUERIES)
    parts = [np.arange(start, min(start + _QUERIES, count)) for start in starts]
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def gather_rows(rows: np.ndarray, found: np.ndarray, count: int) -> np.ndarray:
    """What all processes found for their `shared_rows`, int64 (rows, k), as (count, k) on each of them."""
    whole = np.full((count, found.shape[1]), -1, dtype=np.int64)
    for part, values in gather_object([(rows, found)]):
        whole[part] = values
    return whole


def search_device(model: SentenceTransformer) -> torch.device:
    """Where `top_k_documents` is fastest: the model's GPU, else the CPU."""
    return model.device if model.device.type == "cuda" else torch.device("cpu")


def mine_hard_negatives(
    query_vectors: np.ndarray,
    positives: Sequence[Collection[int]],
    store: VectorStore,
    k: int,
    *,
    max_ratio: float = 0.95,
    skip_top: int = 0,
    depth: int = 100,
    exclude: Sequence[Collection[int]] | None = None,
    rows_per_block: int = 65536,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """The first k acceptable documents in every query's ranking -> (n, k) int64 rows, best first, padded with -1.

    Args:
        query_vectors: (n, dim) float32.
        positives: for each query the rows of its known positives, at least one. The lowest-scoring one sets the limit:
            a negative is below all of them. To mine for (query, positive) pairs, give one query row a pair and the
            query's other positives in `exclude`.
        k, max_ratio, skip_top: see `select_hard_negatives`.
        depth: how many documents of the ranking are looked at, positives included; a smaller store is looked at whole.
        exclude: for each query further rows that are never taken.

    Raises:
        HlmError: lengths differ, a query has no positive, a row is outside the store, or k, depth, skip_top or
            max_ratio make no sense.
    """
    queries = _checked_queries(query_vectors, store)
    if not 1 <= k <= depth - skip_top:
        raise HlmError(f"expected k within 1..depth - skip_top ({depth} - {skip_top}), found {k}; raise depth")
    limits = positive_scores(query_vectors, positives, store)
    excluded = positives if exclude is None else exclude
    if len(excluded) != len(queries):
        raise HlmError(f"expected a set of excluded rows for each of {len(queries)} queries, found {len(excluded)}")
    depth = min(depth, len(store))
    scores, rows = top_k_documents(query_vectors, store, depth, rows_per_block=rows_per_block, device=device)
    never = [{*known, *more} for known, more in zip(positives, excluded, strict=True)]
    return select_hard_negatives(scores, rows, limits, never, k, max_ratio=max_ratio, skip_top=skip_top)


def select_hard_negatives(
    scores: np.ndarray,
    rows: np.ndarray,
    limits: np.ndarray,
    never: Sequence[Collection[int]],
    k: int,
    *,
    max_ratio: float = 0.95,
    skip_top: int = 0,
) -> np.ndarray:
    """Hard negatives from a ranking that is already there -> (n, k) int64 rows in ranking order, padded with -1.

    A document is taken where score < p - (1 - max_ratio) x |p| with p the positive's score: max_ratio x p where p is
    positive, and still below p where it is negative.

    Args:
        scores, rows: (n, depth) float32 and int64, best first, from `top_k_documents`.
        limits: (n,) float32, from `positive_scores`.
        never: for each query the rows that are no negatives, its positives among them.
        max_ratio: math.inf takes all documents that are not in `never`.
        skip_top: how many of the best documents, those in `never` not counted, are passed over first.

    Raises:
        HlmError: shapes do not fit, or k, skip_top or max_ratio make no sense.
    """
    count = len(scores)
    if scores.ndim != 2 or scores.shape != rows.shape or limits.shape != (count,) or len(never) != count:
        raise HlmError(
            f"expected scores and rows of one shape (n, depth), n limits and n sets, found {scores.shape}, "
            f"{rows.shape}, {limits.shape} and {len(never)}"
        )
    if k < 1 or skip_top < 0 or not max_ratio > 0:
        raise HlmError(f"expected k >= 1, skip_top >= 0, max_ratio > 0, found {k}, {skip_top} and {max_ratio}")
    if max_ratio == math.inf:
        threshold = np.full(count, np.inf, dtype=np.float32)  # inf x |0| would be no number
    else:
        threshold = limits - (1 - max_ratio) * np.abs(limits)
    candidates = np.empty(scores.shape, dtype=bool)
    for start in range(0, count, _QUERIES):  # padded to the longest set: not for all queries at once
        part = slice(start, start + _QUERIES)
        known = id_mask(padded_rows(never[part]), torch.from_numpy(np.ascontiguousarray(rows[part])))
        candidates[part] = ~known.numpy()
    candidates &= np.cumsum(candidates, axis=1) > skip_top
    candidates &= scores < threshold[:, None]
    place = np.cumsum(candidates, axis=1) - 1
    query, column = np.nonzero(candidates & (place < k))
    taken = np.full((count, k), -1, dtype=np.int64)
    taken[query, place[query, column]] = rows[query, column]
    return taken


def positive_scores(query_vectors: np.ndarray, positives: Sequence[Collection[int]], store: VectorStore) -> np.ndarray:
    """The lowest score among each query's positives: (n,) float32.

    Raises:
        HlmError: lengths or widths differ, a query has no positive, or a row is outside the store.
    """
    queries = _checked_queries(query_vectors, store).numpy()
    if len(positives) != len(queries):
        raise HlmError(f"expected positives for each of {len(queries)} queries, found {len(positives)}")
    sizes = np.array([len(known) for known in positives], dtype=np.int64)
    if (sizes == 0).any():
        first = int(np.flatnonzero(sizes == 0)[0])
        raise HlmError(
            f"expected at least one positive a query, found {(sizes == 0).sum()} queries without (first: row {first}); "
            "leave queries without a positive out"
        )
    lowest = np.empty(len(queries), dtype=np.float32)
    for start in range(0, len(queries), _QUERIES):
        part = range(start, min(start + _QUERIES, len(queries)))
        documents = store.gather([row for query in part for row in positives[query]])
        owner = np.repeat(np.arange(start, part.stop), sizes[part.start : part.stop])
        products = np.einsum("nd,nd->n", queries[owner], _at_width(documents, queries.shape[1]).numpy())
        lowest[part.start : part.stop] = np.minimum.reduceat(products, np.searchsorted(owner, np.asarray(part)))
    return lowest


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top k of each row of `scores` (n, m), best first, ties by column."""
    values, columns = scores.topk(k, dim=1)
    last = values[:, -1:]
    # topk takes any of the columns that tie for its last place; where some were left out, take the lowest. The host
    # waits for the GPU here, once for 1,024 queries and a block: next to the product, nothing.
    crowded = ((scores >= last).sum(dim=1) > k).nonzero().squeeze(1)
    if len(crowded):
        part, last = scores[crowded], last[crowded]
        above, level = part > last, part == last
        room = k - above.sum(dim=1, keepdim=True)
        chosen = above | (level & (level.cumsum(dim=1) <= room))
        columns[crowded] = chosen.nonzero()[:, 1].view(-1, k)
    columns = columns.sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def padded_rows(sets: Sequence[Collection[int]]) -> Tensor:
    """One line a set, as long as the longest: int64 (n, longest), padded with -1."""
    padded = np.full((len(sets), max((len(rows) for rows in sets), default=0)), -1, dtype=np.int64)
    for line, rows in zip(padded, sets, strict=True):
        line[: len(rows)] = list(rows)
    return torch.from_numpy(padded)


def _at_width(documents: np.ndarray, width: int) -> Tensor:
    vectors = torch.from_numpy(documents)
    return vectors if width == documents.shape[1] else matryoshka(vectors, width)


def _checked_queries(query_vectors: np.ndarray, store: VectorStore) -> Tensor:
    if query_vectors.ndim != 2 or not 1 <= query_vectors.shape[1] <= store.dim:
        raise HlmError(
            f"expected query vectors of shape (n, {store.dim}) like the store's, or narrower, found "
            f"{query_vectors.shape}; encode the queries with the store's encoder or a student of it"
        )
    if not np.isfinite(query_vectors).all():
        raise HlmError("expected finite query vectors, found NaN or infinity; check the encoder's dtype")
    return torch.from_numpy(np.ascontiguousarray(query_vectors, dtype=np.float32))
