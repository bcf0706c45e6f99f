"""The catalogue of `hlm prepare`: its rows as documents, its long numbers, and its bid keywords.

Tables in the database of work: `ads` (_place, _id, title, text and what is kept beside), `bids` (doc, kind, query).
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from hlm.data.log_columns import Columns
from hlm.data.log_sources import RawTable, named
from hlm.data.personal import ProductNumbers
from hlm.errors import HlmError
from hlm.progress import progress

if TYPE_CHECKING:
    import duckdb

KINDS = ("exact", "phrase", "broad", "negative")
# SQL of an id: 17, where a spreadsheet or pandas made it 17.0.
WHOLE = r"regexp_replace(trim({0}), '^(\d+)\.0+$', '\1')"
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|<!--.*?-->")
_SEPARATE = re.compile(r"[|;\n]")
_BATCH = 10_000


def read_catalogue(
    connection: duckdb.DuckDBPyConnection, table: RawTable, columns: Columns, keep: Sequence[str], dropped: Counter
) -> ProductNumbers:
    """Fills `ads` and `bids`; returns the catalogue's numbers. Rows without an id or without a text, and further rows
    of an id, are left out and counted in `dropped`.

    Raises:
        HlmError: nothing is left, a column to keep is not there, or ids that a spreadsheet has rounded.
    """
    if missing := [name for name in keep if name not in table.columns]:
        raise HlmError(f"keep: expected columns of {table.name}, found no '{missing[0]}'; correct it")
    texts = [role for role in ("title", "text") if role in columns]
    beside = [name for name in keep if name.lower() not in ("_id", "title", "text")]
    bids = [role for role in ("keywords", *KINDS) if role in columns]
    wanted = {role: columns[role] for role in ("_id", *texts, *bids)} | {f"kept {name}": name for name in beside}
    names = ["_id", *texts, *beside]
    connection.execute(f"CREATE TABLE ads (_place BIGINT, {', '.join(f'{named(name)} VARCHAR' for name in names)})")
    connection.execute("CREATE TABLE bids (doc VARCHAR, kind VARCHAR, query VARCHAR)")
    known, writer, place = ProductNumbers(), connection.cursor(), 0
    connection.execute("SET preserve_insertion_order = true")

    def batches() -> Iterator[pa.RecordBatch]:
        yield from connection.sql(table.select(wanted)).to_arrow_reader(_BATCH)
        if rescued := table.rescued(connection, wanted):
            yield from connection.sql(rescued).to_arrow_reader(_BATCH)

    with progress(what="read the catalogue", unit="row") as bar:
        for batch in batches():
            ads, keywords = [], []
            for row in batch.to_pylist():
                place += 1
                ad: dict[str, Any] = {"_place": place, "_id": _id(row["_id"])} | {
                    name: row[f"kept {name}"] for name in beside
                }
                ad |= {name: plain_text(row[name]) for name in texts}
                if not ad["_id"] or not any(ad[name] for name in texts):
                    dropped["without an id" if not ad["_id"] else "without a text"] += 1
                    continue
                for name in names:
                    known.add(ad[name] or "")
                ads.append(ad)
                keywords += [(ad["_id"], *bid) for role in bids for bid in bids_of(row[role], role)]
            _insert(writer, "ads", ads, ["_place", *names])
            _insert(writer, "bids", [dict(zip(("doc", "kind", "query"), bid, strict=True)) for bid in keywords])
            bar.update(batch.num_rows)
    writer.close()
    connection.execute("SET preserve_insertion_order = false")
    known.close()
    dropped["lines that cannot be read"] += table.unread(connection, place)
    _first_of_each_id(connection, table, dropped)
    return known


def _first_of_each_id(connection: duckdb.DuckDBPyConnection, table: RawTable, dropped: Counter) -> None:
    again = connection.execute(
        "DELETE FROM ads WHERE _place NOT IN (SELECT min(_place) FROM ads GROUP BY _id)"
    ).fetchone()
    dropped["further rows of an id"] += again[0] if again else 0
    left = connection.execute(
        "SELECT count(*), min(_id) FILTER (regexp_matches(_id, '^\\d[.,]?\\d*E\\+\\d+$')) FROM ads"
    )
    count, rounded = left.fetchone() or (0, None)
    if rounded is not None:
        raise HlmError(
            f"catalogue: expected ids as they are, found '{rounded}', as spreadsheets write long numbers; format the "
            "column as text there, and export it again"
        )
    if not count:
        found = ", ".join(f"{n} {why}" for why, n in dropped.items() if n) or "no rows"
        raise HlmError(
            f"catalogue: expected ads with an id and a text in {table.name}, found {found}; correct the columns"
        )


def _id(value: str | None) -> str:
    return re.sub(r"^(\d+)\.0+$", r"\1", (value or "").strip())


def plain_text(value: str | None) -> str | None:
    """The text on one line, without tags and entities of HTML; None where nothing is left."""
    if value is None:
        return None
    if "<" in value:
        value = _TAG.sub(" ", value)
    if "&" in value:
        value = html.unescape(value)
    return " ".join(value.split()) or None


def bids_of(value: str | None, role: str) -> Iterator[tuple[str, str]]:
    """(kind, keyword) of a cell: a list in JSON, or parted by |, ;, line breaks or else commas.

    In a column of all kinds `[...]` is exact, `"..."` a phrase, `-...` negative, and the rest broad, as ad platforms
    write them.
    """
    value = (value or "").strip()
    if value.startswith('["') and value.endswith("]"):
        try:
            words = [str(word) for word in json.loads(value)]
        except ValueError:
            words = [value]
    else:
        words = _SEPARATE.split(value) if _SEPARATE.search(value) else value.split(",")
    for word in (word.strip() for word in words):
        kind = role if role in KINDS else "broad"
        if role == "keywords" and word.startswith("-"):
            kind, word = "negative", word[1:].strip()
        if len(word) > 2 and word[0] + word[-1] in ("[]", '""'):
            kind = kind if kind == "negative" or role != "keywords" else "exact" if word[0] == "[" else "phrase"
            word = word[1:-1].strip()
        if word:
            yield kind, word


def _insert(writer: duckdb.DuckDBPyConnection, table: str, rows: list[dict], names: Sequence[str] = ()) -> None:
    if not rows:
        return
    names = list(names or rows[0])
    types = [pa.int64() if name == "_place" else pa.string() for name in names]
    made = pa.table([pa.array([row.get(n) for row in rows], t) for n, t in zip(names, types, strict=True)], names=names)
    writer.register("new_rows", made)
    writer.execute(f"INSERT INTO {table} SELECT * FROM new_rows")
    writer.unregister("new_rows")
