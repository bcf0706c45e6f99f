"""Last step: every system searches the catalogue; metrics, recovery with intervals, table, plot and report.json.

    accelerate launch recipes/evaluate.py --config recipes/configs/quickstart/evaluate.yaml

Under `output`: report.json, report.png, per_query.parquet, and what a rerun need not do again (runs/, stores/).
"""

from __future__ import annotations

from collections.abc import Sequence

from hlm.config import given, run_recipe
from hlm.evaluation.evaluate import SCRIPT, evaluate
from hlm.evaluation.report import command_line, format_table
from hlm.steps import EvaluateConfig


def main(argv: Sequence[str] | None = None) -> None:
    settings = given(EvaluateConfig, argv=argv)
    report = evaluate(**settings, command=command_line(SCRIPT, argv))
    if report is not None:
        print(format_table(report))


if __name__ == "__main__":
    run_recipe(main)
