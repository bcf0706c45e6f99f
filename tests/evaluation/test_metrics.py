"""Metrics against values worked out by hand, recovery and its interval, slices, runs, the report and its outputs."""

import math

import numpy as np
import pytest

from hlm.artefacts import HlmError
from hlm.evaluation.hf_metric import RetrievalMetric
from hlm.evaluation.metrics import (
    dense_run,
    length_slice,
    mean,
    overlap,
    per_query,
    ranking,
    recovery,
    relevance_threshold,
    slices,
)
from hlm.indexes.faiss_index import AdIndex
from hlm.vectors.store import VectorStore, write_store

QRELS = {"q": {"a": 1, "b": 3, "c": 2, "d": 3, "e": 0}}


def as_run(*documents):
    return {document: float(-rank) for rank, document in enumerate(documents)}


def test_metrics_by_hand():
    scores = per_query({"q": as_run("a", "b", "x", "c", "e")}, QRELS)
    ideal = 3 / math.log2(2) + 3 / math.log2(3) + 2 / math.log2(4) + 1 / math.log2(5)
    gained = 1 / math.log2(2) + 3 / math.log2(3) + 0 + 2 / math.log2(5)
    assert list(scores) == ["precision@10", "ndcg@10", "recall@100", "mrr@10"]
    assert scores["ndcg@10"]["q"] == pytest.approx(gained / ideal)
    assert scores["precision@10"]["q"] == pytest.approx(2 / 10)  # b and c; a's grade 1 is not relevant
    assert scores["recall@100"]["q"] == pytest.approx(2 / 3)
    assert scores["mrr@10"]["q"] == pytest.approx(1 / 2)


def test_relevance_level():
    assert relevance_threshold(QRELS) == 2
    assert relevance_threshold({"q": {"a": 1, "b": 0}}) == 1
    lenient = per_query({"q": as_run("a", "b")}, QRELS, relevance_level=1)
    assert lenient["mrr@10"]["q"] == 1
    assert lenient["recall@100"]["q"] == pytest.approx(2 / 4)
    assert per_query({"q": as_run("x", "a")}, {"q": {"a": 1}})["mrr@10"]["q"] == pytest.approx(1 / 2)


def test_mrr_stops_at_k_and_recall_at_100():
    filler = [f"x{n}" for n in range(200)]
    scores = per_query({"q": as_run(*filler[:10], "b", *filler[10:], "c")}, QRELS)
    assert scores["mrr@10"]["q"] == 0  # rank 11: trec_eval's own recip_rank would be 1/11
    assert scores["recall@100"]["q"] == pytest.approx(1 / 3)
    assert per_query({"q": as_run("x", "y", "b")}, QRELS, 2)["mrr@2"]["q"] == 0
    assert per_query({"q": as_run("x", "b")}, QRELS, 2)["precision@2"]["q"] == pytest.approx(1 / 2)


def test_ties_break_by_document_id():
    assert ranking({"a": 1.0, "c": 1.0, "b": 2.0}) == ["b", "c", "a"]
    assert ranking({"c": 1.0, "b": 2.0, "a": 1.0}, 2) == ["b", "c"]
    tied = per_query({"q": {"b": 1.0, "x": 1.0}}, QRELS)
    assert tied["mrr@10"]["q"] == pytest.approx(1 / 2)
    # Told apart in 64 bits only: trec_eval reads 32, where it would see a tie and put x first.
    close = per_query({"q": {"b": 1.0 + 1e-12, "x": 1.0}}, QRELS)
    assert close["mrr@10"]["q"] == 1


def test_queries_without_hits_or_relevant_documents_count_as_zero():
    qrels = QRELS | {"missing": {"a": 3}, "hopeless": {"a": 0}, "empty": {"a": 3}}
    run = {"q": as_run("b"), "hopeless": as_run("a"), "empty": {}, "foreign": as_run("a")}
    scores = per_query(run, qrels, incomplete=True)
    for values in scores.values():
        assert set(values) == set(qrels)
    assert all(scores["ndcg@10"][query] == 0 for query in ("missing", "hopeless", "empty"))
    assert mean(scores["mrr@10"]) == pytest.approx(1 / 4)
    assert scores["judged@10"] == {"q": 1, "missing": 0, "hopeless": 1, "empty": 0}


