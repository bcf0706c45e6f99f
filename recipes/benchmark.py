"""Query encoders side by side: latency, throughput, cold start and memory, against quality; budgets as a gate.

    python recipes/benchmark.py --config recipes/configs/quickstart/benchmark.yaml --budget p99_ms=15

Under `output`: latency.json and latency.png. Exit status 1 says that a budget was not kept, 3 that of a budget neither
this nor the opposite can be said, as its figure is undefined or other processes took the CPUs. Without weights:

    python recipes/benchmark.py --random_weights --output runs/shapes \\
        --shape Qwen/Qwen3-Embedding-8B:dtype=bfloat16 --shape Qwen/Qwen3-Embedding-0.6B:layers=4,ffn=768
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import cast

from hlm.artefacts import HlmError
from hlm.benchmark.budgets import BUDGETS, gate, read_budgets
from hlm.benchmark.entries import BenchmarkConfig, Entry, named, read_entries, same_models
from hlm.benchmark.quality import quality, searchable
from hlm.benchmark.report import format_table, plot
from hlm.benchmark.run import run
from hlm.config import parse, run_recipe
from hlm.encoders.loading import check_device, find_encoder
from hlm.evaluation.report import command_line, environment
from hlm.machine import facts
from hlm.report_files import claimed_report, read_report, write_latency
from hlm.report_types import Environment, Quality, Report
from hlm.vectors.store import VectorStore


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse(BenchmarkConfig, argv=argv)
    check_device(config.device)
    if os.environ.get("RANK", "0") != "0":
        return  # nothing here is distributed
    entries = read_entries(config)
    for model in [entry.model for entry in entries.values() if entry.model]:
        find_encoder(model)  # before the first one is loaded
    reference = named(config.reference, entries, "reference", 0)
    budgets = read_budgets(config.budgets, list(entries), named(config.candidate, entries, "candidate", -1))
    evaluated = read_evaluated(config, entries)
    qualities = read_qualities(entries, evaluated)
    store = VectorStore.open(config.corpus) if config.corpus else None
    measurable = find_measurable(config, entries, qualities, store)
    check_figures(config, entries, qualities, measurable, budgets)
    with claimed_report(config.output, "latency.json") as output:
        report = run(config, entries, reference, budgets, qualities, measurable, store, evaluated)
        report["environment"] = cast(Environment, environment(command_line("recipes/benchmark.py", argv)) | facts())
        write_latency(output, report)  # first: it says that the plot beside it is HLM's
        plot(report, output / "latency.png")
    print(format_table(report))
    if status := gate(report["budgets"], sys.stderr):
        raise SystemExit(status)


def read_evaluated(config: BenchmarkConfig, entries: dict[str, Entry]) -> Report | None:
    """report.json of recipes/evaluate.py; None where none is asked for."""
    if config.report is None:
        for name, entry in entries.items():
            if entry.quality is not None:
                raise HlmError(f"systems: '{name}' takes its quality from a report, found none; set `report`")
        return None
    try:
        return read_report(config.report)
    except HlmError as error:
        raise HlmError(f"report: {error}, recipes/evaluate.py") from error


def read_qualities(entries: dict[str, Entry], report: Report | None) -> dict[str, Quality]:
    if report is None:
        return {}
    wanted = {name: entry.quality or name for name, entry in entries.items()}
    return {
        name: quality(report, of)
        for name, of in wanted.items()
        if entries[name].quality or (entries[name].model and of in report["systems"])
    }


def find_measurable(
    config: BenchmarkConfig, entries: dict[str, Entry], known: dict[str, Quality], store: VectorStore | None
) -> list[str]:
    """Systems that no report knows and whose quality this run can measure: the store's own encoder and its students."""
    if store is None or config.data is None or config.report is None:
        return []
    models = {name: entry.model for name, entry in entries.items() if entry.model and name not in known}
    return sorted(searchable(models, store), key=list(entries).index)


def check_figures(
    config: BenchmarkConfig,
    entries: dict[str, Entry],
    qualities: dict[str, Quality],
    measurable: list[str],
    budgets: list[tuple[str, str, float]],
) -> None:
    """Refuses a budget whose figure this run will not have, before anything is measured."""
    for name, budget, _ in budgets:
        part, *rest = BUDGETS[budget][0]
        need = None
        again = name in same_models(entries)
        measured = name in measurable and rest != ["overlap"]
        if part == "quality" and rest[0] not in qualities.get(name, {}) and not measured:
            need = f"`report` with {rest[0]} of '{entries[name].quality or name}'"
        if budget.startswith("e2e_") and entries[name].index is None:
            need = "`index` in the system's settings"
        if part == "cold_start" and (config.cold_starts == 0 or entries[name].model is None):
            need = "`cold_starts` of 1 or more, and a model's folder"
        if part == "agreement" and (not again or (rest == ["overlap"] and not config.corpus)):
            need = "another system of the same model before it" + (", and `corpus`" if rest == ["overlap"] else "")
        if need:
            raise HlmError(f"budgets: {budget} of '{name}' needs {need}; found none")


if __name__ == "__main__":
    run_recipe(main)
