"""Embedding store: a folder of fp16 vector shards keyed by row id, written resumably, read through memory maps.

    vectors-00000.safetensors   key "vectors", fp16, (rows, dim)
    ids-00000.parquet           column "_id", and "text": a hash of each text, both in row order
    hlm.json                    kind "vectors": the inputs' fingerprints, and size and SHA-256 of every shard
    versions/                   where the texts have changed (`store_versions.py`): what is gone from the shards above

Vectors are L2-normalised before they are rounded to fp16 and are not normalised again afterwards. Rounding moves a
component by at most 2^-11 of itself, so a vector moves by less than 5e-4 and so does its inner product with any unit
vector.

Written by `write_store`, one shard in memory at a time, resumable after a kill (`hlm.vectors.store_writer`).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hlm.artefacts import MANIFEST, HlmError, fingerprint_json, read_manifest
from hlm.data.ids import rows_with
from hlm.fields import field, optional
from hlm.integrity import file_state, read_steadily
from hlm.vectors import versions
from hlm.vectors.shard_files import (
    GONE,
    KEY,
    REMEDY,
    TEXT,
    files,
    ids_name,
    number_of,
    read_ids,
    sha256,
    vectors_name,
    vectors_offset,
)
from hlm.vectors.store_writer import KIND, check_store_output, pending_shards, write_store

__all__ = ["VectorStore", "check_store_output", "pending_shards", "write_store"]


class VectorStore:
    """A whole store, opened for reading: vectors stay on disk and are read through memory maps.

    Attributes:
        folder: where it is.
        manifest: the content of its `hlm.json`.
        dim: width of the vectors.
        encoder: fingerprint of the encoder that made the vectors.
        source: fingerprint of the texts they were made from.
        canaries: the encoder's vectors of fixed queries (`canaries.py`); None where the store was written without.
        gone: int64, ascending, which rows of the shards are no rows of this version: the store numbers the others.
    """

    def __init__(
        self, folder: Path, manifest: dict[str, Any], states: dict[str, list[int] | None], gone: np.ndarray
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.dim: int = manifest["dim"]
        self.encoder: str = manifest["inputs"]["encoder"]
        self.source: str = manifest["inputs"]["source"]
        self.canaries: dict[str, Any] | None = manifest.get("canaries")
        self._starts = np.cumsum([0] + [shard["rows"] for shard in manifest["shards"]])
        self.gone = gone
        self._before = gone - np.arange(len(gone))  # of each row that is gone, how many are there before it
        self._states = states  # file name -> what its file was when the store was opened
        self._maps: dict[int, np.ndarray] = {}

    @classmethod
    def open(cls, folder: str | Path) -> VectorStore:
        """Opens a store after comparing every shard's header and size with the manifest; reads no vector.

        What is open stays what it was: a store that another one has replaced since is refused, not read.

        Raises:
            HlmError: not a store, unfinished, or a shard is missing, truncated or not what the manifest says.
        """
        return read_steadily(folder, lambda: cls._open(Path(folder)))

    @classmethod
    def _open(cls, folder: Path) -> VectorStore:
        if not (folder / MANIFEST).is_file() and (whole := len(list(folder.glob("shard-*.json")))):
            raise HlmError(
                f"expected a whole vector store at {folder}, found an unfinished one ({whole} whole shards, no "
                f"{MANIFEST}); run the command that writes it again, it goes on where it stopped"
            )
        return cls.of(folder, _checked_manifest(folder))

    @classmethod
    def of(cls, folder: Path, manifest: dict[str, Any]) -> VectorStore:
        """The version of a store that a manifest tells of, checked as by `open`."""
        try:
            return cls._of(folder, manifest)
        except HlmError as error:
            if not versions.are_kept(folder):
                raise
            # What one run wrote is written again by the same run; of several versions there is no such run.
            remedy = "go back by `hlm rollback` to a version without that file, or embed into another folder"
            raise HlmError(str(error).replace(REMEDY, remedy)) from error

    @classmethod
    def _of(cls, folder: Path, manifest: dict[str, Any]) -> VectorStore:
        states = {}
        for number, record in enumerate(manifest["shards"]):
            for name, entry in files(number, record).items():
                with _open_file(folder / name) as file:
                    states[name] = file_state(file.fileno())
                    if (found := os.fstat(file.fileno()).st_size) != entry["bytes"]:
                        raise HlmError(
                            f"{folder / name}: expected {entry['bytes']} bytes, found {found} bytes; {REMEDY}"
                        )
                    if name.startswith(KEY):
                        vectors_offset(file, folder / name, (record["rows"], manifest["dim"]))
        return cls(folder, manifest, states, _read_gone(folder, manifest))

    def __len__(self) -> int:
        return int(self._starts[-1]) - len(self.gone)

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickling a memory map would copy its content into every data loader worker.
        return _open_again, (self.folder, self.fingerprint)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the inputs and the SHA-256 of every shard and of what is gone."""
        gone = self.manifest.get("gone")
        return fingerprint_json([self.manifest["inputs"], self.manifest["shards"], *([gone] if gone else [])])

    @property
    def parts(self) -> dict[str, Any]:
        """What an index built from this store says it is made of: 16 hex digits of each shard's vectors, "shards", and
        of what is "gone", or None."""
        gone = self.manifest.get("gone")
        shards = [record["vectors"]["sha256"][:16] for record in self.manifest["shards"]]
        return {"shards": shards, "gone": gone["sha256"][:16] if gone else None}

    @functools.cached_property
    def ids(self) -> pa.ChunkedArray:
        """The row ids as Arrow strings in row order, one chunk a shard; read on first use and kept."""
        chunks = []
        for place in range(len(self.manifest["shards"])):
            ids = self._read_ids(place)
            chunks.append(ids.filter(pa.array(self._kept(place))) if len(self.gone) else ids)
        return pa.chunked_array(chunks, type=pa.string())

    @functools.cached_property
    def text_hashes(self) -> np.ndarray:
        """uint64 (len(self),), a hash of each row's text; 0 where a store of an older version has none."""
        chunks = []
        for place, record in enumerate(self.manifest["shards"]):
            with self._file(place, ids_name(number_of(place, record))) as file:
                parquet = pq.ParquetFile(file)
                has = TEXT in parquet.schema_arrow.names
                hashes = parquet.read(columns=[TEXT])[TEXT].to_numpy() if has else np.zeros(record["rows"], np.uint64)
                chunks.append(hashes[self._kept(place)])
        return np.concatenate(chunks)

    def physical(self, rows: np.ndarray) -> np.ndarray:
        """Where rows of this version are among all rows of the shards."""
        return rows + np.searchsorted(self._before, rows, side="right")

    def names_at(self, physical: np.ndarray) -> pa.Array:
        """The ids of rows of the shards, gone or not, by their places there, ascending."""
        found = []
        for place, (low, high) in enumerate(itertools.pairwise(self._starts)):
            here = physical[np.searchsorted(physical, low) : np.searchsorted(physical, high)] - low
            if len(here):
                found.append(self._read_ids(place).take(pa.array(here)))
        return pa.chunked_array(found, pa.string()).combine_chunks()

    def _read_ids(self, place: int) -> pa.Array:
        record = self.manifest["shards"][place]
        name = ids_name(number_of(place, record))
        with self._file(place, name) as file:
            return read_ids(file, self.folder / name, record["rows"], REMEDY).cast(pa.string())

    def _kept(self, place: int) -> np.ndarray:
        """bool, of each row of a shard whether it is a row of this version."""
        low, high = self._starts[place : place + 2]
        kept = np.ones(high - low, bool)
        kept[self.gone[np.searchsorted(self.gone, low) : np.searchsorted(self.gone, high)] - low] = False
        return kept

    def rows_of(self, ids: Sequence[str]) -> np.ndarray:
        """Row numbers (int64, one for each id, in order) of `ids`, which may repeat.

        Passes once over all ids of the store, however few are asked for (20 to 30 ms a million rows on one core): ask
        once for all of them rather than once a batch.

        Raises:
            HlmError: an id that the store does not hold.
        """
        found = rows_with(self.ids, ids)
        if (found < 0).any():
            unknown = list(dict.fromkeys(name for name, row in zip(ids, found.tolist(), strict=True) if row < 0))
            shown = ", ".join(map(repr, unknown[:3]))
            raise HlmError(
                f"expected ids of the {len(self)} rows at {self.folder}, found {len(unknown)} unknown ones ({shown}"
                f"{', ...' if len(unknown) > 3 else ''}); embed the dataset that these ids come from"
            )
        return found

    def ids_of(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The ids of `rows` (any order, may repeat)."""
        return self.ids.take(pa.array(self._checked(rows))).to_pylist()

    def gather(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The vectors of `rows` (integers, any order, may repeat) as float32 (n, dim).

        They are the stored fp16 values, not normalised again: norms are within 5e-4 of 1.

        Raises:
            HlmError: a row number outside [0, len(store)), or not an integer.
        """
        rows = self.physical(self._checked(rows))
        order = np.argsort(rows, kind="stable")  # reading in disk order turns page faults into few, forward reads
        ordered = rows[order]
        out = np.empty((len(rows), self.dim), dtype=np.float32)
        bounds = np.searchsorted(ordered, self._starts)
        for shard in np.flatnonzero(np.diff(bounds)):
            part = slice(bounds[shard], bounds[shard + 1])
            out[order[part]] = self._map(int(shard))[ordered[part] - self._starts[shard]]
        return out

    def iter_blocks(self, rows_per_block: int = 65536) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first row, float32 (n, dim)) over all rows in order; n is `rows_per_block` but for the last."""
        if rows_per_block < 1:
            raise HlmError(f"expected at least 1 row a block, found {rows_per_block}")
        for start in range(0, len(self), rows_per_block):
            stop = min(start + rows_per_block, len(self))
            if len(self.gone):
                yield start, self.gather(np.arange(start, stop))
                continue
            block = np.empty((stop - start, self.dim), dtype=np.float32)
            first = int(np.searchsorted(self._starts, start, side="right")) - 1
            for shard in range(first, len(self._starts) - 1):
                low, high = self._starts[shard : shard + 2]
                if low >= stop:
                    break
                a, b = max(start, low), min(stop, high)
                block[a - start : b - start] = self._map(shard)[a - low : b - low]
            yield start, block

    def check(self, *, encoder: str | None = None, source: str | None = None) -> None:
        """Refuses the store where its encoder's or its texts' fingerprint is not the one given.

        Raises:
            HlmError: names both fingerprints and the remedy.
        """
        for what, expected, found in (("encoder", encoder, self.encoder), ("source", source, self.source)):
            if expected is not None and expected != found:
                made = "by the encoder" if what == "encoder" else "from the texts"
                raise HlmError(
                    f"expected vectors made {made} {expected}, found {self.folder} made {made} {found}; embed again "
                    f"with that {what}, or use the {what} that the store was made with"
                )

    def verify(self) -> None:
        """Reads every shard and compares its SHA-256 with the manifest's.

        Raises:
            HlmError: names the first file whose content is not what was written.
        """
        for number, record in enumerate(self.manifest["shards"]):
            for name, entry in files(number, record).items():
                with _open_file(self.folder / name) as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != entry["sha256"]:
                    raise HlmError(
                        f"{self.folder / name}: expected SHA-256 {entry['sha256'][:16]}..., found {found[:16]}...: the "
                        "file was changed after it was written; delete that file and run the command that writes "
                        "the store again, it writes the missing shard only"
                    )
        gone = self.manifest.get("gone")
        if gone and (found := sha256(_gone_path(self.folder, self.manifest))) != gone["sha256"]:
            raise HlmError(
                f"{_gone_path(self.folder, self.manifest)}: expected SHA-256 {gone['sha256'][:16]}..., found "
                f"{found[:16]}...: the file was changed after it was written; copy or pull the folder again"
            )

    def _checked(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        rows = np.asarray(rows)
        if rows.size == 0:
            return np.zeros(0, dtype=np.int64)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise HlmError(f"expected a list of row numbers, found {rows.dtype} of shape {rows.shape}")
        if rows.min() < 0 or rows.max() >= len(self):
            wrong = rows[(rows < 0) | (rows >= len(self))][0]
            raise HlmError(f"expected rows in [0, {len(self)}) of {self.folder}, found {wrong}")
        return rows.astype(np.int64, copy=False)

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            record = self.manifest["shards"][shard]
            name, shape = vectors_name(number_of(shard, record)), (record["rows"], self.dim)
            with self._file(shard, name) as file:
                offset = vectors_offset(file, self.folder / name, shape)
                self._maps[shard] = np.memmap(file, dtype="<f2", mode="r", offset=offset, shape=shape)
        return self._maps[shard]

    def _file(self, shard: int, name: str) -> BufferedReader:
        """A file of a shard, which is the one that was there when the store was opened, or has the same content."""
        file = _open_file(self.folder / name)
        if file_state(file.fileno()) != self._states[name]:
            expected = files(shard, self.manifest["shards"][shard])[name]["sha256"]
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                file.close()
                raise HlmError(
                    f"{self.folder / name}: the store was replaced or changed after it was opened; open it again"
                )
            file.seek(0)
        return file


def _checked_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store, with all that reading needs of the types that it needs."""
    manifest, where = read_manifest(folder, KIND), folder / MANIFEST
    for name in ("encoder", "source"):
        field(manifest, str, "inputs", name, where=where)
    field(manifest, int, "dim", where=where, least=1)
    optional(manifest, dict, "canaries", where=where)
    for number in range(len(field(manifest, list, "shards", where=where))):
        field(manifest, int, "shards", number, "rows", where=where, least=1)
        for part in ("vectors", "ids"):
            field(manifest, int, "shards", number, part, "bytes", where=where, least=0)
            field(manifest, str, "shards", number, part, "sha256", where=where)
        optional(manifest["shards"][number], int, "number", where=where, least=0)
    found = sum(shard["rows"] for shard in manifest["shards"])
    if optional(manifest, dict, "gone", where=where):
        found -= field(manifest, int, "gone", "rows", where=where, least=1)
        field(manifest, str, "gone", "sha256", where=where)
    if found != field(manifest, int, "rows", where=where, least=1):
        raise HlmError(
            f"{where}: expected shards of {manifest['rows']} rows in all, found {found}; delete the folder and write "
            "the store again"
        )
    return manifest


