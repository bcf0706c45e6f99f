"""The settings of `hlm prepare`; a step of `hlm/step_table.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class PrepareLogsConfig:
    """Makes a dataset of a shop's own files: a catalogue, a log of queries, clicks, judgements.

    Files are CSV, TSV, JSON Lines or Parquet; paths, globs and hf:// addresses. The log is cleaned, clicks become
    graded pairs, and a page says what was kept and what was dropped.
    """

    output: str = field(metadata={"help": "folder for the dataset"})
    catalogue: list[str] = field(metadata={"help": "the ads: an id, and a title or a text"})
    log: list[str] = field(default_factory=list, metadata={"help": "queries: one a line, or with a count"})
    clicks: list[str] = field(
        default_factory=list, metadata={"help": "clicks on ads: one a line or counted; OpenSearch's UBI events"}
    )
    judgements: list[str] = field(default_factory=list, metadata={"help": "grades of 0 to 3 that people gave"})
    columns: list[str] = field(
        default_factory=list, metadata={"help": "what columns are, where their names do not say it: title=name,_id=sku"}
    )
    keep: list[str] = field(default_factory=list, metadata={"help": "further columns of the catalogue to keep"})
    encoding: str | None = field(default=None, metadata={"help": "of text files, for example cp1252; null: found out"})
    separator: str | None = field(default=None, metadata={"help": "of CSV, a character or 'tab'; null: found out"})
    day_first: bool | None = field(default=None, metadata={"help": "3/4/2024 is the third of April; null: found out"})
    min_users: int = field(
        default=5, metadata={"help": "a query is kept if so many users typed it; without users, if it came so often"}
    )
    unlabelled_min_users: int | None = field(
        default=None,
        metadata={"help": "the same for queries without judgements, if they stay at home; null: min_users"},
    )
    max_characters: int = field(default=200, metadata={"help": "longer queries are left out"})
    queries_a_day: int = field(default=500, metadata={"help": "who asks more on one day is a robot"})
    repeats: int = field(default=3, metadata={"help": "how often one user counts for one query"})
    min_clicks: int = field(default=2, metadata={"help": "fewer clicks make no pair, unless there is a conversion"})
    click_model: Literal["coec", "pbm"] = field(
        default="coec",
        metadata={"help": "clicks to expect at a position: coec, its mean; pbm, where the best ads stand on top"},
    )
    bid_queries: int = field(
        default=0, metadata={"help": "log queries that a bid keyword matches, at most so many, the commonest; 0: none"}
    )
    smoothing: float = field(default=1.0, metadata={"help": "clicks added to those found and to those expected"})
    min_expected: float = field(
        default=2.0, metadata={"help": "an ad that was shown for so many expected clicks and got none is graded 0"}
    )
    by_time: bool = field(default=True, metadata={"help": "test is the latest time; false: queries alone are split"})
    dev_share: float = field(
        default=0.1, metadata={"help": "share of the clicks, or without times of queries, for dev"}
    )
    test_share: float = field(default=0.1, metadata={"help": "the same for test"})
    dev_queries: int = field(default=1000, metadata={"help": "at most so many queries in dev"})
    test_queries: int = field(default=4000, metadata={"help": "at most so many queries in test"})
    memory: str = field(default="1GB", metadata={"help": "for the database that counts; more is put on the disk"})
    seed: int = field(default=0, metadata={"help": "of the split of queries"})
