"""The two files of a store's shard (see `store.py`): their names, what may go into them, and how they are written."""

from __future__ import annotations

import collections
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hlm.artefacts import HlmError, write_json

KEY = "vectors"
_NORM_TOLERANCE = 1e-2  # normalising in bf16 is off by up to 0.4%; a vector nobody normalised is off by far more


def vectors_name(shard: int) -> str:
    return f"vectors-{shard:05d}.safetensors"


def ids_name(shard: int) -> str:
    return f"ids-{shard:05d}.parquet"


def record_name(shard: int) -> str:
    return f"shard-{shard:05d}.json"


def files(shard: int, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """File name -> {"bytes", "sha256"} of a shard's two files."""
    return {vectors_name(shard): record["vectors"], ids_name(shard): record["ids"]}


def put_shard(folder: Path, plan: dict[str, Any], shard: int, ids: list[str], vectors: np.ndarray) -> None:
    names = {"vectors": vectors_name(shard), "ids": ids_name(shard)}
    asides = {kind: folder / f".{name}.{os.getpid()}.partial" for kind, name in names.items()}
    digests = {"vectors": _write_vectors(asides["vectors"], vectors)}
    pq.write_table(pa.table({"_id": pa.array(ids, type=pa.string())}), asides["ids"], compression="zstd")
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
