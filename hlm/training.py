"""What the three training recipes share: the trainer, the dev retrieval, exact resume.

The loop is sentence-transformers' trainer. What differs is what flows through it: rows of tables instead of text
columns, so that texts are tokenised once (`hlm.batches`) and frozen vectors come from the store's memory map.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from hlm.artefacts import HlmError, fingerprint_json, read_manifest, write_json
from hlm.batches import GroupedBatches
from hlm.config import check_processes
from hlm.encoders import encode
from hlm.evaluation import Qrels, dense_run, mean, per_query
from hlm.index import AdIndex
from hlm.planner import check_step

logger = logging.getLogger(__name__)

STATE = "state.safetensors"
WHOLE = "whole"  # a file that a checkpoint has once every process has written its part
IDENTITY = "identity.json"
# Arguments that say where and how to report, not what is computed: they may change between a run and its resumption.
REPORTING = {"output_dir", "run_name", "logging_dir", "logging_steps", "report_to", "disable_tqdm", "save_total_limit"}


@dataclass
class TrainingArguments(SentenceTransformerTrainingArguments):
    """sentence-transformers' training arguments with this project's defaults; every one can be set in YAML."""

    dataloader_drop_last: bool = field(default=True)  # ranks must see equally many rows
    remove_unused_columns: bool = field(default=False)
    report_to: str = field(default="none")
    save_total_limit: int | None = field(default=2)
    logging_steps: float = field(default=50)
    lr_scheduler_type: str = field(default="cosine")
    warmup_steps: float = field(default=0.05)

    def __post_init__(self) -> None:
        # Left alone, several processes without an accelerator would each take themselves for the only one.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        check_processes(self.world_size)

    def check_hardware(self, step: str, config: Any) -> None:
        """Refuses a recipe's settings before any weights load, as `hlm.planner.check_step` says."""
        sharded = bool(self.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")
        check_step(step, vars(config) | vars(self), gpus=self.world_size, sharded=sharded)


def recorded(args: TrainingArguments) -> dict[str, Any]:
    """The training arguments that were set to something else than their default, for manifests: JSON values."""
    values = args.to_dict()  # masks tokens
    default = TrainingArguments(output_dir=args.output_dir).to_dict()
    changed = {name: value for name, value in values.items() if value != default.get(name) and name not in REPORTING}
    return {name: value for name, value in changed.items() if isinstance(value, str | int | float | bool | None)}


class DevRetrieval(BaseEvaluator):
    """nDCG@10 and precision@10 of the model in training on dev queries: what checkpoints are chosen by.

    Alignment loss predicts ranking only loosely, so no checkpoint is ever chosen by loss.

    Args:
        texts: dev query id -> text.
        qrels: the dev judgements.
        index: frozen document vectors; or None, with `documents` (id -> text) to be encoded anew each time, as for a
            teacher, whose own document vectors move.
    """

    def __init__(
        self,
        texts: Mapping[str, str],
        qrels: Qrels,
        *,
        index: AdIndex | None = None,
        documents: Mapping[str, str] | None = None,
        prompt_name: str = "query",
    ) -> None:
        super().__init__()
        self.texts, self.qrels, self.index, self.documents = texts, qrels, index, documents
        self.prompt_name = prompt_name
        self.primary_metric = "dev_ndcg@10"

    def __call__(self, model: SentenceTransformer, output_path: str | None = None, epoch: float = -1, steps: int = -1):
        index = self.index
        if index is None:
            vectors = encode(model, list(self.documents.values()), prompt_name="document")
            index = AdIndex.from_vectors(vectors, list(self.documents))
        queries = encode(model, list(self.texts.values()), prompt_name=self.prompt_name)
        run = dense_run(queries, index, list(self.texts), 100)
        scores = per_query(run, self.qrels, 10)
        metrics = {f"dev_{name}": mean(scores[name]) for name in ("ndcg@10", "precision@10")}
        logger.info("step %s: %s", steps, ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        return metrics


class RecipeTrainer(SentenceTransformerTrainer):
    """sentence-transformers' trainer over rows: `collate(rows)` makes a batch, `step_loss(model, batch)` its loss.

    Args:
        rows: number of training rows; a row's meaning is the recipe's.
        collate: list of row numbers -> dict of tensors and of features (nested dicts).
        step_loss: (model as wrapped for distribution, batch on the device) -> scalar.
        keys, group: which rows go into a batch together, see GroupedBatches.
        extra_state: tensors that must survive a kill beside weights and optimizer, updated in place by the recipe.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        args: TrainingArguments,
        *,
        rows: int,
        collate: Callable[[list[int]], dict[str, Any]],
        step_loss: Callable[[torch.nn.Module, dict[str, Any]], Tensor],
        keys: np.ndarray | None = None,
        group: int | None = None,
        evaluator: BaseEvaluator | None = None,
        extra_state: dict[str, Tensor] | None = None,
        callbacks: list | None = None,
    ) -> None:
        self.keys, self.group, self.step_loss = keys, group, step_loss
        self.extra_state = extra_state or {}
        super().__init__(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"row": np.arange(rows, dtype=np.int32)}),
            data_collator=_Collator(collate),
            evaluator=evaluator,
            loss=_Trained(model),
            callbacks=[_Epochs(self), *(callbacks or [])],
        )
        if self.is_fsdp_enabled:
            if all(parameter.requires_grad for parameter in model.parameters()):
                raise HlmError("FSDP shards a teacher under LoRA; a student fits every GPU: launch with DDP instead")
            # accelerate would shard the last child called a norm as a layer of its own, and takes Normalize for it.
            model.base_model_prefix = "no_such_child"

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """No card from the trainer: it would describe a column of row numbers."""

    def get_batch_sampler(self, dataset, batch_size, drop_last, valid_label_columns=None, generator=None, seed=0):
        self.batches = GroupedBatches(
            len(dataset), batch_size, seed, keys=self.keys, group=self.group, drop_last=drop_last
        )
        return self.batches

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = self.step_loss(model, inputs)
        return (loss, {}) if return_outputs else loss

    def trained_tensors(self) -> dict[str, Tensor]:
        """Name -> whole tensor of every parameter that trains: under LoRA the adapter's alone. Every process must call
        it: under FSDP each holds a part of every tensor."""
        return {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
            for name, tensor in self._trained().items()
        }

    def _trained(self) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # Only what trains: a checkpoint of an 8B teacher under LoRA holds the adapter, not 16 GB of frozen weights.
        tensors = {f"model.{name}": tensor.contiguous() for name, tensor in self.trained_tensors().items()}
        tensors |= {f"extra.{name}": tensor.contiguous() for name, tensor in self.extra_state.items()}
        if self.args.should_save:  # every process comes here, one writes
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, str(folder / STATE))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        kept, self.args.save_total_limit = self.args.save_total_limit, None  # older ones go once this one is whole
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = kept
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            (folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}" / WHOLE).touch()
            rotate_checkpoints(str(folder), kept, self.state.best_model_checkpoint, use_mtime=True)

    def _load_from_checkpoint(self, checkpoint_path: str, model: torch.nn.Module | None = None) -> None:
        tensors = load_file(str(Path(checkpoint_path) / STATE))
        trained = self._trained()
        found = {name[len("model.") :]: tensor for name, tensor in tensors.items() if name.startswith("model.")}
        if found.keys() != trained.keys():
            raise HlmError(f"{checkpoint_path} does not hold this model's weights; delete {self.args.output_dir}")
        with torch.no_grad():
            for name, tensor in found.items():
                part = trained[name]
                if isinstance(part, DTensor):
                    tensor = distribute_tensor(tensor.to(part.device), part.device_mesh, part.placements)
                part.copy_(tensor)
            for name, tensor in self.extra_state.items():
                tensor.copy_(tensors[f"extra.{name}"])

    def _load_best_model(self) -> None:
        # The parent's version logs an error and goes on with the last weights; a best model that is lost must stop.
        logger.info("best: %s (%.4f)", Path(self.state.best_model_checkpoint).name, self.state.best_metric)
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class _Trained(torch.nn.Module):
    """What the optimizer is made for: sentence-transformers trains the parameters of the loss module, not the model's.
    The loss itself is computed by `RecipeTrainer.compute_loss`."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model


class _Epochs(TrainerCallback):
    """Tells the batches which epoch begins: through the samplers that accelerate puts around them, on several
    processes and on resuming within an epoch, they would not hear of it."""

    def __init__(self, trainer: RecipeTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.batches.set_epoch(int(state.epoch or 0))


class _Collator:
    valid_label_columns: list[str] = []  # asked for by sentence-transformers' loader

    def __init__(self, collate: Callable[[list[int]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, items: list[dict[str, int]]) -> dict[str, Any]:
        return self.collate([item["row"] for item in items])


def up_to_date(folder: str | Path, kind: str, identity: dict[str, Any]) -> bool:
    """Whether `folder` already holds this artefact, made from the same inputs with the same configuration."""
    if not (Path(folder) / "hlm.json").is_file():
        return False
    manifest = read_manifest(folder, kind)
    same = fingerprint_json({name: manifest[name] for name in ("inputs", "config")}) == fingerprint_json(identity)
    if same:
        logger.info("%s: up to date", folder)
    return same


def train(trainer: RecipeTrainer, identity: dict[str, Any]) -> None:
    """Trains, or goes on from the last whole checkpoint in `output_dir`, to the same weights as a run never stopped.

    Args:
        identity: {"inputs": fingerprints, "config": values}: what this run is. Kept beside the checkpoints.

    Raises:
        HlmError: the checkpoints there belong to another run; the message names what differs.
    """
    # Other processes draw other batches.
    identity = identity | {"config": identity["config"] | {"processes": trainer.args.world_size}}
    folder = Path(trainer.args.output_dir)
    path = folder / IDENTITY
    if path.is_file():
        _same_run(path, identity)
    checkpoint = broadcast_object_list([last_checkpoint(folder)])[0]
    if trainer.is_world_process_zero():
        write_json(path, identity)
    trainer.accelerator.wait_for_everyone()
    if checkpoint:
        logger.info("resuming from %s", checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)


def _same_run(path: Path, identity: dict[str, Any]) -> None:
    before = json.loads(path.read_text())
    for part in ("inputs", "config"):
        old, new = before.get(part, {}), json.loads(json.dumps(identity[part]))
        differing = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        if differing:
            name = differing[0]
            raise HlmError(
                f"{path.parent} holds checkpoints of another run: {part} '{name}' was {old.get(name)!r}, now "
                f"{new.get(name)!r}; set it back to resume, or delete {path.parent} to start anew"
            )


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint; a kill while one was written leaves it without the mark."""
    whole = [path.parent for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{WHOLE}")]
    return str(max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if whole else None


def finish(trainer: RecipeTrainer) -> None:
    """Removes the checkpoints once the artefact they led to is whole; no process goes on before that."""
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)


def set_dropout(model: SentenceTransformer, probability: float) -> None:
    """Sets every dropout of the model. A student aligned by L2 wants none: it would learn to answer noise."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = probability


def as_config(config: Any, args: TrainingArguments | None = None) -> dict[str, Any]:
    """A recipe's dataclass (and training arguments) as the JSON values of a manifest's `config`."""
    values = {item.name: getattr(config, item.name) for item in fields(config) if item.name != "output"}
    return values | ({"training": recorded(args)} if args is not None else {})


def check_student(folder: str | Path, teacher: str) -> None:
    """Refuses a student that was pruned or aligned for another teacher's space.

    Raises:
        HlmError: the student's manifest is missing or names another teacher.
    """
    found = read_manifest(folder, "student")["inputs"].get("teacher")
    if found != teacher:
        raise HlmError(
            f"expected a student of teacher {teacher} (the vectors'), found {folder}, a student of teacher {found}; "
            "align it to this teacher, or name the other teacher's vectors"
        )
