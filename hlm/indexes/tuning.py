"""Choosing an index by what it finds and what it costs, on the queries that it will serve.

Every candidate is built, and searched with more and more effort until it finds enough. The fastest of those that find
enough within the bounds is the choice. Queries that chose it do not say how good it is: others do.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import faiss
import numpy as np
import pyarrow as pa

from hlm.artefacts import MANIFEST, HlmError
from hlm.indexes import faiss_parts
from hlm.indexes.faiss_index import AdIndex
from hlm.indexes.recall import recalls
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)

K_FACTORS = (16, 8, 4, 2, 1)
LEAST_GAIN = 1e-4  # of recall by 1.4 times the effort
TIMED_QUERIES = 200
# One-sided 95%: a setting counts as good enough where its recall is, this many standard errors below what was measured.
STANDARD_ERRORS = 1.64


class Bounds(NamedTuple):
    """What a choice must keep to; None is no bound."""

    recall: float  # at least, of the k exact neighbours, in the mean
    bytes: float | None  # at most, of the index's files
    p99_ms: float | None  # at most, of one query on one thread


class Trial(NamedTuple):
    """One candidate at one setting, on the queries that choose."""

    factory: str
    options: dict[str, Any]
    recall: float
    error: float  # standard error of `recall`
    p50_ms: float
    p99_ms: float
    bytes: int

    def fits(self, bounds: Bounds) -> bool:
        within = bounds.bytes is None or self.bytes <= bounds.bytes
        return self.finds(bounds) and within and (bounds.p99_ms is None or self.p99_ms <= bounds.p99_ms)

    def finds(self, bounds: Bounds) -> bool:
        return self.recall - STANDARD_ERRORS * self.error >= bounds.recall


def candidates(rows: int, dim: int, *, tight: bool = False) -> list[str]:
    """The factory strings to try over so many vectors of a width; with `tight`, smaller ones as well: refined by a byte
    a component in place of two, or of six bits alone."""
    found = ["Flat", "HNSW32,SQfp16"]
    cells = 2 ** round(math.log2(max(1, 2 * math.sqrt(rows))))
    if rows < faiss_parts.ROWS_A_CELL * cells or dim < 2:
        return found
    coarse = f"IVF{cells}" if cells < 4096 else f"IVF{cells}_HNSW32"
    pieces = max(piece for piece in range(1, dim // 2 + 1) if dim % piece == 0)
    codes = [f"PQ{pieces}x4fs", *(["RaBitQfs"] if hasattr(faiss, "IndexIVFRaBitQFastScan") else [])]
    exact = ["SQfp16", *(["SQ8"] if tight else [])]
    small = [f"{coarse},SQ6"] if tight else []
    return [*found, f"{coarse},SQ8", *small, *(f"{coarse},{code},Refine({last})" for code in codes for last in exact)]


def bytes_a_vector(factory: str, dim: int) -> int:
    """What a vector takes in an index, ids and graph included, before anything is built."""
    index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    total = 0
    for part in faiss_parts.parts(index, storing=True):
        if isinstance(part, faiss.IndexHNSW):
            total += 4 * part.hnsw.nb_neighbors(0) + part.storage.sa_code_size()
        elif faiss_parts.is_ivf(part):
            total += 8 + part.code_size
        elif isinstance(part, faiss.IndexFlatCodes | faiss.IndexFastScan):
            total += part.code_size
    return total


def build_candidate(
    store: VectorStore, factory: str, dim: int, columns: pa.Table | None, folder: Path, seed: int
) -> tuple[AdIndex, int]:
    """The candidate as a server would open it, and the bytes of its files; built once, and kept in `folder` for a run
    that goes on after a kill, or with other bounds."""
    place = folder / re.sub(r"\W+", "-", factory).strip("-").lower()
    index = AdIndex.load(place) if (place / MANIFEST).is_file() else None
    names = columns.column_names if columns is not None else ["_id"]
    wanted = (store.encoder, store.source, factory, dim, sorted(names))
    if index is None or wanted != (index.encoder, index.source, index.factory, index.dim, sorted(index.columns)):
        started = perf_counter()
        AdIndex.build(store, factory, dim=dim, columns=columns, seed=seed).save(place)
        logger.info("%s: built in %.0f s", factory, perf_counter() - started)
        index = AdIndex.load(place)
    return index, sum(path.stat().st_size for path in place.iterdir())


def explore(
    index: AdIndex,
    size: int,
    queries: np.ndarray,
    exact: list[list[str]],
    k: int,
    bounds: Bounds,
    best_ms: float = math.inf,
) -> list[Trial]:
    """Searches with growing effort until enough is found, or the time passes that of a choice that is known.

    Args:
        size: of the index's files, in bytes.
        queries: float32 (n, dim), L2-normalised; `exact` are their neighbours.
        best_ms: p50 of the best trial of other candidates.
    """
    trials, least = [], 0
    efforts = list(_efforts(index, k))
    # From the most candidates refined to the fewest: what these need of nprobe, fewer need as well.
    for factor in K_FACTORS if "k_factor" in index.options else (None,):
        before = -1.0
        for place in range(least, len(efforts)):
            options = efforts[place] | ({"k_factor": factor} if factor else {})
            found = _trial(index, size, queries, exact, k, options)
            trials.append(found)
            logger.info("%s %s: recall %.4f, p50 %.3f ms", index.factory, shown_options(options), *found[2:5:2])
            if found.fits(bounds):
                best_ms = min(best_ms, found.p50_ms)
            if found.finds(bounds) or found.p50_ms > best_ms or found.recall - before < LEAST_GAIN:
                break
            before = found.recall
        if not found.finds(bounds) and found.p50_ms <= best_ms:
            break  # no effort finds enough, and fewer candidates would find less
        least = place
    return trials


def _efforts(index: AdIndex, k: int) -> Iterator[dict[str, int]]:
    """Settings in order of cost, each about 1.4 times the one before."""
    if "nprobe" in index.options:
        name, least, most = "nprobe", 1, index.cells
    elif "ef_search" in index.options:
        name, least, most = "ef_search", k, max(64 * k, k)
    else:
        yield {}
        return
    steps = (round(least * 2 ** (power / 2)) for power in itertools.count())
    values = itertools.takewhile(lambda value: value < most, steps)
    yield from ({name: value} for value in dict.fromkeys([*values, most]))


def _trial(
    index: AdIndex, size: int, queries: np.ndarray, exact: list[list[str]], k: int, options: dict[str, Any]
) -> Trial:
    found: Any = index.search(queries, k, **options)[1]
    shares = recalls(found, exact)
    times = []
    for query in queries[:TIMED_QUERIES]:
        started = perf_counter()
        index.search(query, k, **options)
        times.append(1e3 * (perf_counter() - started))
    p50, p99 = np.percentile(times, (50, 99))
    error = float(shares.std() / math.sqrt(len(shares)))
    return Trial(index.factory, options, float(shares.mean()), error, float(p50), float(p99), size)


def choose(trials: Sequence[Trial], bounds: Bounds) -> Trial:
    """The fastest trial within the bounds.

    Raises:
        HlmError: there is none; says what was nearest.
    """
    fitting = [trial for trial in trials if trial.fits(bounds)]
    if fitting:
        return min(fitting, key=lambda trial: trial.p50_ms)
    wanted = [f"recall {bounds.recall}"]
    wanted += [f"{bounds.bytes / 1e9:g} GB"] if bounds.bytes is not None else []
    wanted += [f"p99 {bounds.p99_ms:g} ms"] if bounds.p99_ms is not None else []
    nearest = max(trials, key=lambda trial: (trial.finds(bounds), trial.recall - STANDARD_ERRORS * trial.error))
    raise HlmError(
        f"expected an index of {', '.join(wanted)}, found none; nearest is {nearest.factory} "
        f"{shown_options(nearest.options)} of recall {nearest.recall:.4f} (standard error {nearest.error:.4f}), "
        f"{nearest.bytes / 1e9:.3g} GB, p99 {nearest.p99_ms:.3g} ms; relax a bound: what was built is kept"
    )


def shown_options(options: dict[str, Any]) -> str:
    return ",".join(f"{name}={value:g}" for name, value in options.items()) or "-"


def format_table(trials: Sequence[Trial], chosen: Trial, bounds: Bounds, rows: int) -> str:
    """The trials as aligned text, the fastest first; `*` is the choice, `x` breaks a bound."""
    lines = [("", "index", "options", "recall", "+-", "p50 ms", "p99 ms", "bytes an ad")]
    for trial in sorted(trials, key=lambda trial: trial.p50_ms):
        mark = "*" if trial is chosen else "" if trial.fits(bounds) else "x"
        figures = (f"{trial.recall:.4f}", f"{trial.error:.4f}", f"{trial.p50_ms:.3f}", f"{trial.p99_ms:.3f}")
        lines.append((mark, trial.factory, shown_options(trial.options), *figures, f"{trial.bytes / rows:,.0f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 3 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def plot(trials: Sequence[Trial], chosen: Trial, bounds: Bounds, k: int, path: Path) -> None:
    """Recall over the time of a query, a line a candidate, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for factory in dict.fromkeys(trial.factory for trial in trials):
        mine = sorted((t.p50_ms, t.recall) for t in trials if t.factory == factory)
        axes.plot(*zip(*mine, strict=True), marker="o", markersize=3, linewidth=1, label=factory)
    axes.plot([chosen.p50_ms], [chosen.recall], "k*", markersize=13, label="chosen")
    axes.axhline(bounds.recall, color="#9aa5b1", linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("p50 of one query on one thread, ms")
    axes.set_ylabel(f"recall of the {k} exact neighbours")
    axes.set_ylim(bottom=max(0.0, min(0.8, bounds.recall - 0.1)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(path, dpi=150, format="png")
