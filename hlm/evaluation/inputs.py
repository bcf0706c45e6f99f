"""The systems that an evaluation compares: their settings, their models and stores, checked before any work."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import hf_hub_download

from hlm.artefacts import MANIFEST, HlmError, read_manifest
from hlm.encoders.loading import find_encoder
from hlm.evaluation.fusion import check_weights
from hlm.evaluation.report import STUDENTS, SYSTEMS
from hlm.indexes.lineage import check_student
from hlm.settings import closest, read_section
from hlm.steps import EvaluateConfig, Fusion, System
from hlm.vectors.store import VectorStore


def read_systems(config: EvaluateConfig) -> dict[str, System | None]:
    """The checked `systems` in the report's order, in which the teacher comes before the students."""
    for name in ("k", "bootstrap_samples", "impressions"):
        if getattr(config, name) < 1:
            raise HlmError(f"{name}: expected 1 or more, found {getattr(config, name)}")
    if config.depth < max(100, config.k):
        raise HlmError(f"depth: expected {max(100, config.k)} or more (recall@100, k={config.k}), found {config.depth}")
    if not config.systems:
        raise HlmError(f"systems: expected some of {', '.join(SYSTEMS)}, found none")
    systems: dict[str, System | None] = {}
    for name, given in config.systems.items():
        if name not in SYSTEMS:
            raise HlmError(f"systems: expected {', '.join(SYSTEMS)}, found '{name}'{closest(name, SYSTEMS)}")
        if name == "bm25":
            if given:
                raise HlmError(f"systems: bm25 takes nothing here, found {given!r}; set bm25_k1 and bm25_b instead")
            systems[name] = None
            continue
        entry = {"model": given} if isinstance(given, str) else given
        stored = name not in STUDENTS and isinstance(entry, dict) and "queries" in entry
        wanted = ("corpus", "queries") if stored else ("model",)
        if not isinstance(entry, dict) or not all(isinstance(entry.get(one), str) for one in wanted):
            raise HlmError(
                f"systems: expected a model for '{name}', found {given!r}; write `{name}: path/to/model`, or of a "
                "teacher that cannot be loaded {corpus: its store, queries: its store}"
            )
        system: System = read_section(System, entry, f"systems: '{name}'")
        if system.model and system.queries:
            raise HlmError(f"systems: '{name}': expected a model or a store of queries, found both; leave one out")
        systems[name] = system
    return {name: systems[name] for name in SYSTEMS if name in systems}


def read_fusions(config: EvaluateConfig, systems: Iterable[str]) -> dict[str, Fusion]:
    """The checked `fusions`."""
    fusions = {}
    for name, given in config.fusions.items():
        where = f"fusions: '{name}'"
        if name in SYSTEMS or not re.fullmatch(r"[\w+.-]+", name):
            raise HlmError(f"{where}: expected a name of letters, digits, -, + and ., and none of {', '.join(SYSTEMS)}")
        if not isinstance(given, dict) or "systems" not in given:
            raise HlmError(f"{where}: expected {{systems: [...], method: rrf}} or the like, found {given!r}")
        fusion: Fusion = read_section(Fusion, given, where)
        known = list(systems)
        for system in fusion.systems:
            if system not in known:
                raise HlmError(
                    f"{where}: expected some of {', '.join(known)}, found '{system}'{closest(system, known)}"
                )
        if len(set(fusion.systems)) < max(2, len(fusion.systems)):
            raise HlmError(f"{where}: expected two systems or more, each once, found {', '.join(fusion.systems)}")
        if fusion.weights is not None:
            if fusion.method == "rrf":
                raise HlmError(f"{where}: rrf takes no weights; leave them out, or set `method: weighted`")
            check_weights(fusion.weights, len(fusion.systems))
            if 0 in fusion.weights:
                raise HlmError(f"{where}: expected weights above 0, found {fusion.weights}; leave that system out")
        fusions[name] = fusion
    return fusions


