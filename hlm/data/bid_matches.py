"""Queries of the log that an ad's bid keywords match, as ad platforms match them: a phrase within the query, or all
words of a broad keyword in any order. An exact keyword matches the query that it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hlm.data.log_sources import one_row

if TYPE_CHECKING:
    import duckdb


def match_bids(connection: duckdb.DuckDBPyConnection, *, most: int, min_users: int) -> int:
    """Fills `matched` (key, doc): a query of the log before dev and test, and an ad that bids on a part of it. Returns
    how many pairs these are.

    A keyword is looked up by the rarest of its words in the log, so that few queries are compared with it.

    Args:
        most: queries of one keyword, the commonest; 0: none, the table stays empty.
        min_users: as for every query of the log.
    """
    connection.execute("CREATE TABLE matched (key VARCHAR, doc VARCHAR)")
    if not most:
        return 0
    connection.execute(
        "CREATE TABLE keywords AS SELECT DISTINCT doc, kind, key FROM bids JOIN texts USING (query) "
        "WHERE reason IS NULL AND kind IN ('phrase', 'broad') AND key != ''"
    )
    connection.execute(
        "CREATE TABLE query_words AS SELECT DISTINCT key, count, unnest(string_split(key, ' ')) AS word FROM support "
        f"WHERE users >= {min_users} AND past >= 0.5"
    )
    connection.execute(
        "CREATE TABLE anchors AS WITH spread AS (SELECT word, count(*) AS n FROM query_words GROUP BY word), words AS "
        "(SELECT DISTINCT key, unnest(string_split(key, ' ')) AS word FROM keywords) SELECT key, "
        "arg_min(word, (coalesce(n, 0), word)) AS word FROM words LEFT JOIN spread USING (word) GROUP BY key"
    )
    connection.execute(
        "CREATE TABLE hits AS SELECT keyword, kind, query FROM (SELECT DISTINCT kind, keywords.key AS keyword, "
        "query_words.key AS query, count FROM keywords JOIN anchors USING (key) JOIN query_words USING (word) "
        "WHERE query_words.key != keywords.key AND CASE kind WHEN 'phrase' THEN contains(' ' || query_words.key || "
        "' ', ' ' || keywords.key || ' ') ELSE list_has_all(string_split(query_words.key, ' '), "
        "string_split(keywords.key, ' ')) END) "
        f"QUALIFY row_number() OVER (PARTITION BY keyword, kind ORDER BY count DESC, query) <= {most}"
    )
    connection.execute(
        "INSERT INTO matched SELECT DISTINCT query, doc FROM hits JOIN keywords ON keyword = key AND "
        "hits.kind = keywords.kind"
    )
    for name in ("keywords", "query_words", "anchors", "hits"):
        connection.execute(f"DROP TABLE {name}")
    return int(one_row(connection, "SELECT count(*) FROM matched")[0])
