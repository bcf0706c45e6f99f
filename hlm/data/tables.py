"""Tables of the data contract: found in a folder, checked once, kept as Arrow files.

A checked table goes into an Arrow file keyed by its source's content: a second load only maps it into memory, and a
corpus never becomes a Python list. What is read of which file is in `hlm/data/readers.py`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import regex

from hlm.artefacts import HlmError, fingerprint_json
from hlm.data.ids import id_there_twice
from hlm.data.readers import COMPRESSIONS, SUFFIXES, TREC, Row, is_read, read_rows, suffix_of
from hlm.extras import extras_named
from hlm.outputs import make_once
from hlm.progress import progress

if TYPE_CHECKING:
    import datasets

__all__ = ["SUFFIXES", "TEXTS", "Row", "Table", "checked_dataset", "checked_file", "find_table", "identifier"]
__all__ += ["read_rows"]

logger = logging.getLogger(__name__)

# The columns that the encoders read of each part; one of them must be filled.
TEXTS = {"corpus": ("title", "text"), "queries": ("text",), "unlabelled": ("text",)}
SPLIT_NAMES = {"dev": ("dev", "validation", "valid", "val")}  # under which a split is found
_ROWS = {"corpus": "documents", "queries": "queries", "unlabelled": "queries"}
_VISIBLE = regex.compile(r"[^\p{Z}\p{Cc}\p{Cf}]")
_CACHE_VERSION = 2  # raise it when the reading, the checks or the stored columns change
_LEFT_OUT = b"left out"  # in the schema of a stored table: how many rows were


@dataclass(frozen=True)
class Table:
    """One table of a source: its name for messages, a fresh iterator over (place, row), a digest of its content."""

    name: str
    rows: Callable[[], Iterator[tuple[str, Row]]]
    digest: Callable[[], str]


def find_table(folder: Path, name: str) -> Path | None:
    """The one file `folder/name` with a suffix that is read, or None; `dev` may be called `validation` or `valid`.

    Raises:
        HlmError: the table is there twice, or in a format that is not read.
    """
    parent, wanted = (folder / name).parent, Path(name).name
    if not parent.is_dir():
        return None
    names = SPLIT_NAMES.get(wanted, (wanted,))
    suffixes = (*SUFFIXES, *TREC) if parent.name == "qrels" else SUFFIXES
    files = sorted(path for path in parent.iterdir() if path.name.partition(".")[0] in names and path.is_file())
    found = [path for path in files if _named(path, suffixes)]
    if len(found) > 1:
        raise HlmError(f"expected one '{name}' file in {folder}, found {', '.join(p.name for p in found)}; keep one")
    others = [path.name for path in files if path.suffix not in (".urls", ".md", ".yaml", ".yml", ".py", ".log")]
    if not found and others:
        raise HlmError(
            f"{folder}: expected '{name}' as one of {', '.join(suffixes)}, also with {', '.join(COMPRESSIONS)}, found "
            f"{', '.join(others)}, which is not read; convert or rename it"
        )
    return found[0] if found else None


def _named(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether the name is a table's and a suffix that is read, with nothing between."""
    kind, compression = suffix_of(path)
    plain = path.name.lower() == f"{path.name.partition('.')[0].lower()}{kind}{compression}"
    return plain and kind in suffixes and (is_read(path) or kind in TREC)


@extras_named("loading a dataset")
def checked_dataset(table: Table, part: str, cache: Path, *, skip_bad_rows: bool = False) -> datasets.Dataset:
    """`checked_file` as a memory-mapped Dataset."""
    from datasets import Dataset

    return Dataset.from_file(str(checked_file(table, part, cache, skip_bad_rows=skip_bad_rows)))


def checked_file(table: Table, part: str, cache: Path, *, skip_bad_rows: bool = False) -> Path:
    """The table as an Arrow file (a stream), checked and written to `cache` first where it is not there yet.

    Args:
        table: where the rows come from.
        part: "corpus", "queries" or "unlabelled".
        cache: folder of the Arrow files.
        skip_bad_rows: leave out rows whose texts are all empty, and say how many.

    Raises:
        HlmError: a row breaks the contract: wrong columns, missing or duplicate id, empty text, not text, no rows; or
            `cache` cannot be written.
    """
    key = fingerprint_json([_CACHE_VERSION, part, table.digest(), skip_bad_rows])
    path = cache / f"{part}-{key}.arrow"
    try:
        if not path.is_file():
            columns, left_out = _check_rows(table, part, skip_bad_rows)

            def write(aside: Path) -> None:
                _write_arrow(table, part, columns, left_out, aside)
                if part != "unlabelled":
                    _refuse_duplicates(table, aside)

            make_once(path, write, path.is_file)
            logger.info("checked %s", table.name)
        with pa.memory_map(str(path)) as stored:
            left_out = int((pa.ipc.open_stream(stored).schema.metadata or {}).get(_LEFT_OUT, 0))
    except OSError as error:  # the cache's: what goes wrong in reading a source is an HlmError already
        raise HlmError(
            f"{cache}: expected a folder for checked tables that can be written, found {error}; set HF_HOME to a "
            "folder with room that can be written, or pass one as cache_dir"
        ) from error
    if left_out:
        logger.warning("%s: left out %d %s without %s", table.name, left_out, _ROWS[part], " and ".join(TEXTS[part]))
    return path


