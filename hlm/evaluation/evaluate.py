"""The last step: every system searches the catalogue; metrics, recovery with intervals, plot and report.json."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hlm.artefacts import HlmError, fingerprint_json, fingerprint_texts, read_manifest
from hlm.data.contract import RetrievalData, document_text, load
from hlm.data.counts import counts_of
from hlm.data.views import Rows
from hlm.encoders.loading import check_device, encode, fingerprint, load_encoder
from hlm.encoders.pruning import parameter_counts
from hlm.evaluation.bm25 import bm25_run
from hlm.evaluation.by_count import weigh
from hlm.evaluation.contribution import Scoring, Split, compare_fusion
from hlm.evaluation.inputs import chooses_on_dev, find_inputs, read_fusions, read_slices, read_systems
from hlm.evaluation.kept_runs import cached_run, check_runs, run_path, write_parquet
from hlm.evaluation.metrics import Run, check_judgements, dense_run, relevance_threshold
from hlm.evaluation.report import STUDENTS, build_report, command_line, environment, plot
from hlm.evaluation.thresholds import calibrate
from hlm.indexes.exact import StoreSearch, exact_search
from hlm.indexes.faiss_index import AdIndex
from hlm.indexes.index import Index, open_index
from hlm.indexes.lineage import check_student
from hlm.progress import progress
from hlm.report_files import claimed_report, write_report
from hlm.report_types import Report, Thresholds
from hlm.settings import defaults_of, keywords
from hlm.steps import EvaluateConfig, System
from hlm.vectors.store import VectorStore, write_store

logger = logging.getLogger(__name__)

SCRIPT = "recipes/evaluate.py"


@keywords(EvaluateConfig)
def evaluate(config: EvaluateConfig, *, command: str | None = None) -> Report | None:
    """Searches a dataset's catalogue with every system and compares what they find.

    Every setting of `EvaluateConfig` is a keyword. What a rerun need not do again is kept beside the report, in `runs`
    and `stores`.

    Args:
        command: what makes this report again, for its record; None: the recipe's script with these settings.

    Returns:
        The report, as it stands in `output`/report.json, beside report.png and per_query.parquet. None in all but the
        first process of several: nothing here is distributed.

    Raises:
        HlmError: systems that are not there or do not belong together, or an output that is somebody's.
    """
    check_device(config.device)
    if os.environ.get("RANK", "0") != "0":
        return None
    systems = read_systems(config)
    stores = find_inputs(systems)
    with claimed_report(config.output, "report.json") as output:
        check_runs(output, [*systems, *(f"{name}-{config.dev_split}" for name in systems)])
        command = command or command_line(SCRIPT, flags_of(config))
        return _evaluate(replace(config, output=str(output)), systems, stores, command)


def flags_of(config: EvaluateConfig) -> list[str]:
    """The settings as words of the script's command line."""
    words = []
    for name, default in defaults_of(EvaluateConfig).items():
        value = getattr(config, name)
        if value != default:
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return words


def _evaluate(
    config: EvaluateConfig, systems: dict[str, System | None], stores: dict[str, VectorStore], command: str
) -> Report:
    """Searches with every system and writes the report's files."""
    fusions, patterns = read_fusions(config, systems), read_slices(config)
    splits = (config.split, config.dev_split) if chooses_on_dev(config, fusions) else (config.split,)
    data = load(config.data, revision=config.revision, splits=splits, skip_bad_rows=config.skip_bad_rows)
    queries, qrels = data.split_queries(config.split), data.qrels[config.split]
    level = relevance_threshold(qrels) if config.relevance_level is None else config.relevance_level
    for split in splits:
        check_judgements(data.qrels[split], config.k, level)
    for store in stores.values():
        store.check(source=data.fingerprint("corpus"))

    runs, parameters, encoders = _search_all(config, data, systems, stores, splits)
    reported, *others = (Split(split, runs[split], data.qrels[split]) for split in splits)
    dev = others[0] if others else None
    fused, compared = {}, {}
    how = Scoring(
        config.k, level, config.incomplete, config.bootstrap_samples, config.bootstrap_seed, config.impressions
    )
    for name, fusion in fusions.items():
        fused[name], compared[name] = compare_fusion(fusion, reported, dev, config.depth, how)
        sizes = [parameters[system] for system in fusion.systems]
        parameters[name] = (sum(total for total, _ in sizes), sum(body for _, body in sizes))
        logger.info("fused %s", name)

    report, scores = build_report(
        {**reported.runs, **fused},
        qrels,
        dataset=config.data,
        split=config.split,
        parameters=parameters,
        texts=dict(queries),
        kinds=query_kinds(data),
        patterns=patterns,
        fusions=compared,
        k=config.k,
        relevance_level=level,
        incomplete=config.incomplete,
        samples=config.bootstrap_samples,
        seed=config.bootstrap_seed,
        environment={**environment(command), "encoders": encoders, "corpus": data.fingerprint("corpus")},
    )
    if config.by_count:
        every = dict(zip(data.queries["_id"], counts_of(data.queries, "queries"), strict=True))
        counts = {query: float(every[query]) for query in qrels}
        how_drawn = {"samples": config.bootstrap_samples, "seed": config.bootstrap_seed}
        report["by_count"] = weigh(report, scores, counts, **how_drawn)
    if config.shown_precision is not None and dev is not None:
        report["thresholds"] = least_scores(config.shown_precision, reported, dev, how)
    output = Path(config.output)
    write_report(output, report)  # first: it says that the files beside it are HLM's
    write_parquet(output / "per_query.parquet", scores)
    plot(report, output / "report.png")
    return report


