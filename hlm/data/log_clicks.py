"""Clicks as graded pairs, by clicks over expected clicks (COEC), and the splits.

COEC divides the clicks of a pair by what its impressions would have got at their positions on average (Zhang and Jones,
"Comparing click logs and editorial labels for training query rewriting", 2007). Both are smoothed by the same number of
clicks, which draws rare pairs to 1.

Tables in the database of work: `events` (key, doc, period, clicks, impressions, expected, conversions), `graded` (key,
doc, period, grade), `split_of` (key, split), `qrels` (key, doc, grade, split).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from hlm.data.bid_matches import match_bids
from hlm.data.click_model import examine
from hlm.data.log_catalogue import WHOLE
from hlm.data.log_cleaning import hours_of, number, user_of
from hlm.data.log_columns import Columns
from hlm.data.log_sources import RawTable, one_row
from hlm.errors import HlmError

if TYPE_CHECKING:
    import duckdb

CLICKED = "^(item_|product_|result_|ad_)?click(s|ed)?$|^select_item$"
SHOWN = "^(item_|product_|result_|ad_)?(impressions?|shown)$|^view_item_list$"
BOUGHT = "^(purchased?|conversion|converted|order(ed)?|buy|bought|add_to_cart|cart)$"
GRADES = {"exact": 3, "substitute": 2, "complement": 1, "irrelevant": 0}
GRADES |= {"e": 3, "s": 2, "c": 1, "i": 0, "perfect": 3, "excellent": 3, "good": 2, "fair": 1, "bad": 0}
POSITIONS = 50  # further down all positions are one
LOWEST = {3: 2.0, 2: 1.0, 1: 0.5}  # grade -> the lowest COEC; with conversions 3 is theirs alone
SHARES = {3: 0.5, 2: 0.2}  # without impressions: grade -> the lowest share of the clicks of a query's best ad


class Facts(NamedTuple):
    """What the clicks can tell."""

    impressions: bool
    positions: bool
    conversions: bool
    times: bool


def read_clicks(
    connection: duckdb.DuckDBPyConnection,
    table: RawTable,
    columns: Columns,
    day_first: bool | None,
    log: tuple[RawTable, Columns] | None,
    dropped: Counter,
) -> None:
    """Fills `click_lines` (query, doc, user, hour, position, clicks, impressions, conversions)."""
    time = hours_of(connection, table, columns, day_first)
    clicks, shown, bought = _counts(connection, table, columns)
    user = user_of(columns)
    position = f"least(CAST({number('position')} AS INTEGER), {POSITIONS})" if "position" in columns else "NULL"
    # What one user does within an hour counts once.
    once = [
        f"CASE WHEN user IS NULL THEN {what} ELSE least({what}, 1) END AS {what}"
        for what in ("clicks", "impressions", "conversions")
    ]

    def grouped(select: str) -> str:
        return (
            f"SELECT query, doc, user, hour, position, {', '.join(once)} FROM ("
            f"SELECT query, {WHOLE.format('_id')} AS doc, {user} AS user, CAST({time} AS INTEGER) AS hour, "
            f"CAST({position} AS INTEGER) AS position, sum({clicks}) AS clicks, sum({shown}) AS impressions, "
            f"sum({bought}) AS conversions FROM {_with_queries(connection, table, columns, log, select)} "
            "WHERE query IS NOT NULL AND _id IS NOT NULL GROUP BY ALL) "
            "WHERE clicks > 0 OR impressions > 0 OR conversions > 0"
        )

    connection.execute(f"CREATE TABLE click_lines AS {grouped(table.select(columns))}")
    if rescued := table.rescued(connection, columns):
        connection.execute(f"INSERT INTO click_lines {grouped(rescued)}")
    rows = one_row(connection, "SELECT count(*) FROM click_lines")[0]
    dropped["lines that cannot be read"] += table.unread(connection, rows)
    if not rows:
        raise HlmError(
            f"clicks: expected rows with a query, an ad and a click in {table.name}, found none; correct the columns "
            "with --columns clicks.ROLE=COLUMN"
        )
    _check_ids(connection, table, columns)


def _with_queries(
    connection: duckdb.DuckDBPyConnection,
    table: RawTable,
    columns: Columns,
    log: tuple[RawTable, Columns] | None,
    select: str,
) -> str:
    """SQL of the rows with their queries. Events of UBI may name them by the id alone that they have in the log."""
    source = f"({select})"
    named_by_id = "query_id" in columns and log is not None and "query_id" in log[1]
    if "query" not in columns and not named_by_id:
        raise HlmError(
            "clicks: expected the column query, or query_id here and in the log, found "
            f"{', '.join(table.columns)}; give "
            "the log that has the ids with --log"
        )
    if "query" in columns:
        bare = f"SELECT count(*) FROM {source} WHERE query IS NULL AND query_id IS NOT NULL"
        if not named_by_id or not one_row(connection, bare)[0]:
            return source
    assert log is not None
    ids = log[0].select({"query_id": log[1]["query_id"], "query": log[1]["query"]})
    query = "coalesce(events.query, queries.query)" if "query" in columns else "queries.query"
    rest = "events.* EXCLUDE (query)" if "query" in columns else "events.*"
    return (
        f"(SELECT {rest}, {query} AS query FROM {source} events LEFT JOIN (SELECT query_id, min(query) AS query "
        f"FROM ({ids}) WHERE query IS NOT NULL GROUP BY query_id) queries USING (query_id))"
    )


def _counts(connection: duckdb.DuckDBPyConnection, table: RawTable, columns: Columns) -> tuple[str, str, str]:
    """SQL of the clicks, impressions and conversions of a row."""
    if "action" in columns and "clicks" not in columns:
        clicks, shown, bought = (
            f"CAST(coalesce(regexp_matches(lower(action), '{form}'), false) AS INTEGER)"
            for form in (CLICKED, SHOWN, BOUGHT)
        )
        return clicks, shown, bought
    clicks = f"coalesce({number('clicks')}, 0)" if "clicks" in columns else "0" if "impressions" in columns else "1"
    shown = f"coalesce({number('impressions')}, 0)" if "impressions" in columns else "0"
    if "clicks" in columns and "impressions" not in columns:
        select = table.select({"clicks": columns["clicks"]})
        if one_row(connection, f"SELECT count(*) FILTER ({number('clicks')} = 0) FROM ({select})")[0]:
            shown = "1"  # rows without a click: each row is an impression
    return clicks, shown, f"coalesce({number('conversions')}, 0)" if "conversions" in columns else "0"


def _check_ids(connection: duckdb.DuckDBPyConnection, table: RawTable, columns: Columns) -> None:
    lost, of, example = one_row(
        connection,
        "SELECT count(*) FILTER (ads._id IS NULL), count(*), min(doc) FILTER (ads._id IS NULL) "
        "FROM click_lines LEFT JOIN ads ON doc = ads._id",
    )
    if lost == of:
        alike = connection.execute(
            "SELECT min(_id) FROM ads, (SELECT DISTINCT doc FROM click_lines LIMIT 1000) "
            "WHERE ltrim(lower(_id), '0') = ltrim(lower(doc), '0')"
        ).fetchone()
        first = one_row(connection, "SELECT min(_id) FROM ads")[0]
        hint = f"the catalogue writes it '{alike[0]}'" if alike and alike[0] else f"the catalogue's are like '{first}'"
        raise HlmError(
            f"{table.what}: expected ids of the catalogue in '{columns['_id']}', found '{example}' and the like "
            f"({hint}); name the right column with --columns {table.what}._id=COLUMN, or export ids as text"
        )


def sum_events(
    connection: duckdb.DuckDBPyConnection, periods: tuple[int, int] | None, dropped: Counter, model: str = "coec"
) -> Facts:
    """Fills `events`: the clicks of people, by pair and period ("train", "dev", "test"; without times one, "all").

    Args:
        model: what clicks an impression is expected to get at its position: "coec", the mean there; "pbm", that of an
            ad of mean attraction (`hlm.data.click_model`).
    """
    period = "'all'"
    if periods is not None:
        period = f"CASE WHEN hour >= {periods[1]} THEN 'test' WHEN hour >= {periods[0]} THEN 'dev' ELSE 'train' END"
    joined = (
        f"SELECT key, doc, {period} AS period, coalesce(position, 0) AS position, clicks, impressions, conversions "
        "FROM click_lines JOIN texts USING (query) WHERE reason IS NULL AND doc IN (SELECT _id FROM ads) "
        "AND (user IS NULL OR user NOT IN (SELECT user FROM robots))"
    )
    rates = "SELECT position, sum(clicks) / sum(impressions) AS rate FROM rows WHERE impressions > 0 GROUP BY ALL"
    rates = f", rates AS ({rates})"
    if model == "pbm":
        examine(connection, joined)  # fills a table of that name
        rates = ""
    connection.execute(
        f"CREATE TABLE events AS WITH rows AS ({joined}){rates} SELECT key, doc, period, sum(clicks) AS clicks, "
        "sum(impressions) AS impressions, round(sum(impressions * coalesce(rate, 0)), 6) AS expected, "
        "sum(conversions) AS conversions FROM rows LEFT JOIN rates USING (position) GROUP BY ALL"
    )
    impressions, conversions = one_row(connection, "SELECT coalesce(sum(impressions), 0), sum(conversions) FROM events")
    positions = one_row(connection, "SELECT count(position) FROM click_lines")[0]
    of_ads, of_texts = one_row(
        connection,
        "SELECT count(*) FILTER (doc NOT IN (SELECT _id FROM ads)), count(*) FILTER (reason IS NOT NULL) "
        "FROM click_lines JOIN texts USING (query)",
    )
    dropped.update({"of ads that are not in the catalogue": of_ads, "of queries that were left out": of_texts})
    return Facts(impressions > 0, bool(positions) and impressions > 0, (conversions or 0) > 0, periods is not None)


def grade(
    connection: duckdb.DuckDBPyConnection, facts: Facts, *, min_clicks: int, smoothing: float, min_expected: float
) -> None:
    """Fills `graded`.

    Args:
        min_clicks: fewer make no pair, unless there is a conversion.
        smoothing: clicks that are added to those found and to those expected.
        min_expected: an ad that was shown so often that so many clicks were to be expected, and got none, is a 0.
    """
    top = "WHEN conversions > 0 THEN 3 "
    if facts.impressions:
        ratio = f"(clicks + {smoothing}) / (expected + {smoothing})"
        steps = {2: LOWEST[2], 1: LOWEST[1]} if facts.conversions else LOWEST
        cases = " ".join(f"WHEN {ratio} >= {lowest} THEN {value}" for value, lowest in steps.items())
        rule = (
            f"{top}WHEN clicks >= {min_clicks} THEN CASE {cases} ELSE 0 END WHEN clicks = 0 AND expected >= "
            f"{min_expected} THEN 0"
        )
    else:
        share = "clicks / max(clicks) OVER (PARTITION BY key, period)"
        best = 2 if facts.conversions else 3
        cases = " ".join(f"WHEN {share} >= {lowest} THEN {min(value, best)}" for value, lowest in SHARES.items())
        rule = f"{top}WHEN clicks >= {min_clicks} THEN CASE {cases} ELSE 1 END"
    connection.execute(
        f"CREATE TABLE graded AS SELECT * FROM (SELECT key, doc, period, CASE {rule} END AS grade FROM events) "
        "WHERE grade IS NOT NULL"
    )


def read_judgements(connection: duckdb.DuckDBPyConnection, table: RawTable, columns: Columns, dropped: Counter) -> None:
    """Fills `judged` (query, doc, grade).

    Raises:
        HlmError: a grade that is none of 0 to 3.
    """
    names = " ".join(f"WHEN '{name}' THEN {value}" for name, value in GRADES.items())
    value = f"coalesce(CASE lower(trim(grade)) {names} END, try_cast(replace(trim(grade), ',', '.') AS DOUBLE))"
    connection.execute(
        f"CREATE TABLE judged_lines AS SELECT query, {WHOLE.format('_id')} AS doc, grade AS said, {value} AS grade "
        f"FROM ({table.select(columns)}) WHERE query IS NOT NULL AND _id IS NOT NULL"
    )
    rows = one_row(connection, "SELECT count(*) FROM judged_lines")[0]
    dropped["lines that cannot be read"] += table.unread(connection, rows)
    wrong = connection.execute(
        "SELECT coalesce(said, '') FROM judged_lines WHERE grade IS NULL OR grade NOT IN (0, 1, 2, 3) ORDER BY ALL "
        "LIMIT 1"
    ).fetchone()
    if wrong:
        raise HlmError(
            f"judgements: expected grades of 0, 1, 2 and 3 in '{columns['grade']}', found '{wrong[0]}'; rescale them"
        )
    connection.execute("CREATE TABLE judged AS SELECT query, doc, max(grade) AS grade FROM judged_lines GROUP BY ALL")
    if not one_row(connection, "SELECT count(*) FROM judged WHERE doc IN (SELECT _id FROM ads)")[0]:
        raise HlmError(
            f"judgements: expected ids of the catalogue in '{columns['_id']}', found none of them; name the right "
            "column with --columns judgements._id=COLUMN"
        )


def make_pairs(
    connection: duckdb.DuckDBPyConnection, config: Any, facts: Facts | None, *, judged: bool
) -> dict[str, int]:
    """Fills `split_of` and `qrels` from `graded`, `judged` and `bids`; returns counts of what was left out.

    A query is of one split, by a hash of its text. Dev and test take their judgements from their own period, train
    from the time before; where people judged, dev and test are theirs alone.
    """
    share = f"('0x' || md5('{config.seed}' || key)[:8])::UBIGINT / 4294967296.0"
    sources = []
    if facts is not None:
        known = f"SELECT key FROM support WHERE users >= {config.min_users}"
        sources.append(f"SELECT key, doc, period, grade FROM graded WHERE key IN ({known})")
    if judged:
        sources.append(
            "SELECT key, doc, 'judged' AS period, max(grade) AS grade FROM judged JOIN texts USING (query) "
            "WHERE reason IS NULL AND doc IN (SELECT _id FROM ads) GROUP BY ALL"
        )
    sources.append(
        "SELECT key, doc, 'bid' AS period, max(CASE kind WHEN 'broad' THEN 1 ELSE 2 END) AS grade FROM bids "
        "JOIN texts USING (query) WHERE reason IS NULL AND kind != 'negative' GROUP BY ALL"
    )
    match_bids(connection, most=config.bid_queries, min_users=config.min_users)
    sources.append("SELECT key, doc, 'bid' AS period, 1 AS grade FROM matched")
    refused = (
        "EXISTS (SELECT 1 FROM negatives WHERE negatives.doc = pairs.doc AND contains(' ' || pairs.key || ' ', "
        "negative))"
    )
    connection.execute(
        "CREATE TABLE negatives AS SELECT DISTINCT doc, ' ' || key || ' ' AS negative FROM bids JOIN texts USING "
        "(query) WHERE kind = 'negative' AND key != ''"
    )
    connection.execute(f"CREATE TABLE pairs AS {' UNION ALL '.join(sources)}")
    excluded = one_row(connection, f"SELECT count(*) FROM pairs WHERE grade > 0 AND {refused}")[0]
    connection.execute(f"DELETE FROM pairs WHERE grade > 0 AND {refused}")
    connection.execute(_split_sql(config, share, timed=facts is not None and facts.times, judged=judged))
    for split, most in (("test", config.test_queries), ("dev", config.dev_queries)):
        connection.execute(
            f"UPDATE split_of SET split = 'train' WHERE split = '{split}' AND key NOT IN "
            f"(SELECT key FROM split_of WHERE split = '{split}' ORDER BY share, key LIMIT {most})"
        )
    own = {"judged": "split != 'train'", "bid": "split = 'train'", "train": "split = 'train'", "all": "true"}
    own |= {"dev": "split = 'dev'", "test": "split = 'test'"}
    if judged:
        own |= {name: "split = 'train'" for name in ("all", "dev", "test")}
    fits = " OR ".join(f"(period = '{period}' AND {rule})" for period, rule in own.items())
    # Where several sources grade a pair the clicks' word counts before the bids'.
    order = "CASE period WHEN 'bid' THEN 1 ELSE 0 END"
    connection.execute(
        f"CREATE TABLE qrels AS SELECT key, doc, split, arg_min(grade, {order} * 10 - grade)::INTEGER AS grade "
        f"FROM pairs JOIN split_of USING (key) WHERE {fits} GROUP BY ALL"
    )
    connection.execute("DELETE FROM qrels WHERE key NOT IN (SELECT key FROM qrels WHERE grade > 0)")
    return {"pairs that negative keywords exclude": int(excluded)}


def _split_sql(config: Any, share: str, *, timed: bool, judged: bool) -> str:
    """SQL that fills `split_of` with every query that has a positive pair where its split may look for one."""
    has = {period: f"bool_or(period = '{period}')" for period in ("test", "dev", "judged")}
    if judged:
        split = (
            f"CASE WHEN {has['judged']} THEN (CASE WHEN {share} < 0.667 THEN 'test' ELSE 'dev' END) ELSE 'train' END"
        )
    elif timed:  # half of the queries, so that the other half of the latest time does not have to be thrown away
        split = (
            f"CASE WHEN {share} < 0.5 AND {has['test']} THEN 'test' WHEN {share} >= 0.5 AND {has['dev']} AND {share} "
            "< 0.75 THEN 'dev' ELSE 'train' END"
        )
    else:
        real = "bool_or(period = 'all')"  # a bid is no judgement
        split = (
            f"CASE WHEN {real} AND {share} < {config.test_share} THEN 'test' "
            f"WHEN {real} AND {share} < {config.test_share + config.dev_share} THEN 'dev' ELSE 'train' END"
        )
    return (
        f"CREATE TABLE split_of AS SELECT key, {share} AS share, {split} AS split FROM pairs WHERE grade > 0 GROUP "
        "BY key"
    )
