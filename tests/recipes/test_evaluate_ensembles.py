"""Ensembles, least scores and slices that an evaluation is asked for, on the sample catalogue with a tiny model."""

import json

import pytest

import hlm
from hlm.artefacts import HlmError
from hlm.data.contract import load
from hlm.evaluation import evaluate as step
from hlm.evaluation.report import format_table


@pytest.fixture(scope="module")
def settings(catalogue_200, tiny_bert):
    return {
        "data": catalogue_200,
        "systems": {"bm25": None, "backbone": tiny_bert},
        "bootstrap_samples": 100,
        "impressions": 5,
        "slices": {"negation": r"\b(without|not|no|non)\b", "for": r"\bfor\b"},
        "shown_precision": 0.2,
        "fusions": {
            "rrf": {"systems": ["bm25", "backbone"]},
            "chosen": {"systems": ["bm25", "backbone"], "method": "weighted"},
            "given": {"systems": ["backbone", "bm25"], "method": "weighted", "weights": [1, 3]},
        },
    }


def test_ensembles_least_scores_and_slices_are_in_the_report(settings, tmp_path, monkeypatch):
    searched = []
    real = step.bm25_run
    monkeypatch.setattr(
        step, "bm25_run", lambda corpus, queries, *a, **k: searched.append(queries) or real(corpus, queries, *a, **k)
    )
    report = hlm.evaluate(**settings, output=tmp_path)
    data = load(settings["data"], splits=("dev", "test"))
    assert searched == [data.split_queries("test"), data.split_queries("dev")]
    assert list(report["systems"]) == ["bm25", "backbone", "rrf", "chosen", "given"]
    parameters = {name: values["params_total"] for name, values in report["systems"].items()}
    assert parameters["rrf"] == parameters["backbone"] > parameters["bm25"] == 0
    chosen = report["fusions"]["chosen"]
    assert chosen["weights_from"] == "dev" and sum(chosen["weights"]) == pytest.approx(1)
    alone = {name: report["systems"][name]["ndcg@10"] for name in ("bm25", "backbone")}
    assert {name: one["without"]["ndcg@10"] for name, one in chosen["members"].items()} == {
        "bm25": alone["backbone"],
        "backbone": alone["bm25"],
    }
    uplift = chosen["members"]["backbone"]["uplift"]["ndcg@10"]["value"]
    assert uplift == pytest.approx(report["systems"]["chosen"]["ndcg@10"] / alone["bm25"] - 1)
    thresholds = report["thresholds"]
    assert (thresholds["split"], set(thresholds["systems"])) == ("dev", {"bm25", "backbone"})
    kept = thresholds["systems"]["bm25"]
    assert kept["chosen_on"]["precision"]["value"] >= 0.2 and 0 < kept["reported"]["coverage"] <= 1
    groups = report["slices"]["for"]
    assert groups["match"]["n"] + groups["others"]["n"] == report["queries"]
    weighted = sum(group["n"] * group["ndcg@10"]["bm25"] for group in groups.values())
    assert weighted / report["queries"] == pytest.approx(alone["bm25"])
    text = format_table(report)
    for words in (
        "given: 1 backbone + 3 bm25",
        "rrf: bm25 + backbone, fused by reciprocal ranks",
        "Least scores chosen",
    ):
        assert words in text
    assert "simulated" in text
    # What was searched is kept: nothing is searched again, and the report is the same.
    assert hlm.evaluate(**settings, output=tmp_path)["fusions"] == report["fusions"] and len(searched) == 2
    assert json.loads((tmp_path / "report.json").read_text())["thresholds"] == thresholds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dev_split": "test"}, "dev_split: expected another split than 'test'"),
        ({"dev_split": "none"}, "split 'none'"),
        ({"shown_precision": 90}, "shown_precision: expected a share"),
        ({"impressions": 0}, "impressions: expected 1"),
        ({"slices": {"kind": "x"}}, "choose another name"),
        ({"slices": {"x": "("}}, "slices: 'x': expected a regular expression"),
        ({"fusions": {"student": {"systems": []}}}, "'student': expected a name"),
        ({"fusions": {"../x": {"systems": []}}}, "'../x': expected a name"),
        ({"fusions": {"x": ["bm25"]}}, "'x': expected {systems"),
        ({"fusions": {"x": {"systems": ["bm25"], "wieghts": [1]}}}, "did you mean 'weights'"),
        ({"fusions": {"x": {"systems": ["bm25", "bakcbone"]}}}, "did you mean 'backbone'"),
        ({"fusions": {"x": {"systems": ["bm25", "bm25"]}}}, "two systems or more, each once"),
        ({"fusions": {"x": {"systems": ["bm25", "backbone"], "weights": [1, 1]}}}, "rrf takes no weights"),
        ({"fusions": {"x": {"systems": ["bm25", "backbone"], "method": "weighted", "weights": [1]}}}, "expected 2"),
        ({"fusions": {"x": {"systems": ["bm25", "backbone"], "method": "weighted", "weights": [1, 0]}}}, "above 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_searched(settings, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(step, "bm25_run", lambda *_, **__: pytest.fail("searched"))
    with pytest.raises(HlmError, match=message):
        hlm.evaluate(**settings | change, output=tmp_path)
    assert not (tmp_path / "report.json").exists()
