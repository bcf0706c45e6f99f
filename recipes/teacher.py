"""Phase 1: LoRA fine-tunes the teacher contrastively on query-document pairs, merges it, saves adapter and model.

    accelerate launch recipes/teacher.py --config recipes/configs/quickstart/teacher.yaml

Writes `output` (the merged model, a sentence-transformers folder) and `output/adapter` (the LoRA adapter alone).
"""

from __future__ import annotations

from collections.abc import Sequence

from hlm.config import given, run_recipe
from hlm.steps import TeacherConfig
from hlm.training.teacher import train_teacher
from hlm.training.trainer import TrainingArguments


def main(argv: Sequence[str] | None = None) -> None:
    train_teacher(**given(TeacherConfig, TrainingArguments, argv=argv))


if __name__ == "__main__":
    run_recipe(main)
