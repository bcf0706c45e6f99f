"""What narrower and coarser vectors cost: recall, bytes an ad and time of each width and kind of index, and what these
bytes come to at a billion ads.

    python results/measure/measure_index_widths.py --vectors VECTORS --online ONLINE --data DATA --work WORK \\
        --output results/index-widths.json

VECTORS, ONLINE and DATA are as of results/measure/measure_index.py. Each index is searched at the least effort that
finds `target_recall` of what exact search finds at its own width. The recall that is written is of the exact neighbours
at full width: it has both losses, the width's and the index's. One thread. What is built is kept under WORK.

Draws a plot beside `output`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import faiss
import numpy as np
import torch

from hlm.artefacts import write_json
from hlm.config import parse, run_recipe
from hlm.data.contract import load
from hlm.evaluation.report import command_line, environment
from hlm.indexes import tuning
from hlm.indexes.index_parts import normalised
from hlm.indexes.recall import exact_neighbours, recalls
from hlm.machine import facts
from hlm.serving.query_encoder import QueryEncoder
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)
FOLDERS = ("vectors", "online", "data", "work", "output")
SIZES = (10_000_000, 47_000_000, 100_000_000, 1_000_000_000)
MACHINE_GIB, FILLED = 64, 0.75  # of a machine's memory that an index may take
HOURS = 3600


@dataclass
class WidthsConfig:
    vectors: str = field(metadata={"help": "the teacher's stores"})
    online: str = field(metadata={"help": "the student's online folder"})
    data: str = field(metadata={"help": "the dataset: its unlabelled queries are searched"})
    work: str = field(metadata={"help": "folder for what is built"})
    output: str = field(metadata={"help": "file for the figures"})
    widths: list[int] = field(default_factory=lambda: [32, 64, 128, 256], metadata={"help": "beside the full one"})
    kinds: list[str] = field(default_factory=list, metadata={"help": "factory strings; empty: those of the size"})
    target_recall: float = field(default=0.98, metadata={"help": "of the exact neighbours at the same width"})
    k: int = field(default=100, metadata={"help": "ads that are searched"})
    queries: int = field(default=1000, metadata={"help": "half choose the effort, half are measured"})


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse(WidthsConfig, argv=argv)
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    store = VectorStore.open(Path(config.vectors) / "corpus")
    texts = list(load(config.data, splits=()).unlabelled["text"])[: config.queries]
    queries = QueryEncoder.from_pretrained(config.online, threads=1).encode(texts)
    full = queries.shape[1]
    best = exact_neighbours(store, queries, config.k)
    rows = []
    for width in [*(one for one in sorted(config.widths) if one < full), full]:
        rows += at_width(config, store, normalised(queries, width, first_row=0), best)
    report: dict[str, Any] = {"ads": len(store), "dim": full, "k": config.k, "machine_gib": MACHINE_GIB, "found": rows}
    report["to_1b"] = [row for one in rows if one["dim"] == full for row in scaled(one, len(store))]
    given = {name: value for name, value in asdict(config).items() if name not in FOLDERS}
    report |= {
        "settings": given,
        "environment": environment(command_line("results/measure/measure_index_widths.py", argv)),
    }
    report["environment"] |= facts()
    write_json(config.output, report)
    plot(report, Path(config.output).with_suffix(".png"))


def kinds(rows: int, width: int) -> list[str]:
    """The kinds of index to build, from exact to coarse."""
    searched = tuning.candidates(rows, width, tight=True)
    return ["Flat", "SQfp16", "SQ8", *(one for one in searched if one != "Flat")]


def at_width(
    config: WidthsConfig, store: VectorStore, queries: np.ndarray, best: list[list[str]]
) -> list[dict[str, Any]]:
    """Every kind of index at the width of the queries."""
    half, width, found = len(queries) // 2, queries.shape[1], []
    same = exact_neighbours(store, queries[:half], config.k)
    bounds = tuning.Bounds(config.target_recall, None, None)
    for factory in config.kinds or kinds(len(store), width):
        folder = Path(config.work) / str(width)
        index, size, seconds = built(store, factory, width, folder)
        trials = tuning.explore(index, size, queries[:half], same, config.k, bounds)
        fitting = [trial for trial in trials if trial.fits(bounds)]
        trial = min(fitting, key=lambda one: one.p50_ms) if fitting else max(trials, key=lambda one: one.recall)
        index.set_options(**trial.options)
        times = []
        for query in queries[half:]:
            started = perf_counter()
            index.search(query, config.k)
            times.append(1e3 * (perf_counter() - started))
        answers: Any = index.search(queries[half:], config.k)[1]
        row = {"dim": width, "factory": factory, "options": trial.options, "finds_enough": bool(fitting)}
        row |= {"recall": float(recalls(answers, best[half:]).mean()), "bytes_an_ad": size / len(store)}
        row |= {"p50_ms": float(np.median(times)), "p99_ms": float(np.quantile(times, 0.99)), "build_s": seconds}
        found.append(row)
        logger.info("%s", row)
    return found


def built(store: VectorStore, factory: str, width: int, folder: Path) -> tuple[Any, int, float]:
    """The index, the bytes of its files, and the seconds that its build took, which are kept beside it."""
    started = perf_counter()
    index, size = tuning.build_candidate(store, factory, width, None, folder, 0)
    kept = folder / "seconds.json"
    seconds = json.loads(kept.read_text()) if kept.is_file() else {}
    if factory not in seconds:
        write_json(kept, seconds | {factory: perf_counter() - started})
        return index, size, perf_counter() - started
    return index, size, seconds[factory]


def scaled(row: dict[str, Any], ads: int) -> list[dict[str, Any]]:
    """Bytes, hours of building and machines of more ads, from the bytes and seconds an ad that were measured. An IVF
    grows its cells with the root of the ads, and its assignment with them; a graph's build grows by a logarithm: both
    are left out, so hours are the least that they can be."""
    found = []
    for size in SIZES:
        gib = row["bytes_an_ad"] * size / 2**30
        one = {"factory": row["factory"], "dim": row["dim"], "ads": size, "gib": gib}
        one |= {"build_hours_on_one_core": row["build_s"] / ads * size / HOURS}
        found.append(one | {"machines": int(np.ceil(gib / (MACHINE_GIB * FILLED)))})
    return found


def plot(report: dict[str, Any], path: Path) -> None:
    """Recall of full width over bytes an ad, a line a width, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for width in dict.fromkeys(row["dim"] for row in report["found"]):
        mine = sorted((row["bytes_an_ad"], row["recall"]) for row in report["found"] if row["dim"] == width)
        axes.plot(*zip(*mine, strict=True), marker="o", markersize=4, linewidth=1, label=f"{width} wide")
    axes.set_xscale("log")
    axes.set_xlabel("bytes an ad, ids included")
    axes.set_ylabel(f"recall of the {report['k']} exact neighbours at full width")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150, format="png")


if __name__ == "__main__":
    run_recipe(main)
