"""From runs to a report: report.json, a printed table, a plot and the scores of every query.

The names of systems and keys are fixed: cards, the README and CI read them.
"""

from __future__ import annotations

import datetime
import platform
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from matplotlib.figure import Figure

from hlm import __version__
from hlm.artefacts import HlmError, atomic_file
from hlm.evaluation import by_count
from hlm.evaluation.metrics import (
    Qrels,
    Run,
    Scores,
    length_slice,
    mean,
    metric_names,
    overlap,
    per_query,
    recovery,
    relevance_threshold,
    slices,
)
from hlm.evaluation.tables import contribution_rows, describe, percent, threshold_rows
from hlm.machine import cores, cpu_model, installed_versions
from hlm.redaction import without_secret_options
from hlm.report_types import SCHEMA_VERSION, Environment, FusionReport, Report

# Rows of every table, in this order. Students search the teacher's index with a query encoder of their own.
# `student_on_index` is the student again, in the index that goes online instead of an exact search.
# `static` looks up and averages token vectors.
STUDENTS = ("pruned", "aligned", "student", "student_on_index", "static", "contrastive_only")
SYSTEMS = ("bm25", "backbone", "teacher", *STUDENTS)

_PACKAGES = ["torch", "transformers", "sentence-transformers", "peft", "accelerate", "datasets", "faiss-cpu"]
_PACKAGES += ["faiss-gpu", "faiss-gpu-cu12", "pytrec-eval-terrier", "numpy"]


def build_report(
    runs: Mapping[str, Run],
    qrels: Qrels,
    *,
    dataset: str,
    split: str,
    parameters: Mapping[str, tuple[int, int]],
    texts: Mapping[str, str],
    kinds: Mapping[str, str] | None = None,
    patterns: Mapping[str, re.Pattern[str]] | None = None,
    fusions: Mapping[str, FusionReport] | None = None,
    k: int = 10,
    relevance_level: int | None = None,
    incomplete: bool = False,
    samples: int = 10_000,
    seed: int = 0,
    environment: Environment | None = None,
) -> tuple[Report, pa.Table]:
    """Scores every run and compares the students with the teacher.

    Args:
        runs: system name (one of `SYSTEMS` or of `fusions`) -> run over the queries of `qrels`.
        parameters: system name -> (all parameters, parameters outside embedding tables).
        texts: query id -> text, for the slices by length.
        kinds: query id -> kind, for the slices by kind; None where the data has no kinds.
        patterns: name of a slice -> what its queries match; what every system scores on them is in the report too.
        fusions: kept as they are; see `hlm.evaluation.contribution`.
        k, relevance_level, incomplete: see `hlm.evaluation.metrics.per_query`.
        samples, seed: of the bootstrap.
        environment: kept as it is; see `environment`.

    Returns:
        report: see `hlm.report_types.Report`. "recovery", "overlap@k" and "slices" compare `student` with `teacher`;
            empty (None for the overlap) where one of them is not among the runs. Every recovery is that of
            `hlm.evaluation.metrics.recovery`: None and a "reason" where it is undefined.
        scores: one row for each system and query: system, query_id, the metrics, and for students overlap@k.

    Raises:
        HlmError: an unknown system name, or what the metrics refuse.
    """
    order = (*SYSTEMS, *(fusions or {}))
    unknown = sorted(set(runs) - set(order))
    if unknown or not runs:
        raise HlmError(f"expected systems among {', '.join(SYSTEMS)}, found {', '.join(unknown) or 'none'}")
    runs = {name: {query: runs[name].get(query, {}) for query in qrels} for name in order if name in runs}
    level = relevance_threshold(qrels) if relevance_level is None else relevance_level
    scores = {
        name: per_query(run, qrels, k, relevance_level=level, incomplete=incomplete) for name, run in runs.items()
    }
    students = [name for name in STUDENTS if name in runs and "teacher" in runs]
    overlaps = {name: overlap(runs[name], runs["teacher"], k) for name in students}
    # judged@k says how much of a result is judged at all; a ratio of it would be no recovery.
    recovered = [metric for metric in metric_names(k, incomplete=incomplete) if metric != f"judged@{k}"]
    kept = {
        name: {m: recovery(scores[name][m], scores["teacher"][m], samples=samples, seed=seed) for m in recovered}
        for name in (*students, *(fusions or {} if "teacher" in runs else ()))
    }
    groups = _groups(qrels, texts, kinds)
    report: Report = {
        "schema_version": SCHEMA_VERSION,
        "dataset": dataset,
        "split": split,
        "k": k,
        "queries": len(qrels),
        "relevance_level": level,
        "systems": {
            name: _means(scores[name], overlaps.get(name), k)
            | {"params_total": parameters[name][0], "params_non_embedding": parameters[name][1]}
            for name in runs
        },
        "recovery": kept.get("student", {}),
        f"overlap@{k}": mean(overlaps["student"]) if "student" in overlaps else None,  # type: ignore[misc]
        "slices": _slices(groups, patterns or {}, texts, scores, overlaps, k=k, samples=samples, seed=seed),
        "recovery_by_system": kept,
        "environment": environment if environment is not None else {},
    }
    if fusions:
        report["fusions"] = dict(fusions)
    return report, _score_table(scores, overlaps, k)


