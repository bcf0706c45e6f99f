"""A teacher's vectors of a dataset: a store of each part, and an index over the ads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from sentence_transformers import SentenceTransformer

from hlm.artefacts import MANIFEST, HlmError, check_output
from hlm.config import check_processes
from hlm.data.contract import document_text, load, query_text
from hlm.embedding import given
from hlm.embedding.embed_index import write_index
from hlm.embedding.endpoint import Endpoint
from hlm.embedding.ray_workers import write_by_ray
from hlm.embedding.shares import share_of, writer_of
from hlm.embedding.teacher_identity import prompt_name
from hlm.encoders.lengths import say_what_is_cut
from hlm.encoders.loading import encode, fingerprint, load_encoder
from hlm.indexes.index import ENGINES, engine_and_factory
from hlm.locks import locked
from hlm.planning.footprint import encoder_width
from hlm.planning.plan import check_dim
from hlm.progress import progress
from hlm.settings import keywords
from hlm.steps import PARTS, EmbedConfig
from hlm.teacher_settings import ReadySettings
from hlm.vectors import canaries
from hlm.vectors.store import VectorStore, check_store_output
from hlm.vectors.store_versions import Target, target_of

logger = logging.getLogger(__name__)

# Texts encoded at a time. A constant, because in bf16 it decides which texts share a batch and so the last bits of the
# vectors.
TEXTS_PER_STEP = 4096
# One model on two machines is nearer to itself than this.
SAME_SPACE = 0.99


@keywords(EmbedConfig)
def embed(config: EmbedConfig) -> Path:
    """Writes a teacher's vectors of ads and queries into stores, `output/{corpus,unlabelled,queries}`, and with
    `index`, `output/index` over the ads.

    Every setting of `EmbedConfig` is a keyword. A store is written shard by shard: a run that was killed goes on after
    the last whole shard, and a store that is up to date is left alone. Several processes share the shards and write the
    same store as one. Stores are float16, each row of norm 1.

    Where ads or queries have changed, only those are encoded whose text is new, and those that went are left out: store
    and index get a further version, and who has the former open keeps it.

    Returns:
        `output`.

    Raises:
        HlmError: settings or data that do not work, no such model, or an output that is somebody's.
    """
    check(config)
    _, tasks = share_of(config.shard)
    process = processes()
    endpoint, ready = given.read_settings(config)
    asked = Endpoint(config.model, endpoint) if endpoint else None
    if given.needs_model(config):
        dim = check_dim(config.dim, encoder_width(config.model, revision=config.model_revision))
        check_dim(config.index_dim, dim, "index_dim")
    output = Path(config.output)
    if process.is_main_process:
        for part in config.parts:
            check_store_output(output / part)
        if config.index and tasks == 1:  # tasks of an array would meet at its lock
            check_output(output / "index", "index")
    if asked or ready:
        embed_given(config, process, asked, ready)
        return output
    new: dict[str, int] = {}
    if config.ray_workers:
        sizes = {part: len(table) for part, table in tables_of(config, process)[0].items()}
        new = {part: size for part, size in sizes.items() if not (output / part / MANIFEST).is_file()}
        if new:  # what changed of the others is left to this process
            write_by_ray(config, new)
    work = Work.of(config, process)
    for part, size in new.items():  # Ray's workers have written them
        say_what_is_cut(work.model, work.writes(part)[0], size, role=prompt_name(part))
    targets = [write_part(work, part, process) for part in config.parts]
    process.wait_for_everyone()
    if process.is_main_process:
        finish(work.model, config, targets, work.tables.get("corpus"))
    return output


def embed_given(
    config: EmbedConfig, process: PartialState, asked: Endpoint | None, ready: dict[str, ReadySettings]
) -> None:
    """The stores and the index of a teacher behind an endpoint, or whose vectors are ready."""
    tables, sources = tables_of(config, process)
    if process.is_main_process:  # one process asks: the limits of an endpoint are for all
        parts = {
            part: given.Part(records_of(table, part, config.oracle), len(table), sources[part], _ids_of(table))
            for part, table in tables.items()
        }
        model = load_model(config, process) if given.needs_model(config) else None
        finish(None, config, given.write_given(config, parts, asked, ready, model), tables.get("corpus"))
    process.wait_for_everyone()


def tables_of(config: EmbedConfig, process: PartialState) -> tuple[dict[str, datasets.Dataset], dict[str, str]]:
    """The tables of the parts, and the fingerprints of their texts.

    Raises:
        HlmError: data that do not work, a part that they lack, or no `oracle` column where one is asked for.
    """
    with process.local_main_process_first():  # the others find the checked tables in the cache
        data = load(config.data, revision=config.data_revision, splits=(), skip_bad_rows=config.skip_bad_rows)
    tables = {part: getattr(data, part) for part in config.parts}
    sources = {part: data.fingerprint(part) for part in config.parts}  # refuses a part that the dataset lacks
    if config.oracle and not any("oracle" in table.column_names for table in tables.values()):
        raise HlmError(f"oracle: expected an 'oracle' column in {config.data}, found none; add it or set oracle: false")
    if config.index_columns:
        columns_of(tables["corpus"], config.index_columns)
    return tables, sources


def columns_of(ads: datasets.Dataset | None, names: Sequence[str]) -> pa.Table:
    """The ids of the ads and the columns of these names.

    Raises:
        HlmError: the ads have no such column.
    """
    assert ads is not None  # `check` has seen to it
    for name in names:
        if name not in ads.column_names:
            raise HlmError(f"index_columns: expected some of {', '.join(ads.column_names)}, found '{name}'")
    return ads.select_columns(["_id", *names]).with_format("arrow")[:]


@dataclass(frozen=True)
class Work:
    """The stores that a configuration asks for, and what writes any shard of them."""

    config: EmbedConfig
    tables: dict[str, datasets.Dataset]
    model: SentenceTransformer
    plans: dict[str, dict[str, Any]]  # of each part what `write_store` takes beside records and encode

    @classmethod
    def of(cls, config: EmbedConfig, process: PartialState) -> Work:
        """Loads the data and the model."""
        tables, sources = tables_of(config, process)
        model = load_model(config, process)
        shared: dict[str, Any] = {
            "dim": check_dim(config.dim, encoder_width(config.model, revision=config.model_revision))
        }
        shared |= {"encoder": fingerprint(model), "shard_rows": config.shard_rows}
        plans = {}
        for part, table in tables.items():
            facts = {"prompt": prompt_name(part), "oracle": config.oracle, "dtype": config.dtype}
            plans[part] = shared | {"source": sources[part], "n_rows": len(table), "facts": facts}
        return cls(config, tables, model, plans)

    def writes(self, part: str, bar: Any = None) -> tuple[Any, Any]:
        """`records` and `encode` of `write_store`."""
        more = {"dim": self.config.dim, "batch_tokens": self.config.batch_tokens, "bar": bar}
        encode_part = partial(encode, self.model, prompt_name=prompt_name(part), **more)
        return records_of(self.tables[part], part, self.config.oracle), stepwise(encode_part)


def load_model(config: EmbedConfig, process: PartialState) -> SentenceTransformer:
    return load_encoder(
        config.model,
        device=str(process.device),
        dtype=config.dtype,
        max_seq_length=config.max_seq_length,
        revision=config.model_revision,
    )


def finish(
    model: SentenceTransformer | None,
    config: EmbedConfig,
    targets: Sequence[Target],
    ads: datasets.Dataset | None,
) -> None:
    """What follows when every store is whole, by whichever task of an array finds them so: the next versions of stores
    that have changed, canaries of the model, if one was loaded, and the index."""
    output = Path(config.output)
    if unfinished := [target.folder.name for target in targets if not target.is_whole]:
        logger.info("%s: shards of %s are still with other tasks", output, ", ".join(unfinished))
        return
    with locked(output / ".finish.lock", f"canaries and index of {output}", wait=True):
        for target in targets:
            target.commit(partial(check_canaries, model, config.dim), keep=config.keep_versions)
        if model is not None:
            write_canaries(model, config)
        if config.index:
            write_index(config, columns_of(ads, config.index_columns) if config.index_columns else None)


def check_canaries(model: SentenceTransformer | None, dim: int | None, store: VectorStore) -> None:
    """Refuses a model that no longer puts the canary queries where it put them when the store was begun, though its
    fingerprint is the same: another device, library or precision.

    Raises:
        HlmError: names the mean cosine.
    """
    if model is None or store.canaries is None:
        return
    texts = canaries.texts_of(store.canaries, where=str(store.folder))
    found = encode(model, texts, prompt_name="query", dim=dim)
    _, cosine = canaries.check(store.canaries, found, name="this model", where=str(store.folder))
    if cosine < SAME_SPACE:
        raise HlmError(
            f"expected the model's canary queries where they were when {store.folder} was begun, found a mean cosine "
            f"of {cosine:.4f}: another device, library or precision; embed on one as before, or into a new folder"
        )


def write_part(work: Work, part: str, process: PartialState) -> Target:
    """One store, or what it lacks of its texts; this process writes its share of the shards of this task's."""
    config, plan = work.config, work.plans[part]
    share, tasks = share_of(config.shard)
    index, count = writer_of(config.shard, process.process_index, process.num_processes)
    records, _ = work.writes(part)
    target = target_of(part, Path(config.output) / part, records, plan)
    rows = target.plan["n_rows"]
    pending = target.pending()
    mine = [n for n in pending if n % count == index]
    left = sum(min(config.shard_rows, rows - n * config.shard_rows) for n in mine)
    if pending and process.is_main_process:
        say_what_is_cut(work.model, target.rows, rows, role=prompt_name(part))
    with progress(what=f"embed {part}", unit="text", total=left) as bar:
        target.write(work.writes(part, bar)[1], process_index=index, num_processes=count)
    by = " by the first process" if process.num_processes > 1 else ""
    by += f" by task {share} of {tasks}" if tasks > 1 else ""
    logger.info("%s: %s", target.folder, f"{left} of {plan['n_rows']} vectors written{by}" if left else "up to date")
    return target


