"""What `hlm prepare` did, on one page: report.html, which needs nothing but itself, and report.txt.

Every query that is shown passed the same rules as the dataset. What was dropped is counted and never shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hlm.data.words import count_words
from hlm.log_settings import PrepareLogsConfig

if TYPE_CHECKING:
    import duckdb

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 280, 56, 228  # of a plot, in its own units
LONGEST = 10  # words; longer queries share a bar
SHOWN = 8  # examples of a kind
STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --paper: #ffffff; --mark: #0969da }
@media (prefers-color-scheme: dark) {
  :root { --ink: #f0f6fc; --soft: #9198a1; --line: #3d444d; --paper: #0d1117; --mark: #4493f8 } }
body { margin: 0 auto; padding: 1rem; max-width: 46rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem } p { margin: .5rem 0 } .soft { color: var(--soft) }
table { border-collapse: collapse; width: 100% } caption { text-align: left; color: var(--soft) }
th, td { text-align: left; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { font-weight: 600 } .n { text-align: right; white-space: nowrap } .wide { overflow-x: auto }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--soft); font-size: 20px }
.bar { fill: var(--mark) } .axis { stroke: var(--line) } .curve { fill: none; stroke: var(--mark); stroke-width: 3 }
"""


class Table(NamedTuple):
    """Rows under a heading; numbers stand to the right."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    note: str = ""


class Report(NamedTuple):
    """What both files say."""

    title: str
    notes: list[str]
    tables: list[Table]
    lengths: list[tuple[str, float]]  # words of a query, share of the searches
    curve: list[tuple[int, float]]  # most frequent queries, share of the searches that they have


def write_reports(
    connection: duckdb.DuckDBPyConnection,
    folder: Path,
    about: Mapping[str, Any],
    read: Mapping[str, tuple[str, Mapping[str, str]]],
    config: PrepareLogsConfig,
) -> None:
    """Writes report.html and report.txt beside the tables.

    Args:
        about: what the manifest says: counts, dropped, robots, fewest_users, split, clicks.
        read: table -> (its file's name, role -> column).
    """
    report = Report(
        title=f"The data of {Path(config.output).resolve().name}",
        notes=_notes(about, config),
        tables=_tables(connection, about, read),
        lengths=_lengths(connection),
        curve=_curve(connection),
    )
    (folder / "report.txt").write_text(_text(report), encoding="utf-8")
    (folder / "report.html").write_text(_page(report), encoding="utf-8")


def _notes(about: Mapping[str, Any], config: PrepareLogsConfig) -> list[str]:
    clicks, fewest = about["clicks"], about["fewest_users"]
    if about["split"] == "by time and by query":
        notes = ["Test is the latest time, dev the time before it, and no query is in two of them."]
    else:
        why = "the clicks have no times, or too few"
        why = "people judged it" if config.judgements else why if config.by_time else "by_time is off"
        notes = [f"No query is in two of train, dev and test. Test is not the future: {why}."]
    if fewest is None:
        notes.append(
            f"The log has no users: a query is kept from a count of {config.min_users} on. This is no k-anonymity; do "
            "not publish the queries on its strength."
        )
    else:
        if fewest["queries"] > 1:
            notes.append(f"At least {fewest['queries']} users typed each query that has judgements from clicks.")
        for name, what in (("queries", "queries with judgements"), ("unlabelled", "unlabelled queries")):
            if fewest[name] < max(2, fewest["queries"]):
                notes.append(f"Each of the {what} has {fewest[name]} or more users, too few to publish them.")
    if clicks:
        how = "clicks over expected clicks" if clicks["impressions"] else "the share of the clicks of a query's best ad"
        by = " and a position-based model" if config.click_model == "pbm" else ""
        how += f", expected by position{by}" if clicks["positions"] else ""
        notes.append(f"Pairs are graded by {how}{'; a conversion is a 3' if clicks['conversions'] else ''}.")
        if not clicks["impressions"]:
            notes.append("Nothing says which ads were shown and skipped: there are no zeros.")
    if config.bid_queries:
        notes.append(f"A bid keyword is a pair, too, with up to {config.bid_queries} log queries that it matches.")
    notes.append("Names and addresses of streets are not looked for; the number of users is what keeps them out.")
    return notes


def _tables(
    connection: duckdb.DuckDBPyConnection,
    about: Mapping[str, Any],
    read: Mapping[str, tuple[str, Mapping[str, str]]],
) -> list[Table]:
    columns = [
        (what, name, ", ".join(f"{role}={column}" for role, column in chosen.items()))
        for what, (name, chosen) in read.items()
    ]
    dropped = [(what, why, n) for what, reasons in about["dropped"].items() for why, n in reasons.items()]
    bands = connection.execute(
        "SELECT band, count(*), sum(count)::BIGINT FROM bands GROUP BY band ORDER BY band = 'tail', band"
    ).fetchall()
    grades = connection.execute(
        "SELECT split, count(*) FILTER (grade = 3), count(*) FILTER (grade = 2), count(*) FILTER (grade = 1), "
        "count(*) FILTER (grade = 0) FROM qrels GROUP BY split ORDER BY split"
    ).fetchall()
    return [
        Table("What was read", ("table", "file", "columns"), columns),
        Table("What is in the dataset", ("table", "rows"), list(about["counts"].items())),
        Table(
            "What was dropped",
            ("from", "why", "lines"),
            dropped,
            f"{about['robots']:,} users were taken for robots. A line is dropped for one reason, the first that holds.",
        ),
        Table("Head, torso and tail", ("slice", "queries", "searches"), bands, "Each has a third of the searches."),
        Table("Pairs by grade", ("split", "3", "2", "1", "0"), grades),
        *_examples(connection),
    ]


def _examples(connection: duckdb.DuckDBPyConnection) -> list[Table]:
    columns = {row[0] for row in connection.execute("DESCRIBE ads").fetchall()}
    shown = "coalesce(" + ", ".join(f"ads.{name}" for name in ("title", "text") if name in columns) + ")"
    most = connection.execute(
        "SELECT text, count::BIGINT, band FROM bands WHERE key IN (SELECT key FROM qrels) "
        f"ORDER BY count DESC, key LIMIT {SHOWN}"
    ).fetchall()
    drawn = connection.execute(
        f"SELECT spellings.text, {shown}[:80], grade FROM qrels JOIN spellings USING (key) JOIN ads ON doc = _id "
        f"WHERE grade > 0 AND split = 'train' ORDER BY md5(key || doc) LIMIT {SHOWN}"
    ).fetchall()
    return [
        Table("The most frequent queries with judgements", ("query", "searches", "slice"), most),
        Table("Pairs drawn from train", ("query", "ad", "grade"), drawn),
    ]


def _lengths(connection: duckdb.DuckDBPyConnection) -> list[tuple[str, float]]:
    """(words, share of the searches) of the kept queries."""
    counts = [0.0] * LONGEST
    rows = connection.execute("SELECT text, count FROM bands")
    while batch := rows.fetchmany(50_000):
        for text, count in batch:
            counts[min(max(count_words(text), 1), LONGEST) - 1] += count
    total = sum(counts) or 1.0
    return [(f"{n}{'+' if n == LONGEST else ''}", count / total) for n, count in enumerate(counts, 1)]


def _curve(connection: duckdb.DuckDBPyConnection) -> list[tuple[int, float]]:
    """(n, share of the searches that the n most frequent queries have), n in steps of the logarithm."""
    total = connection.execute("SELECT count(*) FROM bands").fetchone()
    last = int(total[0]) if total else 0
    steps = sorted({min(last, round(10 ** (step / 6))) for step in range(6 * len(str(last)) + 1)}) if last else []
    listed = ", ".join(map(str, steps)) or "0"
    return connection.execute(
        "SELECT rank, share FROM (SELECT row_number() OVER w AS rank, sum(count) OVER w / sum(count) OVER () AS share "
        f"FROM bands WINDOW w AS (ORDER BY count DESC, key)) WHERE rank IN ({listed}) ORDER BY rank"
    ).fetchall()


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def _text(report: Report) -> str:
    lines = [report.title, "", *report.notes]
    for table in report.tables:
        rows = [table.head, *([_shown(cell) for cell in row] for row in table.rows)]
        widths = [max(len(row[n]) for row in rows) for n in range(len(table.head))]
        lines += ["", table.title, *([table.note] if table.note else [])]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  " + "  ".join(cells).rstrip())
    lines += ["", "Words of a query, by searches"]
    lines += [f"  {words:>3}  {share:6.1%}  {'#' * round(50 * share)}" for words, share in report.lengths]
    lines += ["", "Searches of the most frequent queries"]
    lines += [f"  {n:>11,}  {share:6.1%}" for n, share in report.curve]
    return "\n".join(lines) + "\n"


def _page(report: Report) -> str:
    parts = [f"<h1>{escape(report.title)}</h1>", *(f"<p>{escape(note)}</p>" for note in report.notes)]
    for number, table in enumerate(report.tables):
        if number == 4:  # after the numbers of head and tail
            parts += [_bars(report.lengths), _line_plot(report.curve)]
        parts.append(f"<h2>{escape(table.title)}</h2>")
        parts += [f'<p class="soft">{escape(table.note)}</p>'] if table.note else []
        numbers = [isinstance(cell, int) for cell in table.rows[0]] if table.rows else []
        head = "".join(
            f"<th{' class=n' if number < len(numbers) and numbers[number] else ''}>{escape(name)}</th>"
            for number, name in enumerate(table.head)
        )
        rows = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in table.rows)
        parts.append(f'<div class="wide" tabindex="0"><table><tr>{head}</tr>{rows}</table></div>')
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{STYLE}</style></head><body><main>\n{body}\n</main></body></html>\n"
    )


def _cell(value: Any) -> str:
    return f'<td class="n">{value:,}</td>' if isinstance(value, int) else f"<td>{escape(_shown(value))}</td>"


def _bars(lengths: Sequence[tuple[str, float]]) -> str:
    step, top = (WIDTH - LEFT) / len(lengths), max(share for _, share in lengths) or 1.0
    parts = []
    for number, (words, share) in enumerate(lengths):
        height = (BOTTOM - 40) * share / top
        x = LEFT + number * step
        parts.append(
            f'<rect class="bar" x="{x + 5:.1f}" y="{BOTTOM - height:.1f}" width="{step - 10:.1f}" '
            f'height="{height:.1f}"/>'
        )
        parts.append(f'<text x="{x + step / 2:.1f}" y="{BOTTOM + 24}" text-anchor="middle">{words}</text>')
        if share >= 0.005:
            at = BOTTOM - height - 8
            parts.append(f'<text x="{x + step / 2:.1f}" y="{at:.1f}" text-anchor="middle">{share:.0%}</text>')
    said = "; ".join(f"{words}: {share:.1%}" for words, share in lengths)
    return _figure("Words of a query", "words of a query, share of the searches", said, parts)


def _line_plot(curve: Sequence[tuple[int, float]]) -> str:
    last = max(math.log10(max(n for n, _ in curve)), 1.0) if curve else 1.0

    def x(n: float) -> float:
        return LEFT + (WIDTH - LEFT - 24) * math.log10(n) / last

    def y(share: float) -> float:
        return BOTTOM - (BOTTOM - 40) * share

    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<path class="axis" d="M{LEFT} {y(share):.1f}H{WIDTH - 24}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(share) + 6:.1f}" text-anchor="end">{share:.0%}</text>')
    for power in range(int(last) + 1):
        label = f"{10**power:,}" if power < 6 else f"10^{power}"
        parts.append(f'<text x="{x(10**power):.1f}" y="{BOTTOM + 24}" text-anchor="middle">{label}</text>')
    points = " ".join(f"{x(n):.1f},{y(share):.1f}" for n, share in curve)
    parts.append(f'<polyline class="curve" points="{points}"/>')
    said = "; ".join(f"{n:,} queries: {share:.1%}" for n, share in curve)
    return _figure("Head against tail", "most frequent queries, share of the searches that they have", said, parts)


def _figure(title: str, axis: str, said: str, parts: Sequence[str]) -> str:
    return (
        f'<h2>{title}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}. {escape(said)}">'
        f'{"".join(parts)}<text x="{(WIDTH + LEFT) / 2}" y="{BOTTOM + 48}" text-anchor="middle">{axis}</text></svg>'
    )
