"""The ad index beside a teacher's stores: built from them, measured, and brought up to date as they change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hlm.artefacts import MANIFEST, HlmError, fingerprint_texts, read_manifest
from hlm.fields import optional
from hlm.steps import EmbedConfig
from hlm.vectors import canaries
from hlm.vectors.index import ENGINES, KIND, OLDEST, Index, create_index, engine_and_factory, open_index
from hlm.vectors.recall import measured, sample_of
from hlm.vectors.store import VectorStore
from hlm.vectors.store_versions import since

logger = logging.getLogger(__name__)
MEASURED_K, ROWS_AT_ONCE = 100, 65_536
# A further version that finds so much less of the exact neighbours than the one before is not taken.
LOST_RECALL = 0.02
WANTED_RECALL = 0.98  # an index that can search harder does so until it finds so much
STAMP = "columns"  # in `made_of`: a hash of what searches can be filtered by


def write_index(config: EmbedConfig, columns: pa.Table | None) -> None:
    """Builds `output/index` from `output/corpus`, unless it is there already, made from the same vectors and columns.
    An index of a living engine is changed where only ads have changed.

    Args:
        columns: "_id" and the columns of the ads that searches can be filtered by.

    Raises:
        HlmError: a further version that finds less than the one before; that one stays.
    """
    kind, keep = str(config.index), config.keep_versions
    store, folder = VectorStore.open(Path(config.output) / "corpus"), Path(config.output) / "index"
    engine, factory = engine_and_factory(kind)
    wanted = {"encoder": store.encoder, "factory": factory, "dim": config.index_dim or store.dim, "engine": engine}
    stamp = None if columns is None else fingerprint_texts(_as_texts(columns))
    before, found = None, {}
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder, KIND)
        found = {"encoder": manifest["inputs"].get("encoder"), "factory": manifest["config"].get("factory")}
        found |= {"dim": manifest.get("dim"), "engine": manifest.get("engine", OLDEST)}
        same = manifest["inputs"].get("source") == store.source
        before = optional(manifest, dict, "measured", where=folder / MANIFEST) if wanted == found else None
        if wanted == found and same and (manifest.get("made_of") or {}).get(STAMP) == stamp:
            if store.canaries:
                canaries.keep(folder, KIND, store.canaries)
            logger.info("%s: up to date", folder)
            return
    check = _checked(store, config.output, stamp, before)
    if wanted == found and ENGINES[engine].lives and refresh(open_index(folder), store, columns, check, keep):
        return
    create_index(folder, store, kind, dim=config.index_dim, columns=columns, check=check, keep=keep)
    logger.info("%s: %s over %d ads", folder, factory, len(store))


def refresh(
    index: Any, store: VectorStore, columns: pa.Table | None, check: Callable[[Index], None], keep: int
) -> bool:
    """Puts into a living index what a store has and it lacks, or has in other columns, deletes what the store lacks,
    and commits.

    Returns:
        False, and changes nothing, where it has to be built anew: it has other columns, its vectors are in other files,
        or somebody put or deleted ads that the store does not know of.
    """
    found = since(store, index.made_of)
    if found is None or index.columns != (["_id"] if columns is None else columns.column_names):
        return False
    fresh, gone = found
    rows = fresh
    if columns is not None:
        try:
            rows = np.union1d(fresh, store.rows_of(_differing(index.ads(), columns)))
        except pa.ArrowException:  # a column is of another type by now
            return False
    index.delete(gone)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        index.put(store.ids_of(part), store.gather(part), columns)
    index.commit(store, check=check, keep=keep)
    counts = len(fresh), len(rows) - len(fresh), len(gone), len(store)
    logger.info("%s: %d ads put, %d in other columns, %d deleted, of %d", index.folder, *counts)
    return True


def _differing(old: pa.Table, new: pa.Table) -> list[str]:
    """The ids of both whose other columns differ."""
    places = pc.index_in(new["_id"].cast(pa.string()), value_set=old["_id"].combine_chunks().cast(pa.string()))
    new, places = new.filter(places.is_valid()), places.drop_null()
    differs = np.zeros(len(new), bool)
    for name in new.column_names[1:]:
        before, now = old[name].take(places), new[name].cast(old.schema.field(name).type)
        same = pc.fill_null(pc.equal(before, now), False)
        both_null = pc.and_(before.is_null(), now.is_null())
        differs |= ~pc.or_(same, both_null).to_numpy()
    return new["_id"].filter(pa.array(differs)).to_pylist()


def _as_texts(columns: pa.Table) -> Iterator[str]:
    for batch in columns.to_batches(max_chunksize=ROWS_AT_ONCE):
        yield from map(repr, batch.to_pylist())


def _checked(
    store: VectorStore, output: str, stamp: str | None, before: dict[str, Any] | None
) -> Callable[[Index], None]:
    """Counts and measures an index before it is taken, and makes it search harder where that finds more: `check` of
    `create_index`.

    Args:
        stamp: of the columns.
        before: what was measured of the version before, of the same kind.
    """

    def check(index: Index) -> None:
        if len(index) != len(store):
            raise HlmError(f"expected an index of the {len(store)} ads of {store.folder}, found one of {len(index)}")
        index.made_of = {**store.parts, **({STAMP: stamp} if stamp else {})}
        if index.factory.upper() == "FLAT":
            return
        part, queries = queries_beside(output, store)
        sample, of = sample_of(queries, 0, dim=index.dim), f"vectors of {part}"
        found = measured(index, store, sample, MEASURED_K, of)
        while found["recall"] < WANTED_RECALL and index.search_harder():
            found = measured(index, store, sample, MEASURED_K, of)
        index.measured = found
        alike = before is not None and all(before.get(name) == found[name] for name in ("k", "of"))
        least = before["recall"] - LOST_RECALL if before is not None and alike else 0.0
        if found["recall"] < least:
            raise HlmError(
                f"expected an index that finds {least:.4f} of the exact neighbours, as the one before and the noise of "
                f"a sample have it, found {found['recall']:.4f}; the old one stays: name a finer kind of index"
            )

    return check


def queries_beside(output: str, store: VectorStore) -> tuple[str, VectorStore]:
    """A store of the same teacher's queries beside that of the ads; without one the ads' own, for which an index finds
    more than for queries."""
    for part in ("unlabelled", "queries"):
        if (Path(output) / part / MANIFEST).is_file():
            found = VectorStore.open(Path(output) / part)
            if (found.encoder, found.dim) == (store.encoder, store.dim):
                return part, found
    return "corpus", store
