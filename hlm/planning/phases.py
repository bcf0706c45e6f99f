"""The phases of a run and what each costs: GPU memory, FLOPs, time, disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hlm.artefacts import HlmError
from hlm.merge_weights import weights_of
from hlm.planning.footprint import Precision, Shape, forward_flops, inference_memory, training_flops
from hlm.planning.hardware import Gpu, Training, smallest
from hlm.planning.settings import Assumptions

# fp32 matrices that a loss holds at its peak for each of its similarities: measured, rounded up.
CONTRASTIVE_MATRICES, REFINEMENT_MATRICES = 12, 8
PADDING = 1.1  # padded tokens over real ones, in batches of similar length
SEARCH_FLOPS = 2e13  # a second and GPU, in fp32: exact search of the whole store, which the GPUs share
ID_BYTES = 12  # of a row id, compressed
AGREED_DOCUMENTS = 20_000  # at most: 20 that BM25 finds for each of 500 typed queries, and 20 of the backbone's
CHECKPOINTS = "checkpoints, until the step ends"  # on disk


@dataclass
class Phase:
    """One part of a step. `memory`: bytes a GPU; `flops`: of all GPUs; `disk`: bytes by what they hold."""

    step: str
    name: str
    memory: dict[str, int]
    flops: float = 0.0
    utilisation: float = 1.0
    disk: dict[str, int] = field(default_factory=dict)
    alone: bool = False  # every GPU does the same
    search_flops: float = 0.0  # in fp32, of all GPUs
    lookups: float = 0.0  # rows of a table read, of all GPUs, by what has no layers to compute
    steps: int | None = None
    step_seconds: float = 0.0  # no step is faster
    training: Training | None = None

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    def hours(self, count: int, gpu: Gpu) -> float:
        seconds = self.flops / (gpu.flops * self.utilisation * (1 if self.alone else count))
        seconds = max(seconds, (self.steps or 0) * self.step_seconds)
        return (seconds + self.search_flops / (count * SEARCH_FLOPS)) / 3600

    def smallest(self) -> str:
        """The smallest hardware that holds this phase."""
        if self.training is None:
            return smallest(lambda count, sharded: self.peak, shards=False)
        return smallest(self.training.peak)


@dataclass
class TrainingPhase(Phase):
    """A phase that trains: its steps, and what one of them holds."""

    steps: int = field(kw_only=True)
    training: Training = field(kw_only=True)


def padded(tokens: float, longest: int) -> float:
    return min(tokens * PADDING, longest)


def precision_of(step: Mapping[str, Any], lora_rank: int | None = None) -> Precision:
    return Precision(step.get("dtype", "float32"), bool(step["bf16"] or step["fp16"]), lora_rank)


def teacher_lengths(step: Mapping[str, Any], sizes: Assumptions) -> tuple[int, int]:
    """Padded tokens of the longest query with its instruction, and of the longest document."""
    limit = step["max_seq_length"]
    query = int(sizes.prompt_tokens + sizes.longest_query)
    return (query, sizes.longest_document) if limit is None else (min(query, limit), limit)


def teacher_training(shape: Shape, step: Mapping[str, Any], sizes: Assumptions, count: int) -> Training:
    """The teacher's training step on each of `count` GPUs, at the longest texts."""
    query, document = teacher_lengths(step, sizes)
    negatives = step["hard_negatives"]

    def loss(batch: int) -> int:
        vectors = 2 * batch * (2 + negatives) * shape.hidden * 4 + 2 * batch * count * shape.hidden * 4
        return CONTRASTIVE_MATRICES * 4 * batch * batch * count + vectors

    return Training(
        shape=shape,
        precision=precision_of(step, step["lora_rank"]),
        rows=((1, query), (1 + negatives, document)),
        batch=step["per_device_train_batch_size"],
        chunk=step["cache_chunk"],
        checkpointing=bool(step["gradient_checkpointing"]),
        loss=loss,
    )