def least_scores(precision: float, reported: Split, dev: Split, how: Scoring) -> Thresholds:
    """The threshold of every system that gives a score of its own."""
    settings: dict[str, Any] = {"level": how.level, "k": how.k, "samples": how.samples, "seed": how.seed}
    settings["judged_only"] = how.incomplete
    found = {
        name: calibrate((dev.runs[name], dev.qrels), (run, reported.qrels), precision, **settings)
        for name, run in reported.runs.items()
    }
    return {"wanted_precision": precision, "split": dev.name, "systems": found}


def _search_all(
    config: EvaluateConfig,
    data: RetrievalData,
    systems: dict[str, System | None],
    stores: dict[str, VectorStore],
    splits: Sequence[str],
) -> tuple[dict[str, dict[str, Run]], dict[str, tuple[int, int]], dict[str, str]]:
    """Every system's run of each split, its parameters (all, without embeddings) and its encoder's fingerprint."""
    runs: dict[str, dict[str, Run]] = {split: {} for split in splits}
    parameters, encoders = {}, {}
    teacher = None
    for name, system in systems.items():
        if system is None:
            parameters[name] = (0, 0)
            for split in splits:
                runs[split][name] = bm25(config, data, split)
            continue
        if system.model is None:
            model: Any = VectorStore.open(str(system.queries))
            encoders[name], parameters[name] = model.encoder, (0, 0)  # nobody counts what cannot be loaded
        else:
            model = load_encoder(
                system.model, device=config.device, dtype=system.dtype, max_seq_length=system.max_seq_length
            )
            encoders[name], parameters[name] = fingerprint(model), parameter_counts(model)
        catalogue = open_catalogue(config, data, name, system, model, encoders[name], teacher, stores.get(name))
        if name == "teacher":
            teacher = catalogue
        for split in splits:
            runs[split][name] = search(config, data, split, name, system, model, encoders[name], catalogue)
        logger.info("searched with %s", name)
    return runs, parameters, encoders


def _kept_as(config: EvaluateConfig, name: str, split: str) -> Path:
    """Where a system's run of a split is kept."""
    return run_path(config.output, name if split == config.split else f"{name}-{split}")


def bm25(config: EvaluateConfig, data: RetrievalData, split: str) -> Run:
    queries = data.split_queries(split)
    corpus = data.corpus.select_columns(["_id", "title", "text"])
    key = [data.fingerprint("corpus"), queries_fingerprint(queries), config.depth, config.bm25_k1, config.bm25_b]
    return cached_run(
        _kept_as(config, "bm25", split),
        key,
        [query for query, _ in queries],
        lambda: bm25_run(Rows(corpus), queries, config.depth, k1=config.bm25_k1, b=config.bm25_b),
    )


class Catalogue:
    """A store and the exact indexes over it, one for each width that is asked for, built on first use."""

    def __init__(self, store: VectorStore) -> None:
        self.store = store
        self._indexes: dict[int, AdIndex | StoreSearch] = {}

    def index(self, dim: int) -> AdIndex | StoreSearch:
        if dim not in self._indexes:
            self._indexes[dim] = exact_search(self.store, dim)
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
        assert catalogue is not None, "find_inputs refuses a student without a teacher's vectors"
        check_student(str(system.model), catalogue.store.encoder)
        return catalogue
    if store is None:
        # Named after what it holds: another model or corpus gets a folder of its own.
        corpus = data.corpus.select_columns(["_id", "title", "text"])
        folder = Path(config.output) / "stores" / f"{name}-{encoder}-{source}"
        with progress(what=f"encode the documents with {name}", unit="text", total=len(data.corpus)) as bar:
            write_store(
                folder,
                lambda start, stop: ((row["_id"], document_text(row)) for row in corpus.select(range(start, stop))),
                lambda texts: encode(model, texts, prompt_name="document", bar=bar),
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
    split: str,
    name: str,
    system: System,
    model: Any,
    encoder: str,
    catalogue: Catalogue,
) -> Run:
    """The run of a dense system; a student narrower than the store searches the store's first components.

    Args:
        model: or the store of its query vectors.
    """
    queries = data.split_queries(split, oracle=system.oracle)
    ids, texts = [query for query, _ in queries], [text for _, text in queries]
    dim = None if name in STUDENTS else catalogue.store.dim
    shipped = open_shipped(system.index, catalogue.store) if system.index else None

    def make() -> Run:
        if isinstance(model, VectorStore):
            vectors = model.gather(model.rows_of(ids))
        else:
            vectors = encode(model, texts, prompt_name=system.prompt_name, dim=dim)
        return dense_run(vectors, shipped or catalogue.index(vectors.shape[1]), ids, config.depth)

    key = [encoder, catalogue.store.fingerprint, queries_fingerprint(queries), system.prompt_name, config.depth]
    key += [fingerprint_json(read_manifest(system.index, "index"))] if system.index else []
    if isinstance(model, VectorStore):
        model.check(source=data.fingerprint("queries"))
        key += [model.fingerprint]
    return cached_run(_kept_as(config, name, split), key, ids, make)


def open_shipped(folder: str, store: VectorStore) -> Index:
    """The index at a folder, over the same ads as a store and of the same encoder.

    Raises:
        HlmError: no such index there.
    """
    index = open_index(folder, expect_encoder=store.encoder)
    if (index.source, len(index)) != (store.source, len(store)):
        raise HlmError(
            f"expected an index of the {len(store)} ads of {store.folder}, found one of {len(index)} other ads at "
            f"{folder}; build it from that store"
        )
    return index


def query_kinds(data: RetrievalData) -> dict[str, str] | None:
    if "kind" not in data.queries.column_names:
        return None
    return {row["_id"]: row["kind"] or "(none)" for row in data.queries.select_columns(["_id", "kind"])}


def queries_fingerprint(queries: list[tuple[str, str]]) -> str:
    return fingerprint_texts(field for query in queries for field in query)
