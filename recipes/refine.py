"""Phase 3: trains the student contrastively against the teacher's frozen ad vectors; no ad is encoded.

    accelerate launch recipes/refine.py --config recipes/configs/quickstart/refine.yaml

Started from a student that was never aligned, it is the paper's naive baseline.
"""

from __future__ import annotations

from collections.abc import Sequence

from hlm.config import given, run_recipe
from hlm.steps import RefineConfig
from hlm.training.refine import refine
from hlm.training.trainer import TrainingArguments


def main(argv: Sequence[str] | None = None) -> None:
    refine(**given(RefineConfig, TrainingArguments, argv=argv))


if __name__ == "__main__":
    run_recipe(main)