def write_canaries(model: SentenceTransformer, config: EmbedConfig) -> None:
    """Keeps the teacher's vectors of the canary queries in every store that has none yet: after the shards, because
    these may be a resumed run's of another machine, and vectors of two machines are not equal to the bit."""
    folders = [Path(config.output) / part for part in config.parts]
    if any(VectorStore.open(folder).canaries is None for folder in folders):
        made = canaries.made_by(model, dim=config.dim)
        for folder in folders:
            canaries.keep(folder, "vectors", made)


def check(config: EmbedConfig) -> None:
    """Refuses unknown or repeated parts and numbers below 1, before anything is loaded."""
    unknown = [part for part in config.parts if part not in PARTS]
    if unknown or not config.parts or len(set(config.parts)) < len(config.parts):
        raise HlmError(f"parts: expected some of {', '.join(PARTS)}, each once, found {config.parts}")
    if config.index and "corpus" not in config.parts:
        raise HlmError(f"index: expected 'corpus' among the parts, found {config.parts}; the index is built over it")
    if config.index and ENGINES[engine_and_factory(config.index)[0]].scheme:
        raise HlmError(
            f"index: expected a kind of FAISS's or LanceDB's, which lie in a folder, found '{config.index}'; build "
            "that one by hlm.indexes.index.create_index from output/corpus"
        )
    if config.index_columns and not config.index:
        raise HlmError(f"index_columns: expected an index to keep {config.index_columns}, found none; give index")
    if config.ray_workers and config.shard:
        raise HlmError("expected ray_workers or shard, found both; either shares the shards out")
    if (config.ray_workers or config.shard) and (config.endpoint or config.ready):
        raise HlmError("expected no shard or ray_workers beside an endpoint or ready vectors: one process writes these")
    for name in ("dim", "index_dim", "max_seq_length", "batch_tokens", "shard_rows", "ray_workers", "keep_versions"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise HlmError(f"{name}: expected at least 1, found {value}")


def processes() -> PartialState:
    """This process among those that the launcher started."""
    # Alone, PartialState takes several processes without an accelerator for so many single ones.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu)
    check_processes(state.num_processes)
    return state


def records_of(table: datasets.Dataset, part: str, oracle: bool) -> Callable[[int, int], Iterator[tuple[str, str]]]:
    """The store's view of a table: (start, stop) -> (row id, text) of these rows, read in batches."""
    render = document_text if part == "corpus" else query_text
    columns = [name for name in ("_id", "title", "text", "oracle") if name in table.column_names]
    has_id = _has_ids(table)  # unlabelled queries need none

    def records(start: int, stop: int) -> Iterator[tuple[str, str]]:
        number = start
        for batch in table.select_columns(columns).select(range(start, stop)).iter(batch_size=1024):
            for cells in zip(*batch.values(), strict=True):
                row = dict(zip(batch, cells, strict=True))
                yield row["_id"] if has_id else f"u{number}", render(row, oracle=oracle)
                number += 1

    return records


def _ids_of(table: datasets.Dataset) -> pa.ChunkedArray | None:
    return table.data.column("_id") if _has_ids(table) else None


def _has_ids(table: datasets.Dataset) -> bool:
    return "_id" in table.column_names


def stepwise(encode_texts: Callable[[list[str]], np.ndarray]) -> Callable[[list[str]], np.ndarray]:
    """The same encoding in steps of `TEXTS_PER_STEP`."""

    def encode_shard(texts: list[str]) -> np.ndarray:
        vectors = encode_texts(texts[:TEXTS_PER_STEP])
        if len(texts) > TEXTS_PER_STEP:  # filled in place: joining the steps would hold the shard twice
            whole = np.empty((len(texts), vectors.shape[1]), dtype=np.float32)
            whole[:TEXTS_PER_STEP] = vectors
            for start in range(TEXTS_PER_STEP, len(texts), TEXTS_PER_STEP):
                stop = min(start + TEXTS_PER_STEP, len(texts))
                whole[start:stop] = encode_texts(texts[start:stop])
            vectors = whole
        return vectors

    return encode_shard
