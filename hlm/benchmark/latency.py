"""Query encoders side by side in one run: latency at batch 1, throughput over batch sizes, ratios.

Systems take turns within every repeat, so that whatever the machine does to one it does to all. What other processes
take of the CPUs is read around every block of calls; a block with too much of it is flagged and counted, its samples
are kept, and figures rest on clean samples where there are any.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter, sleep
from typing import Any

import numpy as np

from hlm.artefacts import HlmError
from hlm.evaluation.metrics import length_slice
from hlm.machine import other_load, read_counters
from hlm.progress import progress
from hlm.report_types import BlockRecord

logger = logging.getLogger(__name__)

Encode = Callable[[list[str]], np.ndarray]
PERCENTILES = (50, 95, 99)
# Threads of the system before wait for more work by spinning, ONNX Runtime's for some 50 ms, and would take a core.
SETTLE_S = 0.1


@dataclass
class Block:
    """Consecutive calls of one system at one batch size."""

    system: str
    repeat: int
    batch_size: int
    calls_ms: list[float] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)  # the first query of each call, as a place in the sample
    other_load: float | None = None  # share of the CPUs that other processes took; None where it cannot be read
    contaminated: bool = False

    @property
    def queries_per_s(self) -> float:
        return 1e3 * self.batch_size * len(self.calls_ms) / sum(self.calls_ms)

    def record(self) -> BlockRecord:
        """For the report: all but the single samples."""
        return {
            "system": self.system,
            "repeat": self.repeat,
            "batch_size": self.batch_size,
            "other_load": self.other_load,
            "contaminated": self.contaminated,
            "queries_per_s": self.queries_per_s,
            "calls": len(self.calls_ms),
            "p50_ms": float(np.median(self.calls_ms)),
        }


def measure(
    systems: Mapping[str, Encode],
    queries: Sequence[str],
    *,
    repeats: int = 5,
    block_s: float = 1.0,
    batch_sizes: Sequence[int] = (8, 32, 128),
    max_other_load: float = 0.05,
    seed: int = 0,
) -> list[Block]:
    """Times every system, interleaved: in each repeat, for batch size 1 and then each of `batch_sizes`, every system
    encodes for `block_s` seconds, in an order that rotates, over queries in an order that is drawn anew.

    A call is timed from texts to vectors, tokenisation included, CUDA synchronised before and after. Before the first
    repeat every system meets each length of query and each batch size; the first call of a block is not timed.

    Args:
        systems: name -> texts to (len(texts), dim) vectors.
        queries: the sample, used round and round; a slow system sees the first of a repeat's order.
        max_other_load: above this share (0 ... 1) of CPU time taken by others, a block is contaminated.

    Raises:
        HlmError: nothing to measure, a setting out of range, or vectors that are not finite and (len(texts), dim).
    """
    _check(systems, queries, repeats, block_s, batch_sizes, max_other_load)
    names, sizes = list(systems), [1, *(size for size in batch_sizes if size != 1)]
    for name, encode in systems.items():
        _warm_up(name, encode, queries, sizes, block_s)
    blocks = []
    with progress(what="measure", unit="block", total=repeats * len(sizes) * len(names)) as bar:
        for repeat in range(repeats):
            order = list(range(len(queries)))
            random.Random(f"{seed} {repeat}").shuffle(order)
            for size in sizes:
                for place in range(len(names)):
                    name = names[(place + repeat) % len(names)]
                    blocks.append(_run_block(Block(name, repeat, size), systems[name], queries, order, block_s))
                    load = blocks[-1].other_load
                    blocks[-1].contaminated = load is not None and load > max_other_load
                    bar.update()  # between two blocks: it takes part in no measurement
            found = [block for block in blocks if block.repeat == repeat]
            flagged = sum(block.contaminated for block in found)
            logger.info("repeat %d of %d: %d of %d blocks contaminated", repeat + 1, repeats, flagged, len(found))
    return blocks


def _check(
    systems: Mapping[str, Encode],
    queries: Sequence[str],
    repeats: int,
    block_s: float,
    batch_sizes: Sequence[int],
    max_other_load: float,
) -> None:
    if not systems or not queries:
        raise HlmError(f"expected systems and queries to measure, found {len(systems)} and {len(queries)}")
    for name, value, least in (("repeats", repeats, 1), *(("batch_sizes", size, 1) for size in batch_sizes)):
        if value < least:
            raise HlmError(f"{name}: expected {least} or more, found {value}")
    if block_s <= 0:
        raise HlmError(f"block_s: expected more than 0 seconds, found {block_s}")
    if not 0 <= max_other_load <= 1:
        raise HlmError(f"max_other_load: expected a share of the CPUs' time, 0 to 1, found {max_other_load}")


def _warm_up(name: str, encode: Encode, queries: Sequence[str], sizes: Sequence[int], seconds: float) -> None:
    by_length = {length_slice(query): query for query in queries}
    for query in by_length.values():
        vectors = np.asarray(encode([query]))
        if vectors.ndim != 2 or len(vectors) != 1:
            raise HlmError(f"{name}: expected vectors of shape (1, dim) for one query, found {vectors.shape}")
        if not np.isfinite(vectors).all():
            raise HlmError(
                f"{name}: expected finite vectors, found NaN or infinity for {query!r}; check its weights and precision"
            )
    end = perf_counter() + seconds
    for query in queries:
        if perf_counter() > end:
            break
        encode([query])
    for size in sizes:
        encode([queries[place % len(queries)] for place in range(size)])


def _run_block(block: Block, encode: Encode, queries: Sequence[str], order: Sequence[int], seconds: float) -> Block:
    def batch(call: int) -> list[int]:
        return [order[(call * block.batch_size + place) % len(order)] for place in range(block.batch_size)]

    sleep(SETTLE_S)
    encode([queries[place] for place in batch(-1)])  # brings the caches back from the system before
    before, end = read_counters(), perf_counter() + seconds
    while True:
        places = batch(len(block.calls_ms))
        texts = [queries[place] for place in places]
        synchronise()
        started = perf_counter()
        encode(texts)
        synchronise()
        now = perf_counter()
        block.calls_ms.append(1e3 * (now - started))
        block.queries.append(places[0])
        if now >= end:
            break
    block.other_load = other_load(before, read_counters())
    return block


def new_words(encode: Encode, forget: Callable[[], None], queries: Sequence[str], *, seconds: float) -> dict[str, Any]:
    """What a system that remembers words takes at batch 1 for queries none of whose words it has met, beside what it
    takes for them once it has: `forget` is called before every second call, and not timed.

    Returns:
        {"p50_ms", "known_p50_ms", "samples": of either}.
    """
    new: list[float] = []
    known: list[float] = []
    end = perf_counter() + seconds
    while not known or perf_counter() < end:
        query = [queries[len(known) % len(queries)]]
        forget()
        for taken in (new, known):
            started = perf_counter()
            encode(query)
            taken.append(1e3 * (perf_counter() - started))
    return {"p50_ms": float(np.median(new)), "known_p50_ms": float(np.median(known)), "samples": len(known)}


def synchronise() -> None:
    """Waits for CUDA where it is in use: its calls return before their work is done."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def summarise(blocks: Iterable[Block], queries: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Figures of every system.

    Percentiles are numpy's (linear between samples) over the pooled samples of all clean blocks; throughput is the
    median of clean blocks. "over" says what they rest on: "clean", or "all" where no clean sample was had.

    Returns:
        {system: {"latency_ms": {"all" or a length in words: {"p50", "p95", "p99", "samples", "contaminated", "over"}},
        "throughput": {batch size: {"queries_per_s", "blocks", "contaminated", "over"}}, "best_batch_size",
        "best_queries_per_s"}}. "samples" and "blocks" count all, the contaminated ones among them.
    """
    systems: dict[str, list[Block]] = {}
    for block in blocks:
        systems.setdefault(block.system, []).append(block)
    return {name: _summary(found, [length_slice(query) for query in queries]) for name, found in systems.items()}


def _summary(blocks: list[Block], lengths: list[str]) -> dict[str, Any]:
    samples = [
        (lengths[query], call_ms, block.contaminated)
        for block in blocks
        if block.batch_size == 1
        for query, call_ms in zip(block.queries, block.calls_ms, strict=True)
    ]
    latency = {"all": _percentiles([(ms, flag) for _, ms, flag in samples])}
    for length in sorted(set(lengths)):
        found = [(ms, flag) for of, ms, flag in samples if of == length]
        if found:
            latency[length] = _percentiles(found)
    throughput = {}
    for size in sorted({block.batch_size for block in blocks}):
        rates, facts = _clean([(b.queries_per_s, b.contaminated) for b in blocks if b.batch_size == size])
        count = facts.pop("samples")
        throughput[str(size)] = {"queries_per_s": float(np.median(rates)), "blocks": count, **facts}
    return _figures(latency, throughput)


def _figures(latency: dict[str, Any], throughput: dict[str, Any]) -> dict[str, Any]:
    best = max(throughput, key=lambda size: throughput[size]["queries_per_s"])
    return {
        "latency_ms": latency,
        "throughput": throughput,
        "best_batch_size": int(best),
        "best_queries_per_s": throughput[best]["queries_per_s"],
    }


def _percentiles(samples: list[tuple[float, bool]]) -> dict[str, Any]:
    values, facts = _clean(samples)
    found = np.percentile(values, PERCENTILES)
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, found, strict=True)} | facts


def _clean(samples: list[tuple[float, bool]]) -> tuple[list[float], dict[str, Any]]:
    """The values that figures rest on, and how many there were."""
    clean = [value for value, contaminated in samples if not contaminated]
    facts = {"samples": len(samples), "contaminated": len(samples) - len(clean), "over": "clean" if clean else "all"}
    return clean or [value for value, _ in samples], facts


def derive(shallow: Mapping[str, Any], deep: Mapping[str, Any], depths: tuple[int, int], layers: int) -> dict[str, Any]:
    """The summary of a model of `layers` layers from those of its first `depths[0]` and `depths[1]`.

    Layers are alike, so time is linear in depth: t(layers) = t(deep) + (layers - deep) * slope, for p50 and for the
    seconds of a query at each batch size. p95 and p99 keep their ratio to p50: their own slopes are mostly noise.
    """

    def factor(short: float, long: float) -> float:
        slope = max(0.0, (long - short) / (depths[1] - depths[0]))
        return 1 + (layers - depths[1]) * slope / long

    def both(*sides: Mapping[str, Any]) -> str:
        return "all" if any(side["over"] == "all" for side in sides) else "clean"

    latency = {}
    for length, measured in deep["latency_ms"].items():
        if length in shallow["latency_ms"]:
            by = factor(shallow["latency_ms"][length]["p50"], measured["p50"])
            latency[length] = measured | {f"p{p}": measured[f"p{p}"] * by for p in PERCENTILES}
            latency[length]["over"] = both(shallow["latency_ms"][length], measured)
    throughput = {}
    for size, measured in deep["throughput"].items():
        by = factor(1 / shallow["throughput"][size]["queries_per_s"], 1 / measured["queries_per_s"])
        throughput[size] = measured | {"queries_per_s": measured["queries_per_s"] / by}
        throughput[size]["over"] = both(shallow["throughput"][size], measured)
    derived = f"derived from {depths[0]} and {depths[1]} of {layers} layers"
    return _figures(latency, throughput) | {"derived": derived}


def ratios(
    summaries: Mapping[str, Mapping[str, Any]], blocks: Sequence[Block], reference: str
) -> dict[str, dict[str, Any]]:
    """How many times better than the reference: latency is reference / system, throughput system / reference.

    Returns:
        {system: {"p50", "p95", "p99", "p50_by_length": {length: ...}, "p50_range": the lowest and highest ratio within
        one repeat in which both are clean (absent where there is none), "throughput": each at its best batch size}}.
    """
    base = summaries[reference]
    medians = {
        (block.system, block.repeat): float(np.median(block.calls_ms))
        for block in blocks
        if block.batch_size == 1 and not block.contaminated
    }
    found = {}
    for name, summary in summaries.items():
        found[name] = {
            f"p{p}": base["latency_ms"]["all"][f"p{p}"] / summary["latency_ms"]["all"][f"p{p}"] for p in PERCENTILES
        }
        found[name]["p50_by_length"] = {
            length: base["latency_ms"][length]["p50"] / figures["p50"]
            for length, figures in summary["latency_ms"].items()
            if length != "all" and length in base["latency_ms"]
        }
        repeats = [r for system, r in medians if system == name and (reference, r) in medians]
        if repeats:
            pairs = [medians[reference, repeat] / medians[name, repeat] for repeat in repeats]
            found[name]["p50_range"] = [min(pairs), max(pairs)]
        found[name]["throughput"] = summary["best_queries_per_s"] / base["best_queries_per_s"]
    return found
