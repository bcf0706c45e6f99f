"""What a step of training, or a batch of embedding, takes of an ideal machine: FLOPs, bytes, and the time they allow.

No weights and no GPU are needed. The lengths of the texts are the plan's means, without padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hlm.planning.footprint import Precision, Shape, forward_flops, training_flops
from hlm.planning.hardware import GPUS, Gpu, Training
from hlm.planning.phases import (
    REFINEMENT_MATRICES,
    SEARCH_FLOPS,
    Phase,
    TrainingPhase,
    align_phase,
    embed_phase,
    refine_phase,
    teacher_phases,
)
from hlm.planning.settings import Assumptions
from hlm.training.gradcache import rows_of_short_texts

PREDICTED = ("H100", "H200")
# Share of the data sheet's bytes/s that reads and writes of large tensors reach. The shares of its FLOP/s are
# `teacher_utilisation`, `embed_utilisation` and `student_utilisation` of the plan's assumptions.
BANDWIDTH_UTILISATION = 0.8
ADAMW_BYTES = 28  # of a trained fp32 weight, in a fused step: gradient read; weight and two moments read and written


@dataclass
class Work:
    """What a step (or a text embedded) takes of an ideal machine. `rows`: training rows, or texts."""

    rows: int
    flops: float
    bytes: float
    utilisation: float  # of the data sheet's FLOP/s
    fp32_flops: float = 0.0  # of the loss, without TF32

    def seconds(self, gpu: Gpu) -> float:
        """Arithmetic or memory, whichever takes longer. What launches and the host take is not in it."""
        arithmetic = self.flops / (gpu.flops * self.utilisation) + self.fp32_flops / SEARCH_FLOPS
        return max(arithmetic, self.bytes / (gpu.bandwidth * BANDWIDTH_UTILISATION))


def predicted(work: Work, gpu: Gpu, peak_memory: int) -> dict[str, float]:
    """The figures of `measured`, from FLOPs and bytes; `peak_memory` is the planner's."""
    seconds = work.seconds(gpu)
    return {
        "step_seconds": seconds,
        "rows_per_s": work.rows / seconds,
        "peak_memory_allocated": peak_memory,
        "fraction_of_peak": work.flops / seconds / gpu.flops,
    }


def predictions(work: Work, peak_memory: int) -> dict[str, Any]:
    return {name: predicted(work, GPUS[name], peak_memory) for name in PREDICTED}


def lora_work(shape: Shape, step: Mapping[str, Any], sizes: Assumptions) -> tuple[Work, TrainingPhase]:
    """One step of the teacher's training, and its phase in the plan of one GPU."""
    (phase,) = (phase for phase in teacher_phases(shape, step, sizes, 1) if isinstance(phase, TrainingPhase))
    training = phase.training
    (_, query), (_, document) = training.rows
    chunks = [training.chunk and rows_of_short_texts(training.chunk, query, document), training.chunk]
    calls = [
        (rows, tokens)
        for (each, _), tokens, chunk in zip(training.rows, _mean_lengths(training, sizes), chunks, strict=True)
        for rows in _chunks(training.batch * each, chunk)
    ]
    return _training_work(training, calls, sizes.teacher_utilisation), phase


def embed_work(shape: Shape, step: Mapping[str, Any], sizes: Assumptions) -> tuple[Work, Phase]:
    """One batch of ads through the teacher, and the plan's phase that embeds the corpus."""
    phase = embed_phase(shape, {**step, "parts": ["corpus"]}, sizes, step["dim"] or shape.hidden)
    limit = step["max_seq_length"] or sizes.longest_document
    tokens = min(sizes.document_tokens, limit)
    rows = max(1, int(step["batch_tokens"] // tokens))
    flops = forward_flops(shape, rows, tokens)
    moved = forward_bytes(shape, [(rows, tokens)], Precision(step["dtype"]))
    return Work(rows, flops, moved, sizes.embed_utilisation), phase


def align_work(shape: Shape, step: Mapping[str, Any], sizes: Assumptions) -> tuple[Work, TrainingPhase]:
    """One step of alignment, and its phase in the plan of one GPU."""
    phase = align_phase("align", shape, {}, step, sizes, 1)
    return _student_work(phase.training, sizes), phase


def refine_work(shape: Shape, step: Mapping[str, Any], sizes: Assumptions) -> tuple[Work, TrainingPhase]:
    """One step of refinement, its phase in the plan of one GPU. Searches for hard negatives are not in it."""
    phase = refine_phase(shape, step, sizes, 1, shape.hidden)
    phase.search_flops = 0.0
    work = _student_work(phase.training, sizes)
    batch, pool = step["per_device_train_batch_size"], min(step["pool"], sizes.documents)
    ads = pool + batch * (1 + step["hard_negatives"])
    work.fp32_flops = loss_flops(batch, pool, shape.hidden)
    # fp16 rows gathered; fp32 copies written, normalised, and read by both products of the loss.
    work.bytes += ads * shape.hidden * (2 + 5 * 4) + REFINEMENT_MATRICES * 2 * 4 * batch * pool
    return work, phase


def loss_flops(batch: int, pool: int, width: int) -> float:
    """Of a refinement step's loss: similarities to the pool, and their gradient for the queries."""
    return 2 * 2.0 * batch * pool * width


def _student_work(training: Training, sizes: Assumptions) -> Work:
    calls = [(training.batch, min(sizes.query_tokens, training.rows[0][1]))]
    return _training_work(training, calls, sizes.student_utilisation)


def _mean_lengths(training: Training, sizes: Assumptions) -> tuple[float, float]:
    (_, query), (_, document) = training.rows
    return min(sizes.query_tokens + sizes.prompt_tokens, query), min(sizes.document_tokens, document)


def _chunks(rows: int, chunk: int | None) -> list[int]:
    chunk = chunk or rows
    return [min(chunk, rows - start) for start in range(0, rows, chunk)]


def _training_work(training: Training, calls: Sequence[tuple[int, float]], utilisation: float) -> Work:
    shape, precision = training.shape, training.precision
    rank, checkpointing, caching = precision.lora_rank, training.checkpointing, bool(training.chunk)
    flops = sum(
        training_flops(shape, rows, tokens, lora_rank=rank, checkpointing=checkpointing, caching=caching)
        for rows, tokens in calls
    )
    passes = (2 if rank else 3) + checkpointing + caching  # as `training_flops` counts them
    trained = shape.lora_parameters(rank) if rank else shape.parameters
    moved = passes * forward_bytes(shape, calls, precision) + ADAMW_BYTES * trained
    return Work(training.batch, flops, moved, utilisation)


def forward_bytes(shape: Shape, calls: Sequence[tuple[int, float]], precision: Precision) -> float:
    """Bytes that encoding moves at the least: every linear layer reads its weights and its input and writes its output,
    once in each call of (rows, tokens a row); what lies between them is taken as fused."""
    weights = shape.layers * shape.layer_weights * precision.weight_bytes
    if precision.lora_rank:
        weights += 4 * shape.lora_parameters(precision.lora_rank)
    token = shape.layers * sum(into + out for into, out in shape.linears) * precision.activation_bytes
    return sum(weights + rows * tokens * token for rows, tokens in calls)
