"""What the three training recipes share: the trainer, the dev retrieval, exact resume.

The loop is sentence-transformers' trainer. What differs is what flows through it: rows of tables instead of text
columns, so that texts are tokenised once (`hlm.training.batches`) and frozen vectors come from the store's memory map.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import rotate_checkpoints

from hlm.artefacts import HlmError, write_json
from hlm.config import check_processes
from hlm.encoders.loading import check_device, devices
from hlm.encoders.padding import leave_out_masks
from hlm.machine import computes_in_bf16
from hlm.planning.plan import check_step
from hlm.redaction import is_secret
from hlm.training.bar import REPLACED, TrainingBar
from hlm.training.batches import GroupedBatches
from hlm.training.checkpoints import (
    IDENTITY,
    STATE,
    TRAINER_STATE,
    check_same_run,
    checkpoint_folder,
    fault,
    last_checkpoint,
    mark_whole,
)
from hlm.training.dev_retrieval import on_dev

logger = logging.getLogger(__name__)

START = "start.json"  # what a run measured on dev before its first step
# Arguments that say where and how to report, or how fast, not what is computed: they may change between a run and its
# resumption.
REPORTING = {"output_dir", "run_name", "logging_dir", "logging_steps", "report_to", "disable_tqdm", "save_total_limit"}
# Those that are mappings and change the weights; others, such as accelerator_config, follow from the machine.
MAPPINGS = {"learning_rate_mapping", "lr_scheduler_kwargs"}
REPORTING |= {f"dataloader_{name}" for name in ("num_workers", "prefetch_factor", "persistent_workers", "pin_memory")}


@dataclass
class TrainingArguments(SentenceTransformerTrainingArguments):
    """sentence-transformers' training arguments with this project's defaults; every one can be set in YAML.

    Left as they are: AdamW is fused; `dataloader_num_workers` is 0, as cutting a batch from memory maps takes a
    millisecond or two while the GPU computes; DDP looks for unused parameters, since a BERT's pooler gets no gradient.
    """

    dataloader_drop_last: bool = field(default=True)  # ranks must see equally many rows
    remove_unused_columns: bool = field(default=False)
    use_cpu: bool | None = field(default=None, metadata={"help": "true: the CPU; false: a GPU; null: what is there"})
    report_to: str = field(default="none")
    save_total_limit: int | None = field(default=2)
    logging_steps: float = field(default=50)
    logging_nan_inf_filter: bool = field(default=False)  # looking at every step's loss makes the host wait for the GPU
    lr_scheduler_type: str = field(default="cosine")
    warmup_steps: float = field(default=0.05)

    def __post_init__(self) -> None:
        if self.use_cpu is False:
            check_device("accelerator", "use_cpu: false")
        # Left alone, several processes without an accelerator would each take themselves for the only one.
        self.use_cpu = bool(self.use_cpu) or not torch.accelerator.is_available()
        if self.use_cpu:
            self.dataloader_pin_memory = False  # pinned for a GPU that is not there
            if self.fp16:
                raise HlmError(f"fp16: expected a GPU, found none in use ({devices()}); leave fp16 out")
        elif self.dataloader_pin_memory and self.accelerator_config is None:  # type: ignore[has-type]
            self.accelerator_config = {"non_blocking": True}  # batches are copied while the step before computes
        super().__post_init__()
        check_processes(self.world_size)
        if self.resume_from_checkpoint:
            raise HlmError(
                "resume_from_checkpoint: a recipe resumes by itself from the last whole checkpoint beside its output; "
                "leave it out and run the same command again"
            )
        if self.load_best_model_at_end and self.save_strategy == "steps" and self.save_steps != self.eval_steps:
            steps = f"eval_steps {self.eval_steps} and save_steps {self.save_steps}"
            raise HlmError(f"load_best_model_at_end: expected each evaluated step to be saved, found {steps}; set one")

    @property
    def device(self) -> torch.device:
        found = super().device  # in several processes of older accelerate "cpu:0", onto which torch loads no checkpoint
        return torch.device("cpu") if found.type == "cpu" else found

    @property
    def sharded(self) -> bool:
        """Whether each GPU holds a part of the model (FSDP)."""
        return bool(self.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")

    def check_hardware(self, step: str, config: Any) -> None:
        """Refuses a recipe's settings before any weights load, as `hlm.planning.plan.check_step` says."""
        if self.use_cpu and self.bf16 and not computes_in_bf16():
            logger.warning("%s: bf16 is slow on this CPU (%s), which has no instructions for it", step, devices())
        check_step(step, vars(config) | vars(self), gpus=self.world_size, sharded=self.sharded)


