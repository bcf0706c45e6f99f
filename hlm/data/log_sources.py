"""Raw tables as shops have them, opened for DuckDB: files of any of these kinds, globs, and `hf://` addresses.

A text file's encoding and separator are found out from its beginning. What DuckDB cannot read where it lies (another
encoding, an address) is first copied into the folder of work files. Rows are never held in memory here.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

import pyarrow as pa

from hlm.data.log_files import KINDS, READ, File, reachable, suffix_of
from hlm.errors import HlmError

if TYPE_CHECKING:
    import duckdb

logger = logging.getLogger(__name__)

_SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")
_BEGINNING = 1 << 18  # bytes from which a file's form is found out
_SAMPLED = 2000  # lines of JSON from which its columns are found out
_SEPARATORS = ",;\t|"
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# How a file begins that is another than its name says.
_MAGIC = (
    (b"PK\x03\x04", "a spreadsheet or a ZIP archive", "save it as CSV (UTF-8), or unpack it"),
    (b"\xd0\xcf\x11\xe0", "a spreadsheet of old Excel", "save it as CSV (UTF-8)"),
    (b"PAR1", "Parquet", "name it .parquet"),
    (b"\x1f\x8b", "gzip", "name it .gz"),
    (b"<", "HTML or XML", "download or export the table itself, as CSV"),
)


class Part(NamedTuple):
    """A file of a table, as DuckDB reads it."""

    path: str
    kind: str  # csv, json or parquet
    columns: dict[str, tuple[str, ...]]  # name -> keys that lead to it in an object of JSON; else itself
    separator: str = ","
    skip: int = 1  # lines before the first row


class RawTable(NamedTuple):
    """A table in one or more files, every cell a text."""

    what: str  # the setting that named it, such as "log"
    name: str  # for messages
    parts: list[Part]

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for part in self.parts for name in part.columns))

    def select(self, chosen: dict[str, str]) -> str:
        """SQL of the rows: role -> column, as text columns named by their roles."""
        groups: dict[tuple[Any, ...], list[Part]] = {}
        for part in self.parts:
            groups.setdefault((part.kind, tuple(part.columns.items()), part.separator, part.skip), []).append(part)
        return " UNION ALL BY NAME ".join(
            f"SELECT {', '.join(_cell(parts[0], role, column) for role, column in chosen.items())} "
            f"FROM {self._scan(parts)}"
            for parts in groups.values()
        )

    def _scan(self, parts: list[Part]) -> str:
        paths = "[" + ", ".join(quoted(part.path) for part in parts) + "]"
        first = parts[0]
        if first.kind == "parquet":
            return f"read_parquet({paths}, union_by_name=true)"
        if first.kind == "json":
            # The lines between rows that OpenSearch's bulk requests have are no rows.
            return (
                f"(SELECT json FROM read_ndjson_objects({paths}, ignore_errors=true, maximum_object_size=16777216) "
                "WHERE NOT coalesce(json_exists(json, '$.index._index') OR json_exists(json, '$.create._index'), "
                "false))"
            )
        columns = ", ".join(f"{quoted(name)}: 'VARCHAR'" for name in first.columns)
        quotes = "quote='', escape=''" if first.separator == "\t" else "quote='\"', escape='\"'"
        return (
            f"read_csv({paths}, delim={quoted(first.separator)}, {quotes}, header=false, skip={first.skip}, "
            f"auto_detect=false, columns={{{columns}}}, ignore_errors=true, store_rejects=true, strict_mode=true, "
            f"rejects_table='rejects_{self.what}', rejects_scan='scans_{self.what}', nullstr='')"
        )

    def rescued(self, connection: duckdb.DuckDBPyConnection, chosen: dict[str, str]) -> str | None:
        """SQL as `select`, after its scan: the rows that a stray quote had joined to one broken line, and that are
        whole by themselves. None where nothing was broken."""
        texts = [part for part in self.parts if part.kind == "csv"]
        if not _rejects(connection, self.what) or len({(*part.columns, part.separator) for part in texts}) != 1:
            return None
        columns = list(texts[0].columns)
        connection.execute(
            f"CREATE TABLE rescued_{self.what} ({', '.join(f'{named(name)} VARCHAR' for name in columns)})"
        )
        connection.execute(
            f"SELECT DISTINCT line, csv_line FROM rejects_{self.what} WHERE contains(trim(csv_line, chr(10)), chr(10))"
        )
        writer = connection.cursor()
        while joined := connection.fetchmany(1000):
            lines = (line for _, text in joined for line in text.splitlines())
            whole = [row for line in lines if len(row := _whole(line, texts[0])) == len(columns)]
            cells = [pa.array([row[n] for row in whole], pa.string()) for n in range(len(columns))]
            writer.register("whole", pa.table(cells, names=columns))
            writer.execute(f"INSERT INTO rescued_{self.what} SELECT * FROM whole")
            writer.unregister("whole")
        writer.close()
        chosen_cells = ", ".join(_cell(texts[0], role, column) for role, column in chosen.items())
        return f"SELECT {chosen_cells} FROM rescued_{self.what}"

    def unread(self, connection: duckdb.DuckDBPyConnection, read: int) -> int:
        """How many lines of a scan that has run were broken: other cells than the header has, quotes, no UTF-8.

        Args:
            read: how many rows were not.

        Raises:
            HlmError: most were, so that the separator or the quotes must be others.
        """
        if not _rejects(connection, self.what):
            return 0
        found = _number(
            connection,
            "SELECT count(*) + sum(length(text) - length(replace(text, chr(10), ''))) FROM (SELECT DISTINCT line, "
            f"trim(csv_line, chr(10)) AS text FROM rejects_{self.what})",
        )
        if _has(connection, f"rescued_{self.what}"):
            found -= _number(connection, f"SELECT count(*) FROM rescued_{self.what}")
        if found > read:
            raise HlmError(
                f"{self.what}: expected rows of {len(self.columns)} cells ({', '.join(self.columns[:8])}) in "
                f"{self.name}, found {found} lines that are none; pass --separator, or export it with quotes around "
                "cells"
            )
        return found


def _has(connection: duckdb.DuckDBPyConnection, table: str) -> bool:
    return _number(connection, f"SELECT count(*) FROM duckdb_tables() WHERE table_name = '{table}'") > 0


def _rejects(connection: duckdb.DuckDBPyConnection, what: str) -> bool:
    return _has(connection, f"rejects_{what}") and _number(connection, f"SELECT count(*) FROM rejects_{what}") > 0


def _whole(line: str, part: Part) -> list[str]:
    """The cells of a line whose quotes close in it; none of another."""
    return _cells(line, part.separator) if line.count('"') % 2 == 0 else []


def _number(connection: duckdb.DuckDBPyConnection, sql: str) -> int:
    return int(one_row(connection, sql)[0] or 0)


def one_row(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple[Any, ...]:
    """The one row of an aggregate, read to its end: DuckDB streams nothing else meanwhile."""
    (found,) = connection.execute(sql).fetchall()
    return found


def quoted(text: str) -> str:
    """A text of SQL."""
    return "'" + text.replace("'", "''") + "'"


def named(column: str) -> str:
    """A name of SQL."""
    return '"' + column.replace('"', '""') + '"'


def _cell(part: Part, role: str, column: str) -> str:
    if column not in part.columns:
        return f"CAST(NULL AS VARCHAR) AS {named(role)}"
    if part.kind == "json":
        path = "$." + ".".join(f'"{key}"' for key in part.columns[column])
        return f"json_extract_string(json, {quoted(path)}) AS {named(role)}"
    cell = f"CAST({named(column)} AS VARCHAR)"
    if part.separator == "\t":  # many write no quotes there: a cell is unquoted where it is quoted properly
        inner = f"replace({cell}[2:-2], '\"\"', '\"')"
        cell = f'CASE WHEN regexp_full_match({cell}, \'"(?:[^"]|"")*"\') THEN {inner} ELSE {cell} END'
    return f"{cell} AS {named(role)}"


def open_table(
    what: str,
    files: Sequence[File],
    work: Path,
    connection: duckdb.DuckDBPyConnection,
    *,
    encoding: str | None = None,
    separator: str | None = None,
) -> RawTable:
    """Finds out how a table's files are written.

    Args:
        what: the setting that names them, for messages.
        work: a folder for copies.
        encoding, separator: of the text files, where they are not to be found out.

    Raises:
        HlmError: a file that is not read, empty, in another encoding, without rows, or that names a column twice.
    """
    if encoding is not None:
        try:
            codecs.lookup(encoding)
        except LookupError as error:
            raise HlmError(f"encoding: expected one that Python knows, found '{encoding}'; try cp1252") from error
    if separator is not None:
        separator = {"tab": "\t", "\\t": "\t"}.get(separator, separator)
        if len(separator) != 1:
            raise HlmError(f"separator: expected one character or 'tab', found '{separator}'; correct it")
    parts = [_part(what, file, work, connection, encoding, separator) for file in files]
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return RawTable(what, f"{Path(files[0].shown).name}{more}", parts)


def _part(
    what: str,
    file: File,
    work: Path,
    connection: duckdb.DuckDBPyConnection,
    encoding: str | None,
    separator: str | None,
) -> Part:
    path = Path(file.path if file.remote is None else file.shown)
    suffix, packed = suffix_of(path)
    where = f"{what}: {file.shown}"
    if suffix in _SPREADSHEETS:
        raise HlmError(f"{where}: expected a text table, found a spreadsheet ({suffix}); save it as CSV (UTF-8)")
    if suffix not in KINDS or (packed and suffix == ".parquet"):
        raise HlmError(f"{where}: expected one of {READ}, found '{path.name}'; convert or rename it")
    copy = work / f"{what}-{len(list(work.iterdir()))}{suffix}"
    if file.remote is not None:
        path = copy.with_suffix(suffix + (".gz" if packed else ""))
        with reachable(what, file.shown), file.remote as source, open(path, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    try:
        if path.stat().st_size == 0:
            raise HlmError(f"{where}: expected a table, found an empty file; export it again")
        if suffix == ".parquet":
            return _parquet(where, path, connection)
        with _opened(path, packed) as opened:
            beginning = opened.read(_BEGINNING)
    except (OSError, EOFError) as error:
        raise HlmError(f"{where}: expected a file that can be read, found {error}; copy it again") from error
    encoding = encoding or _encoding(where, beginning)
    text = codecs.getincrementaldecoder(encoding)(errors="replace").decode(beginning)
    if encoding not in ("utf-8", "utf-8-sig") or ("\r\n" in text and re.search(r"(?<!\r)\n", text)):
        path = _recoded(where, path, packed, encoding, copy.with_stem(copy.stem + "-utf-8"))
    if not text.strip():
        raise HlmError(f"{where}: expected a table, found blank lines alone; export it again")
    if KINDS[suffix] == "json":
        return Part(str(path), "json", _json_columns(where, text))
    return _csv(where, path, text, separator, suffix)


def _opened(path: Path, packed: bool) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb") if packed else open(path, "rb"))


def _parquet(where: str, path: Path, connection: duckdb.DuckDBPyConnection) -> Part:
    import duckdb

    try:
        rows = connection.execute(f"DESCRIBE SELECT * FROM read_parquet({quoted(str(path))})").fetchall()
    except duckdb.Error as error:
        said = str(error).splitlines()[0]
        raise HlmError(f"{where}: expected Parquet, found what is none ({said}); write it again") from error
    return Part(str(path), "parquet", {str(row[0]): (str(row[0]),) for row in rows})


def _encoding(where: str, beginning: bytes) -> str:
    for mark, name in _MARKS:
        if beginning.startswith(mark):
            return name
    for magic, found, remedy in _MAGIC:
        if beginning.startswith(magic):
            raise HlmError(f"{where}: expected a table of text, found {found}; {remedy}")
    if beginning[1::2].count(0) > len(beginning) // 4:
        return "utf-16-le"
    if beginning[::2].count(0) > len(beginning) // 4:
        return "utf-16-be"
    if b"\0" in beginning:
        raise HlmError(f"{where}: expected a table of text, found NUL bytes; export it again as CSV (UTF-8)")
    try:
        codecs.getincrementaldecoder("utf-8")().decode(beginning)
    except UnicodeDecodeError as error:
        line = beginning[: error.start].count(b"\n") + 1
        raise HlmError(
            f"{where}, line {line}: expected UTF-8, found byte 0x{beginning[error.start]:02x}, as Latin-1 and Windows "
            "have it; pass --encoding cp1252 (or what wrote it), or save the file as UTF-8"
        ) from error
    return "utf-8"


def _recoded(where: str, path: Path, packed: bool, encoding: str, target: Path) -> Path:
    """A copy in UTF-8 whose lines all end in the same way."""
    try:
        with _opened(path, packed) as source, open(target, "w", encoding="utf-8", newline="\n") as sink:
            shutil.copyfileobj(io.TextIOWrapper(source, encoding), sink, 1 << 20)
    except (UnicodeError, OSError, EOFError) as error:
        raise HlmError(f"{where}: expected text in {encoding}, found {error}; name its encoding") from error
    return target


def _csv(where: str, path: Path, text: str, separator: str | None, suffix: str) -> Part:
    lines = text.splitlines()
    skip = 0
    if lines[0].lower().removeprefix("\ufeff").startswith("sep=") and len(lines[0].strip()) == 5:  # Excel's own line
        separator, skip = separator or lines[0].strip()[4], 1
    while skip < len(lines) and not lines[skip].strip():
        skip += 1
    header = lines[skip].removeprefix("\ufeff") if skip < len(lines) else ""
    if separator is None:
        counts = {one: len(_cells(header, one)) for one in _SEPARATORS}
        separator = "\t" if suffix == ".tsv" and counts["\t"] > 1 else max(_SEPARATORS, key=counts.__getitem__)
    names = [cell.strip() for cell in _cells(header, separator)]
    if len(lines) <= skip + 1 or not any(line.strip() for line in lines[skip + 1 :]):
        raise HlmError(f"{where}: expected rows under the header, found none; export it again")
    names = [name or f"column {number}" for number, name in enumerate(names, 1)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise HlmError(f"{where}: expected each column name once, found '{twice[0]}' twice; rename one")
    if len({name.lower() for name in names}) < len(names):  # names of SQL have no case
        raise HlmError(f"{where}: expected names that differ in more than case, found {', '.join(names)}; rename one")
    return Part(str(path), "csv", {name: (name,) for name in names}, separator, skip + 1)


def _cells(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:
        return [line]


def _json_columns(where: str, text: str) -> dict[str, tuple[str, ...]]:
    """The columns of objects, those inside of others with a dot in their names."""
    if text.lstrip().startswith("["):
        raise HlmError(
            f"{where}: expected one JSON object a line, found an array; write one object a line (jq -c '.[]')"
        )
    found: dict[str, tuple[str, ...]] = {}
    read = 0
    for line in text.splitlines()[:_SAMPLED]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        read += isinstance(row, dict)
        for keys in _keys(row) if isinstance(row, dict) and not {"index", "create"} & row.keys() else ():
            found.setdefault(".".join(keys), keys)
    if not read:
        raise HlmError(
            f"{where}: expected one JSON object a line, found '{text.split()[0][:20]}'; write one object a line"
        )
    return found


def _keys(row: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in row.items():
        if isinstance(value, dict) and len(before) < 3:
            yield from _keys(value, (*before, key))
        else:
            yield (*before, key)
