"""Last step: every system searches the catalogue; metrics, recovery with intervals, table, plot and report.json.

    accelerate launch recipes/evaluate.py --config recipes/configs/quickstart/evaluate.yaml

Under `output`: report.json, report.png, per_query.parquet, and what a rerun need not do again (runs/, stores/).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download

from hlm.artefacts import (
    MANIFEST,
    HlmError,
    atomic_file,
    fingerprint_json,
    fingerprint_texts,
    read_manifest,
    write_json,
)
from hlm.config import closest, parse, read_section, run_recipe
from hlm.data.contract import RetrievalData, document_text, load
from hlm.encoders.loading import check_device, encode, find_encoder, fingerprint, load_encoder
from hlm.encoders.pruning import parameter_counts
from hlm.evaluation.metrics import Run, bm25_run, check_judgements, dense_run, relevance_threshold
from hlm.evaluation.report import STUDENTS, SYSTEMS, build_report, command_line, environment, format_table, plot
from hlm.report_files import claimed_report
from hlm.training.inputs import check_student
from hlm.vectors.index import AdIndex
from hlm.vectors.store import VectorStore, write_store

logger = logging.getLogger(__name__)

COMMAND = "recipes/evaluate.py"


@dataclass
class EvaluateConfig:
    data: str = field(metadata={"help": "folder or Hub id in the data contract"})
    systems: dict[str, Any] = field(
        metadata={"help": "name -> nothing (bm25), a model, or {model, corpus (store), oracle, prompt_name}"}
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "leave out rows without text, and judgements of what is not in the data"}
    )
    output: str = field(default="runs/quickstart", metadata={"help": "folder for the report"})
    revision: str | None = field(default=None, metadata={"help": "Hub revision of the data"})
    split: str = "test"
    k: int = field(default=10, metadata={"help": "cut-off of precision, nDCG, MRR and overlap"})
    depth: int = field(default=100, metadata={"help": "documents retrieved for each query, at least 100"})
    relevance_level: int | None = field(default=None, metadata={"help": "lowest relevant grade; default 2, or 1"})
    incomplete: bool = field(default=False, metadata={"help": "add condensed nDCG and judged@k"})
    bm25_k1: float = 1.5
    bm25_b: float = 0.75
    bootstrap_samples: int = 10_000
    bootstrap_seed: int = 0
    device: str | None = None


@dataclass
class System:
    """One entry of `systems`."""

    model: str  # folder, "package:..." or Hub id; students: the folder that a recipe wrote
    corpus: str | None = None  # store of document vectors; encoded here (backbone, teacher) or the teacher's (students)
    oracle: bool = False  # the teacher's queries are read with their oracle column
    prompt_name: str | None = "query"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # what the model computes in
    max_seq_length: int | None = None  # the model's own; must be what the store was made with


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse(EvaluateConfig, argv=argv)
    check_device(config.device)
    if os.environ.get("RANK", "0") != "0":
        return  # nothing here is distributed: under a multi-process launch the first process does it all
    systems = read_systems(config)
    stores = find_inputs(systems)
    with claimed_report(config.output, "report.json") as output:
        check_runs(output, systems)
        report = evaluate(replace(config, output=str(output)), systems, stores, command_line(COMMAND, argv))
    print(format_table(report))


def evaluate(
    config: EvaluateConfig, systems: dict[str, System | None], stores: dict[str, VectorStore], command: str
) -> dict[str, Any]:
    """Searches with every system and writes the report's files."""
    data = load(config.data, revision=config.revision, splits=(config.split,), skip_bad_rows=config.skip_bad_rows)
    queries, qrels = data.split_queries(config.split), data.qrels[config.split]
    level = relevance_threshold(qrels) if config.relevance_level is None else config.relevance_level
    check_judgements(qrels, config.k, level)
    for store in stores.values():
        store.check(source=data.fingerprint("corpus"))

    runs, parameters, encoders = {}, {}, {}
    teacher = None
    for name, system in systems.items():
        if system is None:
            runs[name], parameters[name] = bm25(config, data, queries), (0, 0)
            continue
        model = load_encoder(
            system.model, device=config.device, dtype=system.dtype, max_seq_length=system.max_seq_length
        )
        encoders[name], parameters[name] = fingerprint(model), parameter_counts(model)
        catalogue = open_catalogue(config, data, name, system, model, encoders[name], teacher, stores.get(name))
        if name == "teacher":
            teacher = catalogue
        runs[name] = search(config, data, name, system, model, encoders[name], catalogue)
        logger.info("searched with %s", name)

    report, scores = build_report(
        runs,
        qrels,
        dataset=config.data,
        split=config.split,
        parameters=parameters,
        texts=dict(queries),
        kinds=query_kinds(data),
        k=config.k,
        relevance_level=level,
        incomplete=config.incomplete,
        samples=config.bootstrap_samples,
        seed=config.bootstrap_seed,
        environment=environment(command) | {"encoders": encoders, "corpus": data.fingerprint("corpus")},
    )
    output = Path(config.output)
    write_json(output / "report.json", report)  # first: it says that the files beside it are HLM's
    write_parquet(output / "per_query.parquet", scores)
    plot(report, output / "report.png")
    return report


