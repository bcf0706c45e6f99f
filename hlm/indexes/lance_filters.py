"""Filters of `filters.py` as LanceDB takes them: SQL over the columns beside the vectors."""

from __future__ import annotations

import datetime
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

SIGNS = {sign: {"==": "=", "!=": "<>"}.get(sign, sign) for sign in COMPARE}


def sql_of(where: Where, schema: pa.Schema) -> str:
    """The condition of a filter, in SQL.

    Args:
        where: a mapping of columns to values, lists or comparisons, or ids, as `mask_of` in `filters.py` takes them.
        schema: of the ads: "_id" and the columns kept beside it.

    Raises:
        HlmError: an expression of PyArrow or a mask of rows, which LanceDB does not take; or what `mask_of` refuses.
    """
    if isinstance(where, Mapping):
        ads = schema.empty_table()
        conditions = [one for name, wanted in where.items() for one in _conditions(name, wanted, ads)]
        return " AND ".join(conditions) or "true"
    if isinstance(where, Selection | pc.Expression | str | bytes) or getattr(where, "dtype", None) == np.bool_:
        raise HlmError(
            "where: expected ids or conditions such as {'country': 'de', 'price': {'<': 10}} of an index in LanceDB, "
            f"found {shown(where)}; rows have no fixed order there: write it as one of these"
        )
    if isinstance(where, AbstractSet | Sequence | pa.Array | pa.ChunkedArray | np.ndarray):
        try:
            return is_one_of(quoted("_id"), pa.array(list(where), pa.string()).to_pylist())
        except (pa.ArrowException, TypeError) as error:
            raise HlmError(f"where: expected ids as texts, found {shown(where)} ({error})") from error
    raise HlmError(f"where: expected ids or conditions on columns, found {shown(where)}")


def is_one_of(column: str, values: Iterable[Any]) -> str:
    """The condition that a column's value is among these; of no values nothing passes."""
    texts = ", ".join(map(literal, values))
    return f"{column} IN ({texts})" if texts else "false"


def _conditions(name: str, wanted: Any, ads: pa.Table) -> Iterable[str]:
    check_column(name, ads)
    if isinstance(wanted, Mapping):
        for sign, value in wanted.items():
            if sign not in SIGNS:
                raise HlmError(f"where: {name}: expected one of {' '.join(SIGNS)}, found {shown(sign)}")
            yield f"{_column(name, [value], ads)} {SIGNS[sign]} {literal(checked_value(name, value, ads).as_py())}"
    elif isinstance(wanted, list | tuple | AbstractSet):
        values = [checked_value(name, value, ads).as_py() for value in wanted]
        yield is_one_of(_column(name, values, ads), values)
    else:
        yield from _conditions(name, [wanted], ads)


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
