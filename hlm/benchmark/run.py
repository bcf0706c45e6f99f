"""One benchmark from its checked settings to latency.json, every figure beside the one it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

from hlm.benchmark.budgets import check_budgets
from hlm.benchmark.entries import (
    BenchmarkConfig,
    Entry,
    device_of,
    find_works,
    load_systems,
    model_settings,
    reads_texts,
    same_models,
)
from hlm.benchmark.floor import floor_of, measure_rates
from hlm.benchmark.latency import Block, derive, measure, new_words, ratios, summarise
from hlm.benchmark.quality import agreements, measured_quality
from hlm.benchmark.queries import catalogue_queries, drawn
from hlm.benchmark.random_weights import Derivation
from hlm.benchmark.systems import System, cold_starts
from hlm.data.contract import RetrievalData, load
from hlm.evaluation.metrics import length_slice
from hlm.report_types import SCHEMA_VERSION, LatencyReport, MeasuredSystem, Quality, Report
from hlm.vectors.store import VectorStore


def run(
    config: BenchmarkConfig,
    entries: dict[str, Entry],
    reference: str,
    budgets: list[tuple[str, str, float]],
    qualities: dict[str, Quality],
    measurable: list[str],
    store: VectorStore | None,
    evaluated: Report | None,
) -> LatencyReport:
    """Loads and measures everything; latency.json less its environment."""
    queries, data = read_queries(config)
    systems, derived = load_systems(config, entries)
    models = {name: model_settings(config, entry) for name, entry in entries.items() if entry.model}
    starts = cold_starts(models, queries[0], config.cold_starts, max_other_load=config.max_other_load)
    encoders = {name: system.encode for name, system in systems.items()}
    # Not among derived systems, nor where random token ids are read.
    whole = {name: of for name, of in same_models(entries).items() if reads_texts(systems, name, of)}
    same = agreements(encoders, whole, queries, store, k=10)
    for name in measurable if evaluated else ():
        measured: Any = measured_quality  # its arguments are all there, or it is not asked for
        qualities[name] = measured(encoders[name], data, config.split, store, evaluated, name)
    works = find_works(entries, systems, derived, queries)
    rates = measure_rates(list(works.values()), device=device_of(config), seconds=config.block_s)
    blocks = measure(
        encoders,
        queries,
        repeats=config.repeats,
        block_s=config.block_s,
        batch_sizes=config.batch_sizes,
        max_other_load=config.max_other_load,
        seed=config.seed,
    )
    unseen = {
        name: new_words(system.encode, system.forget, queries, seconds=config.block_s)
        for name, system in systems.items()
        if system.forget
    }
    parts: dict[str, Any] = {"cold_start": starts, "quality": qualities, "agreement": same, "new_words": unseen}
    report = build_report(config, entries, queries, systems, derived, blocks, reference, parts)
    report["rates"] = rates
    for name, work in works.items():
        report["systems"][name]["floor"] = floor_of(work, rates, report["systems"][name])
    report["budgets"] = check_budgets(report, budgets)
    return report


def read_queries(config: BenchmarkConfig) -> tuple[list[str], RetrievalData | None]:
    """A sample of the split's queries, or of the sample catalogue's; and the data, where some are named."""
    if config.data is None:
        return drawn(catalogue_queries(), config.queries, config.seed), None
    data = load(config.data, revision=config.revision, splits=(config.split,), skip_bad_rows=config.skip_bad_rows)
    return drawn([text for _, text in data.split_queries(config.split)], config.queries, config.seed), data


def build_report(
    config: BenchmarkConfig,
    entries: dict[str, Entry],
    queries: list[str],
    systems: dict[str, System],
    derived: dict[str, Derivation],
    blocks: list[Block],
    reference: str,
    parts: Mapping[str, Mapping[str, Any]],
) -> LatencyReport:
    """latency.json, less its environment and budgets; `parts` are figures taken elsewhere: key -> system -> figures."""
    summaries = summarise(blocks, queries)
    for name, plan in derived.items():
        shallow, deep = (summaries.pop(part) for part in plan.names)
        summaries[name] = derive(shallow, deep, plan.depths, plan.layers)
        summaries[name]["measured"] = {str(plan.depths[0]): shallow, str(plan.depths[1]): deep}
    compared = ratios(summaries, blocks, reference)
    for name, found in parts["agreement"].items():
        found["ratio"] = ratios(summaries, blocks, found["with"])[name]
    slices = [length_slice(query) for query in queries]
    settings = ("repeats", "block_s", "batch_sizes", "cold_starts", "max_other_load", "seed")
    return {
        "schema_version": SCHEMA_VERSION,
        "data": config.data or "the sample catalogue",
        "split": config.split,
        "queries": len(queries),
        "lengths": {length: slices.count(length) for length in sorted(set(slices))},  # in words
        "reference": reference,
        "settings": {name: getattr(config, name) for name in settings},
        "systems": {
            name: cast(
                MeasuredSystem,
                (derived[name] if name in derived else systems[name]).facts
                | {"settings": asdict(entry)}
                | summaries[name]
                | {"ratio": compared[name]}
                | {key: figures[name] for key, figures in parts.items() if name in figures},
            )
            for name, entry in entries.items()
        },
        "blocks": [block.record() for block in blocks],
        "budgets": [],
        "environment": {},
    }
