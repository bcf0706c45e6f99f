"""A corpus as rows or as texts, read from the table that lies on disk: for what would hold all of them otherwise."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

from hlm.data.contract import Row, document_text, iterate

if TYPE_CHECKING:
    import datasets


TEXTS_AT_ONCE = 1024


class Rows(Collection[Row]):
    """The rows of a table, in order, as often as they are asked for."""

    def __init__(self, table: datasets.Dataset) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Row]:
        return iterate(self.table)

    def __contains__(self, row: object) -> bool:
        return any(row == other for other in self)


class DocumentTexts(Sequence[str]):
    """`document_text` of the rows of a corpus, of all or of those with these numbers.

    Read it by slices or iterate: one text at a time is slow.
    """

    def __init__(self, corpus: datasets.Dataset, *, oracle: bool = False, rows: np.ndarray | None = None) -> None:
        columns = [name for name in ("title", "text", "oracle") if name in corpus.column_names]
        self.table, self.oracle, self.rows = corpus.select_columns(columns), oracle, rows

    def of(self, rows: np.ndarray) -> DocumentTexts:
        """The texts of these row numbers, in their order."""
        return DocumentTexts(self.table, oracle=self.oracle, rows=rows)

    def __len__(self) -> int:
        return len(self.table) if self.rows is None else len(self.rows)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), TEXTS_AT_ONCE):
            yield from self[start : start + TEXTS_AT_ONCE]

    @overload
    def __getitem__(self, places: int) -> str: ...
    @overload
    def __getitem__(self, places: slice) -> list[str]: ...
    def __getitem__(self, places: int | slice) -> str | list[str]:
        if isinstance(places, int):
            place = range(len(self))[places]
            return self[place : place + 1][0]
        wanted = range(len(self))[places]
        part = self.table.select(wanted if self.rows is None else self.rows[np.asarray(wanted, np.int64)])
        return [document_text(row, oracle=self.oracle) for row in iterate(part)]
