"""Metrics against values worked out by hand, recovery and its interval, slices, runs, the report and its outputs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hlm.artefacts import HlmError
from hlm.encoders.pruning import parameter_counts
from hlm.evaluation.hf_metric import RetrievalMetric
from hlm.evaluation.metrics import (
    bm25_run,
    dense_run,
    length_slice,
    mean,
    overlap,
    per_query,
    ranking,
    recovery,
    relevance_threshold,
    slices,
    tokenise,
)
from hlm.evaluation.report import SYSTEMS, build_report, environment, format_table, plot
from hlm.publishing.card_facts import report_facts
from hlm.vectors.faiss_index import AdIndex
from hlm.vectors.store import VectorStore, write_store
from results.measure import render_readme

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


def test_tokens_keep_model_numbers_and_decimals():
    assert tokenise('Sony WH-1000XM4, 15.6" Headphones.') == ["sony", "wh", "1000xm4", "15.6", "headphone"]
    assert tokenise("batteries glasses bus dress cases HP's ﬁne") == [
        *("battery", "glasse", "bus", "dress", "case", "hp", "s", "fine")
    ]
    assert tokenise("Batteries", stem=False) == ["batteries"]


def test_bm25_run():
    corpus = [
        {"_id": "phone", "title": "Acme X100 phone", "text": "A phone with a good camera."},
        {"_id": "case", "title": "Case for Acme X100", "text": None},
        {"_id": "kettle", "title": None, "text": "Steel kettle, 1.7 l"},
    ]
    queries = [("q1", "phones"), ("q2", "X100 case"), ("q3", "1.7"), ("q4", "zzz"), ("q5", "...")]
    run = bm25_run(corpus, queries, 10)
    assert ranking(run["q1"]) == ["phone"]
    assert ranking(run["q2"]) == ["case", "phone"]
    assert ranking(run["q3"]) == ["kettle"]
    assert run["q4"] == run["q5"] == {}
    assert ranking(bm25_run(corpus, queries, 1)["q2"]) == ["case"]
    assert bm25_run(corpus, [("q", "phones")], 1, stem=False)["q"] == {}
    # Lucene's BM25 by hand: one document of three holds "kettle"; lengths are 10, 4 and 4 words.
    length = np.mean(
        [
            len(tokenise(t))
            for t in ("Acme X100 phone A phone with a good camera", "Case for Acme X100", "Steel kettle 1.7 l")
        ]
    )
    idf = math.log(1 + (3 - 1 + 0.5) / (1 + 0.5))
    assert run["q3"]["kettle"] == pytest.approx(idf / (1 + 1.5 * (1 - 0.75 + 0.75 * 4 / length)), rel=1e-5)
    with pytest.raises(HlmError, match="no word"):
        bm25_run([{"_id": "a", "title": "...", "text": None}], queries, 3)


def small_runs(n=40, seed=0):
    """A teacher that is mostly right, students that lose some of it, and a weak lexical baseline."""
    rng = np.random.default_rng(seed)
    qrels = {f"q{i}": {f"d{i}-{j}": 3 - j // 2 for j in range(6)} for i in range(n)}
    noise = {
        "bm25": 2.5,
        "backbone": 2,
        "teacher": 0.8,
        "pruned": 1.6,
        "aligned": 1,
        "student": 0.9,
        "contrastive_only": 1.8,
    }
    runs = {
        name: {
            query: {d: grade + scale * rng.normal() for d, grade in judged.items()}
            | {f"x{j}": scale * rng.normal() for j in range(8)}
            for query, judged in qrels.items()
        }
        for name, scale in noise.items()
    }
    return runs, qrels


def small_report(**options):
    runs, qrels = small_runs()
    return build_report(
        options.pop("runs", runs),
        qrels,
        dataset="tiny catalogue",
        split="test",
        parameters={name: (0, 0) if name == "bm25" else (22_713_216, 10_646_784) for name in SYSTEMS},
        texts={query: "red shoe" if i % 2 else "shoe" for i, query in enumerate(qrels)},
        kinds={query: "head" if i % 4 else "tail" for i, query in enumerate(qrels)},
        samples=500,
        environment=environment("evaluate --config x.yaml"),
        **options,
    )


def test_report_has_the_fixed_shape():
    report, scores = small_report()
    again = json.loads(json.dumps(report, allow_nan=False))
    assert again == report
    assert list(report["systems"]) == list(SYSTEMS)
    for values in report["systems"].values():
        wanted = {"precision@10", "ndcg@10", "recall@100", "mrr@10", "params_total", "params_non_embedding"}
        assert wanted <= set(values) <= wanted | {"overlap@10"}
    assert set(report["recovery"]) == {"precision@10", "ndcg@10", "recall@100", "mrr@10"}
    student, teacher = (report["systems"][name]["ndcg@10"] for name in ("student", "teacher"))
    kept = report["recovery"]["ndcg@10"]
    assert kept["value"] == pytest.approx(student / teacher)
    assert kept["ci95"][0] < kept["value"] < kept["ci95"][1] and "reason" not in kept
    assert report["overlap@10"] == report["systems"]["student"]["overlap@10"]
    assert {by: set(found) for by, found in report["slices"].items()} == {
        "kind": {"head", "tail"},
        "length": {"1", "2"},
    }
    assert report["slices"]["kind"]["tail"]["n"] == 10
    assert {"command", "date", "git_commit", "versions", "cpu", "cores"} <= set(report["environment"])
    assert scores.num_rows == len(SYSTEMS) * 40
    of_student = scores.filter([name == "student" for name in scores["system"].to_pylist()])
    assert np.mean(of_student["ndcg@10"].to_pylist()) == pytest.approx(student)
    assert scores.filter([name == "bm25" for name in scores["system"].to_pylist()])["overlap@10"].null_count == 40


def test_report_of_incomplete_judgements():
    report, scores = small_report(incomplete=True)
    assert {"condensed_ndcg@10", "judged@10"} <= set(report["systems"]["teacher"])
    assert "condensed_ndcg@10" in report["recovery"] and "judged@10" not in report["recovery"]
    assert "judged@10" in scores.column_names and "judged@10" in format_table(report)


def test_report_without_student_compares_nothing():
    runs, _ = small_runs()
    report, _ = small_report(runs={name: runs[name] for name in ("teacher", "bm25")})
    assert list(report["systems"]) == ["bm25", "teacher"]
    assert report["recovery"] == report["slices"] == {} and report["overlap@10"] is None
    assert "student / teacher" not in format_table(report)


def runs_that_miss(*missed):
    """Four queries of one relevant document each; the teacher misses those named, the student the last."""
    qrels = {f"q{n}": {f"d{n}": 1} for n in range(4)}
    hit = {query: {f"d{query[1:]}": 1.0, "x": 0.5} for query in qrels}
    miss = {"x": 1.0, "y": 0.5}
    teacher = {query: miss if query in missed else hit[query] for query in qrels}
    return {"teacher": teacher, "student": hit | {"q3": miss}, "pruned": hit}, qrels


def report_of_few(runs, qrels):
    kinds = {query: "head" if query < "q2" else "tail" for query in qrels}
    parameters, texts = {name: (1, 1) for name in runs}, {query: "a b" for query in qrels}
    return build_report(
        runs, qrels, dataset="few", split="test", parameters=parameters, texts=texts, kinds=kinds, samples=500
    )


@pytest.mark.parametrize(
    ("missed", "value", "reason"),
    [
        (("q1", "q2"), 1.5, "no interval: the teacher scores 0 in "),
        (("q1", "q2", "q3"), 3.0, "no interval: the teacher scores 0 in "),
        (("q0", "q1", "q2", "q3"), None, "the teacher scores 0 on all 4 queries"),
    ],
)
def test_a_recovery_that_is_undefined_takes_no_other_figure_with_it(tmp_path, missed, value, reason):
    runs, qrels = runs_that_miss(*missed)
    report, scores = report_of_few(runs, qrels)
    assert json.loads(json.dumps(report, allow_nan=False)) == report and scores.num_rows == 3 * 4
    assert report["systems"]["student"]["ndcg@10"] == 0.75
    assert report["systems"]["teacher"]["ndcg@10"] == 1 - len(missed) / 4
    kept = report["recovery"]["ndcg@10"]
    assert kept["value"] == value and kept["ci95"] is None and kept["reason"].startswith(reason)
    assert report["recovery"] == report["recovery_by_system"]["student"]
    head = report["slices"]["kind"]["head"]["recovery"]
    assert (head["value"] is None) == ("q0" in missed and "q1" in missed)
    text = format_table(report)
    row = next(line for line in text.splitlines() if line.startswith("student"))
    assert row.endswith(" -" if value is None else f" {100 * value:.1f}% [-]")
    assert f"student, recovery of precision@10, ndcg@10, recall@100, mrr@10: {reason}" in text
    assert "nan" not in text.lower()
    plot(report, tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as image:
        assert image.format == "PNG"
    shown = render_readme.table(report)
    assert "nan" not in shown.lower() and reason in shown and (" - |" in shown or "no interval" in shown)
    facts = report_facts(report, "student", None)
    assert reason in facts["recovery"]["ndcg@10"]
    assert facts["rows"][-1][0] == "student" and facts["rows"][-1][-3] == ("-" if value is None else f"{value:.1%} [-]")


def test_report_refuses_unknown_systems():
    with pytest.raises(HlmError, match="found studnet"):
        small_report(runs={"studnet": {}})


def test_table_is_aligned_and_in_order():
    report, _ = small_report()
    lines = format_table(report).splitlines()
    assert lines[0] == "tiny catalogue, split test: 40 queries, relevant from grade 2"
    rows = lines[4 : 4 + len(SYSTEMS)]
    assert [row.split()[0] for row in rows] == list(SYSTEMS)
    assert len({len(line) for line in lines[2 : 4 + len(SYSTEMS)]}) == 1
    assert f"{report['systems']['student']['ndcg@10']:.4f}" in rows[5]
    assert "22.7M" in rows[5] and "10.6M" in rows[5]


@pytest.mark.parametrize("names", [SYSTEMS, ("bm25", "teacher"), ("teacher", "student")])
def test_plot_is_a_png(tmp_path, names):
    runs, _ = small_runs()
    report, _ = small_report(runs={name: runs[name] for name in names})
    plot(report, tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as image:
        assert image.format == "PNG" and image.width > 700 and image.height > 500
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


def test_parameter_counts_see_shared_weights_once():
    body = torch.nn.Linear(8, 4)
    words, positions = torch.nn.Embedding(10, 8), torch.nn.Embedding(5, 8)
    head = torch.nn.Linear(8, 10, bias=False)
    head.weight = words.weight
    assert parameter_counts(torch.nn.ModuleList([body, words, positions, head])) == (8 * 4 + 4 + 80 + 40, 36)


def test_bm25_does_not_start_jax(tmp_path):
    """JAX would take three quarters of a GPU's memory; bm25s asks for it where it is installed."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("open(__file__ + '.started', 'w')")
    code = (
        "import sys, hlm.evaluation.metrics as metrics\n"
        "row = {'_id': 'd', 'title': '', 'text': 'red shoe'}\n"
        "assert list(metrics.bm25_run([row], [('q', 'shoe')], 1)) == ['q']\n"
        "assert 'bm25s' in sys.modules and 'jax' not in sys.modules\n"
        "import jax\n"  # who wants it still has it
    )
    paths = [str(tmp_path), str(Path(__file__).resolve().parents[2])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-c", code.rpartition("import jax")[0]], env=environment, check=True)
    assert not (tmp_path / "jax" / "__init__.py.started").exists()
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert (tmp_path / "jax" / "__init__.py.started").exists()
