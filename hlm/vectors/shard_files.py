"""The two files of a store's shard (see `store.py`): their names, what may go into them, and how they are written."""

from __future__ import annotations

import collections
import hashlib
import json
import os
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hlm.artefacts import HlmError, write_json
from hlm.fields import field

KEY, TEXT = "vectors", "text"
REMEDY = "run the command that writes the store again, it writes missing and truncated shards anew"
HEADER_BYTES = 2**20
# What ids decompress to stays below this many times their file, and below this many bytes for a small file.
IDS_INFLATION, IDS_LEAST_BYTES = 1000, 2**26
GONE = "gone.parquet"  # of a version: which rows of its shards it has no more
_NORM_TOLERANCE = 1e-2  # normalising in bf16 is off by up to 0.4%; a vector nobody normalised is off by far more


def vectors_name(shard: int) -> str:
    return f"vectors-{shard:05d}.safetensors"


def ids_name(shard: int) -> str:
    return f"ids-{shard:05d}.parquet"


def record_name(shard: int) -> str:
    return f"shard-{shard:05d}.json"


def number_of(place: int, record: dict[str, Any]) -> int:
    """The number in the names of a shard's files: its place in the manifest, unless a later version added it."""
    return record.get("number", place)


def files(shard: int, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """File name -> {"bytes", "sha256"} of a shard's two files; `shard` is its place in the manifest."""
    number = number_of(shard, record)
    return {vectors_name(number): record["vectors"], ids_name(number): record["ids"]}


def text_hashes(texts: Iterable[str]) -> np.ndarray:
    """uint64, what tells a text from the one that has its id next."""
    raw = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(raw, dtype="<u8")


def put_shard(
    folder: Path, plan: dict[str, Any], shard: int, ids: list[str], vectors: np.ndarray, texts: np.ndarray
) -> dict[str, Any]:
    """Writes the two files of a shard and its record, and returns the record.

    Args:
        plan: what the record is of, as JSON.
        vectors: little-endian fp16 (len(ids), dim).
        texts: their `text_hashes`.
    """
    names = {"vectors": vectors_name(shard), "ids": ids_name(shard)}
    asides = {kind: folder / f".{name}.{os.getpid()}.partial" for kind, name in names.items()}
    digests = {"vectors": _write_vectors(asides["vectors"], vectors)}
    table = pa.table({"_id": pa.array(ids, type=pa.string()), TEXT: texts})
    pq.write_table(table, asides["ids"], compression="zstd")
    digests["ids"] = sha256(asides["ids"])
    record: dict[str, Any] = {"rows": len(ids)}
    for kind, aside in asides.items():
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        record[kind] = {"bytes": aside.stat().st_size, "sha256": digests[kind]}
    for kind, aside in asides.items():
        os.replace(aside, folder / names[kind])
    # Last, so that a shard counts as whole only when both of its files are in place.
    write_json(folder / record_name(shard), {"shard": shard, "plan": plan, "record": record})
    return record


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_vectors(path: Path, vectors: np.ndarray) -> str:
    """Writes a safetensors file and returns its SHA-256.

    By hand, because `safetensors.numpy.save_file` writes through a temporary file with a random name, which a kill
    leaves lying in the store (half a gigabyte and more), and makes the result readable by its owner alone.
    """
    entry = {"dtype": "F16", "shape": list(vectors.shape), "data_offsets": [0, vectors.nbytes]}
    header = json.dumps({KEY: entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format aligns the data to 8 bytes
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for piece in (len(header).to_bytes(8, "little"), header, vectors.data.cast("B")):
            file.write(piece)
            digest.update(piece)
    return digest.hexdigest()


def check_ids(ids: list[str], expected: int, where: str) -> None:
    if len(ids) != expected:
        raise HlmError(f"{where}: expected {expected} records, found {len(ids)}; n_rows does not fit the data")
    if wrong := [row_id for row_id in ids if not isinstance(row_id, str) or not row_id]:
        raise HlmError(f"{where}: expected ids that are non-empty text, found {wrong[0]!r}; correct the data's ids")
    if len(set(ids)) != len(ids):
        twice = collections.Counter(ids).most_common(1)[0][0]
        raise HlmError(f"{where}: expected distinct ids, found {twice!r} twice; make the ids of the data unique")


def quantised(vectors: np.ndarray, shape: tuple[int, int], where: str) -> np.ndarray:
    """The checked vectors as contiguous little-endian fp16."""
    vectors = np.asarray(vectors)
    if vectors.shape != shape or vectors.dtype.kind != "f":
        raise HlmError(
            f"{where}: expected floating-point vectors of shape {shape} from the encoder, found {vectors.dtype} of "
            f"shape {vectors.shape}; check dim against the encoder's dimension"
        )
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float32))
    first = f"row {int(np.argmax(~np.isfinite(norms)))} of the shard"
    if not np.isfinite(norms).all():
        raise HlmError(
            f"{where}: expected finite vectors, found NaN or infinity in {first}; check the encoder's weights, or load "
            "it in bfloat16 or float32 where it overflows in float16"
        )
    off = np.abs(norms - 1)
    if (off > _NORM_TOLERANCE).any():
        row = int(np.argmax(off))
        raise HlmError(
            f"{where}: expected L2-normalised vectors, found norm {norms[row]:.4g} in row {row} of the shard; "
            "normalise what the encoder gives (a norm of 0 has no direction: look at that row's text)"
        )
    return np.ascontiguousarray(vectors, dtype="<f2")


def vectors_offset(file: BufferedReader, path: Path, shape: tuple[int, int]) -> int:
    """Where the fp16 vectors of `shape` begin in a safetensors file, in bytes; reads the header only.

    Raises:
        HlmError: the header is broken or tells of another shape or type, or the file does not hold what it tells of.
    """
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(min(length, HEADER_BYTES)))
    except (ValueError, RecursionError) as error:
        raise HlmError(f"{path}: expected a safetensors header with '{KEY}', found none ({error}); {REMEDY}") from error
    kind = field(header, str, KEY, "dtype", where=path)
    begin, end = (field(header, int, KEY, "data_offsets", place, where=path) for place in (0, 1))
    found = field(header, list, KEY, "shape", where=path)
    if (kind, found) != ("F16", list(shape)) or end - begin != 2 * shape[0] * shape[1]:
        raise HlmError(
            f"{path}: expected fp16 vectors of shape {shape}, found {kind} of shape {tuple(found)}; {REMEDY}"
        )
    if begin < 0 or 8 + length + end > os.fstat(file.fileno()).st_size:
        raise HlmError(f"{path}: expected vectors within the file, found bytes {begin} to {end}; {REMEDY}")
    return 8 + length + begin


