"""Writes the tables of README.md (between its markers) and of results/README.md from results/*.json.

    python results/measure/render_readme.py runs/quickstart runs/latency/alternatives

Folders given are kept first: report.json and timings.json of runs/<name> become results/<name>.json, latency.json
becomes results/latency-<name>.json, compare.json results/compare.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hlm.artefacts import write_json
from hlm.benchmark import report as latency_report
from hlm.evaluation.report import undefined
from hlm.report_files import checked_report, read_latency
from hlm.report_types import LatencyReport, Recovery, Report

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from results.measure import tables
from results.measure.tables import markdown

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
RECOVERED = ("precision@10", "ndcg@10", "condensed_ndcg@10")
TITLES = {
    "quickstart": "Sample catalogue",
    "electronics": "Electronics, judged by people",
    "esci_mini": "Shopping queries, judged by people",
}
METRICS = ["ndcg@10", "condensed_ndcg@10", "judged@10", "precision@10", "recall@100", "mrr@10", "overlap@10"]
# What decides, for the README; results/README.md has all of it.
SHORT = {
    "quickstart": ["ndcg@10", "recall@100", "overlap@10"],
    "electronics": ["ndcg@10", "condensed_ndcg@10", "judged@10"],
    "esci_mini": ["ndcg@10", "precision@10", "overlap@10"],
}
SHORT_LATENCY = ["system", "backend", "p50 ms", "p99 ms", "queries/s", "peak MiB"]
SEARCHED = "From text to ads: a million ads on one thread"
# results/latency-<name>.json -> what it is
LATENCY = {
    "quickstart": "The quickstart's student online, beside its teacher",
    "esci-mini": "Students on shopping queries, beside their teacher",
    "alternatives": "The same student under everything that would serve it",
    "cascade": "Every student of the quickstart's cascade",
    "true-shapes": "The published shapes with random weights",
    "true-shapes-bf16": "The published shapes with random weights in bf16",
}


def table(report: Report, columns: list[str]) -> str:
    """One report as Markdown: a row a system, with these columns where it has them."""
    columns = [name for name in columns if any(name in row for row in report["systems"].values())]
    rows = []
    for name, row in report["systems"].items():
        cells = [f"{row[column]:.3f}" if row.get(column) is not None else "-" for column in columns]
        size = "-"
        if row.get("params_total"):
            size = f"{row['params_total'] / 1e6:.1f}M ({row['params_non_embedding'] / 1e6:.1f}M)"
        kept = report["recovery_by_system"].get(name, {}).get("ndcg@10")
        rows.append([name, *cells, percent(kept) if kept else "-", size])
    return markdown(["system", *columns, "recovery of ndcg@10", "parameters (without embeddings)"], rows)


def summary(report: Report) -> str:
    """Recovery and overlap of the refined student."""
    found = [f"{metric} {percent(report['recovery'][metric])}" for metric in RECOVERED if metric in report["recovery"]]
    lines = ["Recovery of the student: " + ", ".join(found) + "."] if found else []
    lines += [f"{line}." for line in undefined(report)]
    if (overlap := report["systems"].get("student", {}).get("overlap@10")) is not None:
        lines.append(f"Of the student's ten best ads, {overlap:.1%} are among the teacher's ten.")
    return "\n\n".join(lines)


def ensembles(report: Report) -> str:
    """What each retriever adds to each ensemble."""
    metric = f"ndcg@{report['k']}"
    rows = []
    for name, fusion in report.get("fusions", {}).items():
        weights = fusion["weights"] or [None] * len(fusion["systems"])
        for member, weight in zip(fusion["systems"], weights, strict=True):
            adds = fusion["members"][member]
            clicked = adds["interleaving"]["preference"]["value"]
            rows.append(
                [
                    name,
                    member,
                    "by ranks" if weight is None else f"{weight:.1f}",
                    f"{adds['without'][metric]:.3f}",
                    f"{report['systems'][name][metric]:.3f}",
                    percent(adds["uplift"][metric]),
                    percent(adds["only_found"]["share"]),
                    "-" if clicked is None else f"{clicked:.1%}",
                ]
            )
    if not rows:
        return ""
    columns = [
        "ensemble",
        "retriever",
        "weight",
        f"{metric} without it",
        "with it",
        "uplift",
        "relevant ads only it found",
    ]
    about = "Weights are chosen on dev. Clicks are simulated from the judgements: nobody clicked."
    return markdown([*columns, "preferred by simulated clicks"], rows) + f"\n\n{about}"


def percent(recovery: Recovery) -> str:
    if recovery["value"] is None:
        return "-"
    interval = f"{recovery['ci95'][0]:.1%} to {recovery['ci95'][1]:.1%}" if recovery["ci95"] else "no interval"
    return f"{recovery['value']:.1%} ({interval})"


def block() -> str:
    parts = []
    for name, title in TITLES.items():
        path = ROOT / "results" / f"{name}.json"
        if path.is_file():
            results = json.loads(path.read_text())
            report = checked_report(results["report"], path)
            parts += [f"### {title}", table(report, SHORT[name]), timing(results)]
        path = ROOT / "results" / f"latency-{name.replace('_', '-')}.json"
        if path.is_file():
            parts.append(latency_table(read_latency(path), SHORT_LATENCY))
    if (found := read("index-1m")) is not None:
        parts += [f"### {SEARCHED}", tables.text_to_ads(found)]
    return "\n\n".join(filter(None, parts)) or "Not measured yet."


def details() -> str:
    """results/README.md: every measurement with its notes and the command that takes it."""
    about = "Rendered by `measure/render_readme.py` from the JSON beside it; machine, versions and load are in that."
    parts = ["# Measured", about]
    for name, title in TITLES.items():
        if (found := read(name)) is not None:
            report = checked_report(found["report"], ROOT / "results" / f"{name}.json")
            parts += [f"## {title}", command(report), table(report, METRICS), summary(report), ensembles(report)]
            parts += [timing(found)]
    for name, title in LATENCY.items():
        path = ROOT / "results" / f"latency-{name}.json"
        if path.is_file():
            latency = read_latency(path)
            notes = [f"- {note}" for note in latency_report.notes(latency)]
            parts += [f"## {title}", command(latency), latency_table(latency), "\n".join(notes)]
    for name, title, rows in (
        ("compare", "Training and embedding beside the sentence-transformers scripts they replace", tables.compared),
        ("memory", "Memory of alignment as the query log grows", tables.remembered),
        ("prepare", "Raw logs with every kind of dirt through hlm prepare", tables.prepared),
        ("first-student", "From raw files to a first student and a dry run", tables.first_students),
        ("index-1m", SEARCHED, tables.searched),
        ("index-70k", "From text to ads: 70,000 ads on one thread", tables.searched),
        ("living", "A catalogue that changes while it is searched", tables.living),
        ("index-peers", "The index beside other engines, on one thread", tables.beside),
        ("index-build", "Building the index of ten million ads in 4 GiB", tables.grown),
        ("index-widths", "Narrower and coarser vectors, and a billion ads", tables.widened),
        ("install", "What an install takes, and how fast it starts", tables.light),
        ("gpu", "The published shapes on one GPU", tables.on_gpu),
        ("esci-gpu", "The recipe on shopping queries on one GPU", recipe_on_gpu),
        ("reliability", "Two writers on one output, and kills at random moments", tables.reliable),
        ("demo", "The demo as a visitor meets it", tables.visited),
        ("hub-lfs", "Publishing and pulling with a fault at every request, over LFS", tables.published),
        ("hub-xet", "Publishing and pulling with a fault at every request, over Xet", tables.published),
    ):
        if (found := read(name)) is not None:
            parts += [f"## {title}", command(found), rows(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def recipe_on_gpu(found: dict[str, Any]) -> str:
    """The report of steps that ran on a GPU, and how long each took, its start included."""
    report = checked_report(found["report"], ROOT / "results" / "esci-gpu.json")
    seconds = ", ".join(f"{step} {took:.0f}" for step, took in found["seconds"].items())
    minutes = sum(found["seconds"].values()) / 60
    times = (
        f"At {found['max_seq_length']} tokens of an ad. In seconds, the start of each step included: {seconds}; "
        f"together {minutes:.1f} minutes on one {found['environment']['gpu']}. The data was made elsewhere; "
        f"{', '.join(found['left_out'])} did not run there."
    )
    return "\n\n".join([table(report, METRICS), summary(report), times])


def read(name: str) -> dict[str, Any] | None:
    path = ROOT / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def command(found: Mapping[str, Any]) -> str:
    """The command that takes the measurement again: the script is named where it lies now, whatever the JSON says."""
    line = found.get("command") or found.get("environment", {}).get("command")
    if not line:
        return ""
    script, _, arguments = line.partition(" ")
    here = Path("results/measure") / Path(script).name
    return f"`{f'python {here if (ROOT / here).is_file() else script} {arguments}'.strip()}`"


def timing(results: dict[str, Any]) -> str:
    if not results.get("timings", {}).get("in_one_run"):
        return ""  # steps were run again since: their times do not add up to a run
    times, environment = results["timings"], results["report"]["environment"]
    beside = f", {times['beside']}" if "beside" in times else ""  # written by hand
    return (
        f"All steps took {times['total_seconds'] / 60:.1f} minutes on {times['cores']} cores of "
        f"{environment['cpu']} and {times['peak_memory_gib']:.1f} GiB at the most{beside}."
    )


def latency_table(latency: LatencyReport, columns: list[str] | None = None) -> str:
    """latency.json as Markdown: the rows that recipes/benchmark.py prints; or these columns of them, and of what is
    below only what they need."""
    header, *rows = latency_report.rows(latency)
    places = [header.index(name) for name in columns or header]
    header, *rows = [[row[place] for place in places] for row in (header, *rows)]
    text = markdown(header, rows).replace("|---|---:|", "|---|---|", 1)
    environment = latency["environment"]
    ratios = "" if columns else f", ratios to {latency['reference']}"
    where = (
        f"Tokenisation included{ratios}, over {latency['queries']} queries in one run on {environment['cores']} cores "
        f"of {environment['cpu']}."
    )
    known = [f"{line}." for line in latency_report.known_before(latency) if not columns or "tokenised" in line]
    return "\n".join([text, "", " ".join([where, *known])])


def rendered(readme: str) -> str:
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{block()}\n{END}{rest.split(END)[1]}"


def keep(run: Path) -> None:
    """results/<name>.json of a run: its report, and the times of its steps where they were taken."""
    name = run.name.replace("_", "-")
    for source, target in (("latency", f"latency-{name}"), ("compare", "compare")):
        if (run / f"{source}.json").is_file():
            write_json(ROOT / "results" / f"{target}.json", json.loads((run / f"{source}.json").read_text()))
    if name in LATENCY and run.name not in TITLES:
        return
    if run.name not in TITLES:
        sys.exit(f"error: expected a run named {' or '.join(TITLES)}, found {run.name!r}; name it in TITLES")
    if not (run / "report.json").is_file():
        sys.exit(f"error: expected {run}/report.json, found none; run recipes/quickstart.py first")
    files = {"report": run / "report.json", "timings": run / "timings.json"}
    results = {what: json.loads(path.read_text()) for what, path in files.items() if path.is_file()}
    write_json(ROOT / "results" / f"{run.name}.json", results)


if __name__ == "__main__":
    for given in sys.argv[1:]:
        keep(Path(given))
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text()))
    (ROOT / "results/README.md").write_text(details())