def identifier(value: Any, where: str) -> str:
    """An id as text: text as it is, whole numbers written out, also those that became floats (1.0).

    Raises:
        HlmError: empty, missing or of another type; `where` names the place.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53:
        return str(int(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, bytes):
        raise HlmError(f"{where}: expected an id, found bytes that are no UTF-8 ({value!r}); write it as text")
    if not isinstance(value, str) or not value.strip():
        raise HlmError(f"{where}: expected an id, found {value!r}; give every row a unique id, as text")
    return value


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # NaN: pandas's way to say so


def _empty(row: Row, names: tuple[str, ...]) -> bool:
    """Whether none of the columns has a character to be seen; zero-width spaces are none."""
    return not any(isinstance(text := row.get(name), str) and _VISIBLE.search(text) for name in names)


def _check_rows(table: Table, part: str, skip_bad_rows: bool) -> tuple[dict[str, pa.DataType], int]:
    """Checks every row; returns the columns (strings for ids and texts, the narrowest fitting type for the rest) and
    how many rows are to be left out."""
    texts, has_id = TEXTS[part], part != "unlabelled"
    columns = dict.fromkeys((("_id",) if has_id else ()) + texts, pa.string())
    extra: dict[str, pa.DataType] = {}
    rows = left_out = 0
    for place, row in progress(table.rows(), what=f"check {part}", unit="row"):
        rows += 1
        where = f"{table.name}, {place}"
        if (has_id and "_id" not in row) or not any(name in row for name in texts):
            expected = ("_id and " if has_id else "") + " or ".join(texts)
            raise HlmError(
                f"{where}: expected the columns {expected}, found {', '.join(row)}; rename the columns, or add the "
                "header line if the file has none"
            )
        if has_id:
            identifier(row["_id"], f"{where}, column _id")
        for name in (*texts, "oracle"):
            value = row.get(name)
            if not isinstance(value, str) and not _missing(value):
                raise HlmError(f"{where}: expected text in '{name}', found {value!r}; write it as text")
        if _empty(row, texts):
            if not skip_bad_rows:
                raise HlmError(
                    f"{where}: expected {' or '.join(texts)} to be filled, found it empty; fill it, remove the row, or "
                    "leave all such rows out with skip_bad_rows"
                )
            left_out += 1
            continue
        for name, value in row.items():
            if name not in columns:
                extra[name] = _wider(extra.get(name, pa.null()), value)
    if rows == left_out:
        found = f"{rows} without text" if rows else "none"
        raise HlmError(f"{table.name}: expected at least one row, found {found}; fill the table or remove it")
    return columns | {name: pa.string() if kind == pa.null() else kind for name, kind in extra.items()}, left_out


def _wider(kind: pa.DataType, value: Any) -> pa.DataType:
    """The narrowest type for a column of `kind` that meets `value`; text where nothing else fits."""
    if value is None:
        return kind
    fits = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}.get(type(value), pa.string())
    if fits == pa.int64() and abs(value) >= 1 << 53:  # larger ones would not survive a mix with floats
        fits = pa.string()
    if kind in (pa.null(), fits):
        return fits
    return pa.float64() if {kind, fits} == {pa.int64(), pa.float64()} else pa.string()


def _write_arrow(table: Table, part: str, columns: dict[str, pa.DataType], left_out: int, path: Path) -> None:
    schema = pa.schema(list(columns.items()), metadata={_LEFT_OUT: str(left_out)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        pending: list[Row] = []
        for _, row in progress(table.rows(), what=f"read {part}", unit="row"):
            if left_out and _empty(row, TEXTS[part]):
                continue
            pending.append({name: _cell(name, row.get(name), kind) for name, kind in columns.items()})
            if len(pending) == 2048:
                writer.write_batch(pa.RecordBatch.from_pylist(pending, schema=schema))
                pending.clear()
        if pending:
            writer.write_batch(pa.RecordBatch.from_pylist(pending, schema=schema))


def _cell(name: str, value: Any, kind: pa.DataType) -> Any:
    if value is None or isinstance(value, str) or kind != pa.string():
        return value
    if name == "_id":
        return identifier(value, name)
    return None if _missing(value) else json.dumps(value, ensure_ascii=False, default=str)


def _refuse_duplicates(table: Table, path: Path) -> None:
    with pa.memory_map(str(path)) as source:
        blocks = [batch.column("_id") for batch in pa.ipc.open_stream(source)]  # mapped: they take no memory
        twice = id_there_twice(lambda: iter(blocks), sum(map(len, blocks)))
    if twice is None:
        return
    places = [place for place, row in table.rows() if identifier(row["_id"], table.name) == twice]
    raise HlmError(
        f"{table.name}, {places[1]}: expected unique ids, found '{twice}' here and on {places[0]}; remove or rename one"
    )
