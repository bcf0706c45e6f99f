"""Figures over searches: a query that was typed eight times is eight queries."""

import pyarrow as pa
import pytest

from hlm.evaluation.by_count import lines, weigh

SCORES = {"teacher": [0.5, 1.0, 0.2], "student": [0.4, 1.0, 0.0]}
COUNTS = {"q0": 8.0, "q1": 1.0, "q2": 1.0}


def table():
    rows = [
        {"system": name, "query_id": f"q{number}", "ndcg@10": value, "overlap@10": value if name == "student" else None}
        for name, values in SCORES.items()
        for number, value in enumerate(values)
    ]
    return pa.Table.from_pylist(rows)


def test_means_and_recovery_are_those_of_the_searches():
    report = {"k": 10, "recovery_by_system": {"student": {}}}
    found = weigh(report, table(), COUNTS, samples=200, seed=0)
    assert found["searches"] == 10
    means = {name: (8 * a + b + c) / 10 for name, (a, b, c) in SCORES.items()}
    assert found["systems"]["teacher"] == {"ndcg@10": pytest.approx(means["teacher"])}
    assert found["systems"]["student"]["overlap@10"] == pytest.approx(means["student"])
    kept = found["recovery_by_system"]["student"]["ndcg@10"]
    assert kept["value"] == pytest.approx(means["student"] / means["teacher"])
    assert kept["ci95"][0] <= kept["value"] <= kept["ci95"][1]
    told = lines(report | {"by_count": found})
    assert told[1] == "each query weighed by its count, 10 searches:"
    assert "  teacher: ndcg@10 0.5200" in told and any(f"recovery {kept['value']:.1%} [" in line for line in told)
    assert lines(report) == []


def test_equal_counts_change_nothing():
    report = {"k": 10, "recovery_by_system": {"student": {"ndcg@10": {}}}}
    one, other = (
        weigh(report, table(), dict.fromkeys(COUNTS, count), samples=200, seed=0)["recovery_by_system"]
        for count in (1.0, 7.0)
    )
    assert one["student"]["ndcg@10"]["value"] == pytest.approx(1.4 / 1.7)
    assert one["student"]["ndcg@10"]["ci95"] == pytest.approx(other["student"]["ndcg@10"]["ci95"])