def _gone_path(folder: Path, manifest: dict[str, Any]) -> Path:
    return versions.own_folder(folder, manifest) / GONE


def _read_gone(folder: Path, manifest: dict[str, Any]) -> np.ndarray:
    """The rows of a version's shards that are not its own, int64, ascending."""
    said = manifest.get("gone")
    if not said:
        return np.zeros(0, np.int64)
    path, most = _gone_path(folder, manifest), sum(record["rows"] for record in manifest["shards"])
    try:
        gone = pq.read_table(path, columns=["row"])["row"].to_numpy().astype(np.int64, casting="safe")
    except (pa.ArrowException, OSError, KeyError, TypeError) as error:
        raise HlmError(f"{path} is not readable ({error}); copy or pull the folder again") from error
    if len(gone) != said["rows"] or gone[0] < 0 or gone[-1] >= most or (np.diff(gone) <= 0).any():
        raise HlmError(f"{path}: expected {said['rows']} rows below {most}, ascending, found others; {REMEDY}")
    return gone


def _open_again(folder: Path, fingerprint: str) -> VectorStore:
    """Opens a store in another process, which must be the one that was open in the first."""
    store = VectorStore.open(folder)
    if store.fingerprint != fingerprint and versions.are_kept(folder):  # it has changed meanwhile
        older = (VectorStore.of(folder, manifest) for manifest in versions.listed(folder, KIND).values())
        store = next((one for one in older if one.fingerprint == fingerprint), store)
    if store.fingerprint != fingerprint:
        raise HlmError(
            f"expected store {fingerprint} at {folder}, found {store.fingerprint}: it was replaced; run again"
        )
    return store


def _open_file(path: Path) -> BufferedReader:
    if not path.is_file():  # a pipe of that name would be waited for
        raise HlmError(f"{path}: expected a file as {MANIFEST} says, found no such file; {REMEDY}")
    try:
        return open(path, "rb")
    except OSError as error:
        raise HlmError(f"expected to read {path}, found {error.strerror}; make it readable for this user") from error
