"""A store whose texts change: only what is new or changed is encoded, and the store gets a further version.

A version adds shards to those of the version before and says which rows of all of them are gone, so it costs what
changed. The rows to encode are written as a store of their own beside this one, `.<name>.adding-<texts>.partial`, which
goes on after a kill as any store does and is shared by processes as any store is. When it is whole, its shards get
names in this store, and `hlm.json` points to the new version (`versions.py`). Until then readers see the old one.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hlm.artefacts import MANIFEST, HlmError, read_manifest, write_json
from hlm.locks import locked
from hlm.outputs import os_errors, resolved
from hlm.vectors import versions
from hlm.vectors.shard_files import GONE, files, ids_name, put_shard, sha256, text_hashes, vectors_name
from hlm.vectors.store import VectorStore
from hlm.vectors.store_writer import KIND, pending_shards, write_store

logger = logging.getLogger(__name__)

Rows = Callable[[int, int], Iterable[tuple[str, str]]]
ROWS_AT_ONCE = 65_536
GAP = 256  # rows between two changed ones that are read rather than jumped over
# A store of which more is gone is written anew: then every row is copied at most as often as it was written.
MOST_GONE = 0.5


@dataclass(frozen=True)
class Changes:
    """What is between a store and a table of texts.

    Attributes:
        fresh: int64, rows of the table that are to be encoded, ascending.
        gone: int64, rows of the store's files that the next version has no more, ascending, those that the current one
            already has no more among them.
        removed: how many of these the current version still has.
    """

    fresh: np.ndarray
    gone: np.ndarray
    removed: int


def find_changes(folder: str | Path, rows: Rows, count: int) -> Changes:
    """Compares a store with `count` rows of ids and texts: a row whose id and text the store has is kept.

    Args:
        rows: (start, stop) -> (id, text), as `write_store` takes it.

    Raises:
        HlmError: a store that is damaged, or an id that is there twice.
    """
    store = VectorStore.open(folder)
    ids, hashes = [], []
    for start in range(0, count, ROWS_AT_ONCE):
        pairs = list(rows(start, min(start + ROWS_AT_ONCE, count)))
        ids.append(pa.array([name for name, _ in pairs], pa.large_string()))
        hashes.append(text_hashes(text for _, text in pairs))
    names, texts = pa.chunked_array(ids, pa.large_string()), np.concatenate([np.zeros(0, np.uint64), *hashes])
    if len(pc.unique(names)) != count:
        raise HlmError(f"{folder}: expected distinct ids, found one twice; make the ids of the data unique")
    # A row of the store that the version no longer has must not be found.
    places = pc.index_in(names, value_set=store.ids.cast(pa.large_string())).fill_null(-1).to_numpy()
    found = np.flatnonzero(places >= 0)
    same = found[store.text_hashes[places[found]] == texts[found]]
    kept = np.zeros(len(store), bool)
    kept[places[same]] = True
    fresh = np.ones(count, bool)
    fresh[same] = False
    lost = store.physical(np.flatnonzero(~kept))
    return Changes(np.flatnonzero(fresh), np.sort(np.concatenate([store.gone, lost])), len(lost))


@dataclass(frozen=True)
class Target:
    """Where the rows of a table that a store lacks are written: into the store, or beside it for a further version.

    Attributes:
        folder: of the store that the rows are for.
        place: where `write_store` writes them.
        rows, plan: what it takes; "n_rows" of the plan may be 0.
        changes: what the next version changes; None where the store itself is written.
        base: the version that it changes.
    """

    folder: Path
    place: Path
    rows: Rows
    plan: dict[str, Any]
    changes: Changes | None = None
    base: int = versions.FIRST

    @classmethod
    def of(cls, folder: str | Path, rows: Rows, plan: dict[str, Any]) -> Target:
        """Looks at what is there.

        Args:
            rows, plan: of the whole table, as `write_store` takes them.
        """
        folder = resolved(folder)
        if not _is_living(folder, plan):
            return cls(folder, folder, rows, plan)
        manifest = read_manifest(folder, KIND)
        base = versions.number_of(manifest)
        if manifest["inputs"]["source"] == plan["source"]:
            store = VectorStore.open(folder)
            return cls(folder, folder, rows, plan | {"n_rows": 0}, Changes(np.zeros(0, np.int64), store.gone, 0))
        changes = find_changes(folder, rows, plan["n_rows"])
        if plan["n_rows"] and len(changes.fresh) == plan["n_rows"]:  # another catalogue: `write_store` refuses it
            return cls(folder, folder, rows, plan)
        place = folder.with_name(f".{folder.name}.adding-{plan['source']}-{base}-{plan['shard_rows']}.partial")
        return cls(folder, place, picked(rows, changes.fresh), plan | {"n_rows": len(changes.fresh)}, changes, base)

    def pending(self) -> list[int]:
        """The shards that are still to be written."""
        return pending_shards(self.place, **self.plan) if self.plan["n_rows"] else []

    def write(self, encode: Callable[[list[str]], np.ndarray], **processes: Any) -> None:
        """Writes them, by `write_store`."""
        if self.plan["n_rows"]:
            write_store(self.place, self.rows, encode, **processes, **self.plan)

    @property
    def is_whole(self) -> bool:
        """Whether all rows are written, by this process and the others."""
        return not self.plan["n_rows"] or (self.place / MANIFEST).is_file()

    def commit(self, check: Callable[[VectorStore], None] = lambda store: None, *, keep: int = versions.KEEP) -> None:
        """Makes the store's next version of what is whole, unless it has been made: of a store that is written itself
        nothing is left to do.

        Args:
            check: is given the version before anybody else sees it; what it raises leaves the old one in place.
            keep: versions to keep; files that none of these has are removed.

        Raises:
            HlmError: the store was changed or gone back meanwhile.
        """
        if self.changes is None:
            return
        with locked(self.folder / versions.LOCK, f"a version of {self.folder}", wait=True), os_errors(self.folder):
            manifest = read_manifest(self.folder, KIND)
            inputs = {"encoder": self.plan["encoder"], "source": self.plan["source"]}
            if manifest["inputs"] != inputs:
                if versions.number_of(manifest) != self.base:
                    raise HlmError(
                        f"expected version {self.base} of {self.folder}, which was compared with the texts, found "
                        f"{versions.number_of(manifest)}: it was changed meanwhile; run again"
                    )
                added = _take(self.folder, self.place) if len(self.changes.fresh) else []
                shards, gone = _without_empty(manifest["shards"] + added, self.changes.gone)
                _point(self.folder, manifest | {"inputs": inputs}, shards, gone, check)
                counts = len(self.changes.fresh), self.changes.removed
                logger.info("%s: a further version, %d rows added, %d removed", self.folder, *counts)
                store = VectorStore.open(self.folder)
                if len(store.gone) > MOST_GONE * (len(store) + len(store.gone)):
                    _compact(self.folder)
                forget(self.folder, keep)
            for leftover in self.folder.parent.glob(f".{self.folder.name}.adding-*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)


def target_of(part: str, folder: str | Path, rows: Rows, plan: dict[str, Any]) -> Target:
    """Where a part of a dataset is written. The ids of unlabelled queries are the numbers of their rows, by which they
    are read: a store of them is never changed."""
    return Target(Path(folder), Path(folder), rows, plan) if part == "unlabelled" else Target.of(folder, rows, plan)


def _is_living(folder: Path, plan: dict[str, Any]) -> bool:
    """Whether a whole store lies there, of the same encoder and settings, that was or will be changed: of other texts,
    or one that has versions."""
    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_manifest(folder, KIND)
    same = (
        manifest["inputs"].get("encoder") == plan["encoder"]
        and manifest.get("dim") == plan["dim"]
        and manifest["config"] == (plan.get("facts") or {})
    )
    changed = manifest["inputs"].get("source") != plan["source"]
    return same and (changed or versions.number_of(manifest) > versions.FIRST)


def since(store: VectorStore, parts: dict[str, Any] | None) -> tuple[np.ndarray, list[str]] | None:
    """What is between a version of a store and one that was made before.

    Args:
        parts: what that one was made of, as `VectorStore.parts` said; None: nobody knows.

    Returns:
        int64, the rows that the store has in other shards; and the ids that it has no more. None where shards of the
        former are no longer the store's.
    """
    ours = store.parts["shards"]
    if parts is None or not set(parts["shards"]) <= set(ours):
        return None
    rows = np.array([record["rows"] for record in store.manifest["shards"]])
    is_new = np.repeat([shard not in set(parts["shards"]) for shard in ours], rows)
    is_gone = np.zeros(len(is_new), bool)
    is_gone[store.gone] = True
    for manifest in versions.listed(store.folder, KIND).values():  # what that version said of it is known already
        older = manifest.get("gone")
        if older and older["sha256"][:16] == parts["gone"]:
            is_gone[VectorStore.of(store.folder, manifest).gone] = False
    kept = np.ones(len(is_new), bool)
    kept[store.gone] = False
    lost = np.flatnonzero(is_gone & ~is_new)
    ids = store.names_at(lost)
    left = ids.filter(pc.invert(pc.is_in(ids, value_set=store.ids.combine_chunks())))
    return np.flatnonzero(is_new[kept]), left.to_pylist()


def compact(folder: str | Path) -> None:
    """Writes the store's rows into shards of their own, without those that are gone, as a further version."""
    folder = resolved(folder)
    with locked(folder / versions.LOCK, f"a version of {folder}", wait=True), os_errors(folder):
        _compact(folder)


