"""What searchers see on average: each query weighs as often as it was typed."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from hlm.evaluation.metrics import Scores, mean, recovery
from hlm.report_types import ByCount, Report


def weigh(report: Report, scores: pa.Table, counts: Mapping[str, float], *, samples: int, seed: int) -> ByCount:
    """The report's means and recoveries over searches instead of queries.

    A ratio of weighted means is one of means of weighted scores, so that the bootstrap draws queries as before, with
    their weights.

    Args:
        scores: the table of scores by system and query that comes with the report.
        counts: of every query.
    """
    total = sum(counts[query] for query in counts)
    weights = {query: count * len(counts) / total for query, count in counts.items()}  # their mean is 1
    weighted: dict[str, dict[str, Scores]] = {}
    for row in scores.to_pylist():
        system = weighted.setdefault(row.pop("system"), {})
        query = row.pop("query_id")
        for metric, value in row.items():
            if value is not None:
                system.setdefault(metric, {})[query] = weights[query] * value
    kept = {
        name: {
            metric: recovery(values, weighted["teacher"][metric], samples=samples, seed=seed)
            for metric, values in weighted[name].items()
            if metric in weighted["teacher"] and not metric.startswith("judged@")  # a ratio of it is no recovery
        }
        for name in report["recovery_by_system"]
    }
    means = {name: {metric: mean(values) for metric, values in found.items()} for name, found in weighted.items()}
    return {"searches": round(total), "systems": means, "recovery_by_system": kept}


def lines(report: Report) -> list[str]:
    """What `format_table` adds of it."""
    if "by_count" not in report:
        return []
    found, metric = report["by_count"], f"ndcg@{report['k']}"
    text = [f"each query weighed by its count, {found['searches']:,} searches:"]
    for name, values in found["systems"].items():
        kept = found["recovery_by_system"].get(name, {}).get(metric)
        bounds = kept["ci95"] if kept else None
        told = "" if not kept or kept["value"] is None else f", recovery {kept['value']:.1%}"
        told += f" [{bounds[0]:.1%}, {bounds[1]:.1%}]" if bounds else ""
        text.append(f"  {name}: {metric} {values[metric]:.4f}{told}")
    return ["", *text]
