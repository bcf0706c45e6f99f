"""What a retriever adds to an ensemble: counted by hand, and in the report that recipes/evaluate.py writes."""

import json

import pytest

from hlm.evaluation.contribution import Scoring, Split, compare_fusion, only_found
from hlm.evaluation.report import build_report, format_table, plot
from hlm.steps import Fusion


def runs_of_two():
    """On even queries the lexical list finds the relevant document, on odd ones the dense list; `other` finds none."""
    qrels = {f"q{n}": {"good": 2, "bad": 0} for n in range(10)}
    hit, miss = {"good": 1.0, "bad": 0.5}, {"bad": 1.0, "x": 0.5}
    lexical = {query: miss if int(query[1:]) % 2 else hit for query in qrels}
    dense = {query: hit if int(query[1:]) % 2 else miss for query in qrels}
    return {"bm25": lexical, "student": dense, "backbone": dict.fromkeys(qrels, miss)}, qrels


def test_relevant_documents_that_one_retriever_alone_found():
    runs = {"a": {"p": {"1": 3.0, "2": 2.0, "x": 1.0}, "q": {"5": 1.0}}, "b": {"p": {"2": 2.0, "3": 1.0}, "q": {}}}
    qrels = {"p": {"1": 2, "2": 2, "3": 1, "4": 3, "x": 0}, "q": {"5": 2}}
    found = only_found(runs, qrels, level=2, samples=200)
    # 1 and 5 are a's alone, 2 is of both; 3 is not relevant enough, 4 nobody found.
    assert (found["a"]["only"], found["a"]["found"]) == (2, 3) and found["a"]["share"]["value"] == pytest.approx(2 / 3)
    assert (found["b"]["only"], found["b"]["found"]) == (0, 3) and found["b"]["share"]["value"] == 0
    assert only_found(runs, qrels, level=1, samples=200)["b"]["only"] == 1
    assert only_found(runs, qrels, level=2, k=1, samples=200)["a"]["found"] == 3  # 1, 2 and 5 come first somewhere


def test_an_ensemble_beside_itself_without_each_member():
    runs, qrels = runs_of_two()
    fusion = Fusion(systems=["bm25", "student"])
    run, found = compare_fusion(fusion, Split("test", runs, qrels), None, 100, Scoring(10, 2, False, 200, 0, 20))
    assert list(run["q0"]) == ["bad", "good", "x"]  # 1/61 + 1/62, 1/61, 1/62
    fused = 1 / 1.584962500721156  # second place
    student = found["members"]["student"]
    assert student["without"]["ndcg@10"] == pytest.approx(0.5)  # BM25 alone: first on even queries, absent on odd ones
    assert student["uplift"]["ndcg@10"]["value"] == pytest.approx(fused / 0.5 - 1)
    assert (student["only_found"]["only"], student["only_found"]["found"]) == (5, 10)
    assert student["interleaving"]["simulated"] is True and student["weights_without"] is None
    assert (found["weights"], found["weights_from"], found["normalisation"]) == (None, None, None)


def test_weights_are_chosen_on_the_other_split_and_shown():
    runs, qrels = runs_of_two()
    reported, dev = Split("test", runs, qrels), Split("dev", runs, qrels)
    how = Scoring(10, 2, False, 200, 0, 5)
    fusion = Fusion(systems=["bm25", "backbone", "student"], method="weighted")
    _, found = compare_fusion(fusion, reported, dev, 100, how)
    assert found["weights_from"] == "dev" and found["weights"][1] <= 0.2 and found["chosen_ndcg"] > 0.8
    assert len(found["members"]["bm25"]["weights_without"]) == 2
    given = Fusion(systems=["bm25", "backbone", "student"], method="weighted", weights=[1, 1, 2])
    _, found = compare_fusion(given, reported, None, 100, how)
    assert found["weights_from"] == "given" and found["chosen_ndcg"] is None
    assert found["members"]["bm25"]["weights_without"] == [1, 2]


def test_the_report_scores_an_ensemble_like_any_system(tmp_path):
    runs, qrels = runs_of_two()
    fusion = Fusion(systems=["bm25", "student"], method="weighted")
    split, how = Split("test", runs, qrels), Scoring(10, 2, False, 200, 0, 5)
    run, found = compare_fusion(fusion, split, Split("dev", runs, qrels), 100, how)
    names = [*runs, "teacher", "hybrid"]
    report, scores = build_report(
        {**runs, "teacher": runs["student"], "hybrid": run},
        qrels,
        dataset="two",
        split="test",
        parameters=dict.fromkeys(names, (1, 1)),
        texts=dict.fromkeys(qrels, "a"),
        fusions={"hybrid": found},
        samples=200,
    )
    assert json.loads(json.dumps(report)) == report and list(report["systems"])[-1] == "hybrid"
    assert report["recovery_by_system"]["hybrid"]["ndcg@10"]["value"] > 1 and scores.num_rows == 5 * 10
    text = format_table(report)
    assert "hybrid: 0.5 bm25 + 0.5 student, scores normalised by minmax, weights chosen on dev (nDCG@10 " in text
    assert "preferred with it, simulated clicks [95%]" in text
    plot(report, tmp_path / "report.png")