def forget(folder: Path, keep: int) -> None:
    """Removes versions beyond the `keep` newest, and the shards that no other has."""
    versions.forget(folder, KIND, keep)
    named = {
        name
        for manifest in versions.listed(folder, KIND).values()
        for number, record in enumerate(manifest["shards"])
        for name in files(number, record)
    }
    for path in [*folder.glob("vectors-*.safetensors"), *folder.glob("ids-*.parquet")]:
        if path.name not in named:
            path.unlink()


def picked(rows: Rows, chosen: np.ndarray) -> Rows:
    """Some rows as `write_store` takes them: its row n is row `chosen[n]` of `rows`."""

    def of(start: int, stop: int) -> Iterator[tuple[str, str]]:
        part = chosen[start:stop]
        for run in np.split(part, np.flatnonzero(np.diff(part) > GAP) + 1):
            wanted, first = set(run.tolist()), int(run[0])
            for number, row in enumerate(rows(first, int(run[-1]) + 1), first):
                if number in wanted:
                    yield row

    return of


def _take(folder: Path, aside: Path) -> list[dict[str, Any]]:
    """Gives a whole store's shards names in `folder` that no version has, and returns their records."""
    known = [
        record.get("number", place)
        for manifest in versions.listed(folder, KIND).values()
        for place, record in enumerate(manifest["shards"])
    ]
    taken = []
    for number, record in enumerate(read_manifest(aside, KIND)["shards"]):
        new = max(known, default=-1) + 1 + number
        for name, target in ((vectors_name(number), vectors_name(new)), (ids_name(number), ids_name(new))):
            (folder / target).unlink(missing_ok=True)  # a killed run's: no version names it
            try:
                os.link(aside / name, folder / target)
            except OSError:  # a file system without links
                shutil.copyfile(aside / name, folder / target)
        taken.append({**record, "number": new})
    return taken


