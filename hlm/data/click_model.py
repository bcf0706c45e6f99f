"""The position-based model of clicks: how likely a position is looked at, apart from how good what stands there is.

A click happens where a searcher looks at the position and finds the ad attractive (Richardson, Dominowska and Ragno,
"Predicting Clicks", 2007; Chuklin, Markov and de Rijke, "Click Models for Web Search", 2015, section 3.3):
P(click) = examination(position) x attraction(query, ad). The mean click rate of a position, which COEC takes, holds
both, and so asks too much of the first positions where the best ads stand there.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from hlm.errors import HlmError
from hlm.progress import progress

if TYPE_CHECKING:
    import duckdb

logger = logging.getLogger(__name__)

ITERATIONS, TOLERANCE = 200, 1e-4  # of expectation-maximisation; the largest relative change of an examination


def examine(connection: duckdb.DuckDBPyConnection, rows: str) -> dict[int, float]:
    """Fills `rates` (position, rate): the clicks to be expected of an impression there, of an ad of mean attraction.

    Estimated by expectation-maximisation on pairs that were shown at several positions: others fit any examination. A
    position that no such pair links to most of the others takes the rate of the next one above it. Rates are scaled so
    that expected and found clicks are equally many in all.

    Args:
        rows: select of key, doc, position, clicks, impressions; a position of 0 is not known.

    Returns:
        Position -> examination, the highest 1.

    Raises:
        HlmError: no pair was shown at two positions, or none of them was clicked.
    """
    connection.execute(
        "CREATE TABLE shown AS SELECT hash(key, doc) AS pair, position, least(sum(clicks), sum(impressions)) AS c, "
        f"sum(impressions) AS n FROM ({rows}) WHERE impressions > 0 GROUP BY ALL"
    )
    connection.execute(
        "CREATE TABLE moved AS SELECT * FROM shown WHERE position > 0 AND pair IN (SELECT pair FROM shown WHERE "
        "position > 0 GROUP BY pair HAVING count(*) > 1 AND sum(c) > 0)"
    )
    linked = _linked(connection)
    connection.execute(f"DELETE FROM moved WHERE position NOT IN ({', '.join(map(str, sorted(linked) or [0]))})")
    found = _estimated(connection)
    if not found:
        raise HlmError(
            "click_model: expected ads that were shown at several positions for one query, and clicked, found none; "
            "take coec"
        )
    highest = max(found.values())
    known = {position: value / highest for position, value in sorted(found.items())}
    positions = [row[0] for row in connection.execute("SELECT DISTINCT position FROM shown ORDER BY 1").fetchall()]
    whole, before = {}, next(iter(known.values()))
    for position in positions:
        before = whole[position] = known.get(position, before)
    connection.execute("CREATE TABLE examined (position INTEGER, rate DOUBLE)")
    connection.executemany("INSERT INTO examined VALUES (?, ?)", list(whole.items()))
    connection.execute(
        "CREATE TABLE rates AS SELECT position, rate * (SELECT sum(c) / sum(n * rate) FROM shown JOIN examined USING "
        "(position)) AS rate FROM examined"
    )
    for name in ("shown", "moved", "examined"):
        connection.execute(f"DROP TABLE {name}")
    told = ", ".join(f"{position}: {value:.2f}" for position, value in list(known.items())[:10])
    logger.info("examination of positions: %s", told)
    return known


def _linked(connection: duckdb.DuckDBPyConnection) -> set[int]:
    """Positions of `moved` that pairs link to one another, directly or by others; of several such sets the one with
    most impressions. Between sets nothing says which is looked at more."""
    of_pair = "SELECT pair, min(position) AS first FROM moved GROUP BY pair"
    links = connection.execute(f"SELECT DISTINCT first, position FROM moved JOIN ({of_pair}) USING (pair)").fetchall()
    sets: list[set[int]] = []
    for link in links:
        together = {*link}.union(*(one for one in sets if one & {*link}))
        sets = [one for one in sets if not one & together] + [together]
    shown = dict(connection.execute("SELECT position, sum(n) FROM moved GROUP BY position").fetchall())
    return max(sets, key=lambda one: sum(shown[position] for position in one), default=set())


def _estimated(connection: duckdb.DuckDBPyConnection) -> dict[int, float]:
    """Position -> examination, by expectation-maximisation on `moved`; {} where that is empty."""
    start = "SELECT position, greatest(sum(c) / sum(n), 1e-6) FROM moved GROUP BY position"
    # The start spreads a click rate over both factors.
    looked = {position: rate**0.5 for position, rate in connection.execute(start).fetchall()}
    if not looked:
        return {}
    connection.execute(
        "CREATE TABLE attraction AS SELECT pair, sqrt(greatest(sum(c) / sum(n), 1e-6)) AS a FROM moved GROUP BY pair"
    )
    connection.execute("CREATE TABLE looked (position INTEGER, e DOUBLE)")
    joined = "moved JOIN attraction USING (pair) JOIN looked USING (position)"
    for _ in progress(range(ITERATIONS), what="fit the click model", unit="round"):
        connection.execute("DELETE FROM looked")
        connection.executemany("INSERT INTO looked VALUES (?, ?)", list(looked.items()))
        # Of impressions without a click: looked at and not attractive, or attractive and not looked at.
        seen = (
            f"SELECT position, sum(c + (n - c) * e * (1 - a) / (1 - e * a + 1e-12)) / sum(n) FROM {joined} GROUP BY 1"
        )
        after = dict(connection.execute(seen).fetchall())
        connection.execute(
            "CREATE OR REPLACE TABLE attraction AS SELECT pair, sum(c + (n - c) * a * (1 - e) / (1 - e * a + 1e-12)) / "
            f"sum(n) AS a FROM {joined} GROUP BY pair"
        )
        # Only their proportions are certain: compared and kept by the highest.
        change = max(abs(after[at] / max(after.values()) - e / max(looked.values())) for at, e in looked.items())
        looked = after
        if change < TOLERANCE:
            break
    for name in ("attraction", "looked"):
        connection.execute(f"DROP TABLE {name}")
    return looked
