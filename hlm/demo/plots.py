"""A run's quality and latency as charts of HTML: they follow the page's theme, and no label covers another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from hlm.demo.page import shown
from hlm.report_types import LatencyReport, Recovery, Report

KINDS = {"teacher": "hlm-teacher", "bm25": "hlm-other", "backbone": "hlm-other"}  # every other system is a student


def quality_charts(report: Report | None) -> str:
    """nDCG of every system and what the students recover of the teacher's, from a run's report.json."""
    if report is None:
        return _missing("report.json")
    k = report["k"]
    metric = f"ndcg@{k}"
    heights = {name: system[metric] for name, system in report["systems"].items()}
    top = max(heights.values()) or 1.0
    kinds = {name: _kind(name) for name in heights} | dict.fromkeys(report.get("fusions", ()), "hlm-other")
    bars = [(name, _bar(kinds[name], value / top), f"<b>{value:.3f}</b>") for name, value in heights.items()]
    title = f"nDCG@{k} over {report['queries']:,} {report['split']} queries"
    charts = _chart(title, "", bars)
    kept = {name: metrics[metric] for name, metrics in report["recovery_by_system"].items()}
    if kept:
        known = [found for found in kept.values() if found["value"] is not None]
        ends = [end for found in known for end in (found["value"], *(found["ci95"] or ()))]
        place = _scale([*ends, 1.0])
        note = "with its paired-bootstrap 95% interval; the line is the teacher, 100%"
        note += "".join(f"; {name}: {found['reason']}" for name, found in kept.items() if "reason" in found)
        ranges = [(name, *_recovery(kinds[name], found, place)) for name, found in kept.items()]
        charts += _chart(f"Recovery of the teacher's nDCG@{k}", note, ranges)
    return f'<div class="hlm">{charts}</div>'


def _recovery(kind: str, found: Recovery, place: Callable[[float], float]) -> tuple[str, str]:
    if found["value"] is None:
        return _range(kind, None, line=place(1.0)), "<b>undefined</b>"
    low, high = found["ci95"] or (found["value"], found["value"])
    interval = f"{low:.1%} to {high:.1%}" if found["ci95"] else "no interval"
    places = place(low), place(found["value"]), place(high)
    return _range(kind, places, line=place(1.0)), f"<b>{found['value']:.1%}</b> {interval}"


def latency_charts(latency: LatencyReport | None) -> str:
    """Latency of one query and the best throughput of every system, from a run's latency.json."""
    if latency is None:
        return _missing("latency.json")
    systems = latency["systems"]
    times = {name: system["latency_ms"]["all"] for name, system in systems.items()}
    place = _scale([math.log(time[part]) for time in times.values() for part in ("p50", "p99")])
    ranges = []
    for name, time in times.items():
        p50, p99 = (place(math.log(time[part])) for part in ("p50", "p99"))
        text = f"<b>{_ms(time['p50'])} ms</b> p99 {_ms(time['p99'])}"
        ranges.append((name, _range(_kind(name), (p50, p50, p99)), text))
    cores = f"{latency['environment'].get('cpu')}, {latency['environment'].get('cores')} cores"
    where = latency["environment"].get("gpu") or cores
    note = f"p50 to p99 over {latency['queries']:,} queries, on a logarithmic scale; {where}"
    if known := [name for name, system in systems.items() if system.get("new_words")]:
        note += f"; {', '.join(known)} had seen the words of these queries before"
    if any(time.get("over") == "all" for time in times.values()):
        note += "; other programs took part of the processor meanwhile"
    rates = {name: system["best_queries_per_s"] for name, system in systems.items()}
    most = max(rates.values())
    bars = [(name, _bar(_kind(name), rate / most), f"<b>{rate:,.0f}</b> queries/s") for name, rate in rates.items()]
    charts = _chart("Latency of one query", note, ranges)
    charts += _chart("Throughput", "each system at the batch size that suits it best", bars)
    return f'<div class="hlm">{charts}</div>'


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _scale(ends: Sequence[float]) -> Callable[[float], float]:
    """value -> its place from 0.02 to 0.98 between the least and the greatest of the ends, so that a dot is whole."""
    low, high = min(ends), max(ends)
    return lambda value: 0.5 if high == low else 0.02 + 0.96 * (value - low) / (high - low)


