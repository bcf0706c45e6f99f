"""A small shop's raw files for the tests of `hlm prepare`, and what became of them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pyarrow.parquet as pq

import hlm

ADS = "sku,name,description\n" + "".join(
    f"A{n},{colour} {thing},good {thing}\n" for n, (colour, thing) in enumerate(
        (colour, thing) for colour in ("red", "blue", "green") for thing in ("shoe", "lamp", "chair", "tent"))
)  # fmt: skip


THINGS = {
    "red shoe": "A0",
    "red lamp": "A1",
    "blue shoe": "A4",
    "blue lamp": "A5",
    "green tent": "A11",
    "blue chair": "A6",
}


def write(folder: Path, **files: str) -> list[str]:
    """Files by their names less the ending; the arguments that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.csv").write_text(text, encoding="utf-8")
    return [str(folder / f"{name}.csv") for name in files]


def clicks_of(things=THINGS, users=6, days=30, more=""):
    """Every user clicks the right ad of every query, spread over the days."""
    rows = ["query,sku,user,time"]
    for place, (query, ad) in enumerate(sorted(things.items())):
        rows += [f"{query},{ad},u{user},2024-01-{1 + (place + user * 5) % days:02d} 10:00:00" for user in range(users)]
    return "\n".join(rows) + "\n" + more


WORDS = "big small old new cheap best soft hard long wide".split()


MANY = {
    f"{word} {thing}": f"A{n % 12}"
    for n, (word, thing) in enumerate(itertools.product(WORDS, ("shoe", "lamp", "chair", "tent")))
}


def qrels_of(folder: Path) -> dict[str, dict[tuple[str, str], int]]:
    """Split -> {(query, ad): grade}."""
    texts = {row["_id"]: row["text"] for row in pq.read_table(folder / "queries.parquet").to_pylist()}
    tables = {split: pq.read_table(folder / f"qrels/{split}.parquet") for split in ("train", "dev", "test")}
    return {
        split: {(texts[row["query-id"]], row["corpus-id"]): row["score"] for row in table.to_pylist()}
        for split, table in tables.items()
    }


def prepared(tmp_path, clicks=None, *, ads=ADS, **settings):
    files = write(tmp_path, ads=ads, clicks=clicks or clicks_of())
    shares = {"by_time": False, "dev_share": 0.2, "test_share": 0.2, "min_users": 2} | settings
    return hlm.prepare(tmp_path / "out", files[:1], clicks=files[1:], **shares)


def all_grades(folder):
    return {pair: grade for pairs in qrels_of(folder).values() for pair, grade in pairs.items()}