def test_condensed_ranks_judged_documents_only():
    run = {"q": as_run("x", "y", "b", "z", "d")}
    scores = per_query(run, QRELS, incomplete=True)
    squeezed = per_query({"q": as_run("b", "d")}, QRELS)
    assert scores["condensed_ndcg@10"]["q"] == pytest.approx(squeezed["ndcg@10"]["q"])
    assert scores["condensed_ndcg@10"]["q"] > scores["ndcg@10"]["q"]
    assert scores["judged@10"]["q"] == pytest.approx(2 / 5)
    # "e" is judged, with grade 0: it keeps its place.
    with_zero = per_query({"q": as_run("e", "b", "d")}, QRELS, incomplete=True)
    assert with_zero["condensed_ndcg@10"]["q"] == pytest.approx(with_zero["ndcg@10"]["q"])


@pytest.mark.parametrize(
    ("run", "qrels", "options", "message"),
    [
        ({"q": {"a": 1.0}}, {}, {}, "no"),
        ({"p": {"a": 1.0}}, QRELS, {}, "none of the run's 1 queries.*'p'.*'q'"),
        ({"q": {"a": 1.0}}, {"q": {"a": 0}}, {}, "judged 1 or more"),
        ({"q": {"a": 1.0}}, QRELS, {"relevance_level": 4}, "judged 4 or more"),
        ({"q": {"a": float("nan")}}, QRELS, {}, "not finite for query 'q'"),
        ({"q": {"a": 1.0}}, QRELS, {"k": 0}, "k: expected 1"),
    ],
)
def test_metrics_refuse(run, qrels, options, message):
    with pytest.raises(HlmError, match=message):
        per_query(run, qrels, **options)


def test_evaluate_metric_agrees_with_the_function():
    metric = RetrievalMetric()
    result = metric.compute(
        predictions=[["a", "b", "x", "c"], []],
        references=[{"ids": list(QRELS["q"]), "grades": list(QRELS["q"].values())}, {"ids": ["a"], "grades": [3]}],
        incomplete=True,
    )
    expected = per_query({"q": as_run("a", "b", "x", "c")}, QRELS | {"r": {"a": 3}}, incomplete=True)
    assert result == pytest.approx({name: mean(values) for name, values in expected.items()})
    metric.add_batch(predictions=[["b"]], references=[{"ids": ["b"], "grades": [1]}])
    assert metric.compute(k=1)["precision@1"] == 1
    with pytest.raises(HlmError, match="twice"):
        RetrievalMetric().compute(predictions=[["b", "b"]], references=[{"ids": ["b"], "grades": [1]}])
    with pytest.raises(HlmError, match="2 grades and 1"):
        RetrievalMetric().compute(predictions=[["b"]], references=[{"ids": ["b"], "grades": [1, 2]}])


def test_recovery_value_and_interval():
    rng = np.random.default_rng(3)
    teacher = {f"q{n}": value for n, value in enumerate(rng.uniform(size=300))}
    scaled = {query: 0.9 * value for query, value in teacher.items()}
    exact = recovery(scaled, teacher)
    assert exact["value"] == pytest.approx(0.9)
    assert exact["ci95"] == pytest.approx([0.9, 0.9])  # paired: both sides rise and fall together

    noisy = {query: value + rng.normal(scale=0.2) for query, value in scaled.items()}
    kept = recovery(noisy, teacher)
    low, high = kept["ci95"]
    assert low < kept["value"] < high
    assert recovery(noisy, teacher) == kept
    assert recovery(dict(reversed(noisy.items())), teacher) == kept
    assert recovery(noisy, teacher, seed=1) != kept
    # The delta method for a ratio of means gives nearly the same width.
    s, t = (np.array([side[query] for query in teacher]) for side in (noisy, teacher))
    error = np.std(s - kept["value"] * t, ddof=1) / np.sqrt(len(t)) / t.mean()
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.05)
    fewer = {query: teacher[query] for query in list(teacher)[:75]}
    narrow = recovery({query: noisy[query] for query in fewer}, fewer)["ci95"]
    assert (narrow[1] - narrow[0]) / (high - low) == pytest.approx(2, rel=0.25)