def chooses_on_dev(config: EvaluateConfig, fusions: Mapping[str, Fusion]) -> bool:
    """Whether anything is chosen on `dev_split`; refuses to choose on the split that is reported."""
    choosing = [f"the weights of fusion '{name}'" for name, one in fusions.items() if _chooses_weights(one)]
    if config.shown_precision is not None:
        if not 0 < config.shown_precision <= 1:
            raise HlmError(
                f"shown_precision: expected a share above 0 and at most 1, such as 0.9, found {config.shown_precision}"
            )
        choosing.append("least scores")
    if choosing and config.dev_split == config.split:
        raise HlmError(
            f"dev_split: expected another split than '{config.split}', which is reported, to choose {choosing[0]} on; "
            "name one, or choose nothing (weights given or `method: rrf`, no shown_precision)"
        )
    return bool(choosing)


def _chooses_weights(fusion: Fusion) -> bool:
    return fusion.method == "weighted" and fusion.weights is None


def read_slices(config: EvaluateConfig) -> dict[str, re.Pattern[str]]:
    """The checked `slices`: patterns that are looked for anywhere in a query, without regard to case."""
    patterns = {}
    for name, pattern in config.slices.items():
        if name in ("kind", "length"):
            raise HlmError(f"slices: '{name}' is a slice of every report; choose another name")
        try:
            patterns[name] = re.compile(pattern, re.IGNORECASE)
        except re.error as error:
            raise HlmError(f"slices: '{name}': expected a regular expression, found {pattern!r} ({error})") from error
    return patterns


def find_inputs(systems: dict[str, System | None]) -> dict[str, VectorStore]:
    """The store that each system searches, where one is named. Refuses, before anything is encoded, a model or a store
    that is not there, and those whose manifests say that they do not belong together.

    Raises:
        HlmError: names the system.
    """
    stores: dict[str, VectorStore] = {}
    known: dict[str, str] = {}  # encoders whose fingerprint is on record
    for name, system in systems.items():
        if system is None:
            continue
        try:
            source = ""
            if system.queries is not None:
                known[name] = VectorStore.open(system.queries).encoder
            elif not Path(source := find_encoder(str(system.model))).is_dir():
                find_on_hub(source)
            elif encoder := recorded_encoder(Path(source), system):
                known[name] = encoder
            if system.corpus is not None:
                stores[name] = VectorStore.open(system.corpus)
            if name == "student_on_index" and system.index is None:
                raise HlmError("expected the folder of the index that it searches; give it as `index`")
            if system.index is not None:
                read_manifest(system.index, "index")
            if name in STUDENTS:
                if name not in stores and "teacher" not in systems:
                    raise HlmError("it searches the teacher's vectors: add `teacher`, or give it a `corpus`")
                searched = stores.get(name) or stores.get("teacher")
                teacher = searched.encoder if searched else known.get("teacher")
                # Of a teacher without a record nothing is known yet; that this is a student is.
                check_student(source, teacher) if teacher else read_manifest(source, "student")
            elif name in stores and name in known:
                stores[name].check(encoder=known[name])
        except HlmError as error:
            raise HlmError(f"systems: '{name}': {error}") from error
    return stores


def find_on_hub(model: str) -> None:
    """Refuses a Hub id that is not there, or not a whole sentence-transformers model, for the price of a small file."""
    try:
        hf_hub_download(model, "modules.json")
    except (OSError, ValueError) as error:
        found = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HlmError(
            f"expected a folder or a sentence-transformers model on the Hub, found no modules.json of '{model}' "
            f"({found}); correct the name, or run the step that writes it"
        ) from error


def recorded_encoder(folder: Path, system: System) -> str | None:
    """The fingerprint that the manifest of a folder of HLM's gives, where the model is read as it was saved; None where
    there is none, or another dtype or limit of tokens makes it another encoder."""
    found = {}
    for name in (MANIFEST, "config.json"):
        try:
            found[name] = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise HlmError(f"cannot read {folder / name} ({error}); run the step that writes it again") from error
    if not all(isinstance(one, dict) for one in found.values()):
        raise HlmError(f"{folder}: expected mappings in {' and '.join(found)}; run the step that writes it again")
    saved = found["config.json"].get("dtype") or found["config.json"].get("torch_dtype")
    return found[MANIFEST].get("encoder") if saved == system.dtype and system.max_seq_length is None else None
