"""Tables of the data contract: read row by row with the place of every row, checked once, kept as Arrow files.

A row is a dict; its place is "line 7" (text files) or "row 7" (Parquet, Hub), for messages a user can act on. A checked
table goes into an Arrow file keyed by its source's content: a second load only maps it into memory, and a corpus never
becomes a Python list.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hlm.artefacts import HlmError, fingerprint_json

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".parquet", ".tsv", ".csv")
# The columns that the encoders read of each part; one of them must be filled.
TEXTS = {"corpus": ("title", "text"), "queries": ("text",), "unlabelled": ("text",)}
_CACHE_VERSION = 1  # raise it when the checks or the stored columns change
Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """One table of a source: its name for messages, a fresh iterator over (place, row), a digest of its content."""

    name: str
    rows: Callable[[], Iterator[tuple[str, Row]]]
    digest: Callable[[], str]


def find_table(folder: Path, name: str) -> Path | None:
    """The one file `folder/name.{jsonl,parquet,tsv,csv}`, or None.

    Raises:
        HlmError: the table is there in two formats.
    """
    found = [path for suffix in SUFFIXES if (path := folder / f"{name}{suffix}").is_file()]
    if len(found) > 1:
        raise HlmError(f"expected one '{name}' file in {folder}, found {', '.join(p.name for p in found)}; keep one")
    return found[0] if found else None


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yields (place, row) of a table file; text columns of TSV and CSV stay text.

    Raises:
        HlmError: broken UTF-8, JSON, quoting or Parquet, or a row with more or fewer cells than the header.
    """
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".tsv": _read_delimited, ".csv": _read_delimited}
    if path.suffix not in readers:
        raise HlmError(f"{path}: expected one of {', '.join(SUFFIXES)}, found '{path.suffix}'; convert the file")
    return readers[path.suffix](path)


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark is no part of the first key
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise HlmError(
                    f"{path}, line {number}: expected UTF-8, found byte 0x{raw[error.start]:02x} at position "
                    f"{error.start}; convert the file to UTF-8"
                ) from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in _read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise HlmError(
                f"{path}, line {number}: expected one JSON object, found broken JSON ({error}); correct the line"
            ) from error
        if "\\ud" in line.lower():  # half a surrogate pair is valid JSON, but no text
            try:
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise HlmError(
                    f"{path}, line {number}: expected text, found a lone surrogate ({error}); correct the escape"
                ) from error
        if not isinstance(row, dict):
            raise HlmError(
                f"{path}, line {number}: expected a JSON object of columns, found a {type(row).__name__}; "
                "write one object a line"
            )
        yield f"line {number}", row


def _read_delimited(path: Path) -> Iterator[tuple[str, Row]]:
    lines = (line for _, line in _read_lines(path))
    # strict: a stray quote is an error, where the lenient reader would swallow every line up to the next one
    reader = csv.reader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    header: list[str] | None = None
    start = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise HlmError(
                f"{path}, line {start}: broken quoting ({error}); double the quotes inside a quoted cell, "
                "or write the table as JSONL"
            ) from error
        place, start = f"line {start}", reader.line_num + 1
        if header is None:
            header = cells
            if len(set(header)) < len(header):
                raise HlmError(f"{path}, line 1: a column name is there twice in {header}; rename one")
        elif cells:
            if len(cells) != len(header):
                raise HlmError(
                    f"{path}, {place}: expected {len(header)} cells ({', '.join(header)}), found {len(cells)}; "
                    "quote cells that contain the separator"
                )
            yield place, dict(zip(header, cells, strict=True))


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except UnicodeDecodeError as error:
        raise HlmError(f"{path}, after row {number}: expected UTF-8 ({error}); write the file again") from error
    except (pa.ArrowException, OSError) as error:
        raise HlmError(f"{path}, after row {number}: not readable as Parquet ({error}); write it again") from error