def test_recovery_of_a_better_student_is_above_one():
    assert recovery({"a": 0.6, "b": 0.6}, {"a": 0.5, "b": 0.5})["value"] == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("student", "teacher", "value", "reason"),
    [
        ({"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 0.0}, None, "the teacher scores 0 on all 2 queries"),
        ({"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}, None, "the teacher scores 0 on all 2 queries"),
        ({"a": 1.0}, {"a": 0.0}, None, "the teacher scores 0 on all 1 queries"),
        ({"a": 0.5}, {"a": 1.0}, 0.5, "an interval needs 2 queries or more, there is 1"),
        ({"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 1.0}, 2.0, "of 10000 samples of the 2 queries; use more queries"),
        ({"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 1.0}, 0.0, "of 10000 samples of the 2 queries; use more queries"),
    ],
)
def test_recovery_that_is_undefined_is_none_with_the_reason(student, teacher, value, reason):
    found = recovery(student, teacher)
    assert found["value"] == value and found["ci95"] is None and found["reason"].endswith(reason)


def test_a_few_samples_without_a_ratio_do_not_take_the_interval():
    teacher = {f"q{n}": float(n > 2) for n in range(8)}  # 3 of 8 are missed: all 8 draws are misses in 0.04%
    kept = recovery(teacher, teacher)
    assert kept == {"value": 1.0, "ci95": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("student", "teacher", "samples", "message"),
    [
        ({"a": 1.0, "b": 1.0}, {"a": 1.0, "c": 1.0}, 10, "2 and 2 with 1 in common"),
        ({}, {}, 10, "found 0 and 0"),
        ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, 0, "samples: expected 1 or more, found 0"),
    ],
)
def test_recovery_refuses(student, teacher, samples, message):
    with pytest.raises(HlmError, match=message):
        recovery(student, teacher, samples=samples)


def test_overlap_ignores_order():
    first = {"q": as_run(*"abcd"), "r": as_run("a"), "s": {}}
    second = {"q": as_run(*"dcxy"), "r": as_run("a", "b"), "s": {}}
    assert overlap(first, second, 4) == {"q": 0.5, "r": 0.5, "s": 0}
    assert overlap(first, second, 2)["q"] == 0
    with pytest.raises(HlmError, match="same queries"):
        overlap(first, {"q": {}})


def test_slices():
    assert [length_slice(text) for text in ("tv", "lg tv", "lg 55 tv", "lg 55 inch tv", "a b c d e")] == [
        *("1", "2", "3-4", "3-4", "5+")
    ]
    groups = {"a": "head", "b": "head", "c": "tail"}
    student = {"a": 0.4, "b": 0.6, "c": 0.5}
    teacher = {"a": 0.5, "b": 0.75, "c": 1.0}
    found = slices(groups, student, teacher, {"a": 1.0, "b": 0.5, "c": 0.0})
    assert list(found) == ["head", "tail"]
    head = found["head"]
    assert head["n"] == 2
    assert head["recovery"]["value"] == pytest.approx(0.8)
    measured = head["student_ndcg@10"], head["teacher_ndcg@10"], head["overlap@10"]
    assert measured == pytest.approx((0.5, 0.625, 0.75))
    assert found["tail"]["recovery"]["value"] == 0.5 and found["tail"]["recovery"]["ci95"] is None
    assert "2 queries or more" in found["tail"]["recovery"]["reason"] and found["tail"]["n"] == 1


def test_dense_run(tmp_path):
    one_hot = dict(zip("xyz", np.eye(3, dtype=np.float32), strict=True))
    write_store(
        tmp_path / "store",
        [(name, name) for name in one_hot],
        lambda texts: np.stack([one_hot[text] for text in texts]),
        dim=3,
        encoder="e",
        source="s",
        n_rows=3,
    )
    index = AdIndex.build(VectorStore.open(tmp_path / "store"))
    run = dense_run(np.array([[0.8, 0.6, 0], [0, 0, 1]], np.float32), index, ["q1", "q2"], 2)
    assert run["q1"] == pytest.approx({"x": 0.8, "y": 0.6})
    assert ranking(run["q2"])[0] == "z"
    assert all(type(score) is float for documents in run.values() for score in documents.values())
    with pytest.raises(HlmError, match="1 and 2"):
        dense_run(np.eye(3, dtype=np.float32)[:2], index, ["q1"], 2)
