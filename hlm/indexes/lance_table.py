"""LanceDB below the ad index: its table, its vector index, its searches, and its errors as ours."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")  # statistics come without them, and without a warning
import lancedb
from lancedb.index import BTree, HnswSq, IvfFlat, IvfPq, IvfRq, IvfSq
from lancedb.table import Table

from hlm.artefacts import HlmError
from hlm.fields import shown
from hlm.indexes.index_parts import Facts, normalised
from hlm.progress import progress
from hlm.vectors.store import VectorStore

__all__ = [
    "Table",
    "checked_factory",
    "default_nprobe",
    "errors",
    "fill",
    "nearest",
    "not_indexed",
    "opened",
    "rows_of",
]

TABLE, VECTORS, LIVE = "ads", "vectors", "live"
CODES = {"RQ": IvfRq, "PQ": IvfPq, "SQ": IvfSq, "FLAT": IvfFlat, "HNSW_SQ": HnswSq}
ROWS_PER_BLOCK = 65_536
# As rows come and go, LanceDB joins cells of fewer than 2,048 rows, and splits those of more than 32,768.
ROWS_A_CELL = 4096
# Codes alone miss an eighth of the neighbours and more, so that many candidates for each document wanted are scored
# again by their vectors.
REFINE_FACTOR = 4
# So long a version of the table can be read that no version of the folder names any more.
GRACE = datetime.timedelta(hours=1)


def checked_factory(factory: str) -> str:
    """Refuses a factory that is neither "FLAT" nor an IVF with one of `CODES`, such as "IVF_RQ"."""
    kinds = ["FLAT", *(f"IVF_{name}" for name in CODES)]
    if factory not in kinds:
        raise HlmError(
            f"expected one of {', '.join(kinds)} for an index in LanceDB, found {shown(factory)}; correct it"
        )
    return factory


def cells_of(factory: str, count: int) -> int:
    """How many cells so many rows have; 0: every row is scored."""
    return 0 if factory == "FLAT" else max(1, count // ROWS_A_CELL)


def default_nprobe(cells: int) -> int:
    """One cell in 16, at least 8."""
    return min(cells, max(8, math.ceil(cells / 16)))


def connected(folder: Path) -> Any:
    """The database of an index's folder."""
    return lancedb.connect(str(folder))


def opened(database: Any) -> Table:
    """The table as it was last written, whether that was committed or not."""
    with errors(f"open {database.uri}", "pull or build the index again"):
        return database.open_table(TABLE)


def fill(folder: Path, store: VectorStore, ads: pa.Table, facts: Facts) -> int:
    """Writes a store's rows into the table as its newest version, and builds its indexes.

    Args:
        ads: "_id" and the columns to keep, in the store's order.

    Returns:
        The table's version.
    """
    cells = cells_of(facts.factory, len(store))
    blocks = store.iter_blocks(ROWS_PER_BLOCK)
    schema = rows_of(ads[:0], np.zeros((0, facts.dim), np.float32)).schema

    def batches() -> Iterator[pa.RecordBatch]:
        total = -(-len(store) // ROWS_PER_BLOCK)
        for start, block in progress(blocks, what=f"fill {folder.name}", unit="block", total=total):
            rows = rows_of(ads[start : start + len(block)], normalised(block, facts.dim, first_row=start))
            yield from rows.combine_chunks().to_batches()

    remedy = "choose another factory such as FLAT, or more rows"
    with errors(f"build '{facts.factory}' over {len(store)} vectors of width {facts.dim}", remedy):
        reader = pa.RecordBatchReader.from_batches(schema, batches())
        database = lancedb.connect(str(folder))
        mode = "overwrite" if (folder / f"{TABLE}.lance").exists() else "create"
        table = database.create_table(TABLE, data=reader, mode=mode)
        for name in ads.column_names:
            table.create_index(name, config=BTree())
        if cells:
            codes = CODES[facts.factory.removeprefix("IVF_")]
            table.create_index("vector", config=codes(distance_type="dot", num_partitions=cells), name=VECTORS)
        return table.version


def rows_of(ads: pa.Table, vectors: np.ndarray) -> pa.Table:
    """The rows of the table.

    Args:
        ads: "_id" and the columns kept beside it.
        vectors: float32 (len(ads), dim), L2-normalised.
    """
    values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    plain = {name: _plain(ads[name]) for name in ads.column_names}
    return pa.table({"_id": plain.pop("_id"), "vector": values, **plain})


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """LanceDB indexes texts of 32 bits alone."""
    return column.cast(pa.string()) if pa.types.is_large_string(column.type) else column


def nearest(
    table: Table, queries: np.ndarray, k: int, condition: str | None, probed: int, refined: int
) -> tuple[np.ndarray, list[list[str]]]:
    """The `k` rows with the largest inner products.

    Args:
        queries: float32 (n, dim), n at least 1.
        condition: SQL that the rows must fulfil; it is applied before the search, never after it.
        probed: cells that are searched; 0: all rows are scored.
        refined: candidates scored by their vectors, in multiples of `k`.

    Returns:
        scores: float32 (n, k), descending, -inf where there are fewer.
        ids: n lists.
    """
    with errors(f"search {len(queries)} queries for {k} ads each", "correct the filter, or ask for fewer at once"):
        asked: Any = table.search(queries if len(queries) > 1 else queries[0], vector_column_name="vector")
        asked = asked.distance_type("dot").select(["_id", "_distance"]).limit(k)
        if condition is not None:
            asked = asked.where(condition, prefilter=True)
        if probed:
            asked = asked.nprobes(probed).refine_factor(refined)
        else:
            asked = asked.bypass_vector_index()
        found = asked.to_arrow()
    several = "query_index" in found.column_names
    query = found["query_index"].to_numpy() if several else np.zeros(len(found), np.int32)
    distances = found["_distance"].to_numpy()
    order = np.lexsort((distances, query))
    ends = np.cumsum(np.bincount(query, minlength=len(queries)))
    texts = found["_id"].take(pa.array(order)).to_pylist()
    ids = [texts[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    scores = np.full((len(queries), k), -np.inf, np.float32)
    column = np.arange(len(order)) - np.repeat([0, *ends[:-1]], [len(found) for found in ids])
    scores[query[order], column] = 1 - distances[order]  # what LanceDB calls the dot distance is 1 - cosine
    return scores, ids


def not_indexed(table: Table) -> int:
    """Rows that the vector index lacks."""
    statistics = table.index_stats(VECTORS)
    return statistics.num_unindexed_rows if statistics else 0


def tag(table: Table, name: str, version: int) -> None:
    """Gives a version of the table a name, or the name to another version. What has one is never cleaned up."""
    with errors(f"tag version {version} of the table as {name}", "commit or roll back again"):
        if name in table.tags.list():
            table.tags.update(name, version)
        else:
            table.tags.create(name, version)


def untag(table: Table, name: str) -> None:
    """Removes a tag if it is there."""
    with errors(f"remove the tag {name}", "commit again"):
        if name in table.tags.list():
            table.tags.delete(name)


@contextlib.contextmanager
def errors(what: str, remedy: str) -> Iterator[None]:
    """What LanceDB raises becomes an HlmError: "LanceDB cannot <what>: <its reason>; <remedy>"."""
    try:
        yield
    except (RuntimeError, ValueError, OSError, pa.ArrowException) as error:
        if isinstance(error, HlmError):
            raise
        reason = re.split(r",? ?/\S+\.rs:\d+|\n", str(error).strip())[0] or type(error).__name__
        raise HlmError(f"LanceDB cannot {what}: {reason}; {remedy}") from error
