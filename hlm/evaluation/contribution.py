"""What each retriever adds to an ensemble: the ensemble is fused with it and without it, and the two are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from hlm.evaluation.fusion import choose_weights, reciprocal_rank_fusion, weighted_fusion
from hlm.evaluation.interleaving import interleave
from hlm.evaluation.metrics import Qrels, Run, mean, per_query, ranking, ratio, uplift
from hlm.report_types import Contribution, FusionReport, OnlyFound
from hlm.steps import Fusion

T = TypeVar("T")


class Split(NamedTuple):
    """The queries of one split, searched by every system."""

    name: str
    runs: Mapping[str, Run]
    qrels: Qrels


class Scoring(NamedTuple):
    """How runs are compared; see `hlm.evaluation.metrics.per_query` and `ratio`."""

    k: int
    level: int
    incomplete: bool
    samples: int
    seed: int
    impressions: int  # simulated for each query


def compare_fusion(
    fusion: Fusion, reported: Split, dev: Split | None, depth: int, how: Scoring
) -> tuple[Run, FusionReport]:
    """Fuses the runs of a split's systems, and says what each of them adds.

    Args:
        dev: what weights are chosen on; None where none are chosen.
        depth: documents that the fused run keeps of each query.

    Returns:
        The fused run, and its part of the report.
    """
    run, weights, chosen = fuse(fusion, reported, dev, depth, how.k)
    weighted = fusion.method == "weighted"
    return run, {
        "systems": fusion.systems,
        "method": fusion.method,
        "normalisation": fusion.normalisation if weighted else None,
        "weights": weights,
        "weights_from": (dev.name if dev and fusion.weights is None else "given") if weighted else None,
        "chosen_ndcg": chosen,
        "members": _members(fusion, run, reported, dev, depth, how),
    }


def fuse(
    fusion: Fusion, reported: Split, dev: Split | None, depth: int, k: int
) -> tuple[Run, list[float] | None, float | None]:
    """The fused run, its weights, and their nDCG@k on `dev` where they were chosen there."""
    runs, weights, chosen = [reported.runs[name] for name in fusion.systems], fusion.weights, None
    if fusion.method == "rrf":
        return reciprocal_rank_fusion(runs, depth=depth), None, None
    if weights is None:
        assert dev is not None, "the settings are refused without a split to choose on"
        on_dev = [dev.runs[name] for name in fusion.systems]
        weights, chosen = choose_weights(on_dev, dev.qrels, k=k, normalisation=fusion.normalisation)
    return weighted_fusion(runs, weights, normalisation=fusion.normalisation, depth=depth), weights, chosen


def _members(
    fusion: Fusion, run: Run, reported: Split, dev: Split | None, depth: int, how: Scoring
) -> dict[str, Contribution]:
    qrels = reported.qrels
    draws: dict[str, Any] = {"samples": how.samples, "seed": how.seed}
    scored: dict[str, Any] = {"relevance_level": how.level, "incomplete": how.incomplete}
    scores = per_query(run, qrels, how.k, **scored)
    scores.pop(f"judged@{how.k}", None)  # how much is judged is no gain
    lists = {name: reported.runs[name] for name in fusion.systems}
    found = only_found(lists, qrels, level=how.level, k=how.k, **draws)
    members: dict[str, Contribution] = {}
    for place, name in enumerate(fusion.systems):
        systems, weights = _without(fusion.systems, place), fusion.weights and _without(fusion.weights, place)
        control, weights, _ = fuse(replace(fusion, systems=systems, weights=weights), reported, dev, depth, how.k)
        before = per_query(control, qrels, how.k, **scored)
        members[name] = {
            "weights_without": weights,
            "without": {metric: mean(values) for metric, values in before.items()},
            "uplift": {metric: uplift(values, before[metric], **draws) for metric, values in scores.items()},
            "only_found": found[name],
            "interleaving": interleave(control, run, qrels, k=how.k, impressions=how.impressions, **draws),
        }
    return members


def _without(values: list[T], place: int) -> list[T]:
    return values[:place] + values[place + 1 :]


def only_found(
    runs: Mapping[str, Run], qrels: Qrels, *, level: int, k: int = 10, samples: int = 10_000, seed: int = 0
) -> dict[str, OnlyFound]:
    """Of the relevant documents that any retriever has among its first `k`, the share that only this one has.

    Counted over all queries together, as CLOVER-Unity does (arXiv 2209.05861); the interval draws queries.
    """
    by_query: dict[str, dict[str, set[str]]] = {}
    for query, judged in qrels.items():
        by_query[query] = {
            name: {d for d in ranking(run.get(query, {}), k) if judged.get(d, 0) >= level} for name, run in runs.items()
        }
    found = {query: float(len(set().union(*lists.values()))) for query, lists in by_query.items()}
    result: dict[str, OnlyFound] = {}
    for name in runs:
        only = {
            query: float(len(lists[name] - set().union(*(ids for other, ids in lists.items() if other != name))))
            for query, lists in by_query.items()
        }
        names = ("ads that only one retriever found", "relevant ads that were found")
        result[name] = {
            "only": int(sum(only.values())),
            "found": int(sum(found.values())),
            "share": ratio(only, found, samples=samples, seed=seed, names=names, scores="are"),
        }
    return result
