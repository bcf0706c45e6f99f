"""A latency report as a printed table and as a plot of latency against quality."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from hlm.artefacts import atomic_file
from hlm.evaluation.report import align
from hlm.report_types import LatencyReport, MeasuredSystem, Percentile, Rates

FEW_SAMPLES = 100  # a p99 of fewer is little more than the slowest one


def rows(report: LatencyReport) -> list[list[str]]:
    """The table, header first: one row a system, "-" where a figure was not taken. For text and Markdown alike.

    "!" marks figures without a clean sample, "~" those derived from fewer layers, "*" those that count more
    multiply-adds than a system does; `notes` explains them.
    """
    systems = report["systems"]
    columns: list[tuple[str, Any]] = [
        ("backend", lambda s: " ".join(str(s[key]) for key in ("backend", "engine", "precision", "dtype") if key in s)),
        ("text to ads", lambda s: s["index"]["factory"] if "index" in s else None),
        ("p50 ms", lambda s: _milliseconds(s, "p50")),
        ("p95 ms", lambda s: _milliseconds(s, "p95")),
        ("p99 ms", lambda s: _milliseconds(s, "p99")),
        ("p50 x", lambda s: f"{s['ratio']['p50']:.1f}x"),
        (
            "queries/s",
            lambda s: (
                f"{s['best_queries_per_s']:,.0f}" if s["best_queries_per_s"] >= 10 else f"{s['best_queries_per_s']:.2g}"
            ),
        ),
        ("batch", lambda s: str(s["best_batch_size"])),
        ("throughput x", lambda s: f"{s['ratio']['throughput']:.1f}x"),
        ("x floor", lambda s: f"{s['floor']['over']:.1f}x{_looks_up(s)}" if s.get("floor") else None),
        ("of GEMM rate", lambda s: f"{s['floor']['gemm_share']:.0%}{_looks_up(s)}" if s.get("floor") else None),
        ("cold start s", lambda s: f"{s['cold_start']['total_s']:.1f}" if s.get("cold_start") else None),
        ("peak MiB", lambda s: f"{s['cold_start']['peak_memory_mib']:,.0f}" if s.get("cold_start") else None),
        ("nDCG", lambda s: f"{s['quality']['ndcg']:.4f}" if s.get("quality") else None),
        (
            "recovery",
            lambda s: f"{s['quality']['recovery']:.1%}" if s.get("quality", {}).get("recovery") is not None else None,
        ),
    ]
    cells = {title: [cell(system) for system in systems.values()] for title, cell in columns}
    cells = {title: found for title, found in cells.items() if any(found)}
    table = [["system", *cells]]
    for row, name in enumerate(systems):
        table.append([name, *(found[row] or "-" for found in cells.values())])
    return table


def _looks_up(system: MeasuredSystem) -> str:
    return "*" if "left" in system["floor"] else ""


def _milliseconds(system: MeasuredSystem, percentile: Percentile, length: str = "all") -> str | None:
    found = system["latency_ms"].get(length)
    if found is None:
        return None
    mark = ("!" if found["over"] == "all" else "") + ("~" if "derived" in system else "")
    return f"{found[percentile]:.{2 if found[percentile] < 100 else 0}f}{mark}"


def length_rows(report: LatencyReport) -> list[list[str]]:
    """p50 in ms by the query's length in words, header first."""
    table = [["p50 ms by words", *report["lengths"]]]
    for name, system in report["systems"].items():
        table.append([name, *(_milliseconds(system, "p50", length) or "-" for length in report["lengths"])])
    return table


def notes(report: LatencyReport) -> list[str]:
    """What a reader must know beside the figures."""
    found = []
    limit = report["settings"]["max_other_load"]
    flagged = sum(block["contaminated"] for block in report["blocks"])
    if any(block["other_load"] is None for block in report["blocks"]):
        found.append("what other processes took of the CPUs could not be read here: no sample is flagged")
    elif flagged:
        found.append(
            f"{flagged} of {len(report['blocks'])} blocks are contaminated: others took more than {limit:.0%} of the "
            "CPUs; their samples are in the JSON and count only where there is no clean one (marked !)"
        )
    else:
        found.append(f"clean: in no block did others take more than {limit:.0%} of the CPUs")
    if report.get("rates"):
        found.append(_floor_note(report["rates"], limit))
    found += known_before(report)
    for name, system in report["systems"].items():
        found += [*_measured_notes(name, system, limit), *_quality_notes(name, system)]
    return found


