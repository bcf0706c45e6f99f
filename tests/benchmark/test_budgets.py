"""Budgets as a gate: kept, broken, or neither."""

import pytest

from hlm.artefacts import HlmError
from hlm.benchmark.budgets import BUDGETS, check_budgets, failures, inconclusive, read_budgets


def system_of(p99=10.0, *, latency="clean", throughput="clean", **more):
    """An entry of latency.json whose blocks are all clean, or all contaminated ("all")."""
    return {
        "latency_ms": {"all": {"p50": p99 / 2, "p95": p99, "p99": p99, "over": latency}},
        "throughput": {"1": {"over": "clean"}, "8": {"over": throughput}},
        "best_batch_size": 8,
        "best_queries_per_s": 100.0,
    } | more


def full_system(**more):
    """An entry with a figure for every budget."""
    return (
        system_of(
            ratio={"p50": 1.0, "p95": 1.0, "p99": 1.0, "throughput": 1.0},
            cold_start={"total_s": 1.0, "peak_memory_mib": 1.0, "over": "clean"},
            quality={"ndcg": 1.0, "recovery": 1.0, "overlap": 1.0},
            agreement={"with": "twin", "overlap": 1.0, "min_cosine": 1.0, "ratio": {"p50": 1.0}},
            floor={"over": 1.0, "gemm_share": 1.0},
            index={"recall": 1.0},
        )
        | more
    )


def report_of(**systems):
    return {"systems": systems, "reference": "teacher", "settings": {"max_other_load": 0.05}}


def undecided(report, system="student"):
    """The budgets of a system that are inconclusive, however they are set."""
    checked = check_budgets(report, [(system, name, 1e-9) for name in BUDGETS])
    assert all(("reason" in budget) == (budget["passed"] is None) for budget in checked)
    return {budget["budget"] for budget in checked if budget["passed"] is None}


def test_budgets_bind_the_candidate_or_the_system_named():
    given = {"p99_ms": 15, "recovery": 0.98, "queries_per_s": 100, "teacher.p99_ms": 50, "v1.5.p50_ms": 1}
    budgets = read_budgets(given, ["teacher", "v1.5", "student"], "student")
    assert [system for system, *_ in budgets] == ["student", "student", "student", "teacher", "v1.5"]
    found = {
        "teacher": system_of(60.0),
        "v1.5": system_of(2.0),
        "student": system_of(14.0, quality={"recovery": 0.975}),
    }
    checked = check_budgets(report_of(**found), budgets)
    assert [budget["passed"] for budget in checked] == [True, False, True, False, True]
    assert failures(checked) == [
        "student: recovery: wanted at least 0.98, found 0.975",
        "teacher: p99_ms: wanted at most 50, found 60",
    ]
    assert inconclusive(checked) == []


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("p99", "did you mean 'p99_ms'"),
        ("recvery", "did you mean 'recovery'"),
        ("zzz", "found 'zzz'$"),
        ("studnet.p99_ms", "a system among teacher, student, found 'studnet'"),
    ],
)
def test_unknown_budgets_are_named(budget, words):
    with pytest.raises(HlmError, match=words):
        read_budgets({budget: 1.0}, ["teacher", "student"], "student")


def test_every_budget_finds_its_figure_in_a_full_entry():
    report = report_of(teacher=system_of(), twin=system_of(), student=full_system())
    absolute = ("p50", "p95", "p99", "e2e_p", "queries")  # milliseconds and queries a second: not 1 in the entry
    checked = check_budgets(report, [("student", name, 1.0) for name in BUDGETS if not name.startswith(absolute)])
    assert all(budget["passed"] and budget["found"] == 1.0 for budget in checked)
    assert undecided(report) == set()


def test_a_figure_without_a_clean_sample_is_neither_kept_nor_broken():
    clean = {"teacher": system_of(), "twin": system_of(), "student": full_system()}
    timed = ("p50", "p95", "p99", "e2e_p", "speedup_p", "same_", "over_")
    latency = {name for name in BUDGETS if name.startswith(timed)}
    crowded = clean | {"student": full_system() | system_of(latency="all")}
    assert undecided(report_of(**crowded)) == latency
    # A ratio rests on both of its sides.
    assert undecided(report_of(**(clean | {"teacher": system_of(latency="all")}))) == {
        "speedup_p50",
        "speedup_p95",
        "speedup_p99",
    }
    assert undecided(report_of(**(clean | {"twin": system_of(latency="all")}))) == {"same_model_speedup_p50"}
    assert undecided(report_of(**(clean | {"teacher": system_of(throughput="all")}))) == {"speedup_throughput"}
    busy = clean | {"student": full_system() | system_of(throughput="all")}
    assert undecided(report_of(**busy)) == {"queries_per_s", "speedup_throughput", "gemm_share"}
    start = {"total_s": 1.0, "peak_memory_mib": 1.0, "over": "all"}
    assert undecided(report_of(**(clean | {"student": full_system(cold_start=start)}))) == {"cold_start_s"}
    rates = {"rates": {"other_load": 0.5}}
    assert undecided(report_of(**clean) | rates) == {"over_floor", "gemm_share"}
    # It is said whichever way the budget would have gone, and what to do.
    for wanted in (1e-9, 1e9):
        (line,) = inconclusive(check_budgets(report_of(**crowded), [("student", "p99_ms", wanted)]))
        assert "wanted at most" in line and "found 10: other processes took more than 5% of the CPUs" in line
        assert "whenever the latency of student was measured; measure again on an idle machine" in line


def test_a_figure_that_is_undefined_is_neither_kept_nor_broken():
    reason = "the teacher scores 0 on all 4 queries"
    undefined = system_of(quality={"ndcg": 0.5, "recovery": None, "recovery_reason": reason})
    for student, why in ((undefined, reason), (system_of(), "there is no such figure")):
        checked = check_budgets(report_of(student=student), [("student", "recovery", 0.9)])
        assert checked[0]["passed"] is None and checked[0]["found"] is None and failures(checked) == []
        assert inconclusive(checked) == [f"student: recovery: wanted at least 0.9, found no figure: {why}"]
