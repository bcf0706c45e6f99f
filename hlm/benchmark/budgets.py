"""Budgets as a gate: what a system must keep to, checked against a latency report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from hlm.artefacts import HlmError
from hlm.report_types import CheckedBudget, LatencyReport, MeasuredSystem
from hlm.settings import closest

INCONCLUSIVE = 3  # exit status; 2 is bad input's
# Budget -> where its figure stands in a system's entry, whether the budget is the most or the least allowed, and which
# measurement of time the figure rests on; "" where the load of other processes does not change it.
BUDGETS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "p50_ms": (("latency_ms", "all", "p50"), "at most", "latency"),
    "p95_ms": (("latency_ms", "all", "p95"), "at most", "latency"),
    "p99_ms": (("latency_ms", "all", "p99"), "at most", "latency"),
    # Of a system with an index, from text to ads.
    "e2e_p50_ms": (("latency_ms", "all", "p50"), "at most", "latency"),
    "e2e_p95_ms": (("latency_ms", "all", "p95"), "at most", "latency"),
    "e2e_p99_ms": (("latency_ms", "all", "p99"), "at most", "latency"),
    "e2e_recall": (("index", "recall"), "at least", ""),
    "queries_per_s": (("best_queries_per_s",), "at least", "throughput"),
    "speedup_p50": (("ratio", "p50"), "at least", "latency"),
    "speedup_p95": (("ratio", "p95"), "at least", "latency"),
    "speedup_p99": (("ratio", "p99"), "at least", "latency"),
    "speedup_throughput": (("ratio", "throughput"), "at least", "throughput"),
    # Over the first way that model runs.
    "same_model_speedup_p50": (("agreement", "ratio", "p50"), "at least", "latency"),
    "over_floor": (("floor", "over"), "at most", "latency"),
    "gemm_share": (("floor", "gemm_share"), "at least", "throughput"),
    "cold_start_s": (("cold_start", "total_s"), "at most", "cold start"),
    "peak_memory_mib": (("cold_start", "peak_memory_mib"), "at most", ""),
    "ndcg": (("quality", "ndcg"), "at least", ""),
    "recovery": (("quality", "recovery"), "at least", ""),
    "overlap": (("quality", "overlap"), "at least", ""),
    "agreement": (("agreement", "overlap"), "at least", ""),
    "min_cosine": (("agreement", "min_cosine"), "at least", ""),
}


def read_budgets(budgets: Mapping[str, float], systems: Sequence[str], candidate: str) -> list[tuple[str, str, float]]:
    """(system, budget, wanted) of each; `SYSTEM.budget` is that system's, a bare name is the candidate's.

    Raises:
        HlmError: an unknown budget (names the closest) or system.
    """
    found = []
    for given, wanted in budgets.items():
        system, _, name = given.rpartition(".")
        if system and system not in systems:
            raise HlmError(f"budgets: '{given}': expected a system among {', '.join(systems)}, found '{system}'")
        if name not in BUDGETS:
            hint = closest(name, BUDGETS, cutoff=0.4)
            raise HlmError(f"budgets: expected one of {', '.join(BUDGETS)}, found '{name}'{hint}")
        found.append((system or candidate, name, wanted))
    return found


def check_budgets(report: LatencyReport, budgets: Sequence[tuple[str, str, float]]) -> list[CheckedBudget]:
    """Each budget with the figure that was found for it.

    Args:
        report: of recipes/benchmark.py: its "systems", "reference", "settings" and, for floors, "rates".

    Returns:
        [{"system", "budget", "wanted", "bound": "at most" or "at least", "found": a number or None, "passed"}].
        "passed" is None, and "reason" says why, where the budget can be called neither kept nor broken: there is no
        such figure, or it was measured while other processes took the CPUs, without one clean sample.
    """
    checked = []
    for system, name, wanted in budgets:
        path, bound, _ = BUDGETS[name]
        found: Any = report["systems"][system]
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        entry: CheckedBudget = {
            "system": system,
            "budget": name,
            "wanted": wanted,
            "bound": bound,
            "found": found,
            "passed": None,
        }
        if found is None:
            quality = report["systems"][system].get("quality", {})
            reason = quality.get("recovery_reason") if name == "recovery" else None
            entry["reason"] = reason or "there is no such figure"
        elif crowded := _without_a_clean_sample(report, system, name):
            entry["reason"] = (
                f"other processes took more than {report['settings']['max_other_load']:.0%} of the CPUs whenever "
                f"{' and '.join(crowded)} was measured; measure again on an idle machine"
            )
        else:
            entry["passed"] = bool(found <= wanted if bound == "at most" else found >= wanted)
        checked.append(entry)
    return checked


def _without_a_clean_sample(report: LatencyReport, system: str, budget: str) -> list[str]:
    """The measurements behind a budget's figure of which no sample is clean."""
    path, _, measured = BUDGETS[budget]
    systems = report["systems"]
    names = [system]
    if "ratio" in path:
        names.append(systems[system]["agreement"]["with"] if path[0] == "agreement" else report["reference"])
    crowded = [f"the {measured} of {name}" for name in dict.fromkeys(names) if _over(systems[name], measured) == "all"]
    rates = report.get("rates")
    if path[0] == "floor" and rates and (rates["other_load"] or 0) > report["settings"]["max_other_load"]:
        crowded.append("the rate of the machine")
    return crowded


def _over(entry: MeasuredSystem, measured: str) -> str | None:
    """What a system's figure rests on: "clean" samples, or "all" where there is no clean one."""
    if measured == "latency":
        return entry["latency_ms"]["all"]["over"]
    if measured == "throughput":
        return entry["throughput"][str(entry["best_batch_size"])]["over"]
    return entry["cold_start"]["over"] if measured == "cold start" else None


def gate(checked: Sequence[CheckedBudget], out: TextIO) -> int:
    """Writes a line to `out` for each budget that is not kept. Returns the exit status: 0 where all are, 1 where one is
    broken, `INCONCLUSIVE` where none is and one can be called neither."""
    failed, undecided = failures(checked), inconclusive(checked)
    for line in failed:
        print(f"budget failed: {line}", file=out)
    for line in undecided:
        print(f"budget inconclusive: {line}", file=out)
    return 1 if failed else INCONCLUSIVE if undecided else 0


def failures(checked: Sequence[CheckedBudget]) -> list[str]:
    """A line for each budget that was not kept: the system, the budget, what was wanted and what was found."""
    return [_line(budget) for budget in checked if budget["passed"] is False]


def inconclusive(checked: Sequence[CheckedBudget]) -> list[str]:
    """As `failures`, for each budget that can be called neither kept nor broken, with the reason."""
    return [f"{_line(budget)}: {budget['reason']}" for budget in checked if budget["passed"] is None]


def _line(budget: Mapping[str, Any]) -> str:
    found = "no figure" if budget["found"] is None else f"{budget['found']:.4g}"
    return f"{budget['system']}: {budget['budget']}: wanted {budget['bound']} {budget['wanted']:g}, found {found}"
