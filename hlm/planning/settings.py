"""What a plan reads: the settings of the steps in a folder of YAML, and what has to be assumed about data and GPUs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hlm.artefacts import HlmError

REQUIRED = object()
# What a plan reads of each step, with the recipe's own defaults (a test compares them with the recipes).
STEPS: dict[str, dict[str, Any]] = {
    "teacher": {"backbone": REQUIRED, "output": REQUIRED, "pairs_per_query": None, "hard_negatives": 1,
                "lora_rank": 256, "cache_chunk": None, "dev_documents": 2000, "max_seq_length": None,
                "dtype": "float32"},
    "embed": {"parts": ["corpus", "unlabelled", "queries"], "index": None, "index_dim": None, "dim": None,
              "max_seq_length": None, "dtype": "float32", "batch_tokens": 4096},
    "prune": {"model": REQUIRED, "output": REQUIRED, "layers": [], "keep": None, "ffn": None},
    "align": {"student": REQUIRED, "output": REQUIRED, "cascade": [], "head": False,
              "parts": ["unlabelled", "train"], "prompt": False, "max_seq_length": None},
    "refine": {"student": REQUIRED, "pool": 16384, "hard_negatives": 8, "refresh_epochs": 1, "mask_top": 3,
               "query_query": False},
}  # fmt: skip
TRAINING = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "bf16",
            "fp16", "gradient_checkpointing", "eval_strategy", "eval_steps", "logging_steps",
            "save_total_limit")  # fmt: skip
OURS = {"logging_steps": 50, "save_total_limit": 2}  # defaults of hlm.training.trainer that are not transformers' own
TRAINED = ("teacher", "align", "refine")


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
    teacher_utilisation: float = field(default=0.4, metadata={"help": "share of the data sheet's FLOP/s, teacher"})
    student_utilisation: float = field(default=0.1, metadata={"help": "the same, students"})
    step_seconds: float = field(default=0.05, metadata={"help": "no training step is faster: launches, all-reduce"})

    def __post_init__(self) -> None:
        self.train_queries = self.queries if self.train_queries is None else self.train_queries
        self.train_pairs = self.train_queries if self.train_pairs is None else self.train_pairs
        for name in ("documents", "queries", "train_pairs", "query_tokens", "document_tokens", "longest_query"):
            if getattr(self, name) <= 0:
                raise HlmError(f"{name}: expected above 0, found {getattr(self, name)}")
        for name in ("teacher_utilisation", "student_utilisation"):
            if not 0 < getattr(self, name) <= 1:
                raise HlmError(f"{name}: expected above 0 and up to 1, found {getattr(self, name)}")


def read_steps(folder: str | Path) -> dict[str, dict[str, Any]]:
    """What a plan needs of every step's YAML in `folder`; steps without a file are left out.

    Raises:
        HlmError: no folder, no teacher.yaml, broken YAML, a missing or a mistyped setting.
    """
    folder = Path(folder)
    if not (folder / "teacher.yaml").is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise HlmError(f"--config: expected a folder with teacher.yaml and the other steps, found {found} at {folder}")
    return {step: _read_step(path, step) for step in STEPS if (path := folder / f"{step}.yaml").is_file()}


def _read_step(path: Path, step: str) -> dict[str, Any]:
    defaults = dict(STEPS[step])
    if step in TRAINED:
        from transformers import TrainingArguments  # takes seconds: `hlm --help` must not wait for it

        own = TrainingArguments.__dataclass_fields__
        defaults |= {name: OURS.get(name, own[name].default) for name in TRAINING}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise HlmError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise HlmError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    step_settings = {name: values.get(name, default) for name, default in defaults.items()}
    for name, value in step_settings.items():
        default = defaults[name]
        if value is REQUIRED:
            raise HlmError(f"{path}: expected '{name}', found none; set it")
        numeric = type(default) in (int, float) and name != "logging_steps"
        if value is not None and numeric and (type(value) not in (int, float) or (value < 0 and name != "max_steps")):
            raise HlmError(f"{path}: {name}: expected a number from 0 up, found {value!r}")
    if step in TRAINED and step_settings["per_device_train_batch_size"] < 1:
        raise HlmError(f"{path}: per_device_train_batch_size: expected at least 1, found 0")
    return step_settings
