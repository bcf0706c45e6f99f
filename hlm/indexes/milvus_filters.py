"""Filters of `filters.py` as Milvus takes them: boolean expressions over the columns beside the vectors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from hlm.artefacts import HlmError
from hlm.fields import shown
from hlm.indexes.filters import COMPARE, Where, conditions_of, ids_of

NOTHING = "_id in []"


def expression_of(where: Where, schema: pa.Schema) -> str:
    """The expression of a filter.

    Args:
        where: a mapping of columns to values, lists or comparisons, or ids, as `mask_of` in `filters.py` takes them.
        schema: of the ads: "_id" and the columns kept beside it.

    Raises:
        HlmError: an expression of PyArrow or a mask of rows, which Milvus does not take; or what `mask_of` refuses.
    """
    if not isinstance(where, Mapping):
        return is_one_of("_id", ids_of(where, "Milvus"))
    ads, conditions = schema.empty_table(), []
    for name, sign, scalars in conditions_of(where, ads):
        values = [scalar.as_py() for scalar in scalars]
        whole = pa.types.is_integer(ads.schema.field(name).type)
        if sign in COMPARE:
            conditions.append(_compared(name, sign, values[0], whole))
        else:  # what is no whole number is in no column of such
            conditions.append(is_one_of(name, [int(v) for v in values if v == math.floor(v)] if whole else values))
    return " and ".join(conditions) or f"not ({NOTHING})"


def is_one_of(column: str, values: Iterable[Any]) -> str:
    """The expression that a column's value is among these; of no values nothing passes."""
    return f"{column} in [{', '.join(map(literal, values))}]"


def _compared(name: str, sign: str, value: Any, whole: bool) -> str:
    """A comparison; of whole numbers with one that has a fraction, by the nearest whole one that says the same."""
    if whole and isinstance(value, float) and math.isfinite(value):
        if sign in ("==", "!=") and not value.is_integer():
            return NOTHING if sign == "==" else f"{name} is not null"
        value = math.ceil(value) if sign in ("<", ">=") else math.floor(value)
    return f"{name} {sign} {literal(value)}"


def literal(value: Any) -> str:
    """A value as Milvus reads it.

    Raises:
        HlmError: a value that it has no word for.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    raise HlmError(f"where: expected a text, a finite number or a truth value, found {shown(value)}")