def _slices(
    groups: Mapping[str, Mapping[str, str]],
    patterns: Mapping[str, re.Pattern[str]],
    texts: Mapping[str, str],
    scores: Mapping[str, dict[str, Scores]],
    overlaps: Mapping[str, Scores],
    *,
    k: int,
    samples: int,
    seed: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Student against teacher on groups of queries; of those that a pattern makes, every system's nDCG as well."""
    metric = f"ndcg@{k}"
    matched = {
        name: {query: "match" if pattern.search(texts[query]) else "others" for query in groups["length"]}
        for name, pattern in patterns.items()
    }
    found: dict[str, dict[str, dict[str, Any]]] = {}
    if "student" in overlaps:
        sides = scores["student"][metric], scores["teacher"][metric], overlaps["student"]
        found = {by: slices(of, *sides, k=k, samples=samples, seed=seed) for by, of in {**groups, **matched}.items()}
    for name, of in matched.items():
        found.setdefault(name, {group: {"n": n} for group, n in sorted(Counter(of.values()).items())})
        for group, figures in found[name].items():
            figures[metric] = {
                system: mean({query: value for query, value in every[metric].items() if of[query] == group})
                for system, every in scores.items()
            }
    return found


def _means(scores: Mapping[str, Scores], overlaps: Scores | None, k: int) -> dict[str, float]:
    """The mean of each metric over the queries, and of the overlap with the teacher where this is a student."""
    return {metric: mean(values) for metric, values in scores.items()} | (
        {f"overlap@{k}": mean(overlaps)} if overlaps is not None else {}
    )


def _groups(
    queries: Iterable[str], texts: Mapping[str, str], kinds: Mapping[str, str] | None
) -> dict[str, dict[str, str]]:
    """What queries are grouped by -> query id -> its group."""
    by_length = {"length": {query: length_slice(texts[query]) for query in queries}}
    return by_length if kinds is None else {"kind": {query: kinds[query] for query in queries}} | by_length


def _score_table(scores: Mapping[str, dict[str, Scores]], overlaps: Mapping[str, Scores], k: int) -> pa.Table:
    rows = [
        {"system": name, "query_id": query, f"overlap@{k}": overlaps.get(name, {}).get(query)}
        | {metric: of_query[query] for metric, of_query in values.items()}
        for name, values in scores.items()
        for query in next(iter(values.values()))
    ]
    metrics = list(next(iter(scores.values())))
    fields = [("system", pa.string()), ("query_id", pa.string())]
    fields += [(name, pa.float64()) for name in (*metrics, f"overlap@{k}")]
    return pa.Table.from_pylist(rows, schema=pa.schema(fields))


def format_table(report: Report) -> str:
    """The report as aligned plain text: one row a system, then the student's recovery."""
    k = report["k"]
    systems = report["systems"]
    metrics = [m for m in metric_names(k, incomplete=True) if m in next(iter(systems.values()))]
    header = ["system", "params", "non-emb", *metrics, f"overlap@{k}", "recovery of nDCG [95%]"]
    rows = [header]
    for name, values in systems.items():
        kept = report["recovery_by_system"].get(name, {}).get(f"ndcg@{k}")
        rows.append(
            [
                name,
                _millions(values["params_total"]),
                _millions(values["params_non_embedding"]),
                *(f"{values[metric]:.4f}" for metric in metrics),
                f"{values[f'overlap@{k}']:.4f}" if f"overlap@{k}" in values else "-",
                percent(kept) if kept else "-",
            ]
        )
    title = f"{report['dataset']}, split {report['split']}: {report['queries']} queries, "
    title += f"relevant from grade {report['relevance_level']}"
    text = [title, "", *align(rows)]
    if report["recovery"]:
        text += ["", "student / teacher:  " + "  ".join(f"{m} {percent(r)}" for m, r in report["recovery"].items())]
    text += undefined(report) + by_count.lines(report)
    for name, fusion in report.get("fusions", {}).items():
        text += ["", describe(name, fusion, k), "", *align(contribution_rows(fusion, k))]
    if thresholds := report.get("thresholds"):
        title = f"Least scores chosen on {thresholds['split']} so that {thresholds['wanted_precision']:.0%} of the ads "
        text += ["", f"{title}shown are relevant, on {report['split']}:", "", *align(threshold_rows(thresholds))]
    for name in _patterns(report):
        text += ["", f"nDCG@{k} of the queries in slice {name}:", "", *align(_pattern_rows(report, name))]
    return "\n".join(text)


def _patterns(report: Report) -> list[str]:
    """The slices in which every system's nDCG is known."""
    metric = f"ndcg@{report['k']}"
    return [name for name, groups in report["slices"].items() if any(metric in group for group in groups.values())]


def _pattern_rows(report: Report, name: str) -> list[list[str]]:
    groups, metric = report["slices"][name], f"ndcg@{report['k']}"
    rows = [["system", *(f"{group} ({figures['n']})" for group, figures in groups.items())]]
    for system in report["systems"]:
        rows.append([system, *(f"{figures[metric][system]:.4f}" for figures in groups.values())])
    return rows


def undefined(report: Report) -> list[str]:
    """A line for each system whose recovery, or its interval, is undefined: the metrics and the reason."""
    lines = []
    for name, kept in report["recovery_by_system"].items():
        reasons: dict[str, list[str]] = {}
        for metric, found in kept.items():
            if "reason" in found:
                reasons.setdefault(found["reason"], []).append(metric)
        lines += [f"{name}, recovery of {', '.join(metrics)}: {reason}" for reason, metrics in reasons.items()]
    return lines


def align(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a plain-text table, header first and ruled off; the first `left` columns start at the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _millions(count: float) -> str:
    return f"{count / 1e6:.1f}M" if count else "-"


def plot(report: Report, path: str | Path) -> None:
    """Draws nDCG@k of every system and, where there are students, their recovery with 95% intervals, as a PNG."""
    k = report["k"]
    names = list(report["systems"])
    students = [name for name in STUDENTS if name in report["recovery_by_system"]]
    figure = Figure(figsize=(11 if students else 6.5, 4.4), layout="constrained")
    axes = figure.subplots(1, 2 if students else 1, squeeze=False, width_ratios=[1.15, 1] if students else None)[0]

    heights = [report["systems"][name][f"ndcg@{k}"] for name in names]
    known = (
        {"teacher": "#d98324"}
        | dict.fromkeys(STUDENTS, "#1b6ca8")
        | dict.fromkeys(report.get("fusions", ()), "#5b8c5a")
    )
    colours = [known.get(name, "#9aa5b1") for name in names]
    bars = axes[0].bar(range(len(names)), heights, color=colours)
    axes[0].bar_label(bars, fmt="%.3f", padding=2, fontsize=9)
    axes[0].set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=9)
    axes[0].set_ylabel(f"nDCG@{k}")
    axes[0].set_ylim(0, max(heights) * 1.12 or 1)
    axes[0].set_title(f"{report['split']}, {report['queries']} queries", fontsize=10)
    if students:
        _plot_recovery(axes[1], report, students)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(str(report["dataset"]), fontsize=11)
    with atomic_file(path) as aside:
        figure.savefig(aside, dpi=150, format="png")


def _plot_recovery(axis: Any, report: Report, students: list[str]) -> None:
    k = report["k"]
    tops: list[float] = []
    bottoms: list[float] = []
    for offset, metric, colour in ((-0.2, f"ndcg@{k}", "#1b6ca8"), (0.2, f"precision@{k}", "#7fb3d5")):
        for place, name in enumerate(students):
            kept = report["recovery_by_system"][name][metric]
            if kept["value"] is None:
                axis.annotate("-", (place + offset, 0.02), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
                continue
            value = 100 * kept["value"]
            low, high = (100 * bound for bound in kept["ci95"] or (kept["value"], kept["value"]))
            # A bootstrap interval of very few queries need not contain the value itself: bars of no negative length.
            low, high = min(low, value), max(high, value)
            whiskers = {"yerr": [[value - low], [high - value]], "capsize": 3} if kept["ci95"] else {}
            axis.bar(place + offset, value, 0.38, color=colour, **whiskers)
            point = (place + offset, high)
            axis.annotate(f"{value:.1f}", point, (0, 3), textcoords="offset points", ha="center", fontsize=8)
            tops, bottoms = [*tops, high], [*bottoms, low]
        axis.bar(0, 0, color=colour, label=f"nDCG@{k}" if metric.startswith("ndcg") else f"P@{k}")
    axis.axhline(100, color="#d98324", linewidth=1.2, linestyle="--", label="teacher")
    axis.set_xticks(range(len(students)), [name.replace("_", "\n") for name in students], fontsize=9)
    axis.set_xlim(-0.5, len(students) - 0.5)
    axis.set_ylabel("recovery, % of the teacher")
    # From 0 the bars of good students could not be told apart; the axis says where it starts.
    floor = max(0, 10 * int(min(bottoms, default=0) // 10) - 10)
    top = max([*tops, 100])
    axis.set_ylim(floor, top + 0.16 * (top - floor))
    axis.set_title("with paired-bootstrap 95% intervals" + (f"; axis from {floor}%" if floor else ""), fontsize=10)
    axis.legend(fontsize=8, ncols=3, loc="upper center", frameon=False)


def command_line(script: str, argv: Sequence[str] | None) -> str:
    """The command that `main(argv)` of a recipe stands for, as a shell reads it; secrets are struck out."""
    return shlex.join(without_secret_options([script, *(sys.argv[1:] if argv is None else argv)]))


def environment(command: str) -> Environment:
    """Where a report comes from: command, date (UTC), git commit, package versions, processor, cores, GPU."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"hlm": __version__} | installed_versions(_PACKAGES),
        "cpu": cpu_model(),
        "cores": cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _git_commit() -> str | None:
    """The checkout's commit, with "-dirty" where tracked files differ from it; None outside a checkout."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():  # installed: whatever repository lies around it is another project's
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git on this machine
        return None
    return found.stdout.strip() or None
