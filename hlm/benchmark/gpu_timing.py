"""Steps of training under the clock, and what they say beside the plan: seconds, rows, FLOPs and peaks of memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback, TrainerControl, TrainerState

from hlm.benchmark.gpu_work import Work, predictions
from hlm.benchmark.latency import synchronise
from hlm.planning.hardware import GPUS, Gpu
from hlm.planning.phases import Phase, TrainingPhase
from hlm.training.trainer import RecipeTrainer, TrainingArguments


@dataclass
class Ran:
    """Steps that were run: seconds of a step in every measured block, shapes of every forward pass, peaks of memory."""

    steps: int
    block_seconds: list[float]
    warm_up_seconds: float
    shapes: dict[str, list[tuple[int, int]]]
    peaks: dict[str, Any]


class _Clock(TrainerCallback):
    """Times blocks of steps after one step of warming up; stops the training when the time is over."""

    def __init__(self, seconds: float, block: int) -> None:
        self.until, self.block = perf_counter() + seconds, block
        self.blocks: list[float] = []
        self.warm_up = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.last = perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        done = state.global_step - 1
        if done and done % self.block:
            return
        synchronise()
        now = perf_counter()
        if done:
            self.blocks.append((now - self.last) / self.block)
            control.should_training_stop = control.should_training_stop or now > self.until
        else:
            self.warm_up = now - self.last
            reset_peak()
        self.last = perf_counter()


def run_steps(
    model: SentenceTransformer,
    collate: Callable[[list[int]], dict[str, Any]],
    loss: Callable[[torch.nn.Module, dict[str, Any]], torch.Tensor],
    count: int,
    step: Mapping[str, Any],
    *,
    steps: int,
    seconds: float,
    block: int = 1,
    keys: np.ndarray | None = None,
) -> Ran:
    """Trains by the recipes' trainer with the step's batch and precision, for `steps` steps in whole blocks at most."""
    shapes: dict[str, list[tuple[int, int]]] = {}
    block = min(block, steps)
    steps -= steps % block

    def noted(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        for name in ("query", "document"):
            chunks = batch.get(name, [])
            for chunk in chunks if isinstance(chunks, list) else [chunks]:
                shapes.setdefault(name, []).append(tuple(chunk["input_ids"].shape))
        return loss(model, batch)

    clock = _Clock(seconds, block)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=step["per_device_train_batch_size"],
            max_steps=1 + steps,
            bf16=step["bf16"],
            use_cpu=model.device.type == "cpu",
            save_strategy="no",
            disable_tqdm=True,
            learning_rate=1e-5,
        )
        trainer = RecipeTrainer(model, args, rows=count, collate=collate, step_loss=noted, keys=keys, callbacks=[clock])
        trainer.train()
    ran = block * len(clock.blocks)
    share = ran / (ran + 1)  # the first step warmed up
    kept = {name: found[len(found) - round(len(found) * share) :] for name, found in shapes.items()}
    return Ran(ran, clock.blocks, clock.warm_up, kept, peaks(model))


def report(ran: Ran, flops: float, work: Work, phase: TrainingPhase, batch: int, device: str) -> dict[str, Any]:
    """`flops`: of one step, at the lengths that were measured."""
    seconds, gpu = float(np.median(ran.block_seconds)), this_gpu(device)
    measured = {
        "steps": ran.steps,
        "step_seconds": seconds,
        "rows_per_s": batch / seconds,
        "warm_up_seconds": ran.warm_up_seconds,
        "blocks_seconds": ran.block_seconds,
        "flops_a_step": flops,
        "fraction_of_peak": flops / seconds / gpu.flops if gpu else None,
        **ran.peaks,
    }
    return facts(measured, planned_of(phase, gpu, batch, max(1, phase.steps) * batch), work, phase, device)


def facts(measured: dict, planned: dict, work: Work, phase: Phase, device: str) -> dict[str, Any]:
    ratios = {}
    for name in ("step_seconds", "peak_memory_allocated"):
        if planned[name] and measured[name]:
            ratios[name] = measured[name] / planned[name]
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "measured": measured,
        "planned": planned,
        "measured_over_planned": ratios,
        **expected(work, phase),
    }


def expected(work: Work, phase: Phase) -> dict[str, Any]:
    """What a stage knows before it runs: what a step takes, and the time that follows on each GPU of `PREDICTED`."""
    return {"work": asdict(work), "predicted": predictions(work, phase.peak)}


def planned_of(phase: Phase, gpu: Gpu | None, rows: int, all_rows: int) -> dict[str, Any]:
    """What the planner says of `rows` of the phase's `all_rows` rows; no times without a GPU that it knows."""
    seconds = phase.hours(1, gpu) * 3600 * rows / all_rows if gpu else None
    return {
        "step_seconds": seconds,
        "rows_per_s": rows / seconds if seconds else None,
        "peak_memory_allocated": phase.peak,
        "memory": phase.memory,
        "utilisation": phase.utilisation,
    }


def this_gpu(device: str) -> Gpu | None:
    """The planner's entry for the GPU at hand: the longest name that occurs in the device's, or None."""
    if not device.startswith("cuda"):
        return None
    named = torch.cuda.get_device_name().replace(" ", "").lower()
    found = [gpu for name, gpu in GPUS.items() if name.split("-")[0].lower() in named]
    memory = torch.cuda.get_device_properties(0).total_memory
    return min(found, key=lambda gpu: abs(gpu.memory - memory), default=None)


def timed(call: Callable[[], Any]) -> float:
    synchronise()
    began = perf_counter()
    call()
    synchronise()
    return perf_counter() - began


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peaks(model: SentenceTransformer) -> dict[str, Any]:
    cuda = model.device.type == "cuda"
    return {
        "peak_memory_allocated": torch.cuda.max_memory_allocated() if cuda else None,
        "peak_memory_reserved": torch.cuda.max_memory_reserved() if cuda else None,
    }
