"""Embedding store: a folder of fp16 vector shards keyed by row id, written resumably, read through memory maps.

    vectors-00000.safetensors   key "vectors", fp16, (rows, dim)      ids-00000.parquet   column "_id", row order
    hlm.json                    kind "vectors": the inputs' fingerprints, and size and SHA-256 of every shard

Vectors are L2-normalised before they are rounded to fp16 and are not normalised again afterwards. Rounding moves a
component by at most 2^-11 of itself, so a vector moves by less than 5e-4 and so does its inner product with any unit
vector.

Written by `write_store`, one shard in memory at a time, resumable after a kill (`hlm.store_writer`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hlm.artefacts import MANIFEST, HlmError, fingerprint_json, read_manifest
from hlm.store_writer import (
    KIND,
    REMEDY,
    check_size,
    check_store_output,
    files,
    ids_name,
    pending_shards,
    sha256,
    vectors_name,
    vectors_offset,
    write_store,
)

__all__ = ["VectorStore", "check_store_output", "pending_shards", "write_store"]


class VectorStore:
    """A whole store, opened for reading: vectors stay on disk and are read through memory maps.

    Attributes:
        folder: where it is.
        manifest: the content of its `hlm.json`.
        dim: width of the vectors.
        encoder: fingerprint of the encoder that made the vectors.
        source: fingerprint of the texts they were made from.
        canaries: the encoder's vectors of fixed queries (`hlm.canaries`); None where the store was written without.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.dim: int = manifest["dim"]
        self.encoder: str = manifest["inputs"]["encoder"]
        self.source: str = manifest["inputs"]["source"]
        self.canaries: dict[str, Any] | None = manifest.get("canaries")
        self._starts = np.cumsum([0] + [shard["rows"] for shard in manifest["shards"]])
        self._maps: dict[int, np.ndarray] = {}

    @classmethod
    def open(cls, folder: str | Path) -> VectorStore:
        """Opens a store after comparing every shard's header and size with the manifest; reads no vector.

        Raises:
            HlmError: not a store, unfinished, or a shard is missing, truncated or not what the manifest says.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file() and (whole := len(list(folder.glob("shard-*.json")))):
            raise HlmError(
                f"expected a whole vector store at {folder}, found an unfinished one ({whole} whole shards, no "
                f"{MANIFEST}); run the command that writes it again, it goes on where it stopped"
            )
        manifest = read_manifest(folder, KIND)
        shards = manifest["shards"]
        if sum(shard["rows"] for shard in shards) != manifest["rows"]:
            raise HlmError(
                f"{folder / MANIFEST}: expected shards of {manifest['rows']} rows in all, found "
                f"{sum(shard['rows'] for shard in shards)}; delete the folder and write the store again"
            )
        for number, record in enumerate(shards):
            for name, entry in files(number, record).items():
                check_size(folder / name, entry["bytes"])
            vectors_offset(folder / vectors_name(number), (record["rows"], manifest["dim"]))
        return cls(folder, manifest)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickling a memory map would copy its content into every data loader worker.
        return VectorStore.open, (self.folder,)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the inputs and every shard's SHA-256: what an index built from this store records."""
        return fingerprint_json([self.manifest["inputs"], self.manifest["shards"]])

    @functools.cached_property
    def ids(self) -> pa.ChunkedArray:
        """The row ids as Arrow strings in row order, one chunk a shard; read on first use and kept."""
        chunks = []
        for number, record in enumerate(self.manifest["shards"]):
            path = self.folder / ids_name(number)
            try:
                column = pq.read_table(path, columns=["_id"]).column("_id").combine_chunks()
            except (pa.ArrowException, OSError, KeyError) as error:
                raise HlmError(f"{path} is not readable ({error}); {REMEDY}") from error
            if len(column) != record["rows"]:
                raise HlmError(f"{path}: expected {record['rows']} ids, found {len(column)}; {REMEDY}")
            chunks.append(column)
        return pa.chunked_array(chunks, type=pa.string())

    def rows_of(self, ids: Sequence[str]) -> np.ndarray:
        """Row numbers (int64, one for each id, in order) of `ids`, which may repeat.

        Passes once over all ids of the store, however few are asked for (20 to 30 ms a million rows on one core): ask
        once for all of them rather than once a batch.

        Raises:
            HlmError: an id that the store does not hold.
        """
        wanted = pa.array(ids, type=pa.string())
        distinct = pc.unique(wanted)
        found = np.full(len(distinct), -1, dtype=np.int64)
        # The wanted ids are what is hashed, so no index over the whole store is ever built.
        hits = pc.index_in(self.ids, value_set=distinct).fill_null(-1).to_numpy()
        rows = np.flatnonzero(hits >= 0)
        found[hits[rows]] = rows
        if (found < 0).any():
            unknown = distinct.filter(pa.array(found < 0))
            shown = ", ".join(repr(value.as_py()) for value in unknown[:3])
            raise HlmError(
                f"expected ids of the {len(self)} rows at {self.folder}, found {len(unknown)} unknown ones ({shown}"
                f"{', ...' if len(unknown) > 3 else ''}); embed the dataset that these ids come from"
            )
        return found[pc.index_in(wanted, value_set=distinct).to_numpy()] if len(wanted) else found

    def ids_of(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The ids of `rows` (any order, may repeat)."""
        return self.ids.take(pa.array(self._checked(rows))).to_pylist()

    def gather(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The vectors of `rows` (integers, any order, may repeat) as float32 (n, dim).

        They are the stored fp16 values, not normalised again: norms are within 5e-4 of 1.

        Raises:
            HlmError: a row number outside [0, len(store)), or not an integer.
        """
        rows = self._checked(rows)
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
                found = sha256(self.folder / name)
                if found != entry["sha256"]:
                    raise HlmError(
                        f"{self.folder / name}: expected SHA-256 {entry['sha256'][:16]}..., found {found[:16]}...: the "
                        "file was changed after it was written; delete that file and run the command that writes "
                        "the store again, it writes the missing shard only"
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
            path = self.folder / vectors_name(shard)
            shape = (self.manifest["shards"][shard]["rows"], self.dim)
            offset = vectors_offset(path, shape)
            self._maps[shard] = np.memmap(path, dtype="<f2", mode="r", offset=offset, shape=shape)
        return self._maps[shard]