def _chart(title: str, note: str, rows: Sequence[tuple[str, str, str]]) -> str:
    cells = "".join(
        f'<tr><th scope="row">{shown(name.replace("_", " "), 60)}</th>'
        f'<td class="hlm-track">{mark}</td><td>{text}</td></tr>'
        for name, mark, text in rows
    )
    said = f"<p>{shown(note, 600)}</p>" if note else ""
    return f'<section class="hlm-chart"><h2>{shown(title, 120)}</h2>{said}<table>{cells}</table></section>'


def _bar(kind: str, share: float) -> str:
    return f'<div><i class="hlm-bar {kind}" style="width:{share:.1%}"></i></div>'


def _range(kind: str, places: tuple[float, float, float] | None, line: float | None = None) -> str:
    """A dot at the middle one of three places, and what lies between the others."""
    marks = "" if line is None else f'<i class="hlm-line" style="left:{line:.1%}"></i>'
    if places:
        low, middle, high = places
        marks += f'<i class="hlm-span {kind}" style="left:{low:.1%};width:{high - low:.1%}"></i>'
        marks += f'<i class="hlm-dot {kind}" style="left:{middle:.1%}"></i>'
    return f"<div>{marks}</div>"


def _kind(name: str) -> str:
    return KINDS.get(name, "hlm-student")


def _missing(file: str) -> str:
    return f'<div class="hlm"><p class="hlm-note">No {file} of this run: `make quickstart` writes one.</p></div>'


CSS = """
.hlm .hlm-chart { margin: 0 0 28px; max-width: 860px; }
.hlm .hlm-chart table { width: 100%; border-collapse: collapse; margin: 8px 0 0; }
.hlm .hlm-chart table, .hlm .hlm-chart table * { border: 0; }
.hlm .hlm-chart th, .hlm .hlm-chart td { padding: 5px 12px 5px 0; text-align: left; font-weight: 400;
  vertical-align: middle; overflow-wrap: normal; }
.hlm .hlm-chart td:last-child { width: 1%; white-space: nowrap; padding-right: 0; }
.hlm .hlm-chart td b { display: inline-block; min-width: 58px; font-weight: 650; }
.hlm .hlm-chart th { width: 142px; }
.hlm-track div { position: relative; height: 16px; }
.hlm-track i { position: absolute; display: block; background: var(--hlm-colour); }
.hlm-bar { left: 0; top: 1px; height: 14px; border-radius: 3px; min-width: 2px; }
.hlm-span { top: 6.5px; height: 3px; border-radius: 2px; opacity: .65; min-width: 2px; }
.hlm-dot { top: 3px; width: 10px; height: 10px; margin-left: -5px; border-radius: 50%; }
.hlm-track .hlm-line { top: -5px; bottom: -5px; width: 0; background: none;
  border-left: 1.5px dashed var(--hlm-teacher) !important; }
.hlm { --hlm-teacher: #b4610f; --hlm-student: #1b6ca8; --hlm-other: #76828f; }
.dark .hlm { --hlm-teacher: #f0a860; --hlm-student: #6cb4ec; --hlm-other: #93a0ae; }
.hlm-teacher { --hlm-colour: var(--hlm-teacher); }
.hlm-student { --hlm-colour: var(--hlm-student); }
.hlm-other { --hlm-colour: var(--hlm-other); }
@media (max-width: 640px) {
  .hlm .hlm-chart th { width: 92px; }
  .hlm .hlm-chart td b { display: block; }
}
"""
