"""The report: its shape, undefined recoveries, its table and its plot."""

import json

import numpy as np
import pytest
from PIL import Image

from hlm.artefacts import HlmError
from hlm.evaluation.report import SYSTEMS, build_report, environment, format_table, plot
from hlm.publishing.card_facts import report_facts
from results.measure import render_readme


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
        "student_on_index": 0.95,
        "static": 1.2,
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
    shown = render_readme.table(report, ["ndcg@10"]) + render_readme.summary(report)
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
