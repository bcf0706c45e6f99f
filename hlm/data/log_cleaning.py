"""A query log, cleaned: every distinct text once in Python, everything about lines and users by DuckDB.

Tables in the database of work: `lines` (query, user, hour, n) as read, `texts` (query, key, shown, reason) of every
distinct text, `robots` (user), `support` (key, count, users) of what is left.
"""

from __future__ import annotations

import html
import itertools
import logging
import re
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pyarrow as pa

from hlm.data.log_columns import Columns
from hlm.data.log_sources import RawTable, one_row, quoted
from hlm.data.personal import ProductNumbers, personal
from hlm.data.words import fold
from hlm.errors import HlmError
from hlm.progress import progress

if TYPE_CHECKING:
    import duckdb

logger = logging.getLogger(__name__)

EMPTY, LONG, BROKEN = "without a letter or digit", "over-long", "broken characters"
_ESCAPED = re.compile(r"%[0-9a-fA-F]{2}")
_ROBOTS = "bot|crawl|spider|slurp|curl/|wget|python-|headless|scrapy"
_SHOWN = re.compile(r"[^\W_]")
_BATCH = 50_000
LINES_A_PART = 5_000_000  # of the log, for what is grouped at once within the default 1 GB
_SLASHES = r"^\s*(\d{1,2})[./-](\d{1,2})[./-]\d{4}"  # day and month, in either order


