"""Fusion: one ranked list of each query, made from those of several retrievers.

Pure functions of runs (`hlm.evaluation.metrics.Run`). The same documents in another order of retrievers score the same
to the bit, so that ties break by document id alone, as everywhere (`hlm.evaluation.metrics.ranking`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from typing import Literal

import numpy as np

from hlm.artefacts import HlmError
from hlm.evaluation.metrics import Qrels, Run, mean, per_query, ranking

Normalisation = Literal["minmax", "zscore"]

RANK_CONSTANT = 60  # of Cormack, Clarke and Buettcher 2009


def reciprocal_rank_fusion(runs: Sequence[Run], *, constant: int = RANK_CONSTANT, depth: int | None = None) -> Run:
    """Sums 1 / (constant + rank) over the runs, ranks from 1 (Cormack, Clarke and Buettcher, SIGIR 2009).

    A document that a run lacks gets nothing from it.

    Args:
        runs: one or more, over the same queries.
        constant: the larger, the less the first ranks count.
        depth: documents that are kept of each query, the best; None: all.

    Raises:
        HlmError: no run, or runs over other queries.
    """
    _check_queries(runs)
    fused = {}
    for query in runs[0]:
        ids = _documents(runs, query)
        shares = np.zeros((len(ids), len(runs)))
        place = {document: row for row, document in enumerate(ids)}
        for column, run in enumerate(runs):
            for rank, document in enumerate(ranking(run[query]), start=1):
                shares[place[document], column] = 1 / (constant + rank)
        fused[query] = _best(ids, _total(shares), depth)
    return fused


def weighted_fusion(
    runs: Sequence[Run],
    weights: Sequence[float],
    *,
    normalisation: Normalisation = "minmax",
    depth: int | None = None,
) -> Run:
    """Sums the runs' normalised scores, each times its weight (Fox and Shaw, TREC 1993).

    Scores are normalised for each query and run: "minmax" to [0, 1], and to 1 where all are equal; "zscore" to mean 0
    and standard deviation 1, and to 0 where all are equal. A document that a run lacks gets the run's lowest: 0 with
    "minmax", the last one's with "zscore".

    Args:
        runs: one or more, over the same queries.
        weights: one for each run, finite, 0 or more, not all 0.
        depth: documents that are kept of each query, the best; None: all.

    Raises:
        HlmError: no run, runs over other queries, or weights that do not fit.
    """
    _check_queries(runs)
    check_weights(weights, len(runs))
    fused = {}
    for query in runs[0]:
        ids, scores = _normalised(runs, query, normalisation)
        fused[query] = _best(ids, _total(scores * np.asarray(weights, np.float64)), depth)
    return fused


def check_weights(weights: Sequence[float], runs: int) -> None:
    """Refuses weights that `weighted_fusion` cannot use.

    Raises:
        HlmError: says what was expected.
    """
    values = np.asarray(weights, np.float64)
    if values.shape != (runs,) or not np.isfinite(values).all() or values.min() < 0 or values.max() == 0:
        raise HlmError(
            f"fusion weights: expected {runs}, one for each system, 0 or more and not all 0, found {list(weights)}"
        )


def choose_weights(
    runs: Sequence[Run],
    qrels: Qrels,
    *,
    k: int = 10,
    steps: int = 10,
    normalisation: Normalisation = "minmax",
) -> tuple[list[float], float]:
    """The weights of the best mean nDCG@k among all that add up to 1 in equal steps. For queries to choose on, never
    those that are reported.

    Where several are best, the most even ones, and of these the first run's are the highest.

    Args:
        runs: two or more, over the same queries, those of `qrels` among them.
        qrels: judgements; queries without any do not count.
        steps: 10: weights 0, 0.1, ... 1.

    Returns:
        (weights, their nDCG@k)

    Raises:
        HlmError: as `weighted_fusion` and `hlm.evaluation.metrics.per_query`.
    """
    _check_queries(runs)
    parts = {query: _normalised(runs, query, normalisation) for query in runs[0] if query in qrels}
    best: tuple[float, float, tuple[int, ...]] | None = None
    for counts in _simplex(len(runs), steps):
        weights = np.array(counts) / steps
        run = {query: _best(ids, _total(scores * weights), k) for query, (ids, scores) in parts.items()}
        found = mean(per_query(run, qrels, k)[f"ndcg@{k}"])
        candidate = (found, -float(np.square(counts).sum()), counts)
        best = candidate if best is None else max(best, candidate)
    assert best is not None, "a simplex has points"
    return [count / steps for count in best[2]], best[0]


def _simplex(parts: int, steps: int) -> Iterator[tuple[int, ...]]:
    """All ways to share out `steps` among `parts`, 0 allowed: bars between stars."""
    for bars in combinations(range(steps + parts - 1), parts - 1):
        edges = (-1, *bars, steps + parts - 1)
        yield tuple(right - left - 1 for left, right in pairwise(edges))


def _check_queries(runs: Sequence[Run]) -> None:
    if not runs:
        raise HlmError("fusion: expected one run or more, found none")
    for run in runs[1:]:
        if run.keys() != runs[0].keys():
            raise HlmError(
                f"fusion: expected runs over the same queries, found {len(runs[0])} and {len(run)} with "
                f"{len(run.keys() & runs[0].keys())} in common; search with the same queries"
            )


def _documents(runs: Sequence[Run], query: str) -> list[str]:
    """Every document that a run found, by descending id: a stable sort of scores then leaves ties in this order."""
    return sorted(set().union(*(run[query] for run in runs)), reverse=True)


def _normalised(runs: Sequence[Run], query: str, how: Normalisation) -> tuple[list[str], np.ndarray]:
    """The documents of a query, and float64 (documents, runs) of their normalised scores."""
    ids = _documents(runs, query)
    columns = [np.zeros(0)]
    for run in runs:
        found = np.array([run[query].get(document, np.nan) for document in ids])
        present = found[~np.isnan(found)]
        if not len(present):
            columns.append(np.zeros(len(ids)))
            continue
        low, high = present.min(), present.max()
        if how == "minmax":
            scaled = np.where(found == high, 1.0, (found - low) / (high - low or 1))
            columns.append(np.where(np.isnan(found), 0.0, scaled))
        else:
            spread = present.std() if high > low else 0
            columns.append((np.where(np.isnan(found), low, found) - present.mean()) / (spread or 1))
            if not spread:
                columns[-1][:] = 0
    return ids, np.stack(columns[1:], axis=1)


def _total(shares: np.ndarray) -> np.ndarray:
    """The sum of each row of float64 (documents, runs), added from the smallest: the order of runs changes no bit."""
    total = np.zeros(len(shares))
    for column in np.sort(shares, axis=1).T:
        total += column
    return total


def _best(ids: list[str], scores: np.ndarray, depth: int | None) -> dict[str, float]:
    order = np.argsort(-scores, kind="stable")[:depth]
    return {ids[row]: float(scores[row]) for row in order}
