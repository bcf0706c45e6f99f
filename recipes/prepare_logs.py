"""Makes a dataset of a shop's own files: a catalogue, a query log, clicks, judgements.

    hlm prepare runs/mine/data --catalogue ads.csv --log queries.csv --clicks clicks.csv
    python recipes/prepare_logs.py --config prepare_logs.yaml

The folder may stand first, without --output. On a terminal it asks whether the columns it found are the right ones.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hlm.config import given, run_recipe
from hlm.data.logs import prepare
from hlm.log_settings import PrepareLogsConfig


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--output")
    asks = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    folder = prepare(**given(PrepareLogsConfig, argv=words), ask=input if asks else None)
    print((folder / "report.txt").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_recipe(main)
