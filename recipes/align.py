"""Phase 2: prunes the student and aligns it to the frozen teacher's query vectors, cut by cut.

    accelerate launch recipes/align.py --config recipes/configs/quickstart/align.yaml

Every stage of `cascade` cuts the student of the stage before and trains it again; each finished stage is kept in
`output`.stages, so a killed run goes on where it was. Without a cascade the student is aligned as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from hlm.config import given, run_recipe
from hlm.steps import AlignConfig
from hlm.training.align import align
from hlm.training.trainer import TrainingArguments


def main(argv: Sequence[str] | None = None) -> None:
    align(**given(AlignConfig, TrainingArguments, argv=argv))


if __name__ == "__main__":
    run_recipe(main)
