"""What the engines of an ad index share: its manifest, the catalogue's ids, and the checks of vectors and queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hlm.artefacts import MANIFEST, HlmError, read_manifest, write_manifest
from hlm.fields import REMEDY, field, optional
from hlm.integrity import check_files
from hlm.vectors.index import ENGINES, KIND, Index, engine_of
from hlm.vectors.store import read_ids

# Vectors that were normalised and then went through fp16 or bf16 are off by less than this.
NORM_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Facts:
    """What the manifest of an index says, whichever engine wrote it; `config` holds the engine's own settings."""

    encoder: str
    source: str
    factory: str
    dim: int
    count: int
    canaries: dict[str, Any] | None
    config: Mapping[str, Any]


def read_facts(folder: Path, engine: str, expect_encoder: str | None = None) -> Facts:
    """Reads the manifest of an index and compares the engine's files with it.

    Raises:
        HlmError: no index there, one of another engine or encoder, or files that are missing, cut short or changed.
    """
    manifest, where = read_manifest(folder, KIND), folder / MANIFEST
    if (found := engine_of(manifest, where)) != engine:
        raise HlmError(
            f"expected an index of the engine '{engine}' at {folder}, found one of '{found}'; use open_index"
        )
    facts = Facts(
        encoder=field(manifest, str, "inputs", "encoder", where=where),
        source=field(manifest, str, "inputs", "source", where=where),
        factory=field(manifest, str, "config", "factory", where=where),
        dim=field(manifest, int, "dim", where=where, least=1),
        count=field(manifest, int, "count", where=where, least=1),
        canaries=optional(manifest, dict, "canaries", where=where),
        config=manifest["config"],
    )
    if expect_encoder is not None and facts.encoder != expect_encoder:
        raise HlmError(
            f"expected an index of vectors made by encoder {expect_encoder}, found one of encoder {facts.encoder} at "
            f"{folder}; build the index from that encoder's store, or use the student that was aligned to "
            f"{facts.encoder}"
        )
    check_files(folder, field(manifest, dict, "files", where=where), ENGINES[engine].files)
    return facts


def write_facts(folder: Path, index: Index, **settings: Any) -> None:
    """Writes the manifest of an index, the last of its files; `settings` are the engine's own."""
    facts: dict[str, Any] = {"engine": index.engine, "dim": index.dim, "count": len(index)}
    write_manifest(
        folder,
        KIND,
        inputs={"encoder": index.encoder, "source": index.source},
        config={"factory": index.factory, **settings},
        **facts | ({"canaries": index.canaries} if index.canaries else {}),
    )


def checked_queries(queries: Any, dim: int) -> np.ndarray:
    """The queries of `Index.search` as float32 (n, dim).

    Raises:
        HlmError: another shape or width, or vectors that are not finite or not normalised.
    """
    shapes = f"(n, {dim}) or ({dim},)"
    try:
        queries = np.asarray(queries)
        if queries.dtype.kind not in "fiu":
            raise TypeError(f"values of type {queries.dtype}")
        queries = np.ascontiguousarray(queries, dtype=np.float32).reshape(queries.shape)
    except (TypeError, ValueError, RuntimeError) as error:
        raise HlmError(f"expected query vectors of shape {shapes}: {error}") from error
    if queries.ndim not in (1, 2):
        raise HlmError(
            f"expected query vectors of shape {shapes}, found {queries.shape}; give one vector, or a table with a "
            "vector in each row"
        )
    if queries.shape[-1] != dim:
        raise HlmError(
            f"expected query vectors {dim} wide, of shape {shapes}, found {queries.shape}; use the student of this "
            "index's teacher, or build the index with dim= the student's width"
        )
    queries = queries.reshape(-1, dim)
    norms = np.linalg.norm(queries, axis=1)
    wrong = ~(np.abs(norms - 1) <= NORM_TOLERANCE)  # written so that NaN is wrong
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise HlmError(
            f"expected finite, L2-normalised query vectors, found norm {norms[row]:.4g} in row {row} "
            f"({int(wrong.sum())} of {len(queries)} rows); normalise them, or check the encoder"
        )
    return queries


def normalised(block: np.ndarray, width: int, *, first_row: int) -> np.ndarray:
    """The first `width` components of a store's rows, float32 (rows, width), L2-normalised: half precision and slicing
    both leave norms off 1.

    Raises:
        HlmError: a vector that is not finite or zero; `first_row` is the store's row that the block begins with.
    """
    block = np.ascontiguousarray(block[:, :width], dtype=np.float32)
    norms = np.linalg.norm(block, axis=1, keepdims=True)
    wrong = ~((norms > 0) & np.isfinite(norms))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise HlmError(
            f"expected finite vectors other than zero, found norm {norms[row, 0]} in row {first_row + row} "
            "of the store; embed the catalogue again"
        )
    return block / norms


def checked_ids(ids: Any) -> pa.Array:
    """The documents' ids, a list or an Arrow array, as one contiguous array, each once.

    Raises:
        HlmError: names an id that is there twice.
    """
    ids = _flat_strings(ids)
    if len(pc.unique(ids)) != len(ids):
        counts = pc.value_counts(ids)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise HlmError(f"expected an id for each ad, found {twice!r} twice; make the ids of the data unique")
    return ids


def read_index_ids(path: Path, count: int) -> pa.Array:
    """The `count` ids in column "_id" of a Parquet file.

    Raises:
        HlmError: not Parquet, another number of ids, or ids that are no texts.
    """
    with open(path, "rb") as file:
        return _flat_strings(read_ids(file, path, count, REMEDY))


def _flat_strings(ids: Any) -> pa.Array:
    """One contiguous Arrow string array (64-bit offsets: ids of a large catalogue pass 2 GiB)."""
    if isinstance(ids, pa.ChunkedArray):
        return ids.cast(pa.large_string()).combine_chunks()
    return ids.cast(pa.large_string()) if isinstance(ids, pa.Array) else pa.array(ids, pa.large_string())
