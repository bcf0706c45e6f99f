"""Files of tables, read row by row: JSON Lines, Parquet, TSV and CSV, plain or compressed, here or at an address.

Text stays text: no reader guesses a type, and no word means "missing". A row is a dict; its place is "line 7" (text
files) or "row 7" (Parquet), for messages a user can act on.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from hlm.artefacts import HlmError

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".parquet", ".tsv", ".csv")
TREC = (".txt", ".trec", ".qrels")  # judgements only: query, iteration, document, grade, without a header
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
READ = f"{', '.join(SUFFIXES)}, also with {', '.join(COMPRESSIONS)}"
# What is left of a table whose cells are quoted where they must be, the quotes inside doubled.
_TSV_CELL = re.compile(r'(?:"((?:[^"]++|"")*+)"|([^\t]*+))(?:\t|$)')
_LONGEST_CELL = 1 << 26  # characters; a longer one is a quote that is never closed
# The columns of judgements under the names that other tools write.
_QRELS_COLUMNS = {
    "query-id": ("query-id", "queryid", "qid"),
    "corpus-id": ("corpus-id", "corpusid", "doc-id", "docid", "did", "document-id", "passage-id", "pid", "product-id"),
    "score": ("score", "relevance", "rel", "grade", "label", "relevance-score", "relevance-grade", "relevance-label"),
}
_QRELS_NAMES = {name: column for column, names in _QRELS_COLUMNS.items() for name in names}

Row = dict[str, Any]


def suffix_of(name: str | Path) -> tuple[str, str]:
    """(".jsonl", ".gz") of "corpus.jsonl.gz"; either may be empty. In small letters."""
    name = str(name).partition("?")[0] if "://" in str(name) else name
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return suffixes[-1] if suffixes else "", compression


def is_read(name: str | Path) -> bool:
    """Whether `read_rows` reads a file of that name."""
    kind, compression = suffix_of(name)
    return kind in SUFFIXES and not (kind == ".parquet" and compression)


def not_read(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What disks, fsspec and huggingface_hub raise where a file cannot be read, and `more`."""
    from huggingface_hub.errors import HTTPError

    aiohttp = sys.modules.get("aiohttp")  # fsspec loads it before it can raise its errors
    return (OSError, HTTPError, *([aiohttp.ClientError] if aiohttp else []), *more)


def read_rows(path: str | Path, *, delimiter: str | None = None) -> Iterator[tuple[str, Row]]:
    """Yields (place, row) of a table file; cells of TSV and CSV are text, whatever they look like.

    In CSV a quoted cell may go on over lines. In TSV, which many write without quoting, a cell is unquoted where it is
    quoted properly, and goes on over lines only where those are no rows themselves; any other quote is text.

    Args:
        path: a file, or an address that fsspec opens (hf://datasets/..., https://...).
        delimiter: of CSV and TSV, where the suffix does not tell it.

    Raises:
        HlmError: a format that is not read; a file that cannot be opened or is cut short; broken UTF-8, JSON, quoting
            or Parquet; or a row with more or fewer cells than the header.
    """
    kind, _ = suffix_of(path)
    if not is_read(path):
        raise HlmError(f"{path}: expected one of {READ}, found '{Path(path).name}'; convert the file")
    if kind == ".parquet":
        return _read_parquet(path)
    if kind in (".jsonl", ".json"):
        return _read_jsonl(path)
    delimiter = delimiter or ("\t" if kind == ".tsv" else ",")
    return _read_tsv(path) if delimiter == "\t" else _read_csv(path, delimiter)


def read_qrels(path: str | Path, *, delimiter: str | None = None) -> Iterator[tuple[str, Row]]:
    """As `read_rows`, of judgements: the columns query-id, corpus-id and score under the names that other tools give
    them, and files without a header: query, document, grade, or TREC's query, iteration, document, grade.

    Raises:
        HlmError: as `read_rows`; or neither such columns nor such a file.
    """
    kind, _ = suffix_of(path)
    if kind in (".tsv", ".csv", *TREC):
        first = next((line.strip() for _, line in _read_lines(path) if line.strip()), "")
        separator = "," if kind == ".csv" else "\t" if first.count("\t") in (2, 3) else r"\s+"
        cells = re.split(separator, first)
        if kind in TREC or (len(cells) in (3, 4) and re.fullmatch(r"-?\d+(?:\.\d+)?", cells[-1].strip())):
            return _read_bare_qrels(path, len(cells), separator)
    return ((place, qrels_row(row)) for place, row in read_rows(path, delimiter=delimiter))


