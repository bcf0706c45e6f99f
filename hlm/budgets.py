"""Budgets as a gate: what a system must keep to, checked against a latency report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hlm.artefacts import HlmError
from hlm.config import closest

# Budget -> where its figure stands in a system's entry, and whether the budget is the most or the least allowed.
BUDGETS: dict[str, tuple[tuple[str, ...], str]] = {
    "p50_ms": (("latency_ms", "all", "p50"), "at most"),
    "p95_ms": (("latency_ms", "all", "p95"), "at most"),
    "p99_ms": (("latency_ms", "all", "p99"), "at most"),
    "queries_per_s": (("best_queries_per_s",), "at least"),
    "speedup_p50": (("ratio", "p50"), "at least"),
    "speedup_p95": (("ratio", "p95"), "at least"),
    "speedup_p99": (("ratio", "p99"), "at least"),
    "speedup_throughput": (("ratio", "throughput"), "at least"),
    "same_model_speedup_p50": (("agreement", "ratio", "p50"), "at least"),  # over the first way that model runs
    "over_floor": (("floor", "over"), "at most"),
    "gemm_share": (("floor", "gemm_share"), "at least"),
    "cold_start_s": (("cold_start", "total_s"), "at most"),
    "peak_memory_mib": (("cold_start", "peak_memory_mib"), "at most"),
    "ndcg": (("quality", "ndcg"), "at least"),
    "recovery": (("quality", "recovery"), "at least"),
    "overlap": (("quality", "overlap"), "at least"),
    "agreement": (("agreement", "overlap"), "at least"),
    "min_cosine": (("agreement", "min_cosine"), "at least"),
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


def check_budgets(
    systems: Mapping[str, Mapping[str, Any]], budgets: Sequence[tuple[str, str, float]]
) -> list[dict[str, Any]]:
    """Each budget with what was found; a figure that is missing has failed.

    Returns:
        [{"system", "budget", "wanted", "bound": "at most" or "at least", "found": a number or None, "passed"}].
    """
    checked = []
    for system, name, wanted in budgets:
        path, bound = BUDGETS[name]
        found: Any = systems[system]
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        passed = found is not None and (found <= wanted if bound == "at most" else found >= wanted)
        entry = {"system": system, "budget": name, "wanted": wanted, "bound": bound, "found": found, "passed": passed}
        checked.append(entry)
    return checked


def failures(checked: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each budget that was not kept: the system, the budget, what was wanted and what was found."""
    return [
        f"{budget['system']}: {budget['budget']}: wanted {budget['bound']} {budget['wanted']:g}, found "
        + ("no figure" if budget["found"] is None else f"{budget['found']:.4g}")
        for budget in checked
        if not budget["passed"]
    ]