def teacher_phases(shape: Shape, step: Mapping[str, Any], sizes: Assumptions, count: int) -> list[Phase]:
    training = teacher_training(shape, step, sizes, count)
    query_limit, document_limit = teacher_lengths(step, sizes)
    query = padded(sizes.query_tokens + sizes.prompt_tokens, query_limit)
    document = padded(sizes.document_tokens, document_limit)
    encoding = inference_memory(shape, max(1, 4096 // document_limit), document_limit, step["dtype"])
    busy = sizes.embed_utilisation
    phases: list[Phase] = []
    chosen_of = weights_of(step["merge_weight"])
    nobody_judged = chosen_of and sizes.unlabelled and not sizes.dev_documents  # then backbone and BM25 do
    if step["hard_negatives"] or nobody_judged:
        asked = sizes.judged_queries if step["hard_negatives"] else 0
        flops = forward_flops(shape, sizes.documents, document) + forward_flops(shape, asked, query)
        phases.append(
            Phase(
                "teacher",
                "mine hard negatives" if asked else "judge typed queries",
                encoding,
                flops,
                busy,
                disk={"backbone's vectors, until the step ends": store_bytes(sizes.documents, shape.hidden)},
                search_flops=2.0 * asked * sizes.documents * shape.hidden,
            )
        )
    pairs = min(sizes.judged_pairs, sizes.judged_queries * (step["pairs_per_query"] or sizes.judged_pairs))
    if chosen_of:  # every checkpoint is a candidate, and kept
        step = {**step, "save_total_limit": max(1, times("save", step, pairs, count))}
    steps, rows = steps_of(step, pairs, count)
    flops_of = partial(
        training_flops,
        shape,
        lora_rank=step["lora_rank"],
        checkpointing=training.checkpointing,
        caching=bool(training.chunk),
    )
    flops = flops_of(rows, query) + flops_of(rows * (1 + step["hard_negatives"]), document)
    adapter = shape.lora_parameters(step["lora_rank"])
    weights = shape.parameters * training.precision.weight_bytes
    train = TrainingPhase(
        "teacher",
        "train",
        training.memory(count, sizes.fsdp),
        flops,
        sizes.teacher_utilisation,
        disk={"merged model": weights, "adapter": 4 * adapter} | checkpoints(step, adapter),
        steps=steps,
        step_seconds=sizes.step_seconds,
        training=training,
    )
    rates = at_each_rate(train, step) if chosen_of else 1  # which rate is chosen with the weight, or not at all
    phases.append(train)
    searches = rates * times("eval", step, pairs, count)
    # The backbone and each checkpoint at each weight; or the start and the end.
    searches += 1 + rates * step["save_total_limit"] * len(chosen_of) if chosen_of else 2
    judged = AGREED_DOCUMENTS if nobody_judged else sizes.dev_documents
    flops = forward_flops(shape, searches * min(sizes.documents, judged + step["dev_documents"]), document)
    return [*phases, Phase("teacher", "dev retrieval", encoding, flops, busy, alone=True)]


def embed_phase(shape: Shape, step: Mapping[str, Any], sizes: Assumptions, dim: int) -> Phase:
    limit = step["max_seq_length"] or sizes.longest_document
    query = padded(sizes.query_tokens + sizes.prompt_tokens, limit)
    rows = {"corpus": sizes.documents, "unlabelled": sizes.unlabelled, "queries": sizes.queries}
    flops = sum(
        forward_flops(shape, rows[part], padded(sizes.document_tokens, limit) if part == "corpus" else query)
        for part in step["parts"]
    )
    memory = inference_memory(shape, max(1, step["batch_tokens"] // limit), limit, step["dtype"])
    disk = {part: store_bytes(rows[part], dim) for part in step["parts"]}
    return Phase("embed", "encode", memory, flops, sizes.embed_utilisation, disk=disk)


def prune_phase(before: Shape, after: Shape, step: Mapping[str, Any], sizes: Assumptions) -> Phase:
    """The cut alone, in one process. Layers and FFN units are scored on queries; a static student's tokens are encoded
    by the model that it is made of."""
    if after.layers:
        rows, longest = 64, sizes.longest_query
        passes = int(step["method"] == "norm_ratio" and not step["layers"] and step["keep"] is not None)
        passes += step["ffn"] is not None
        read = passes * min(step["calibration"], sizes.unlabelled or sizes.queries)
        tokens = padded(sizes.query_tokens, longest)
    else:
        longest = int(sizes.longest_query + sizes.prompt_tokens)
        rows, read = max(1, 4096 // longest), after.embeddings // after.hidden
        tokens = padded(sizes.query_tokens + sizes.prompt_tokens, longest)
    memory = inference_memory(before, rows if read else 0, longest, "float32")
    if after.layers:  # what is cut is a copy, made when the calibration is done
        memory["working"] = max(memory["working"], memory["weights"])
    flops = forward_flops(before, read, tokens)
    disk = {"student": 4 * after.parameters}
    return Phase("prune", "cut", memory, flops, sizes.embed_utilisation, disk=disk, alone=True)


def student_training(
    shape: Shape, step: Mapping[str, Any], sizes: Assumptions, loss: Callable[[int], int], prompt: bool = False
) -> Training:
    longest = int(sizes.longest_query + (sizes.prompt_tokens if prompt else 0))
    return Training(
        shape=shape,
        precision=precision_of(step),
        rows=((1, min(longest, step.get("max_seq_length") or longest)),),
        batch=step["per_device_train_batch_size"],
        chunk=None,
        checkpointing=bool(step["gradient_checkpointing"]),
        loss=loss,
    )


def student_phase(
    step_name: str, name: str, training: Training, step: Mapping[str, Any], rows: int, sizes: Assumptions, count: int
) -> TrainingPhase:
    shape = training.shape
    steps, rows = steps_of(step, rows, count)
    tokens = padded(sizes.query_tokens + (sizes.prompt_tokens if step.get("prompt") else 0), training.rows[0][1])
    flops = training_flops(shape, rows, tokens, checkpointing=training.checkpointing)
    disk = {"student": 4 * shape.parameters} | checkpoints(step, shape.parameters)
    return TrainingPhase(
        step_name,
        name,
        training.memory(count, sizes.fsdp),
        flops,
        sizes.student_utilisation,
        disk=disk,
        lookups=0.0 if shape.layers else rows * tokens,
        steps=steps,
        step_seconds=sizes.step_seconds,
        training=training,
    )


def align_training(shape: Shape, step: Mapping[str, Any], sizes: Assumptions) -> Training:
    return student_training(shape, step, sizes, lambda batch: 8 * batch * shape.hidden * 4, step["prompt"])


def align_phase(
    name: str, shape: Shape, stage: dict, step: Mapping[str, Any], sizes: Assumptions, count: int
) -> TrainingPhase:
    rows = {"unlabelled": sizes.unlabelled, "train": sizes.judged_queries}
    step = {**step, "num_train_epochs": stage.get("epochs", step["num_train_epochs"])}
    training = align_training(shape, step, sizes)
    return student_phase("align", name, training, step, sum(rows[part] for part in step["parts"]), sizes, count)


def refine_training(shape: Shape, step: Mapping[str, Any], sizes: Assumptions, count: int) -> Training:
    pool = min(step["pool"], sizes.documents)

    def loss(batch: int) -> int:
        ads = pool + batch * (1 + step["hard_negatives"])  # vectors of the pool, positives and hard negatives
        others = CONTRASTIVE_MATRICES * batch * batch * count if step["query_query"] else 0
        return 4 * (2 * ads * shape.hidden + REFINEMENT_MATRICES * batch * pool + others)

    return student_training(shape, step, sizes, loss)


def refine_phase(shape: Shape, step: Mapping[str, Any], sizes: Assumptions, count: int, dim: int) -> TrainingPhase:
    training = refine_training(shape, step, sizes, count)
    phase = student_phase("refine", "train", training, step, sizes.judged_pairs, sizes, count)
    epochs = epochs_of(step, sizes.judged_pairs, count)
    trials = at_each_rate(phase, step)
    mined = trials * math.ceil(epochs / max(1, step["refresh_epochs"])) if step["hard_negatives"] else 0
    phase.search_flops = 2.0 * (mined + bool(step["mask_top"])) * sizes.judged_queries * sizes.documents * dim
    return phase


def rates_of(step: Mapping[str, Any]) -> int:
    """How many learning rates a step trains at."""
    return len({step["learning_rate"], *step["try_learning_rates"]})


def at_each_rate(phase: TrainingPhase, step: Mapping[str, Any]) -> int:
    """Counts a training as often as `try_learning_rates` has it done, with what each leaves until the step ends."""
    trials = rates_of(step)
    phase.steps, phase.flops, phase.lookups = trials * phase.steps, trials * phase.flops, trials * phase.lookups
    phase.disk[CHECKPOINTS] *= trials
    return trials


def steps_an_epoch(step: Mapping[str, Any], rows: int, count: int) -> int:
    batch = step["per_device_train_batch_size"] * count
    if rows < batch:
        raise HlmError(
            f"expected at least one whole batch of {batch} rows ({step['per_device_train_batch_size']} on {count} "
            f"GPUs), found {rows}; the nearest per_device_train_batch_size that works is {max(1, rows // count)}"
        )
    return -(-(rows // batch) // max(1, step["gradient_accumulation_steps"]))


def steps_of(step: Mapping[str, Any], rows: int, count: int) -> tuple[int, int]:
    """(optimizer steps, rows seen by all GPUs) of a training step."""
    steps = int(step["num_train_epochs"] * steps_an_epoch(step, rows, count))
    if step["max_steps"] > 0:
        steps = step["max_steps"]
    batch = step["per_device_train_batch_size"] * count
    return steps, steps * max(1, step["gradient_accumulation_steps"]) * batch


def epochs_of(step: Mapping[str, Any], rows: int, count: int) -> int:
    """Passes over the rows that a training begins."""
    return math.ceil(steps_of(step, rows, count)[0] / steps_an_epoch(step, rows, count))


def times(what: str, step: Mapping[str, Any], rows: int, count: int) -> int:
    """How often a training does what its `<what>_strategy` and `<what>_steps` say, once more at its end if need be."""
    strategy, every = step[f"{what}_strategy"], step[f"{what}_steps"] or step["logging_steps"]
    if strategy == "epoch":
        return epochs_of(step, rows, count)
    steps, _ = steps_of(step, rows, count)
    return math.ceil(steps / (every if every >= 1 else max(1, math.ceil(every * steps)))) if strategy == "steps" else 0


def checkpoints(step: Mapping[str, Any], trained: int) -> dict[str, int]:
    """Weights and AdamW's two moments in fp32 for each checkpoint that is kept, until the step ends."""
    return {CHECKPOINTS: 12 * trained * (step["save_total_limit"] or 1)}


def store_bytes(rows: int, dim: int) -> int:
    """A vector store on disk: fp16 vectors and compressed ids."""
    return rows * (2 * dim + ID_BYTES)
