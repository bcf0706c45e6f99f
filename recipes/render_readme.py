"""Writes the results table of README.md from results/*.json, between its markers.

    python recipes/render_readme.py runs/quickstart

Folders given are kept first: report.json and timings.json of runs/<name> become results/<name>.json, latency.json
becomes results/latency-<name>.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hlm import latency_report
from hlm.artefacts import write_json

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
RECOVERED = ("precision@10", "ndcg@10", "condensed_ndcg@10")
TITLES = {"quickstart": "Sample catalogue", "electronics": "Electronics, judged by people"}


def table(report: dict[str, Any]) -> str:
    """One report as Markdown: a row a system, recovery of the refined student below."""
    columns = ["ndcg@10", "condensed_ndcg@10", "judged@10", "precision@10", "recall@100", "mrr@10", "overlap@10"]
    columns = [name for name in columns if any(name in row for row in report["systems"].values())]
    lines = ["| system | " + " | ".join(columns) + " | recovery of ndcg@10 | parameters (without embeddings) |"]
    lines.append("|---|" + "---:|" * (len(columns) + 2))
    for name, row in report["systems"].items():
        cells = [f"{row[column]:.3f}" if row.get(column) is not None else "-" for column in columns]
        size = "-"
        if row["params_total"]:
            size = f"{row['params_total'] / 1e6:.1f}M ({row['params_non_embedding'] / 1e6:.1f}M)"
        kept = report.get("recovery_by_system", {}).get(name, {}).get("ndcg@10")
        lines.append(f"| {name} | " + " | ".join([*cells, percent(kept) if kept else "-", size]) + " |")
    found = [f"{metric} {percent(report['recovery'][metric])}" for metric in RECOVERED if metric in report["recovery"]]
    if found:
        lines.append("\nRecovery of the student: " + ", ".join(found) + ".")
    if report.get("overlap@10") is not None:
        lines.append(f"\nOf the student's ten best ads, {report['overlap@10']:.1%} are among the teacher's ten.")
    return "\n".join(lines)


def percent(recovery: dict[str, Any]) -> str:
    low, high = recovery["ci95"]
    return f"{recovery['value']:.1%} ({low:.1%} to {high:.1%})"


def block() -> str:
    parts = []
    for name, title in TITLES.items():
        path = ROOT / "results" / f"{name}.json"
        if path.is_file():
            results = json.loads(path.read_text())
            parts.append(f"### {title}\n\n{table(results['report'])}\n\n{timing(results)}".rstrip())
        path = ROOT / "results" / f"latency-{name}.json"
        if path.is_file():
            parts.append(latency_table(json.loads(path.read_text())))
    return "\n\n".join(parts) or "Not measured yet."


def timing(results: dict[str, Any]) -> str:
    if not results.get("timings", {}).get("in_one_run"):
        return ""  # steps were run again since: their times do not add up to a run
    times, environment = results["timings"], results["report"]["environment"]
    return (
        f"All steps took {times['total_seconds'] / 60:.1f} minutes on {times['cores']} cores of "
        f"{environment['cpu']} and {times['peak_memory_gib']:.1f} GiB at the most."
    )


def latency_table(latency: dict[str, Any]) -> str:
    """latency.json as Markdown: the rows and notes that recipes/benchmark.py prints."""
    header, *rows = latency_report.rows(latency)
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    lines.insert(1, "|---|---|" + "---:|" * (len(header) - 2))
    environment = latency["environment"]
    where = (
        f"Tokenisation included, ratios to {latency['reference']}, over {latency['queries']} queries in one run on "
        f"{environment['cores']} cores of {environment['cpu']}."
    )
    return "\n".join([*lines, "", where, "", *(f"- {note}" for note in latency_report.notes(latency))])


def rendered(readme: str) -> str:
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{block()}\n{END}{rest.split(END)[1]}"


def keep(run: Path) -> None:
    """results/<name>.json of a run: its report, and the times of its steps where they were taken."""
    if run.name not in TITLES:
        sys.exit(f"error: expected a run named {' or '.join(TITLES)}, found {run.name!r}; name it in TITLES")
    if not (run / "report.json").is_file():
        sys.exit(f"error: expected {run}/report.json, found none; run recipes/quickstart.py first")
    files = {"report": run / "report.json", "timings": run / "timings.json"}
    results = {what: json.loads(path.read_text()) for what, path in files.items() if path.is_file()}
    write_json(ROOT / "results" / f"{run.name}.json", results)
    if (run / "latency.json").is_file():
        latency = json.loads((run / "latency.json").read_text())
        write_json(ROOT / "results" / f"latency-{run.name}.json", latency)


if __name__ == "__main__":
    for given in sys.argv[1:]:
        keep(Path(given))
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text()))
