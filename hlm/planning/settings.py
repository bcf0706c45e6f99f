"""What a plan reads: the settings of the steps in a folder of YAML, and what has to be assumed about data and GPUs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hlm.errors import HlmError
from hlm.planning.run_file import RUN_FILE, expanded
from hlm.settings import defaults_of, read_yaml
from hlm.step_table import STEPS

PLANNED = ("teacher", "embed", "prune", "align", "refine")  # the scripts whose steps are planned
# What a plan reads of the training arguments, beside the steps' own settings.
TRAINING = (
    "learning_rate per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps bf16 fp16 "
    "gradient_checkpointing eval_strategy eval_steps logging_steps save_strategy save_steps save_total_limit"
).split()
UNREAD = {"data", "vectors"}  # a plan takes their sizes from `Assumptions`


@dataclass
class Assumptions:
    """What a plan cannot know: sizes of the data, lengths of the texts, how busy the GPUs are."""

    documents: int = field(metadata={"help": "ads in the corpus"})
    queries: int = field(metadata={"help": "queries in the table `queries`, of all splits"})
    unlabelled: int = field(default=0, metadata={"help": "queries in the table `unlabelled`"})
    train_queries: int | None = field(default=None, metadata={"help": "queries judged in qrels/train; null: all"})
    train_pairs: int | None = field(default=None, metadata={"help": "pairs of min_score and more; null: one a query"})
    dev_documents: int = field(default=0, metadata={"help": "ads judged in qrels/dev"})
    query_tokens: float = field(default=8, metadata={"help": "mean tokens of a query, end token counted"})
    prompt_tokens: float = field(default=20, metadata={"help": "tokens of the teacher's instruction"})
    document_tokens: float = field(default=128, metadata={"help": "mean tokens of an ad, after truncation"})
    longest_query: int = field(default=64, metadata={"help": "padded tokens of the longest query, without instruction"})
    longest_document: int = field(default=512, metadata={"help": "the same of an ad, where max_seq_length is not set"})
    gpus: str | None = field(default=None, metadata={"help": "such as 8xH100; 2x8xH100: on 2 machines"})
    fsdp: bool = field(default=False, metadata={"help": "weights and optimizer split over the GPUs, instead of DDP"})
    # As measured on an H200: results/gpu.json.
    teacher_utilisation: float = field(
        default=0.25, metadata={"help": "share of the data sheet's FLOP/s, the teacher's training"}
    )
    embed_utilisation: float = field(default=0.45, metadata={"help": "the same, texts that the teacher encodes"})
    student_utilisation: float = field(default=0.1, metadata={"help": "the same, students"})
    step_seconds: float = field(default=0.035, metadata={"help": "no training step is faster: launches, all-reduce"})

    @property
    def judged_queries(self) -> int:
        """`train_queries`, or what stands for it where it is not given."""
        return self.queries if self.train_queries is None else self.train_queries

    @property
    def judged_pairs(self) -> int:
        """`train_pairs`, or what stands for it where it is not given."""
        return self.judged_queries if self.train_pairs is None else self.train_pairs

    def __post_init__(self) -> None:
        self.train_queries, self.train_pairs = self.judged_queries, self.judged_pairs
        for name in ("documents", "queries", "train_pairs", "query_tokens", "document_tokens", "longest_query"):
            if getattr(self, name) <= 0:
                raise HlmError(f"{name}: expected above 0, found {getattr(self, name)}")
        for name in ("teacher_utilisation", "embed_utilisation", "student_utilisation"):
            if not 0 < getattr(self, name) <= 1:
                raise HlmError(f"{name}: expected above 0 and up to 1, found {getattr(self, name)}")


def check_folder(folder: str | Path) -> Path:
    """Refuses a folder without the steps' YAML files, before anything heavy is imported."""
    folder = Path(folder)
    if not ((folder / "teacher.yaml").is_file() or (folder / RUN_FILE).is_file()):
        found = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise HlmError(f"--config: expected a folder with teacher.yaml and the other steps, found {found} at {folder}")
    return folder


def read_steps(folder: str | Path, training: type) -> dict[str, dict[str, Any]]:
    """What a plan needs of every step's YAML in `folder`, in the order of the table of steps; steps without a file are
    left out.

    Args:
        training: the dataclass of the training arguments, `hlm.training.trainer.TrainingArguments`: their names and
            defaults.

    Returns:
        Step -> setting -> value, from the file or the dataclasses' defaults.

    Raises:
        HlmError: no folder, no teacher.yaml, broken YAML, a setting that is unknown (with the closest match), missing,
            or of another type.
    """
    folder = check_folder(folder)
    with expanded(folder) as configs:
        paths = {name: configs / f"{name}.yaml" for name, step in STEPS.items() if step.script in PLANNED}
        return {step: _read_step(path, step, training) for step, path in paths.items() if path.is_file()}


def _read_step(path: Path, step: str, training: type) -> dict[str, Any]:
    own: Any = STEPS[step].settings
    trained = STEPS[step].trains
    given = read_yaml(str(path), STEPS[step].hints(training))
    values = defaults_of(own) | ({name: defaults_of(training)[name] for name in TRAINING} if trained else {})
    values |= {name: value for name, value in given.items() if name in values}
    for name, value in values.items():
        if value is dataclasses.MISSING and name not in UNREAD:
            raise HlmError(f"{path}: expected '{name}', found none; set it")
        if type(value) in (int, float) and value < 0 and name != "max_steps":
            raise HlmError(f"{path}: {name}: expected a number from 0 up, found {value!r}")
    if trained and values["per_device_train_batch_size"] < 1:
        raise HlmError(f"{path}: per_device_train_batch_size: expected at least 1, found 0")
    return values
