"""A least score from which ads are shown: ads are shown only where they fit, so a score must say whether they do.

It is chosen on queries that are not reported. Only scores that mean the same for every query can be cut this way:
cosines can, and so can BM25's to a degree; fused scores are made query by query and cannot.
"""

from __future__ import annotations

import numpy as np

from hlm.artefacts import HlmError
from hlm.evaluation.metrics import Qrels, Run, Scores, mean, ranking, ratio
from hlm.report_types import AtThreshold, Threshold


def choose_threshold(
    run: Run, qrels: Qrels, precision: float, *, level: int, k: int = 10, judged_only: bool = False
) -> tuple[float | None, float]:
    """The lowest score at which a stated share of the shown ads is relevant, over the first `k` of all queries.

    Args:
        precision: above 0, at most 1.
        level: the lowest relevant grade.
        judged_only: leave out ads without a judgement; otherwise they count as not relevant.

    Returns:
        (score, or None where no score keeps the precision; the precision there, or the best there is)

    Raises:
        HlmError: a precision out of bounds.
    """
    if not 0 < precision <= 1:
        raise HlmError(f"shown_precision: expected a share above 0 and at most 1, such as 0.9, found {precision}")
    candidates = [pair for pairs in _first(run, qrels, k, level, judged_only).values() for pair in pairs]
    if not candidates:
        return None, 0.0
    scores, relevant = (np.array(column, np.float64) for column in zip(*candidates, strict=True))
    order = np.argsort(-scores, kind="stable")
    scores, relevant = scores[order], relevant[order]
    kept = np.cumsum(relevant) / np.arange(1, len(relevant) + 1)
    # Ads of equal scores are shown together: only the last of them says what is shown.
    last = np.append(scores[1:] != scores[:-1], True)
    enough = np.flatnonzero(last & (kept >= precision))
    if not len(enough):
        return None, float(kept[last].max())
    return float(scores[enough[-1]]), float(kept[enough[-1]])


def at_threshold(
    run: Run,
    qrels: Qrels,
    threshold: float,
    *,
    level: int,
    k: int = 10,
    judged_only: bool = False,
    samples: int = 10_000,
    seed: int = 0,
) -> AtThreshold:
    """What is shown of each query's first `k` where an ad must score `threshold` or more; arguments as in
    `choose_threshold`, the interval as in `hlm.evaluation.metrics.ratio`."""
    shown: Scores = {}
    relevant: Scores = {}
    before = 0
    for query, pairs in _first(run, qrels, k, level, judged_only).items():
        over = [is_relevant for score, is_relevant in pairs if score >= threshold]
        shown[query], relevant[query] = len(over), sum(over)
        before += sum(is_relevant for _, is_relevant in pairs)
    names = ("relevant shown ads", "shown ads")
    return {
        "precision": ratio(relevant, shown, samples=samples, seed=seed, names=names, scores="are"),
        "coverage": mean({query: float(count > 0) for query, count in shown.items()}),
        "kept": sum(relevant.values()) / before if before else None,
        "shown_per_query": mean(shown),
    }


def calibrate(
    chosen_on: tuple[Run, Qrels],
    reported: tuple[Run, Qrels],
    precision: float,
    *,
    level: int,
    k: int = 10,
    judged_only: bool = False,
    samples: int = 10_000,
    seed: int = 0,
) -> Threshold:
    """Chooses a threshold on one split, and says what it keeps there and on another."""
    threshold, best = choose_threshold(*chosen_on, precision, level=level, k=k, judged_only=judged_only)
    if threshold is None:
        return {"threshold": None, "reason": f"no least score keeps {precision:.0%}: the best is {best:.1%}"}
    there, here = (
        at_threshold(*side, threshold, level=level, k=k, judged_only=judged_only, samples=samples, seed=seed)
        for side in (chosen_on, reported)
    )
    return {"threshold": threshold, "chosen_on": there, "reported": here}


def _first(run: Run, qrels: Qrels, k: int, level: int, judged_only: bool) -> dict[str, list[tuple[float, bool]]]:
    """Query -> (score, whether it is relevant) of its first `k` ads."""
    return {
        query: [
            (run[query][document], judged.get(document, 0) >= level)
            for document in ranking(run.get(query, {}), k)
            if document in judged or not judged_only
        ]
        for query, judged in qrels.items()
    }
