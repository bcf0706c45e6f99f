"""What the engines of an ad index share: its manifest, the catalogue's ids, and the checks of vectors and queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from hlm.artefacts import MANIFEST, HlmError, read_manifest, write_manifest
from hlm.fields import REMEDY, field, optional
from hlm.indexes.index import ENGINES, KIND, Index, engine_of
from hlm.integrity import check_files
from hlm.vectors import versions
from hlm.vectors.shard_files import read_ids

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
    measured: dict[str, Any] | None
    made_of: dict[str, Any] | None
    home: Path  # where the files of this version are
    version: int
    config: Mapping[str, Any]


def read_facts(folder: Path, engine: str, expect_encoder: str | None = None) -> Facts:
    """Reads the manifest of an index and compares the engine's files with it.

    Raises:
        HlmError: no index there, one of another engine or encoder, or files that are missing, cut short or changed.
    """
    return facts_of(folder, read_manifest(folder, KIND), engine, expect_encoder)


def facts_of(folder: Path, manifest: dict[str, Any], engine: str, expect_encoder: str | None = None) -> Facts:
    """`read_facts` of one of the folder's versions, whose manifest is given."""
    where = folder / MANIFEST
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
        measured=optional(manifest, dict, "measured", where=where),
        made_of=optional(manifest, dict, "made_of", where=where),
        home=versions.own_folder(folder, manifest),
        version=versions.number_of(manifest, where),
        config=manifest["config"],
    )
    check_encoder(facts.encoder, expect_encoder, folder)
    if files := ENGINES[engine].files:
        check_files(facts.home, field(manifest, dict, "files", where=where), files)
    return facts


def check_encoder(found: str, expected: str | None, place: str | Path) -> None:
    """Refuses an index at `place` of another encoder's vectors than expected; None expects any."""
    if expected is not None and found != expected:
        raise HlmError(
            f"expected an index of vectors made by encoder {expected}, found one of encoder {found} at {place}; build "
            f"the index from that encoder's store, or use the student that was aligned to {found}"
        )


def write_facts(
    folder: Path,
    index: Index,
    settings: Mapping[str, Any] = MappingProxyType({}),
    *,
    version: int = versions.FIRST,
    records: bool = True,
) -> None:
    """Writes the manifest of an index, the last of its files.

    Args:
        settings: the engine's own.
        version: which of its folder (`versions.py`).
        records: whether the manifest has the hashes of the folder's files: of one whose engine has none it has not.
    """
    facts: dict[str, Any] = {"engine": index.engine, "dim": index.dim, "count": len(index)}
    facts |= {"version": version} if version > versions.FIRST else {}
    facts |= {name: kept for name in ("canaries", "measured", "made_of") if (kept := getattr(index, name))}
    write_manifest(
        folder,
        KIND,
        inputs={"encoder": index.encoder, "source": index.source},
        config={"factory": index.factory, **settings},
        records=records,
        **facts,
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


def joined(ids: pa.Array, columns: pa.Table | None) -> pa.Table:
    """Column "_id", the ids in their order, and the other columns of a table that has each of these ids in its own.

    Raises:
        HlmError: no ids in the table, an id that it lacks or has twice, a column without a name, or one of values that
            cannot be compared, such as lists.
    """
    if columns is None:
        return pa.table({"_id": ids})
    if "_id" not in columns.column_names:
        raise HlmError(f"columns: expected a table with a column '_id', found {', '.join(columns.column_names)}")
    rows = pc.index_in(ids, value_set=checked_ids(columns["_id"]))
    if rows.null_count:
        raise HlmError(f"columns: expected a row for each ad, found none for {ids.filter(rows.is_null())[0].as_py()!r}")
    others = columns.drop_columns(["_id"]).take(rows)
    for name, kind in zip(others.column_names, others.schema.types, strict=True):
        if not comparable(kind):
            raise HlmError(f"columns: expected numbers, texts, dates or truth values in '{name}', found {kind}")
    return pa.table({"_id": ids, **{name: others[name] for name in others.column_names}})


def comparable(kind: pa.DataType) -> bool:
    """Whether a filter can compare values of this type."""
    kinds = (pt.is_integer, pt.is_floating, pt.is_boolean, pt.is_string, pt.is_large_string, pt.is_temporal)
    return any(is_kind(kind) for is_kind in kinds)


def write_ads(path: Path, ads: pa.Table) -> None:
    """Writes a table as one uncompressed Arrow record batch, so that reading it maps it into memory."""
    with pa.ipc.new_file(path, ads.schema) as writer:
        writer.write_batch(ads.combine_chunks().to_batches()[0])


def read_ads(path: Path, count: int) -> pa.Table:
    """The ads' ids, column "_id" of type large_string, and the columns kept with them; mapped into memory.

    Args:
        path: what `write_ads` wrote, or the Parquet file of the ids alone of an older index.

    Raises:
        HlmError: another kind of file, another number of rows, or ids that are no texts.
    """
    if path.suffix == ".parquet":
        with open(path, "rb") as file:
            return pa.table({"_id": _flat_strings(read_ids(file, path, count, REMEDY))})
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            ads = pa.Table.from_batches(batches, reader.schema)
        ads.validate(full=True)
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        raise HlmError(f"{path} is not readable ({error}); {REMEDY}") from error
    kind = ads.schema.field("_id").type if "_id" in ads.column_names else None
    if kind != pa.large_string() or not all(map(comparable, ads.schema.types)):
        raise HlmError(f"{path}: expected '_id' of type large_string and plain columns, found {ads.schema}; {REMEDY}")
    if len(ads) != count or len(batches) != 1 or ads["_id"].null_count:
        raise HlmError(f"{path}: expected {count} ids in one batch, found {len(ads)} in {len(batches)}; {REMEDY}")
    if ads.nbytes > path.stat().st_size:
        raise HlmError(f"{path}: expected no compression, found {ads.nbytes:,} bytes in a smaller file; {REMEDY}")
    return ads


def _flat_strings(ids: Any) -> pa.Array:
    """One contiguous Arrow string array (64-bit offsets: ids of a large catalogue pass 2 GiB)."""
    if isinstance(ids, pa.ChunkedArray):
        return ids.cast(pa.large_string()).combine_chunks()
    return ids.cast(pa.large_string()) if isinstance(ids, pa.Array) else pa.array(ids, pa.large_string())