def recorded(args: TrainingArguments) -> dict[str, Any]:
    """The training arguments that were set to something else than their default, for manifests: JSON values."""
    values = {name: value for name, value in args.to_dict().items() if not is_secret(name)}
    default = TrainingArguments(output_dir=args.output_dir).to_dict()
    changed = {name: value for name, value in values.items() if value != default.get(name) and name not in REPORTING}
    return {
        name: value
        for name, value in changed.items()
        if name in MAPPINGS or isinstance(value, str | int | float | bool | None)
    }


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
        leave_out_masks(model)  # every batch comes from `pad_rows`
        self.extra_state = extra_state or {}
        names = [name for name, _ in model.named_parameters()]
        for pattern in args.learning_rate_mapping:
            if not any(re.search(pattern, name) for name in names):
                raise HlmError(
                    f"learning_rate_mapping: expected patterns of parameters' names, found '{pattern}', which none of "
                    f"them has; some are {', '.join(names[:: max(1, len(names) // 4)])}"
                )
        super().__init__(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"row": np.arange(rows, dtype=np.int32)}),
            data_collator=_Collator(collate),
            evaluator=evaluator,
            loss=_Trained(model),
            callbacks=[_Epochs(self), *(callbacks or [])],
        )
        for shown in REPLACED:
            self.remove_callback(shown)
        self.add_callback(TrainingBar())
        if self.is_fsdp_enabled:
            if all(parameter.requires_grad for parameter in model.parameters()):
                raise HlmError("FSDP shards a teacher under LoRA; a student fits every GPU: launch with DDP instead")
            # accelerate would shard the last child called a norm as a layer of its own, and takes Normalize for it.
            model.base_model_prefix = "no_such_child"

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """No card from the trainer: it would describe a column of row numbers."""

    def get_batch_sampler(
        self,
        dataset: Dataset,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: Any = None,
        generator: Any = None,
        seed: int = 0,
    ) -> GroupedBatches:
        self.batches = GroupedBatches(
            len(dataset), batch_size, seed, keys=self.keys, group=self.group, drop_last=drop_last
        )
        return self.batches

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = self.step_loss(model, inputs)
        return (loss, {}) if return_outputs else loss

    def trained_tensors(self) -> dict[str, Tensor]:
        """Name -> whole tensor of every parameter that trains: under LoRA the adapter's alone. Every process must call
        it: under FSDP each holds a part of every tensor."""
        return {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
            for name, tensor in self._trained().items()
        }

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> None:
        """Sets what trains to whole tensors, as `trained_tensors` gives them. Every process must call it."""
        trained = self._trained()
        for name, tensor in tensors.items():
            part = trained[name]
            if isinstance(part, DTensor):
                tensor = distribute_tensor(tensor.to(part.device), part.device_mesh, part.placements)
            part.copy_(tensor)

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
        checkpoint = checkpoint_folder(self.args.output_dir, self.state.global_step)
        if self.args.should_save and checkpoint.exists():
            shutil.rmtree(checkpoint)  # one that was not resumed, as it was not whole
        self.accelerator.wait_for_everyone()
        kept, self.args.save_total_limit = self.args.save_total_limit, None  # older ones go once this one is whole
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = kept
        self.accelerator.wait_for_everyone()
        if not self.args.save_only_model:  # without the optimizer's state, a run would go on to other weights
            mark_whole(checkpoint)
        if self.args.should_save:
            rotate_checkpoints(str(self.args.output_dir), kept, self.state.best_model_checkpoint, use_mtime=True)

    def _init_training_state(self, *rest: Any) -> tuple[int, int]:
        # The state names the best checkpoint by its path, which is another once the run was moved: the parent would
        # then take the last weights for the best. It is one of the folders beside the checkpoint that is resumed.
        parent = logging.getLogger("transformers.trainer")
        level = parent.level
        parent.setLevel(logging.ERROR)  # it would warn of the path that is gone
        try:
            found = super()._init_training_state(*rest)
        finally:
            parent.setLevel(level)
        best = checkpoint_folder(self.args.output_dir, self.state.best_global_step or 0)
        if best.is_dir():
            self.state.best_model_checkpoint = str(best)
        return found

    def _load_from_checkpoint(self, checkpoint_path: str, model: torch.nn.Module | None = None) -> None:
        tensors = load_file(str(Path(checkpoint_path) / STATE))
        trained = self._trained()
        found = {name[len("model.") :]: tensor for name, tensor in tensors.items() if name.startswith("model.")}
        if found.keys() != trained.keys():
            raise HlmError(f"{checkpoint_path} does not hold this model's weights; delete {self.args.output_dir}")
        self.take(found)
        for name, tensor in self.extra_state.items():
            tensor.copy_(tensors[f"extra.{name}"])

    def _load_best_model(self) -> None:
        # The parent's version logs an error and goes on with the last weights; a best model that is lost must stop.
        best = Path(self.state.best_model_checkpoint)
        reason = fault(best, {STATE}) if not self.args.save_only_model else None
        if reason:
            raise HlmError(f"{best}, the best checkpoint, cannot be taken: {reason}; run the same command again")
        logger.info("best: %s (%.4f)", best.name, self.state.best_metric)
        self._load_from_checkpoint(str(best))


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

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.batches.set_epoch(int(state.epoch or 0))


