"""Which ads of an index a search may answer with: said by ids, by a mask of rows, or by columns kept beside the ids."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hlm.artefacts import HlmError
from hlm.fields import shown


class Selection:
    """Rows of one index, ready for many searches: `Index.select` makes it.

    Attributes:
        mask: bool (len(index),), true where the row may be answered with.
        count: how many are true.
    """

    in_cells: np.ndarray | None = None  # int64, how many of them each cell of an IVF holds, once it is known

    def __init__(self, mask: np.ndarray, index: Any) -> None:
        self.mask = mask
        self.count = int(np.count_nonzero(mask))
        self.index = index

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """int64 (count,), ascending."""
        return np.flatnonzero(self.mask)

    @functools.cached_property
    def bits(self) -> np.ndarray:
        """uint8, a bit a row, the lowest first: FAISS's bitmap."""
        return np.packbits(self.mask, bitorder="little")


Ids: TypeAlias = Sequence[str] | AbstractSet[str] | pa.Array
# {"country": "de", "price": {"<": 10}}; an expression over the columns; ids; or one bool a row.
Conditions: TypeAlias = Mapping[str, Any] | pc.Expression | Ids | np.ndarray
Where: TypeAlias = Selection | Conditions

COMPARE = {
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
ANY_OF, IS = "any of", "is"  # what else a condition may ask of a column


def mask_of(where: Conditions, ads: pa.Table) -> np.ndarray:
    """The rows of an index that a filter lets through, bool (len(ads),).

    Args:
        where: a mapping of columns to the value wanted, to a list of which any will do, or to comparisons, all of which
            must hold, as in {"country": "de", "category": ["shoes", "boots"], "price": {"<": 10}}; an expression of
            `pyarrow.compute` over the columns; one bool a row, in the order of the store; or ids, of which those that
            the index lacks are passed over. A row without a value passes no comparison.
        ads: column "_id" and the columns that were kept beside it.

    Raises:
        HlmError: an unknown column or comparison, a value of another type than the column's, a mask of another length,
            or none of these kinds.
    """
    if isinstance(where, Mapping):
        where = _expression(where, ads)
    if isinstance(where, pc.Expression):
        return _matching(where, ads)
    if isinstance(where, str | bytes):
        raise HlmError(f"where: expected ids, a mask or conditions, found {shown(where)}; write [{where!r}] for one id")
    try:
        kept = np.asarray(where) if not isinstance(where, AbstractSet | pa.Array | pa.ChunkedArray) else None
        if kept is not None and kept.dtype == bool:
            if kept.shape != (len(ads),):
                raise HlmError(f"where: expected a mask of shape ({len(ads)},), a bool a row, found {kept.shape}")
            return kept.copy()
        texts = where if isinstance(where, pa.Array | pa.ChunkedArray) else pa.array(list(where), pa.large_string())
        return pc.is_in(ads["_id"], value_set=texts.cast(pa.large_string())).to_numpy()
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise HlmError(
            f"where: expected ids as texts, a bool for each of {len(ads)} rows, or conditions on columns, found "
            f"{shown(where)} ({error})"
        ) from error


def _expression(conditions: Mapping[str, Any], ads: pa.Table) -> pc.Expression:
    expressions = []
    for name, sign, values in conditions_of(conditions, ads):
        column = pc.field(name)
        if sign in COMPARE:
            expressions.append(COMPARE[sign](column, values[0]))
        elif sign == ANY_OF:
            expressions.append(column.isin(values) if values else pc.scalar(False))  # of no values no type is known
        else:
            expressions.append(column == values[0])
    return functools.reduce(operator.and_, expressions) if expressions else pc.scalar(True)


def conditions_of(conditions: Mapping[str, Any], ads: pa.Table) -> Iterator[tuple[str, str, list[pa.Scalar]]]:
    """Each column with what is asked of it: a sign of `COMPARE` and one value, `ANY_OF` and values, or `IS` and one.

    Raises:
        HlmError: as `mask_of`.
    """
    for name, wanted in conditions.items():
        check_column(name, ads)
        if isinstance(wanted, Mapping):
            for sign, value in wanted.items():
                if sign not in COMPARE:
                    raise HlmError(f"where: {name}: expected one of {' '.join(COMPARE)}, found {shown(sign)}")
                yield name, sign, [checked_value(name, value, ads)]
        elif isinstance(wanted, list | tuple | AbstractSet):
            yield name, ANY_OF, [checked_value(name, value, ads) for value in wanted]
        else:
            yield name, IS, [checked_value(name, wanted, ads)]


def ids_of(where: Any, engine: str) -> list[str]:
    """The ids of a filter that is no mapping, for an engine that knows no rows.

    Args:
        engine: what the message calls it.

    Raises:
        HlmError: an expression of PyArrow, a mask of rows, or no ids.
    """
    if isinstance(where, Selection | pc.Expression | str | bytes) or getattr(where, "dtype", None) == np.bool_:
        raise HlmError(
            f"where: expected ids or conditions such as {{'country': 'de', 'price': {{'<': 10}}}} of an index in "
            f"{engine}, found {shown(where)}; rows have no fixed order there: write it as one of these"
        )
    if isinstance(where, AbstractSet | Sequence | pa.Array | pa.ChunkedArray | np.ndarray):
        try:
            return list(pa.array(list(where), pa.string()).to_pylist())
        except (pa.ArrowException, TypeError) as error:
            raise HlmError(f"where: expected ids as texts, found {shown(where)} ({error})") from error
    raise HlmError(f"where: expected ids or conditions on columns, found {shown(where)}")


def check_column(name: str, ads: pa.Table) -> None:
    """Refuses a column that was not kept with the index."""
    if name not in ads.column_names:
        raise HlmError(
            f"where: expected columns among {', '.join(ads.column_names)}, found {shown(name)}; build the index "
            "with that column"
        )


def checked_value(name: str, value: Any, ads: pa.Table) -> pa.Scalar:
    """A value as the column has it: a text is never compared with numbers, nor 7.5 with whole ones cut to 7."""
    kind = ads.schema.field(name).type
    try:
        found = pa.scalar(value)
        is_text = pa.types.is_string(found.type) or pa.types.is_large_string(found.type)
        if value is None or is_text != (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise TypeError(f"{found.type} is not {kind}")
        return found.cast(kind) if is_text else found
    except (pa.ArrowException, TypeError) as error:
        raise HlmError(f"where: {name}: expected a value of type {kind}, found {shown(value)} ({error})") from error


def _matching(expression: pc.Expression, ads: pa.Table) -> np.ndarray:
    import pyarrow.dataset as ds  # not above: a search without conditions does not wait for it

    try:
        found = ds.dataset(ads).to_table(columns={"kept": expression})["kept"]
        if not pa.types.is_boolean(found.type):
            raise TypeError(f"it gives {found.type}")
    except (pa.ArrowException, TypeError) as error:
        raise HlmError(
            f"where: expected a condition on the columns {', '.join(ads.column_names)}, found {shown(expression)} "
            f"({error})"
        ) from error
    return pc.fill_null(found, False).to_numpy()