def _measured_notes(name: str, system: MeasuredSystem, limit: float) -> list[str]:
    """How far a system's times can be trusted."""
    found = []
    latency = system["latency_ms"]["all"]
    usable = latency["samples"] - (latency["contaminated"] if latency["over"] == "clean" else 0)
    if "derived" in system:
        found.append(f"~ {name}: {system['derived']}")
    if index := system.get("index"):
        recall = f", of recall {index['recall']:.4f}" if "recall" in index else ""
        found.append(
            f"{name}: from text to {index['k']} ads of {index['ads']:,}, ids included, in {index['factory']}{recall}"
        )
    if system.get("weights") == "random":
        found.append(f"{name}: random weights, {system['input']}")
    if usable < FEW_SAMPLES:
        found.append(f"{name}: p99 of {usable} samples is little more than the slowest of them")
    start = system.get("cold_start")
    if start and (load := start.get("other_load") or 0) > limit:
        text = f"{name}: others took {load:.0%} of the CPUs during its cold start"
        found.append(text + (", which does not count" if start.get("over") == "clean" else ""))
    return found


def _quality_notes(name: str, system: MeasuredSystem) -> list[str]:
    """Where a system's quality comes from, and how far its vectors are those of another."""
    found = []
    quality = system.get("quality", {})
    if (of := quality.get("system", name)) != name:
        found.append(f"{name}: nDCG and recovery are those of '{of}' in the report")
    if quality.get("measured"):
        found.append(f"{name}: nDCG measured in this run over the whole split, recovery against the report's teacher")
    if reason := quality.get("recovery_reason"):
        found.append(f"{name}: recovery: {reason}")
    if "agreement" in system:
        same = system["agreement"]
        text = f"{name}: vectors of {same['with']} within a cosine of {same['min_cosine']:.6f}"
        if "overlap" in same:
            text += f", {same['overlap']:.2%} of their first {same['k']} ads in common"
        if "ratio" in same:
            text += f"; {same['ratio']['p50']:.1f}x lower p50, {same['ratio']['throughput']:.1f}x its throughput"
        found.append(text)
    return found


def known_before(report: LatencyReport) -> list[str]:
    """What systems did not compute because they knew it: no table may stand without these sentences."""
    found = []
    for name, system in report["systems"].items():
        floor = system.get("floor")
        if floor and (left := floor.get("left")):
            share = 1 - left["gflop"] / floor["gflop"]
            found.append(
                f"{name}*: floor and rate count all multiply-adds of the model, of which {share:.0%} are looked up; "
                f"of those that are left, it is {left['over']:.1f}x and {left['gemm_share']:.0%}"
            )
        if new := system.get("new_words"):
            # A ratio alone: these times are of a measurement of their own, beside the table's p50.
            found.append(
                f"{name}: had tokenised every word of these queries before; where all words of a query are new, it "
                f"takes {new['p50_ms'] / new['known_p50_ms']:.1f} times as long"
            )
    return found


def _floor_note(rates: Rates, limit: float) -> str:
    streams = [f"{rate:.3g} GB/s over {size} MiB" for size, rate in rates["bandwidth_gb_per_s"].items()]
    products = [f"{rate:.3g} GFLOP/s in {precision}" for precision, rate in rates["gemm_gflop_per_s"].items()]
    text = "x floor: p50 over what streaming the body's weights or its multiply-adds would take at the rates measured "
    text += f"in this run, weights at {', '.join(streams)}, large matrix products at {', '.join(products)}; of GEMM "
    text += "rate: at the best batch, for the tokens that are there"
    if (rates["other_load"] or 0) > limit:
        text += f" (others took {rates['other_load']:.0%} of the CPUs meanwhile: floors may be too high)"
    return text