def qrels_row(row: Row) -> Row:
    """A judgement with its columns under our names; others are left as they are."""
    if "query-id" in row and "corpus-id" in row and "score" in row:
        return row
    named = {_QRELS_NAMES.get(re.sub(r"[_\s]+", "-", name.strip().lower()), name): cell for name, cell in row.items()}
    return named if len(named) == len(row) else row  # two columns of one meaning: neither is chosen


def _read_bare_qrels(path: str | Path, width: int, separator: str) -> Iterator[tuple[str, Row]]:
    if width not in (3, 4):
        raise HlmError(
            f"{path}: expected TREC judgements (query, iteration, document, grade), found {width} cells in the first "
            "line; write them so, or as TSV with the columns query-id, corpus-id, score"
        )
    for number, line in _read_lines(path):
        cells = re.split(separator, line.strip())
        if cells == [""]:
            continue
        if len(cells) != width:
            raise HlmError(
                f"{path}, line {number}: expected {width} cells as in the first line, found {len(cells)}; correct it"
            )
        yield f"line {number}", {"query-id": cells[0], "corpus-id": cells[-2], "score": cells[-1]}


def _bytes_of(path: str | Path) -> BinaryIO:
    if "://" not in str(path):
        return open(path, "rb")
    import fsspec  # of files that are here nothing is loaded that speaks to a network

    return io.BufferedReader(fsspec.open(str(path), "rb", expand=False).open(), 1 << 20)


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed; what goes wrong while they are read is named."""
    _, compression = suffix_of(path)
    try:
        with _bytes_of(path) as file:
            if compression:
                file = io.BufferedReader(pa.input_stream(file, compression=COMPRESSIONS[compression]), 1 << 20)
            yield file
    except not_read() as error:
        raise HlmError(
            f"{path}: expected a file that can be read to its end, found {type(error).__name__}: {error}; copy or "
            "write it again, or correct its permissions or the connection"
        ) from error


def _read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    with _opened(path) as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark is no part of the first key
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise HlmError(
                    f"{path}, line {number}: expected UTF-8, found byte 0x{raw[error.start]:02x} at position "
                    f"{error.start}{_encoding(raw)}; convert the file to UTF-8"
                ) from error


def _encoding(raw: bytes) -> str:
    return " (the file begins as UTF-16 does)" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else ""


def _read_jsonl(path: str | Path) -> Iterator[tuple[str, Row]]:
    for number, line in _read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            whole = line.lstrip().startswith("[") or line.strip() == "{"
            raise HlmError(
                f"{path}, line {number}: expected one JSON object, found broken JSON ({error}); "
                + ("the object or array goes on over lines: write one object a line" if whole else "correct the line")
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


def _header(path: str | Path, header: list[str]) -> list[str]:
    if len(set(header)) < len(header):
        raise HlmError(f"{path}, line 1: a column name is there twice in {header}; rename one")
    return header


def _read_tsv(path: str | Path) -> Iterator[tuple[str, Row]]:
    header: list[str] | None = None
    for number, cells in _tsv_rows(path):
        if header is None:
            header = _header(path, cells)
        else:
            yield f"line {number}", dict(zip(header, cells, strict=True))


def _tsv_rows(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, cells) of every row, the header first. A quote that opens a cell and does not close
    it in its line is text where the next line is a row of its own; else the cell goes on there."""
    width, first, opened = 0, 0, ""  # `opened`: from line `first` on, what a quote has opened
    for number, line in _read_lines(path):
        line = line.rstrip("\r\n")
        if opened and line.count("\t") + 1 != width:
            opened += "\n" + line
            cells, opens = _tsv_cells(opened, width) if '"' in line else ([], True)
            if not opens and len(cells) == width:
                yield first, cells
                opened = ""
            continue
        if opened:
            yield first, _as_written(path, first, opened, width)
            opened = ""
        if not line:
            continue
        cells, opens = _tsv_cells(line, width)
        width = width or len(cells)
        if opens:
            opened, first = line, number
        elif len(cells) != width:
            raise _other_width(path, number, width, cells)
        else:
            yield number, cells
    if opened:
        yield first, _as_written(path, first, opened, width)