def _without_empty(shards: list[dict[str, Any]], gone: np.ndarray) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The shards of which a row is left, and where the rows that are gone are among theirs."""
    kept, moved, start, new_start = [], [], 0, 0
    for place, record in enumerate(shards):
        here = gone[np.searchsorted(gone, start) : np.searchsorted(gone, start + record["rows"])]
        if len(here) < record["rows"]:
            kept.append({**record, "number": record.get("number", place)})
            moved.append(here - start + new_start)
            new_start += record["rows"]
        start += record["rows"]
    return kept, np.concatenate([np.zeros(0, np.int64), *moved])


def _point(
    folder: Path,
    manifest: dict[str, Any],
    shards: list[dict[str, Any]],
    gone: np.ndarray,
    check: Callable[[VectorStore], None] = lambda store: None,
) -> None:
    number = versions.next_number(folder, KIND)
    own = versions.new_folder(folder, number)
    rows = sum(record["rows"] for record in shards) - len(gone)
    manifest = manifest | {"version": number, "shards": shards, "rows": rows, "gone": None}
    if len(gone):
        pq.write_table(pa.table({"row": gone}), own / GONE, compression="zstd")
        with open(own / GONE, "rb+") as file:
            os.fsync(file.fileno())
        manifest["gone"] = {"rows": len(gone), "sha256": sha256(own / GONE)}
    check(VectorStore.of(folder, manifest))
    write_json(own / MANIFEST, manifest)
    versions.point(folder, manifest)


def _compact(folder: Path) -> None:
    store = VectorStore.open(folder)
    manifest, size = store.manifest, store.manifest["shard_rows"]
    aside = folder.with_name(f".{folder.name}.adding-{store.fingerprint}-compact.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    records = []
    for number, start in enumerate(range(0, len(store), size)):
        rows = np.arange(start, min(start + size, len(store)))
        vectors = np.ascontiguousarray(store.gather(rows), dtype="<f2")  # as they were stored, to the bit
        records.append(put_shard(aside, {}, number, store.ids_of(rows), vectors, store.text_hashes[rows]))
    write_json(aside / MANIFEST, manifest | {"shards": records})
    _point(folder, manifest, _take(folder, aside), np.zeros(0, np.int64))
    shutil.rmtree(aside)
    logger.info("%s: written anew, %d rows without those that were gone", folder, len(store))
