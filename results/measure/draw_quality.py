"""Draws results/quickstart.svg of the README, nDCG over latency, from the quickstart's results. It follows the reader's
light or dark colours.

    python results/measure/draw_quality.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 680, 450
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 94, 382  # the axes' ends, in units of the picture
ABOVE, BELOW = -40, 30  # where a point's name stands
# What each system of latency.json is called in the picture, the class of its colour, and where its name stands.
NAMES = {
    "teacher": ("teacher, sentence-transformers", "teacher", BELOW),
    "student": ("student, sentence-transformers", "student", ABOVE),
    "online": ("student, HLM", "online", ABOVE),
    "online_int8": ("student, HLM int8", "online", BELOW),
}
STYLE = """
  text { font: 17px -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; fill: #1f2328;
    paint-order: stroke; stroke: #ffffff; stroke-width: 6px }
  .name { font-weight: 600 }
  .small { font-size: 16px; fill: #59636e }
  .end { text-anchor: end }
  .middle { text-anchor: middle }
  .card { fill: #ffffff; stroke: #d1d9e0 }
  .grid { stroke: #d1d9e0 }
  .line { stroke: #9a6700; stroke-width: 2; stroke-dasharray: 7 6 }
  .teacher { fill: #0969da }
  .student { fill: #59636e }
  .online { fill: #1a7f37 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; stroke: #0d1117 }
    .small { fill: #b1bac4 }
    .card { fill: #0d1117; stroke: #3d444d }
    .grid { stroke: #3d444d }
    .line { stroke: #d29922 }
    .teacher { fill: #4493f8 }
    .student { fill: #b1bac4 }
    .online { fill: #3fb950 }
  }
"""


def quality_over_latency(latency: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """The picture as text: a point for each system of `latency` (latency.json) that NAMES has, at its p50 for one
    query and its nDCG, and a line for BM25 of `report` (report.json)."""
    metric = f"ndcg@{report['k']}"
    points = {
        name: (system["latency_ms"]["all"]["p50"], system["quality"]["ndcg"])
        for name, system in latency["systems"].items()
        if name in NAMES
    }
    bm25 = report["systems"]["bm25"][metric]
    low, high = math.floor(10 * bm25) / 10, math.ceil(10 * max(value for _, value in points.values())) / 10
    decades = range(
        math.floor(math.log10(min(ms for ms, _ in points.values()))),
        math.ceil(math.log10(max(ms for ms, _ in points.values()))) + 1,
    )

    def x(ms: float) -> float:
        share = (math.log10(ms) - decades[0]) / (decades[-1] - decades[0])
        return LEFT + share * (WIDTH - RIGHT - LEFT)

    def y(value: float) -> float:
        return BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP)

    parts = [
        f'<text class="name" x="24" y="36">nDCG@{report["k"]}, higher is better</text>',
        f'<text class="small middle" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{BOTTOM + 50}">'
        f"milliseconds for one query (p50), on {latency['environment']['cores']} cores; left is better</text>",
    ]
    for tenth in range(round(10 * low), round(10 * high) + 1):
        at = y(tenth / 10)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="small end" x="{LEFT - 10}" y="{at + 6:.1f}">{tenth / 10:.1f}</text>')
    for decade in decades:
        at = x(10**decade)
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{BOTTOM}"/>')
        parts.append(f'<text class="small middle" x="{at:.1f}" y="{BOTTOM + 24}">{10**decade:g}</text>')
    parts.append(f'<path class="line" d="M{LEFT} {y(bm25):.1f}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="end" x="{WIDTH - RIGHT - 8}" y="{y(bm25) - 10:.1f}">BM25 {bm25:.3f}</text>')
    for name, (ms, value) in points.items():
        parts += _point(name, ms, value, x(ms), y(value))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="title">\n'
        f'<title id="title">nDCG@{report["k"]} over latency of one query: '
        + "; ".join(f"{NAMES[name][0]} {value:.3f} in {ms:.2f} ms" for name, (ms, value) in points.items())
        + f"; BM25 {bm25:.3f}</title>\n<style>{STYLE}</style>\n"
        f'<rect class="card" x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="12"/>\n{body}\n</svg>\n'
    )


def _point(name: str, ms: float, value: float, x: float, y: float) -> list[str]:
    """A mark, with the system's name and figures over or under it."""
    label, colour, offset = NAMES[name]
    far = x > (LEFT + WIDTH - RIGHT) / 2
    anchor, at = (" end", min(x + 150, WIDTH - RIGHT - 8)) if far else ("", x - 8)
    return [
        f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="8"/>',
        f'<text class="name{anchor}" x="{at:.1f}" y="{y + offset:.1f}">{label}</text>',
        f'<text class="small{anchor}" x="{at:.1f}" y="{y + offset + 21:.1f}">{ms:.2f} ms, {value:.3f}</text>',
    ]


def picture() -> str:
    latency, quality = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("latency-quickstart", "quickstart")
    )
    return quality_over_latency(latency, quality["report"])


if __name__ == "__main__":
    (RESULTS / "quickstart.svg").write_text(picture())
