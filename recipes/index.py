"""Chooses the ad index for a student's queries and writes it: FAISS's kinds and settings, by recall, time and bytes.

    python recipes/index.py --config recipes/configs/quickstart/index.yaml --memory_gb 8 --p99_ms 2

Prints the table that it chose from, and draws it in `output`/tuning.png. The choice, and the recall that other queries
reached with it, are in `output`/hlm.json.
"""

from __future__ import annotations

from collections.abc import Sequence

from hlm.config import given, run_recipe
from hlm.indexes.tune_index import tune_index
from hlm.steps import IndexConfig


def main(argv: Sequence[str] | None = None) -> None:
    tune_index(**given(IndexConfig, argv=argv))


if __name__ == "__main__":
    run_recipe(main)
