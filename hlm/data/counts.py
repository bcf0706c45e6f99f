"""How often queries were typed: the column `count` that `hlm prepare` writes, as weights."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hlm.artefacts import HlmError

if TYPE_CHECKING:
    import datasets

COLUMN = "count"


def counts_of(table: datasets.Dataset, what: str) -> np.ndarray:
    """float64 (rows,): the column `count`; 1 where it is lower, as of queries that are judged and not in the log.

    Args:
        what: the table's name, for the message.

    Raises:
        HlmError: no such column, or a cell that is no number from 0 up.
    """
    if COLUMN not in table.column_names:
        raise HlmError(
            f"{what}: expected the column '{COLUMN}' that hlm prepare writes, found {', '.join(table.column_names)}; "
            "add it, or let each query count once"
        )
    try:
        found = pc.cast(table.data.column(COLUMN), pa.float64()).to_numpy()
    except pa.ArrowInvalid as error:
        raise HlmError(f"{what}: expected numbers in '{COLUMN}', found others ({error}); correct them") from error
    if not (np.isfinite(found).all() and (found >= 0).all()):
        raise HlmError(f"{what}: expected numbers from 0 up in '{COLUMN}', found an empty cell or another; fill it")
    return np.maximum(found, 1.0)


def weights_of(counts: np.ndarray, power: float) -> np.ndarray:
    """float32 (rows,): counts to the power, their mean 1."""
    weights = counts**power
    return (weights / weights.mean()).astype(np.float32)


def fingerprint_counts(counts: np.ndarray) -> str:
    """16 hex digits over the counts and their order."""
    return hashlib.sha256(np.ascontiguousarray(counts, dtype="<f8").data).hexdigest()[:16]
