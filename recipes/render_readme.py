"""Writes the results table of README.md from results/*.json, between its markers.

    python recipes/render_readme.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
TITLES = {"quickstart": "Sample catalogue", "electronics": "Electronics, judged by people"}


def table(report: dict[str, Any]) -> str:
    """One report as Markdown: a row a system, recovery of the refined student below."""
    columns = ["ndcg@10", "condensed_ndcg@10", "judged@10", "precision@10", "recall@100", "mrr@10"]
    columns = [name for name in columns if any(name in row for row in report["systems"].values())]
    lines = ["| system | " + " | ".join(columns) + " | parameters (without embeddings) |"]
    lines.append("|---|" + "---|" * (len(columns) + 1))
    for name, row in report["systems"].items():
        cells = [f"{row[column]:.3f}" if row.get(column) is not None else "-" for column in columns]
        size = "-"
        if row["params_total"]:
            size = f"{row['params_total'] / 1e6:.1f}M ({row['params_non_embedding'] / 1e6:.1f}M)"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {size} |")
    for metric in ("precision@10", "ndcg@10"):
        if metric in report["recovery"]:
            found = report["recovery"][metric]
            low, high = found["ci95"]
            lines.append(f"\nRecovery of {metric}: {found['value']:.1%} ({low:.1%} to {high:.1%}).")
    if report.get("overlap@10"):
        lines.append(f"\nThe student's ten best ads are the teacher's in {report['overlap@10']['student']:.0%} of places.")
    return "\n".join(lines)


def block() -> str:
    parts = []
    for name, title in TITLES.items():
        path = ROOT / "results" / f"{name}.json"
        if path.is_file():
            results = json.loads(path.read_text())
            parts.append(f"### {title}\n\n{table(results['report'])}\n\n{timing(results)}".rstrip())
    return "\n\n".join(parts) or "Not measured yet."


def timing(results: dict[str, Any]) -> str:
    if "timings" not in results:
        return ""
    times, environment = results["timings"], results["report"]["environment"]
    return (
        f"All steps took {times['total_seconds'] / 60:.1f} minutes on {times['cores']} cores of "
        f"{environment['cpu']} and {times['peak_memory_gib']:.1f} GiB at the most."
    )


def rendered(readme: str) -> str:
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{block()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text()))