def checked_dataset(table: Table, part: str, cache: Path) -> datasets.Dataset:
    """The table as a memory-mapped Dataset, checked and written to `cache` first where it is not there yet.

    Args:
        table: where the rows come from.
        part: "corpus", "queries" or "unlabelled".
        cache: folder of the Arrow files.

    Raises:
        HlmError: a row breaks the contract: wrong columns, missing or duplicate id, empty text, not text, no rows.
    """
    key = fingerprint_json([_CACHE_VERSION, part, table.digest()])
    path = cache / f"{part}-{key}.arrow"
    if not path.is_file():
        columns = _check_rows(table, part)
        cache.mkdir(parents=True, exist_ok=True)
        aside = cache / f".{path.name}.{os.getpid()}.partial"
        try:
            _write_arrow(table, columns, aside)
            if part != "unlabelled":
                _refuse_duplicates(table, aside)
            os.replace(aside, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                aside.unlink()
        logger.info("checked %s", table.name)
    return datasets.Dataset.from_file(str(path))


def identifier(value: Any, where: str) -> str:
    """An id as text: text as it is, whole numbers written out.

    Raises:
        HlmError: empty, missing or of another type; `where` names the place.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise HlmError(f"{where}: expected an id, found {value!r}; give every row a unique id")
    return value


def _check_rows(table: Table, part: str) -> dict[str, pa.DataType]:
    """Checks every row and returns the columns: strings for ids and texts, the narrowest fitting type for the rest."""
    texts, has_id = TEXTS[part], part != "unlabelled"
    columns = dict.fromkeys((("_id",) if has_id else ()) + texts, pa.string())
    extra: dict[str, pa.DataType] = {}
    place = None
    for place, row in table.rows():
        where = f"{table.name}, {place}"
        if (has_id and "_id" not in row) or not any(name in row for name in texts):
            expected = ("_id and " if has_id else "") + " or ".join(texts)
            raise HlmError(f"{where}: expected the columns {expected}, found {', '.join(row)}; rename the columns")
        if has_id:
            identifier(row["_id"], f"{where}, column _id")
        for name in (*texts, "oracle"):
            value = row.get(name)
            if value is not None and not isinstance(value, str):
                raise HlmError(f"{where}: expected text in '{name}', found {value!r}; write it as text")
        if not any((row.get(name) or "").strip() for name in texts):
            raise HlmError(f"{where}: expected {' or '.join(texts)} to be filled, found it empty; fill it or remove it")
        for name, value in row.items():
            if name not in columns:
                extra[name] = _wider(extra.get(name, pa.null()), value)
    if place is None:
        raise HlmError(f"{table.name}: expected at least one row, found none; fill the table or remove it")
    return columns | {name: pa.string() if kind == pa.null() else kind for name, kind in extra.items()}


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


def _write_arrow(table: Table, columns: dict[str, pa.DataType], path: Path) -> None:
    schema = pa.schema(list(columns.items()))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        pending: list[Row] = []
        for _, row in table.rows():
            pending.append({name: _cell(name, row.get(name), kind) for name, kind in columns.items()})
            if len(pending) == 2048:
                writer.write_batch(pa.RecordBatch.from_pylist(pending, schema=schema))
                pending.clear()
        if pending:
            writer.write_batch(pa.RecordBatch.from_pylist(pending, schema=schema))


def _cell(name: str, value: Any, kind: pa.DataType) -> Any:
    if value is None or isinstance(value, str) or kind != pa.string():
        return value
    return str(value) if name == "_id" else json.dumps(value, ensure_ascii=False, default=str)


def _refuse_duplicates(table: Table, path: Path) -> None:
    # Counted by Arrow over the memory-mapped column: no Python set of a million ids.
    with pa.memory_map(str(path)) as source:
        ids = pa.chunked_array([batch.column("_id") for batch in pa.ipc.open_stream(source)])
        if pc.count_distinct(ids).as_py() == len(ids):
            return
        counted = pc.value_counts(ids)
        twice = counted.field("values").filter(pc.greater(counted.field("counts"), 1))[0].as_py()
    places = [place for place, row in table.rows() if str(row["_id"]) == twice]
    raise HlmError(
        f"{table.name}, {places[1]}: expected unique ids, found '{twice}' here and on {places[0]}; remove or rename one"
    )