def read_ids(file: BufferedReader, path: Path, rows: int, remedy: str) -> pa.Array:
    """Column "_id" of a Parquet file, one Arrow string array (as it was written: of 32 or 64 bits).

    Raises:
        HlmError: not Parquet, another number of rows, ids that are no text or missing, or a file that would grow beyond
            what ids grow by when it is decompressed.
    """
    try:
        parquet = pq.ParquetFile(file)
        names, kinds = parquet.schema_arrow.names, parquet.schema_arrow.types
        if "_id" not in names or kinds[names.index("_id")] not in (pa.string(), pa.large_string()):
            raise HlmError(f"{path}: expected a column '_id' of texts, found {names} of {kinds[:9]}; {remedy}")
        if parquet.metadata.num_rows != rows:
            raise HlmError(f"{path}: expected {rows} ids, found {parquet.metadata.num_rows}; {remedy}")
        groups = [parquet.metadata.row_group(number) for number in range(parquet.metadata.num_row_groups)]
        size = sum(group.total_byte_size for group in groups)
        if size > max(IDS_LEAST_BYTES, IDS_INFLATION * os.fstat(file.fileno()).st_size):
            raise HlmError(f"{path}: expected ids, found {size:,} bytes packed into a small file; {remedy}")
        column = parquet.read(columns=["_id"]).column("_id").combine_chunks()
        column.validate(full=True)
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        raise HlmError(f"{path} is not readable ({error}); {remedy}") from error
    if len(column) != rows or column.null_count:
        raise HlmError(f"{path}: expected {rows} ids, found {len(column) - column.null_count}; {remedy}")
    return column