def format_table(report: LatencyReport) -> str:
    lengths = ", ".join(f"{words}: {count}" for words, count in report["lengths"].items())
    title = f"{report['queries']} queries of {report['data']} (by words {lengths}), {report['settings']['repeats']} "
    title += f"interleaved repeats, ratios to {report['reference']}"
    lines = [title, "", *align(rows(report), left=2), "", *align(length_rows(report)), ""]
    return "\n".join(lines + [f"- {note}" for note in notes(report)])


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of (latency, quality) points that no other beats in both, fastest first."""
    front: list[str] = []
    for name, (_, value) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if not front or value > points[front[-1]][1]:
            front.append(name)
    return front


def plot(report: LatencyReport, path: str | Path) -> None:
    """Draws p50 at batch 1 against nDCG with the Pareto front (p50 to p99 alone where no quality is known), and
    throughput over batch sizes, as a PNG. A system has one colour and one shape in both, which the legend names: names
    beside the points would cover others. The reference is a square."""
    systems = report["systems"]
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    axes = figure.subplots(1, 2)
    palette = colormaps["tab10" if len(systems) <= 10 else "tab20"]
    colours = {name: palette(place) for place, name in enumerate(systems)}
    shapes = itertools.cycle("o^Dv<>PX*")
    markers = {name: "s" if name == report["reference"] else next(shapes) for name in systems}
    points = {
        name: (system["latency_ms"]["all"]["p50"], system["quality"]["ndcg"])
        for name, system in systems.items()
        if system.get("quality")
    }
    if points:
        _plot_quality(axes[0], report, points, colours, markers)
    else:
        _plot_spread(axes[0], report, colours, markers)
    axes[0].set_xscale("log")
    axes[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].xaxis.set_minor_formatter(NullFormatter())
    axes[0].set_xlabel("latency at batch 1, ms" + (" (p50)" if points else " (p50 to p99)"))
    for name, system in systems.items():
        sizes = sorted(map(int, system["throughput"]))
        rates = [system["throughput"][str(size)]["queries_per_s"] for size in sizes]
        line = "--" if "derived" in system else "-"
        axes[1].plot(sizes, rates, line, marker=markers[name], markersize=4, color=colours[name], label=name)
    sizes = sorted({int(size) for system in systems.values() for size in system["throughput"]})
    axes[1].set_xscale("log", base=2)
    axes[1].set_xticks(sizes, list(map(str, sizes)))
    axes[1].set_yscale("log")
    axes[1].set_xlabel("batch size")
    axes[1].set_ylabel("throughput, queries/s")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    cpu = report["environment"].get("gpu") or report["environment"].get("cpu")
    figure.suptitle(f"{report['data']}, {report['queries']} queries, {cpu}", fontsize=10)
    with atomic_file(path) as aside:
        figure.savefig(aside, dpi=150, format="png")


def _plot_quality(
    axis: Any,
    report: LatencyReport,
    points: Mapping[str, tuple[float, float]],
    colours: Mapping[str, Any],
    markers: Mapping[str, str],
) -> None:
    front = pareto(points)
    steps = list(zip(*(points[name] for name in front), strict=True))
    axis.plot(*steps, color="#9aa5b1", linewidth=1, drawstyle="steps-post", label="Pareto front")
    for name, (latency, value) in points.items():
        axis.scatter(latency, value, color=colours[name], marker=markers[name], s=36, zorder=3)
    metric = next(system["quality"]["metric"] for system in report["systems"].values() if system.get("quality"))
    axis.set_ylabel(metric.replace("ndcg", "nDCG"))
    axis.margins(x=0.2, y=0.25)
    if len(front) > 1:
        axis.legend(fontsize=8, frameon=False)


def _plot_spread(axis: Any, report: LatencyReport, colours: Mapping[str, Any], markers: Mapping[str, str]) -> None:
    for row, (name, system) in enumerate(report["systems"].items()):
        figures = system["latency_ms"]["all"]
        axis.plot([figures["p50"], figures["p99"]], [row, row], color=colours[name], alpha=0.5)
        axis.scatter(figures["p50"], row, color=colours[name], marker=markers[name], zorder=3)
    axis.set_yticks(range(len(report["systems"])), list(report["systems"]), fontsize=8)
    axis.invert_yaxis()
