"""From a shop's own files to the data contract: what `hlm prepare` does.

Lines are read, grouped and joined by DuckDB, which keeps to a limit of memory and puts the rest on the disk. Its
database lies inside the unfinished output and goes with it: nothing of the raw log outlives the run.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlm.artefacts import MANIFEST, atomic_folder, claimed, read_manifest, write_manifest
from hlm.data import log_cleaning, log_clicks
from hlm.data.log_catalogue import read_catalogue
from hlm.data.log_columns import Columns, chosen, confirm_columns, given_columns
from hlm.data.log_files import File, find_files
from hlm.data.log_report import write_reports
from hlm.data.log_sources import RawTable, named, open_table, quoted
from hlm.errors import HlmError
from hlm.extras import extras_named
from hlm.log_settings import PrepareLogsConfig
from hlm.machine import cores
from hlm.settings import keywords

if TYPE_CHECKING:
    import duckdb

logger = logging.getLogger(__name__)

Tables = dict[str, tuple[RawTable, Columns]]
TABLES = ("catalogue", "log", "clicks", "judgements")
FEWEST_HOURS = 10  # of a log that is split by time


@keywords(PrepareLogsConfig)
def prepare(config: PrepareLogsConfig, *, ask: Callable[[str], str] | None = None) -> Path:
    """Makes a dataset in the data contract of a catalogue and, as far as they are there, a query log, clicks and
    judgements: `corpus`, `queries`, `qrels/{train,dev,test}`, `unlabelled`, report.html and report.txt.

    Args:
        ask: asks a question and returns the answer, as `input` does; None: columns that are certain by their names
            are taken.

    Returns:
        The folder.

    Raises:
        HlmError: a file or column that cannot be read or is not certain, a setting out of its bounds, or nothing left
            for a split; it says what to do.
    """
    _check(config)
    with claimed(config.output, "dataset") as output:
        files = {what: find_files(what, getattr(config, what)) for what in TABLES if getattr(config, what)}
        inputs = {f"{what}: {Path(file.shown).name}": file.fingerprint() for what in files for file in files[what]}
        if (output / MANIFEST).is_file():
            manifest = read_manifest(output, "dataset")
            if manifest["config"] == asdict(config) and manifest["inputs"] == inputs:
                logger.info("%s is up to date", config.output)
                return output
        with atomic_folder(output, "dataset") as folder:
            work = folder / ".work"
            work.mkdir(mode=0o700)
            with _database(work, config.memory) as connection:
                facts = _make(connection, config, files, folder, work, ask)
            shutil.rmtree(work)
            write_manifest(folder, "dataset", inputs=inputs, config=asdict(config), **facts)
    logger.info("wrote %s: %s", config.output, facts["counts"])
    return output


def _check(config: PrepareLogsConfig) -> None:
    if not config.catalogue:
        raise HlmError("catalogue: expected the file of the ads, found none; name it with --catalogue")
    if not (config.clicks or config.judgements):
        raise HlmError(
            "expected clicks or judgements beside the catalogue, found neither; name them with --clicks or "
            "--judgements, or derive pairs from the catalogue with hlm prepare_catalogue_queries"
        )
    least = {"min_users": 1, "max_characters": 1, "queries_a_day": 1, "repeats": 1, "min_clicks": 1}
    least |= {"dev_queries": 1, "test_queries": 1, "smoothing": 0, "min_expected": 0, "bid_queries": 0}
    for name, lowest in least.items():
        if getattr(config, name) < lowest:
            raise HlmError(f"{name}: expected {lowest} or more, found {getattr(config, name)}; raise it")
    for name in ("dev_share", "test_share"):
        if not 0 < getattr(config, name) < 0.5:
            raise HlmError(f"{name}: expected a share between 0 and 0.5, found {getattr(config, name)}; correct it")


@contextlib.contextmanager
def _database(work: Path, memory: str) -> Iterator[duckdb.DuckDBPyConnection]:
    with extras_named("hlm prepare"):
        import duckdb
        import phonenumbers  # noqa: F401  # now rather than after minutes of reading
    settings: dict[str, Any] = {
        "memory_limit": memory,
        "threads": cores(),
        "temp_directory": str(work / "spilled"),
        "autoinstall_known_extensions": False,  # nothing is downloaded
        "autoload_known_extensions": False,
        "preserve_insertion_order": False,
    }
    try:
        connection = duckdb.connect(str(work / "log.duckdb"), config=settings)
    except duckdb.Error as error:
        raise HlmError(f"memory: expected a size such as 1GB, found '{memory}' ({_line(error)}); correct it") from error
    try:
        yield connection
    except duckdb.OutOfMemoryException as error:
        raise HlmError(
            f"memory: expected {memory} to do, found that it does not ({_line(error)}); raise --memory, and see that "
            "the disk of the output has room"
        ) from error
    except (duckdb.IOException, duckdb.InvalidInputException) as error:
        if "state machine" in str(error):
            raise HlmError(
                "expected files whose lines end in one way, found one with both \\r\\n and \\n; convert it with "
                "dos2unix"
            ) from error
        raise HlmError(
            f"expected files that can be read to their end, found: {_line(error)}; write them again"
        ) from error
    finally:
        connection.close()


def _line(error: Exception) -> str:
    return str(error).splitlines()[0].strip()[:200]


def _make(
    connection: duckdb.DuckDBPyConnection,
    config: PrepareLogsConfig,
    files: dict[str, list[File]],
    folder: Path,
    work: Path,
    ask: Callable[[str], str] | None,
) -> dict[str, Any]:
    """Writes the tables and reports; returns what the manifest says of them."""
    said = given_columns(config.columns)
    tables: Tables = {}
    for what, found in files.items():
        table = open_table(what, found, work, connection, encoding=config.encoding, separator=config.separator)
        tables[what] = (table, chosen(table, said))
    _check_said(said, tables)
    confirm_columns(list(tables.values()), ask, logger.info if ask is None else print)
    dropped: dict[str, Counter] = {what: Counter() for what in TABLES}
    _read(connection, config, tables, dropped)
    judged, clicked = "judgements" in tables, "clicks" in tables
    periods = _periods(connection, config, "click_lines" if clicked else "lines")
    robots, with_users = log_cleaning.count_support(
        connection,
        queries_a_day=config.queries_a_day,
        repeats=config.repeats,
        train_before=periods[0] if periods else None,
        dropped=dropped["log" if "log" in tables else "clicks"],
    )
    facts = None
    if clicked:
        facts = log_clicks.sum_events(connection, periods, dropped["clicks"], config.click_model)
        limits = {name: getattr(config, name) for name in ("min_clicks", "smoothing", "min_expected")}
        log_clicks.grade(connection, facts, **limits)
    dropped["clicks" if clicked else "catalogue"].update(
        log_clicks.make_pairs(connection, config, facts, judged=judged)
    )
    counts = _write(connection, config, folder)
    about: dict[str, Any] = {
        "counts": counts,
        "dropped": {what: {why: n for why, n in dropped[what].items() if n} for what in tables},
        "robots": robots,
        "fewest_users": {"queries": config.min_users, "unlabelled": _fewest(config)} if with_users else None,
        "split": "by time and by query" if facts and facts.times and not judged else "by query",
        "clicks": facts._asdict() if facts else None,
    }
    write_reports(connection, folder, about, {what: (t.name, c) for what, (t, c) in tables.items()}, config)
    return about


def _fewest(config: PrepareLogsConfig) -> int:
    """Users that an unlabelled query must have had."""
    return config.min_users if config.unlabelled_min_users is None else config.unlabelled_min_users


def _read(
    connection: duckdb.DuckDBPyConnection, config: PrepareLogsConfig, tables: Tables, dropped: dict[str, Counter]
) -> None:
    """Fills the tables of the catalogue, lines, clicks and judgements, and those of texts and spellings."""
    known = read_catalogue(connection, *tables["catalogue"], config.keep, dropped["catalogue"])
    texts = ["SELECT query FROM bids"]
    if "log" in tables:
        log_cleaning.read_lines(connection, *tables["log"], config.day_first, dropped["log"])
    if "clicks" in tables:
        log_clicks.read_clicks(connection, *tables["clicks"], config.day_first, tables.get("log"), dropped["clicks"])
        texts.append("SELECT query FROM click_lines")
        if "log" not in tables:
            connection.execute(
                "CREATE TABLE lines AS SELECT query, user, hour, sum(greatest(clicks, conversions))::DOUBLE AS n "
                "FROM click_lines GROUP BY ALL HAVING n > 0"
            )
    elif "log" not in tables:  # judgements alone
        connection.execute("CREATE TABLE lines (query VARCHAR, user UBIGINT, hour INTEGER, n DOUBLE)")
    if "judgements" in tables:
        log_clicks.read_judgements(connection, *tables["judgements"], dropped["judgements"])
        texts.append("SELECT query FROM judged")
    log_cleaning.clean_texts(connection, ["SELECT query FROM lines", *texts], known, config.max_characters)
    log_cleaning.commonest_spellings(
        connection, ["SELECT query, n FROM lines", *(f"SELECT query, 0 AS n FROM ({select})" for select in texts)]
    )


def _check_said(said: dict[str, dict[str, str]], tables: Tables) -> None:
    """Refuses columns of `columns` that no table has."""
    for place, roles in said.items():
        for role, column in roles.items():
            if place and place not in tables:
                raise HlmError(f"columns: expected tables that are read, found '{place}.{role}'; give --{place}")
            if not place and not any(columns.get(role) == column for _, columns in tables.values()):
                found = ", ".join(name for table, _ in tables.values() for name in table.columns)
                raise HlmError(f"columns: expected '{column}' in one of the tables, found {found}; correct it")


def _periods(connection: duckdb.DuckDBPyConnection, config: PrepareLogsConfig, name: str) -> tuple[int, int] | None:
    """The hours at which dev and test begin; None where the split is by query alone."""
    if not config.by_time:
        return None
    n = "n" if name == "lines" else "1"
    hours = connection.execute(
        f"SELECT hour, sum({n}) FROM {name} WHERE hour IS NOT NULL GROUP BY hour ORDER BY hour"
    ).fetchall()
    if len(hours) < FEWEST_HOURS:
        return None
    total, found = sum(n for _, n in hours), []
    for share in (1 - config.test_share - config.dev_share, 1 - config.test_share):
        before = 0.0
        for at, n in hours:
            before += n
            if before >= share * total:
                found.append(at + 1)
                break
    return found[0], found[1]


def _write(connection: duckdb.DuckDBPyConnection, config: PrepareLogsConfig, folder: Path) -> dict[str, int]:
    """Writes the tables of the contract; returns how many rows each has."""
    connection.execute("SET threads = 1")  # rows are written in their order, without being held for it
    fewest = _fewest(config)
    # One join or sort a statement: each may take all of the memory.
    connection.execute(
        "CREATE TABLE ranked AS SELECT key, count, past, users, (sum(count) OVER (ORDER BY count DESC, key) - count) "
        f"/ sum(count) OVER () AS before FROM support WHERE users >= {min(fewest, config.min_users)}"
    )
    connection.execute(
        "CREATE TABLE bands AS SELECT key, text, count, past, users, CASE WHEN before < 1 / 3 THEN 'head' "
        "WHEN before < 2 / 3 THEN 'torso' ELSE 'tail' END AS band FROM ranked JOIN spellings USING (key)"
    )
    ad = [row[0] for row in connection.execute("DESCRIBE ads").fetchall() if row[0] != "_place"]
    query_id = "'q' || md5(key)[:16]"
    selects = {
        "corpus": f"SELECT {', '.join(map(named, ad))} FROM ads ORDER BY _place",
        "queries": f"SELECT {query_id} AS _id, spellings.text, CAST(round(coalesce(count, 0)) AS BIGINT) AS count, "
        "coalesce(band, 'tail') AS kind, split FROM (SELECT DISTINCT key, split FROM qrels) JOIN spellings USING (key) "
        "LEFT JOIN bands USING (key) ORDER BY split, key",
        "unlabelled": "SELECT text, CAST(round(past) AS BIGINT) AS count, band AS kind FROM bands WHERE users >= "
        f"{fewest} AND past >= 0.5 AND key NOT IN (SELECT key FROM qrels WHERE split != 'train') "
        "ORDER BY past DESC, key",
    }
    for split in ("train", "dev", "test"):
        selects[f"qrels/{split}"] = (
            f'SELECT {query_id} AS "query-id", doc AS "corpus-id", grade AS score FROM qrels WHERE split = '
            f"'{split}' ORDER BY key, grade DESC, doc"
        )
    (folder / "qrels").mkdir()
    counts = {}
    for name, select in selects.items():
        path = folder / f"{name}.parquet"
        written = connection.execute(f"COPY ({select}) TO {quoted(str(path))} (FORMAT parquet)").fetchone()
        counts[name] = int(written[0]) if written else 0
        if not counts[name]:
            path.unlink()
    empty = [name for name in ("qrels/train", "qrels/dev", "qrels/test") if not counts[name]]
    if empty:
        found = ", ".join(f"{counts[f'qrels/{split}']} for {split}" for split in ("train", "dev", "test"))
        raise HlmError(
            f"expected pairs for train, dev and test, found {found}; lower --min_users ({config.min_users}) or "
            f"--min_clicks ({config.min_clicks}), pass --by_time false, or give more of the log and clicks"
        )
    return counts