def read_systems(config: EvaluateConfig) -> dict[str, System | None]:
    """The checked `systems` in the report's order, in which the teacher comes before the students."""
    for name in ("k", "bootstrap_samples"):
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
        if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
            raise HlmError(f"systems: expected a model for '{name}', found {given!r}; write `{name}: path/to/model`")
        systems[name] = read_section(System, entry, f"systems: '{name}'")
    return {name: systems[name] for name in SYSTEMS if name in systems}


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
            source = find_encoder(system.model)
            if not Path(source).is_dir():
                find_on_hub(source)
            elif encoder := recorded_encoder(Path(source), system):
                known[name] = encoder
            if system.corpus is not None:
                stores[name] = VectorStore.open(system.corpus)
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


def check_runs(output: Path, systems: dict[str, System | None]) -> None:
    """Refuses to overwrite a table that is not a run kept by this recipe."""
    for name in systems:
        path = run_path(output, name)
        if os.path.lexists(path) and run_key(path) is None:
            raise HlmError(
                f"expected a run of '{name}' at {path}, found a file that HLM did not write; move it, or name another "
                "output"
            )


def bm25(config: EvaluateConfig, data: RetrievalData, queries: list[tuple[str, str]]) -> Run:
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG on import
    corpus = data.corpus.select_columns(["_id", "title", "text"])
    key = [data.fingerprint("corpus"), queries_fingerprint(queries), config.depth, config.bm25_k1, config.bm25_b]
    return cached_run(
        run_path(config.output, "bm25"),
        key,
        [query for query, _ in queries],
        lambda: bm25_run(corpus, queries, config.depth, k1=config.bm25_k1, b=config.bm25_b),
    )


class Catalogue:
    """A store and the exact indexes over it, one for each width that is asked for, built on first use."""

    def __init__(self, store: VectorStore) -> None:
        self.store = store
        self._indexes: dict[int, AdIndex] = {}

    def index(self, dim: int) -> AdIndex:
        if dim not in self._indexes:
            self._indexes[dim] = AdIndex.build(self.store, dim=dim)
        return self._indexes[dim]


def open_catalogue(
    config: EvaluateConfig,
    data: RetrievalData,
    name: str,
    system: System,
    model: Any,
    encoder: str,
    teacher: Catalogue | None,
    store: VectorStore | None,
) -> Catalogue:
    """The document vectors that `name` searches; refuses those of another encoder or another corpus."""
    source = data.fingerprint("corpus")
    if name in STUDENTS:
        catalogue = Catalogue(store) if store else teacher
        check_student(system.model, catalogue.store.encoder)
        return catalogue
    if store is None:
        # Named after what it holds: another model or corpus gets a folder of its own.
        corpus = data.corpus.select_columns(["_id", "title", "text"])
        folder = Path(config.output) / "stores" / f"{name}-{encoder}-{source}"
        write_store(
            folder,
            lambda start, stop: ((row["_id"], document_text(row)) for row in corpus.select(range(start, stop))),
            lambda texts: encode(model, texts, prompt_name="document"),
            dim=model.get_embedding_dimension(),
            encoder=encoder,
            source=source,
            n_rows=len(data.corpus),
        )
        store = VectorStore.open(folder)
    store.check(encoder=encoder, source=source)
    return Catalogue(store)


def search(
    config: EvaluateConfig,
    data: RetrievalData,
    name: str,
    system: System,
    model: Any,
    encoder: str,
    catalogue: Catalogue,
) -> Run:
    """The run of a dense system; a student narrower than the store searches the store's first components."""
    queries = data.split_queries(config.split, oracle=system.oracle)
    ids, texts = [query for query, _ in queries], [text for _, text in queries]
    dim = None if name in STUDENTS else catalogue.store.dim

    def make() -> Run:
        vectors = encode(model, texts, prompt_name=system.prompt_name, dim=dim)
        return dense_run(vectors, catalogue.index(vectors.shape[1]), ids, config.depth)

    key = [encoder, catalogue.store.fingerprint, queries_fingerprint(queries), system.prompt_name, config.depth]
    return cached_run(run_path(config.output, name), key, ids, make)


def run_path(output: str | Path, name: str) -> Path:
    return Path(output) / "runs" / f"{name}.parquet"


def run_key(path: Path) -> str | None:
    """What a run that was kept was made from; None of any other file."""
    try:
        return (pq.read_schema(path).metadata or {}).get(b"hlm_key", b"").decode() or None
    except (pa.ArrowException, OSError):
        return None


def cached_run(path: Path, key: list[Any], queries: list[str], make: Callable[[], Run]) -> Run:
    """The run kept at `path` if it was made from the same `key`; otherwise makes and keeps it."""
    stamp = fingerprint_json(key)
    if run_key(path) == stamp:
        table = pq.read_table(path)
        logger.info("%s is up to date", path)
        run: Run = {query: {} for query in queries}
        for query, document, score in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
            run[query][document] = score
        return run
    run = make()
    rows = [(query, document, score) for query in run for document, score in run[query].items()]
    schema = pa.schema(
        [("query_id", pa.string()), ("document_id", pa.string()), ("score", pa.float64())], {"hlm_key": stamp}
    )
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    write_parquet(path, pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema))
    return run


def write_parquet(path: Path, table: pa.Table) -> None:
    with atomic_file(path) as aside:
        pq.write_table(table, aside)


def query_kinds(data: RetrievalData) -> dict[str, str] | None:
    if "kind" not in data.queries.column_names:
        return None
    return {row["_id"]: row["kind"] or "(none)" for row in data.queries.select_columns(["_id", "kind"])}


def queries_fingerprint(queries: list[tuple[str, str]]) -> str:
    return fingerprint_texts(field for query in queries for field in query)


if __name__ == "__main__":
    run_recipe(main)
