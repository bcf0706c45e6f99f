"""The ad index beside a teacher's stores: built from them, measured, and brought up to date as they change."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hlm.artefacts import MANIFEST, HlmError, read_manifest
from hlm.fields import optional
from hlm.vectors import canaries
from hlm.vectors.index import ENGINES, Index, create_index, engine_and_factory, open_index
from hlm.vectors.recall import measured, sample_of
from hlm.vectors.store import VectorStore
from hlm.vectors.store_versions import since

logger = logging.getLogger(__name__)
MEASURED_K, ROWS_AT_ONCE = 100, 65_536
# A further version that finds so much less of the exact neighbours than the one before is not taken.
LOST_RECALL = 0.02


def write_index(output: str, kind: str, dim: int | None, keep: int) -> None:
    """Builds `output/index` from `output/corpus`, unless it is there already, made from the same vectors. An index of a
    living engine is changed where it is of other vectors of the same encoder.

    Args:
        kind: as `create_index` takes it.
        keep: versions of the index to keep.

    Raises:
        HlmError: a further version that finds less than the one before; that one stays.
    """
    store, folder = VectorStore.open(f"{output}/corpus"), Path(output) / "index"
    engine, factory = engine_and_factory(kind)
    wanted = {"encoder": store.encoder, "factory": factory, "dim": dim or store.dim, "engine": engine}
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder, "index")
        found = {"encoder": manifest["inputs"].get("encoder"), "factory": manifest["config"].get("factory")}
        found |= {"dim": manifest.get("dim"), "engine": manifest.get("engine", "faiss")}
        if wanted == found and manifest["inputs"].get("source") == store.source:
            if store.canaries:
                canaries.keep(folder, "index", store.canaries)
            logger.info("%s: up to date", folder)
            return
        if wanted == found and ENGINES[engine].lives:
            refresh(open_index(folder), store, output, keep)
            return
    create_index(folder, store, kind, dim=dim, check=_checked(folder, store, output, factory), keep=keep)
    logger.info("%s: %s over %d ads", folder, factory, len(store))


def refresh(index: Index, store: VectorStore, output: str, keep: int) -> None:
    """Puts into a living index what a store has and it lacks, deletes what it has and the store lacks, and commits."""
    folder = Path(output) / "index"
    check = _checked(folder, store, output, index.factory)
    found = since(store, index.made_of)
    if found is None:
        logger.info("%s: built anew, its vectors were written into other files", folder)
        create_index(folder, store, f"{index.engine}:{index.factory}", dim=index.dim, check=check, keep=keep)
        return
    fresh, gone = found
    index.delete(gone)
    for start in range(0, len(fresh), ROWS_AT_ONCE):
        rows = fresh[start : start + ROWS_AT_ONCE]
        index.put(store.ids_of(rows), store.gather(rows))
    commit: Any = index.commit  # of an engine that keeps versions in a folder
    commit(store, check=check, keep=keep)
    logger.info("%s: a further version, %d ads put, %d deleted, of %d", folder, len(fresh), len(gone), len(store))


def _checked(folder: Path, store: VectorStore, output: str, factory: str) -> Callable[[Index], None]:
    """Counts and measures an index before it is taken: `check` of `Index.create`."""
    before = None
    if (folder / MANIFEST).is_file():
        before = optional(read_manifest(folder, "index"), dict, "measured", where=folder / MANIFEST)

    def check(index: Index) -> None:
        if len(index) != len(store):
            raise HlmError(f"expected an index of the {len(store)} ads of {store.folder}, found one of {len(index)}")
        if factory.upper() == "FLAT":
            return
        part, queries = queries_beside(output, store)
        sample = sample_of(queries, 0, dim=index.dim)
        index.measured = measured(index, store, sample, MEASURED_K, f"vectors of {part}")
        least = (before or {}).get("recall", 0.0) - LOST_RECALL
        if index.measured["recall"] < least:
            raise HlmError(
                f"expected an index that finds {least:.4f} of the exact neighbours, as the one at {folder} and the "
                f"noise of a sample have it, found {index.measured['recall']:.4f}; the old one stays: build a finer "
                "one into another folder, or delete this one"
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