def clean(text: str, known: ProductNumbers | None, longest: int) -> tuple[str, str, str | None]:
    """(key, the text as it is shown, why it is left out or None) of a query.

    The text is NFKC, on one line, without invisible characters, entities and %-escapes. The key is the same for texts
    that differ in case, spaces, or punctuation around them.
    """
    if "%" in text and _ESCAPED.search(text):
        for _ in range(2):  # what an application escaped is escaped again in an address
            unescaped = unquote(text, errors="replace")
            text = text if "\ufffd" in unescaped else unescaped.replace("+", " ") if " " not in text else unescaped
    if "&" in text:
        text = html.unescape(text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    if not text.isprintable():
        text = "".join(
            " " if unicodedata.category(character) == "Cc" else character
            for character in text
            if character in "\u200c\u200d" or unicodedata.category(character) not in ("Cf", "Cs", "Co", "Cn")
        )
    shown = " ".join(text.split())
    key = " ".join(fold(shown).split()).strip(" \"'`.,;:!?")
    if not key or not _SHOWN.search(key):
        return "", "", EMPTY
    if len(shown) > longest:
        return "", "", LONG
    if "\ufffd" in shown:
        return "", "", BROKEN
    # What belongs to a person gets neither key nor text: nothing that is written could show it.
    return ("", "", reason) if (reason := personal(shown, known)) else (key, shown, None)


def number(column: str) -> str:
    """SQL of a text as a number: 12, 1.5, 1,234 (a thousand), true; NULL where it is none."""
    plain = f"trim({column})"
    return (
        f"CASE WHEN regexp_full_match({plain}, '\\d{{1,3}}([.,]\\d{{3}})+') "
        f"THEN CAST(regexp_replace({plain}, '[.,]', '', 'g') AS DOUBLE) "
        f"WHEN lower({plain}) IN ('true', 'yes', 't', 'y') THEN 1 "
        f"WHEN lower({plain}) IN ('false', 'no', 'f', 'n', '') THEN 0 "
        f"ELSE try_cast(replace({plain}, ',', '.') AS DOUBLE) END"
    )


def hour(column: str, day_first: bool) -> str:
    """SQL of a time as hours since 1970: ISO 8601, seconds or milliseconds since then, or day, month and year."""
    order = "%d{0}%m{0}%Y" if day_first else "%m{0}%d{0}%Y"
    forms = [order.format(sign) + time for sign in "./-" for time in ("", " %H:%M", " %H:%M:%S", ", %H:%M:%S")]
    forms += ["%Y%m%d", "%d/%b/%Y:%H:%M:%S %z", "%d %b %Y", "%b %d, %Y"]
    seconds = f"try_cast({column} AS DOUBLE)"
    return (
        f"CAST(floor(CASE WHEN {seconds} > 1e14 THEN {seconds} / 1e6 WHEN {seconds} > 1e11 THEN {seconds} / 1e3 "
        f"WHEN {seconds} > 1e9 OR {seconds} BETWEEN 1e8 AND 1e9 THEN {seconds} "
        f"ELSE epoch(coalesce(try_cast({column} AS TIMESTAMP), "
        f"CAST(try_strptime({column}, {forms!r}) AS TIMESTAMP))) END / 3600) AS INTEGER)"
    )


def hours_of(connection: duckdb.DuckDBPyConnection, table: RawTable, columns: Columns, day_first: bool | None) -> str:
    """SQL of the hour of a row; NULL where the table has no times.

    Args:
        day_first: of dates such as 3/4/2024; None: as the table's other dates tell.

    Raises:
        HlmError: nothing tells which of both it is, dates of both orders are there, or what is there are no times.
    """
    if "time" not in columns:
        return "NULL"
    select = table.select({"time": columns["time"]})
    found = hour(
        "time", _reads_day_first(connection, table, columns["time"], select) if day_first is None else day_first
    )
    times, read = one_row(
        connection,
        f"SELECT count(*), count({found}) FROM (SELECT time FROM ({select}) WHERE time IS NOT NULL LIMIT {_BATCH})",
    )
    if read * 2 < times:
        raise HlmError(
            f"{table.what}: expected times in '{columns['time']}', found other text in {times - read} of {times} rows; "
            "write them as 2024-12-31 23:59:59, or name another column with --columns "
            f"{table.what}.time=COLUMN"
        )
    return found


def _reads_day_first(connection: duckdb.DuckDBPyConnection, table: RawTable, column: str, select: str) -> bool:
    parts = ", ".join(f"max(try_cast(regexp_extract(time, '{_SLASHES}', {n}) AS INTEGER))" for n in (1, 2))
    dotted = "bool_and(regexp_matches(time, '^\\s*\\d{1,2}\\.'))"
    first, second, by_dots = one_row(
        connection, f"SELECT {parts}, {dotted} FROM ({select}) WHERE regexp_matches(time, '{_SLASHES}')"
    )
    if first is None or by_dots:
        return True
    if first > 12 and second > 12:
        raise HlmError(
            f"{table.what}: expected dates of one order in '{column}', found days in the first place and in "
            "the second; write them as 2024-12-31"
        )
    if first <= 12 and second <= 12:
        raise HlmError(
            f"{table.what}: expected dates that tell day from month in '{column}', found none above 12; pass "
            "--day_first true or false"
        )
    return first > 12


def read_lines(
    connection: duckdb.DuckDBPyConnection, table: RawTable, columns: Columns, day_first: bool | None, dropped: Counter
) -> None:
    """Fills `lines` from the log; users are kept as hashes. `dropped` gets what is no line of a person."""
    read = {role: column for role, column in columns.items() if role != "query_id"}
    time = hours_of(connection, table, columns, day_first)
    n = number("count") if "count" in columns else "1::DOUBLE"
    agent = f"coalesce(regexp_matches(lower(agent), '{_ROBOTS}'), false)" if "agent" in columns else "false"
    action = _is_search(connection, table, columns)

    def lines(source: str) -> str:
        return (
            f"SELECT query, {user_of(columns)} AS user, CAST({time} AS INTEGER) AS hour, {agent} AS robot, "
            f"{n} AS n FROM ({source}) WHERE {action}"
        )

    connection.execute(f"CREATE TABLE all_lines AS {lines(table.select(read))}")
    if rescued := table.rescued(connection, read):
        connection.execute(f"INSERT INTO all_lines {lines(rescued)}")
    rows, bare, bad, robots = one_row(
        connection,
        "SELECT count(*), count(*) FILTER (query IS NULL), count(*) FILTER (n IS NULL OR n <= 0), sum(n) FILTER "
        "(robot) FROM all_lines",
    )
    dropped["lines that cannot be read"] += table.unread(connection, rows or 0)
    if not rows:
        raise HlmError(f"{table.what}: expected rows in {table.name}, found none that can be read; export it again")
    if (bad or 0) * 2 > rows:
        raise HlmError(
            f"{table.what}: expected numbers in '{columns['count']}', found other text in {bad} of {rows} rows; "
            "correct it, or name another column with --columns log.count=COLUMN"
        )
    dropped.update(
        {"empty": int(bare or 0), "without a count": int(bad or 0), "agents that are robots": int(robots or 0)}
    )
    connection.execute(
        "CREATE TABLE lines AS SELECT query, user, hour, n FROM all_lines WHERE query IS NOT NULL AND n > 0 AND NOT "
        "robot"
    )
    connection.execute("DROP TABLE all_lines")


def user_of(columns: Columns) -> str:
    """SQL of a user as a hash; NULL for those that are not known."""
    unknown = ", ".join(map(quoted, ("", "-", "0", "null", "none", "nan", "undefined", "anonymous", "(not set)")))
    known = f"user IS NOT NULL AND lower(trim(user)) NOT IN ({unknown})"
    return f"CASE WHEN {known} THEN hash(user) END" if "user" in columns else "NULL::UBIGINT"


def _is_search(connection: duckdb.DuckDBPyConnection, table: RawTable, columns: Columns) -> str:
    """SQL of what rows of the log are searches: those without an action, as in UBI's queries, else the searches."""
    if "action" not in columns:
        return "true"
    select = table.select({"action": columns["action"]})
    without = one_row(connection, f"SELECT count(*) FILTER (action IS NULL) FROM ({select})")[0]
    return "action IS NULL" if without else "lower(action) IN ('search', 'on_search', 'query')"


def shares(connection: duckdb.DuckDBPyConnection, column: str) -> list[str]:
    """Conditions of SQL that divide the values of a column into parts, each small enough to be grouped in memory.

    DuckDB puts what it groups on the disk, but needs some memory for each part of it: 100 million groups do not go
    through 1 GB at once.
    """
    parts = 1 + one_row(connection, "SELECT count(*) FROM lines")[0] // LINES_A_PART
    return [f"hash({column}) % {parts} = {part}" for part in range(parts)] if parts > 1 else ["true"]


def _fill(connection: duckdb.DuckDBPyConnection, table: str, selects: list[str]) -> None:
    """One table of several selects, one after the other."""
    for place, select in enumerate(selects):
        connection.execute(f"{f'INSERT INTO {table}' if place else f'CREATE TABLE {table} AS'} {select}")


def clean_texts(connection: duckdb.DuckDBPyConnection, sources: list[str], known: ProductNumbers, longest: int) -> None:
    """Fills `texts` with every distinct text of these selects (one column `query` each)."""
    connection.execute("CREATE TABLE texts (query VARCHAR, key VARCHAR, shown VARCHAR, reason VARCHAR)")
    writer = connection.cursor()
    union = " UNION ALL ".join(f"SELECT query FROM ({source})" for source in sources)
    distinct = f"SELECT DISTINCT query FROM ({union}) WHERE query IS NOT NULL AND "
    with progress(what="clean the queries", unit="text") as bar:
        batches = (connection.sql(distinct + share).to_arrow_reader(_BATCH) for share in shares(connection, "query"))
        for batch in itertools.chain.from_iterable(batches):
            queries = batch.column(0).to_pylist()
            columns = list(zip(*(clean(query, known, longest) for query in queries), strict=True))
            made = pa.table(
                [batch.column(0), *(pa.array(column, pa.string()) for column in columns)],
                names=["query", "key", "shown", "reason"],
            )
            writer.register("cleaned", made)
            writer.execute("INSERT INTO texts SELECT * FROM cleaned")
            writer.unregister("cleaned")
            bar.update(len(queries))
    writer.close()


def count_support(
    connection: duckdb.DuckDBPyConnection,
    *,
    queries_a_day: int,
    repeats: int,
    train_before: int | None,
    dropped: Counter,
) -> tuple[int, bool]:
    """Fills `robots` and `support`; returns how many users were left out as robots, and whether the log has users.

    Args:
        queries_a_day: a user with more lines on one day is a robot (of a log without times, with more in all).
        repeats: how often one user counts for one query.
        train_before: the hour before which `past` is counted; None: always.
        dropped: gets the lines that were left out, by reason.
    """
    days = "SELECT user, hour // 24 AS day, sum(n) AS n FROM lines WHERE user IS NOT NULL AND {} GROUP BY ALL"
    robots_of = f"SELECT DISTINCT user FROM ({days}) WHERE n > {queries_a_day}"
    _fill(connection, "robots", [robots_of.format(share) for share in shares(connection, "user")])
    for reason, n in connection.execute(
        "SELECT reason, sum(n) FROM lines JOIN texts USING (query) WHERE reason IS NOT NULL GROUP BY ALL"
    ).fetchall():
        dropped[reason] += int(n)
    users = one_row(connection, "SELECT count(user) FROM lines")[0]  # of a log without any the count stands in
    past = "true" if train_before is None else f"coalesce(hour < {train_before}, true)"
    people = (
        f"SELECT key, user, sum(n) AS n, coalesce(sum(n) FILTER ({past}), 0) AS past FROM lines JOIN texts USING "
        "(query) WHERE {} AND reason IS NULL AND (user IS NULL OR user NOT IN (SELECT user FROM robots)) GROUP BY ALL"
    )
    count, before = (
        f"sum(CASE WHEN user IS NULL THEN {name} ELSE least({name}, {repeats}) END)" for name in ("n", "past")
    )
    support = (
        f"SELECT key, {count} AS count, {before} AS past, sum(n) AS lines, "
        f"{'count(user)' if users else 'sum(n)'} AS users FROM ({people}) GROUP BY key"
    )
    _fill(connection, "support", [support.format(share) for share in shares(connection, "key")])
    connection.execute("CREATE TABLE of_robots AS SELECT query, user, n FROM lines SEMI JOIN robots USING (user)")
    robots, of_robots = one_row(
        connection,
        "SELECT count(DISTINCT user), sum(n) FROM of_robots JOIN texts USING (query) WHERE reason IS NULL",
    )
    repeated = one_row(connection, "SELECT sum(lines - count) FROM support")[0]
    dropped.update({"users that are robots": int(of_robots or 0), "repeats of one user": int(repeated or 0)})
    return int(robots or 0), bool(users)


def commonest_spellings(connection: duckdb.DuckDBPyConnection, sources: list[str]) -> None:
    """Fills `spellings` (key, text): of each key the spelling that most lines have, of several the last in order.

    Args:
        sources: selects of `query` and `n`.
    """
    union = " UNION ALL ".join(f"SELECT query, n FROM ({source})" for source in sources)
    counted = (
        f"SELECT key, shown, sum(n) AS n FROM ({union}) JOIN texts USING (query) WHERE {{}} AND reason IS NULL "
        "GROUP BY ALL"
    )
    # By a sort, which goes to the disk where it must; the state of max() over texts would have to stay in memory.
    chosen = (
        f"SELECT key, shown AS text FROM ({counted}) "
        "QUALIFY row_number() OVER (PARTITION BY key ORDER BY n DESC, shown DESC) = 1"
    )
    _fill(connection, "spellings", [chosen.format(share) for share in shares(connection, "key")])