def _as_written(path: str | Path, number: int, opened: str, width: int) -> list[str]:
    cells = opened.rstrip("\n").split("\t")
    if len(cells) != width or "\n" in cells[-1]:
        raise _other_width(path, number, width, cells)
    _warn_of_quotes(path)
    return cells


@functools.cache
def _warn_of_quotes(path: str | Path) -> None:  # once, though a table is read more than once
    logger.warning("%s: quotes that open a cell of TSV and are not closed are text", path)


def _other_width(path: str | Path, number: int, width: int, cells: list[str]) -> HlmError:
    return HlmError(
        f"{path}, line {number}: expected {width} cells as in the header, found {len(cells)}; quote cells that contain "
        "a tab or a line break, and double the quotes inside, or write the table as JSONL"
    )


def _tsv_cells(line: str, width: int) -> tuple[list[str], bool]:
    """The cells of a row, and whether a quote opens one of them that it does not close."""
    written = line.split("\t")
    if '"' not in line:
        return written, False
    cells, position = [], 0
    while True:
        match: Any = _TSV_CELL.match(line, position)  # an empty cell at the least
        cells.append(match[2] if match[1] is None else match[1].replace('""', '"'))
        position = match.end()
        if not match[0].endswith("\t"):
            break
    if len(cells) != width and len(written) == width and "\n" not in line:
        return written, False  # its quotes are text
    return cells, any(cell.startswith('"') and cell in written for cell in cells)


def _kept(lines: Iterator[tuple[int, str]], kept: list[str]) -> Iterator[str]:
    """The lines, each put into `kept` as it passes."""
    for _, line in lines:
        kept.append(line)
        yield line


def _read_csv(path: str | Path, delimiter: str) -> Iterator[tuple[str, Row]]:
    if csv.field_size_limit() < _LONGEST_CELL:  # 131,072 by default, and one limit for the whole process
        csv.field_size_limit(_LONGEST_CELL)
    written: list[str] = []  # the lines of a row
    lines = _kept(_read_lines(path), written)
    # strict: a stray quote is an error, where the lenient reader would swallow every line up to the next one
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    while True:
        written.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise HlmError(
                f"{path}, line {start}: broken quoting ({error}; a quote that is opened here may close nowhere); "
                "double the quotes inside a quoted cell, or write the table as JSONL"
            ) from error
        place, start = f"line {start}", reader.line_num + 1
        if header is None:
            header = _header(path, cells)
        elif cells:
            if len(cells) != len(header):
                raise HlmError(
                    f"{path}, {place}: expected {len(header)} cells ({', '.join(header)}), found {len(cells)}; "
                    "quote cells that contain the separator"
                )
            if len(written) > 1 and all(line.count(delimiter) + 1 == len(header) for line in written):
                _check_joined(path, place, header, written)
            yield place, dict(zip(header, cells, strict=True))


def _check_joined(path: str | Path, place: str, header: list[str], written: list[str]) -> None:
    """A row over lines that could be rows of their own: a text with line breaks, or lines that stray quotes join."""
    if len(header) == 1:
        raise HlmError(
            f"{path}, {place}: expected one row, found a quote that is opened here and closed below "
            f"({len(written)} lines): double stray quotes and quote their cell, or write texts with line breaks as "
            "JSONL"
        )
    _warn_of_joined(path, place)


@functools.cache
def _warn_of_joined(path: str | Path, place: str) -> None:
    logger.warning(
        "%s, %s: a quote joins lines that look like rows; if it is stray, write the table as JSONL", path, place
    )


def _read_parquet(path: str | Path) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with _bytes_of(path) as opened, pq.ParquetFile(opened) as file:
            for batch in file.iter_batches(batch_size=4096):
                for row in _texts(batch).to_pylist():
                    number += 1
                    yield f"row {number}", row
    except UnicodeDecodeError as error:
        raise HlmError(f"{path}, after row {number}: expected UTF-8 ({error}); write the file again") from error
    except not_read(pa.ArrowException) as error:
        raise HlmError(f"{path}, after row {number}: not readable as Parquet ({error}); write it again") from error


def _texts(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Columns of bytes as text, where they are UTF-8."""
    for number, field in enumerate(batch.schema):
        if field.type in (pa.binary(), pa.large_binary(), pa.binary_view()):
            with contextlib.suppress(pa.ArrowInvalid):  # other bytes stay bytes, to be refused where text is needed
                batch = batch.set_column(number, field.name, batch.column(number).cast(pa.string()))
    return batch
