"""Filters of `filters.py` as LanceDB takes them: SQL over the columns beside the vectors."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from hlm.artefacts import HlmError
from hlm.fields import shown
from hlm.indexes.filters import COMPARE, Where, conditions_of, ids_of

SIGNS = {sign: {"==": "=", "!=": "<>"}.get(sign, sign) for sign in COMPARE}


def sql_of(where: Where, schema: pa.Schema) -> str:
    """The condition of a filter, in SQL.

    Args:
        where: a mapping of columns to values, lists or comparisons, or ids, as `mask_of` in `filters.py` takes them.
        schema: of the ads: "_id" and the columns kept beside it.

    Raises:
        HlmError: an expression of PyArrow or a mask of rows, which LanceDB does not take; or what `mask_of` refuses.
    """
    if not isinstance(where, Mapping):
        return is_one_of(quoted("_id"), ids_of(where, "LanceDB"))
    ads, conditions = schema.empty_table(), []
    for name, sign, scalars in conditions_of(where, ads):
        values = [scalar.as_py() for scalar in scalars]
        column = _column(name, values, ads)
        conditions.append(
            f"{column} {SIGNS[sign]} {literal(values[0])}" if sign in SIGNS else is_one_of(column, values)
        )
    return " AND ".join(conditions) or "true"


def is_one_of(column: str, values: Iterable[Any]) -> str:
    """The condition that a column's value is among these; of no values nothing passes."""
    texts = ", ".join(map(literal, values))
    return f"{column} IN ({texts})" if texts else "false"


def _column(name: str, values: Sequence[Any], ads: pa.Table) -> str:
    """The column, as numbers with a fraction where one of the values is such a number."""
    if pa.types.is_integer(ads.schema.field(name).type) and any(isinstance(value, float) for value in values):
        return f"CAST({quoted(name)} AS DOUBLE)"
    return quoted(name)


def quoted(name: str) -> str:
    """A column's name as SQL writes it; `check_names` keeps backticks out."""
    return f"`{name}`"


def literal(value: Any) -> str:
    """A value as SQL writes it.

    Raises:
        HlmError: a value that SQL cannot write.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    if isinstance(value, datetime.datetime):
        return f"timestamp '{value.isoformat(sep=' ')}'"
    if isinstance(value, datetime.date):
        return f"date '{value.isoformat()}'"
    raise HlmError(f"where: expected a text, a finite number, a date or a truth value, found {shown(value)}")


def check_names(names: Iterable[str]) -> None:
    """Refuses names of columns that SQL cannot quote, and those that the index uses itself.

    Raises:
        HlmError: names the column.
    """
    for name in names:
        if not name or set(name) & set("`.\\") or name in ("vector", "query_index") or name.startswith("_"):
            raise HlmError(f"columns: expected a name without ` . \\ or a leading _, not 'vector', found {name!r}")