class _Collator:
    valid_label_columns: ClassVar[list[str]] = []  # asked for by sentence-transformers' loader

    def __init__(self, collate: Callable[[list[int]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, items: list[dict[str, int]]) -> dict[str, Any]:
        return self.collate([item["row"] for item in items])


def train(
    trainer: RecipeTrainer, identity: dict[str, Any], *, then: Callable[[], None] | None = None, measure: bool = True
) -> dict[str, Any]:
    """Trains, or goes on from the last whole checkpoint in `output_dir`, to the same weights as a run never stopped.

    Args:
        identity: {"inputs": fingerprints, "config": values}: what this run is. Kept beside the checkpoints.
        then: changes the trained weights once more, before they are measured; every process calls it.
        measure: look at dev before and after.

    Returns:
        {"dev": {"metric", "start", "end"}}, what the weights reached on dev before and after: for the manifest.
        Empty without dev judgements.

    Raises:
        HlmError: the checkpoints there belong to another run; the message names what differs.
    """
    # Other processes draw other batches.
    identity = identity | {"config": identity["config"] | {"processes": trainer.args.world_size}}
    folder = Path(trainer.args.output_dir)
    check_same_run(folder, identity)
    checkpoint = None
    if trainer.is_world_process_zero():  # the others need not hash what it has hashed
        checkpoint = last_checkpoint(folder, best=trainer.args.load_best_model_at_end)
        write_json(folder / IDENTITY, identity)
    checkpoint, start = broadcast_object_list([checkpoint])[0], None
    if checkpoint:
        logger.info("resuming from %s", checkpoint)
        with contextlib.suppress(OSError, ValueError):  # then the manifest does not tell it
            start = json.loads((folder / START).read_text(encoding="utf-8"))
    else:
        start = on_dev(trainer) if measure else None
        if trainer.is_world_process_zero():
            write_json(folder / START, start)
    if not checkpoint or not _at_its_end(trainer, checkpoint):
        trainer.train(resume_from_checkpoint=checkpoint)
    if then is not None:
        then()
    end = on_dev(trainer) if measure else None
    return {} if end is None else {"dev": {"metric": "ndcg@10", "start": start, "end": end}}


def _at_its_end(trainer: RecipeTrainer, checkpoint: str) -> bool:
    """Whether the run was killed after its last step; then takes its weights. Resumed there, transformers' loop would
    train one step more before it looks at their number."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE))
    if state.global_step < state.max_steps:
        return False
    trainer.state = state
    best = state.best_global_step if trainer.args.load_best_model_at_end else None
    trainer._load_from_checkpoint(str(checkpoint_folder(trainer.args.output_dir, best)) if best else checkpoint)
    return True


def finish(trainer: RecipeTrainer, measured: dict[str, Any]) -> None:
    """Removes the checkpoints once the artefact they led to is whole; no process goes on before that. Says so where
    training did harm.

    Args:
        measured: what `train` returned.
    """
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    dev = measured.get("dev") or {}
    if dev.get("start") is not None and dev["end"] < dev["start"]:
        logger.warning(
            "training did harm: nDCG@10 on dev is %.4f at the end, below %.4f where it started; lower learning_rate, "
            "set load_best_model_at_end, or use what it started from",
            dev["end"],
            dev["start"],
        )


def set_dropout(model: SentenceTransformer, probability: float) -> None:
    """Sets every dropout of the model. A student aligned by L2 wants none: it would learn to answer noise."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = probability
