"""Filters of `filters.py` as Milvus takes them: boolean expressions over the columns beside the vectors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hlm.artefacts import HlmError
from hlm.fields import shown
from hlm.indexes.filters import COMPARE, Selection, Where, check_column, checked_value

NOTHING = "_id in []"


def expression_of(where: Where, schema: pa.Schema) -> str:
    """The expression of a filter.

    Args:
        where: a mapping of columns to values, lists or comparisons, or ids, as `mask_of` in `filters.py` takes them.
        schema: of the ads: "_id" and the columns kept beside it.

    Raises:
        HlmError: an expression of PyArrow or a mask of rows, which Milvus does not take; or what `mask_of` refuses.
    """
    if isinstance(where, Mapping):
        ads = schema.empty_table()
        conditions = [one for name, wanted in where.items() for one in _conditions(name, wanted, ads)]
        return " and ".join(conditions) or f"not ({NOTHING})"
    if isinstance(where, Selection | pc.Expression | str | bytes) or getattr(where, "dtype", None) == np.bool_:
        raise HlmError(
            "where: expected ids or conditions such as {'country': 'de', 'price': {'<': 10}} of an index in Milvus, "
            f"found {shown(where)}; rows have no fixed order there: write it as one of these"
        )
    if isinstance(where, AbstractSet | Sequence | pa.Array | pa.ChunkedArray | np.ndarray):
        try:
            return is_one_of("_id", pa.array(list(where), pa.string()).to_pylist())
        except (pa.ArrowException, TypeError) as error:
            raise HlmError(f"where: expected ids as texts, found {shown(where)} ({error})") from error
    raise HlmError(f"where: expected ids or conditions on columns, found {shown(where)}")


def is_one_of(column: str, values: Iterable[Any]) -> str:
    """The expression that a column's value is among these; of no values nothing passes."""
    return f"{column} in [{', '.join(map(literal, values))}]"


def _conditions(name: str, wanted: Any, ads: pa.Table) -> Iterable[str]:
    check_column(name, ads)
    whole = pa.types.is_integer(ads.schema.field(name).type)
    if isinstance(wanted, Mapping):
        for sign, value in wanted.items():
            if sign not in COMPARE:
                raise HlmError(f"where: {name}: expected one of {' '.join(COMPARE)}, found {shown(sign)}")
            yield _compared(name, sign, checked_value(name, value, ads).as_py(), whole)
    elif isinstance(wanted, list | tuple | AbstractSet):
        values = [checked_value(name, value, ads).as_py() for value in wanted]
        if whole:  # what is no whole number is in no such column
            values = [int(value) for value in values if value == math.floor(value)]
        yield is_one_of(name, values)
    else:
        yield from _conditions(name, [wanted], ads)


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
