"""Ids of more rows than a set or a dict of them would fit into memory: whether they are unique, and their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

HASHES_HELD = 2**27  # at once: 1 GiB


def id_there_twice(blocks: Callable[[], Iterable[pa.Array]], rows: int) -> str | None:
    """The first id that is there a second time, or None where all are unique.

    Reads the ids once, and again for every `HASHES_HELD` rows beyond the first; holds 8 bytes a row, of that many rows
    at the most, and one block. A second look at the texts themselves tells ids of one hash apart.

    Args:
        blocks: begins anew, and gives the ids in order, as Arrow strings.
        rows: how many ids there are.
    """
    passes = -(-rows // HASHES_HELD)
    shared = np.concatenate([np.zeros(0, np.int64), *(_shared(blocks, rows, turn, passes) for turn in range(passes))])
    if not len(shared):
        return None
    seen = set()
    for block in blocks():
        ids = block.to_pylist()
        for row in np.flatnonzero(np.isin(_hashes(ids), shared)):
            if ids[row] in seen:
                return ids[row]
            seen.add(ids[row])
    return None


def _shared(blocks: Callable[[], Iterable[pa.Array]], rows: int, turn: int, passes: int) -> np.ndarray:
    """The hashes that more than one row has, of those that this turn looks at."""
    held, count = np.empty(rows if passes == 1 else 2 * HASHES_HELD, np.int64), 0
    for block in blocks():
        hashes = _hashes(block.to_pylist())
        if passes > 1:
            hashes = hashes[hashes % passes == turn]
        if count + len(hashes) > len(held):
            break  # a turn has twice its share only where ids repeat, and many are held already
        held[count : count + len(hashes)] = hashes
        count += len(hashes)
    held = held[:count]
    held.sort()
    return np.unique(held[1:][held[1:] == held[:-1]])


def _hashes(ids: list[str]) -> np.ndarray:
    # Python's own: 64 bits, salted, so that nobody can make ids that share one.
    return np.fromiter(map(hash, ids), np.int64, len(ids))


def rows_with(column: pa.ChunkedArray, ids: Sequence[str] | pa.Array) -> np.ndarray:
    """Of each of `ids`, which may repeat, the row of `column` that has it: int64, -1 where none has.

    Only the ids that are asked for are hashed. Passes over the column once, chunk by chunk.
    """
    wanted = ids if isinstance(ids, pa.Array) else pa.array(ids, type=pa.string())
    if not len(wanted):
        return np.zeros(0, np.int64)
    distinct = pc.unique(wanted)
    found, start = np.full(len(distinct), -1, dtype=np.int64), 0
    for chunk in column.chunks:
        hits = pc.index_in(chunk, value_set=distinct).fill_null(-1).to_numpy()
        rows = np.flatnonzero(hits >= 0)
        found[hits[rows]] = rows + start
        start += len(chunk)
    return found[pc.index_in(wanted, value_set=distinct).to_numpy()]
