"""GPUs: what they hold and how fast they are, which is the smallest that a step fits on, and what to change where none
does."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from hlm.artefacts import HlmError
from hlm.planning.footprint import Calls, Precision, Shape, training_memory

GIB = 1024**3
# Kept for the CUDA context, libraries' workspaces and what the allocator cannot use between blocks.
CONTEXT_BYTES, FRAGMENTED = GIB, 0.05


@dataclass(frozen=True)
class Gpu:
    """`memory`: bytes that torch reports; of the data sheet, `flops`: dense bf16 FLOP/s with fp32 sums, `bandwidth`:
    bytes/s of the memory."""

    name: str
    memory: int
    flops: float
    bandwidth: float = 0.0

    @property
    def usable(self) -> int:
        return int(self.memory * (1 - FRAGMENTED)) - CONTEXT_BYTES


# Smallest first. Memory as `torch.cuda.get_device_properties` gives it, a little below the advertised figure.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("RTX4090", int(23.5 * GIB), 165e12, 1.008e12),
        Gpu("A100-40", int(39.4 * GIB), 312e12, 1.555e12),
        Gpu("H100", int(79.1 * GIB), 989e12, 3.35e12),
        Gpu("A100-80", int(79.2 * GIB), 312e12, 2.039e12),
        Gpu("H200", int(139.8 * GIB), 989e12, 4.8e12),
    )
}


def parse_gpus(text: str) -> tuple[int, Gpu]:
    """(number of GPUs on all machines, GPU) of "H100", "8xH100" or, on two machines, "2x8xH100".

    Raises:
        HlmError: another form, a count below 1, or a GPU that is not in the table.
    """
    counts, gpu = _parsed(text)
    return math.prod(counts), gpu


def machines_of(text: str) -> int:
    """The machines in what `parse_gpus` reads: "2x8xH100" names two, everything else one."""
    counts, _ = _parsed(text)
    return counts[0] if len(counts) == 2 else 1


def _parsed(text: str) -> tuple[list[int], Gpu]:
    match = re.fullmatch(r"((?:[0-9]+\s*x\s*){0,2})([A-Za-z0-9-]+)", text.strip())
    names = {name.lower(): name for name in GPUS}
    counts = [int(count) for count in re.findall("[0-9]+", match[1])] if match else []
    if match is None or 0 in counts or match[2].lower() not in names:
        near = difflib.get_close_matches(match[2].lower() if match else text.lower(), names, n=1, cutoff=0.4)
        times = "".join(f"{count}x" for count in counts)
        hint = f"; did you mean '{times}{names[near[0]]}'?" if near else ""
        raise HlmError(
            f"gpus: expected [machines]x[count]x[name], machines and count where there are more than 1, with a name of "
            f"{', '.join(GPUS)}, found {text!r}{hint}"
        )
    return counts, GPUS[names[match[2].lower()]]


@dataclass(frozen=True)
class Training:
    """A training step as far as memory depends on it.

    Attributes:
        rows: (rows a training row, longest padded tokens) of each kind of text: queries, documents, ...
        batch: training rows a GPU and step. chunk: rows encoded at a time under gradient caching, or None.
        loss: rows a GPU -> bytes that the loss needs.
    """

    shape: Shape
    precision: Precision
    rows: tuple[tuple[int, int], ...]
    batch: int
    chunk: int | None
    checkpointing: bool
    loss: Callable[[int], int]

    def memory(self, gpus: int = 1, sharded: bool = False) -> dict[str, int]:
        """Bytes a GPU at the peak, part by part; only the teacher, under LoRA, is ever sharded."""
        calls: Calls = [(self.batch * rows, tokens) for rows, tokens in self.rows]
        if self.chunk:  # one chunk's activations at a time
            chunks = [(min(self.chunk, rows), tokens) for rows, tokens in calls]
            calls = [max(chunks, key=lambda chunk: chunk[0] * chunk[1])]
        return training_memory(
            self.shape,
            calls,
            self.precision,
            checkpointing=self.checkpointing,
            gpus=gpus,
            sharded=sharded and self.precision.lora_rank is not None,
            loss_bytes=self.loss(self.batch),
        )

    def peak(self, gpus: int = 1, sharded: bool = False) -> int:
        return sum(self.memory(gpus, sharded).values())

    @property
    def knob(self) -> str:
        return "cache_chunk" if self.chunk else "per_device_train_batch_size"

    def largest(self, usable: int, gpus: int = 1, sharded: bool = False) -> int:
        """The largest value of `knob`, up to the present one, whose peak is within `usable` bytes; 0 where none is."""
        low, high = 0, self.chunk or self.batch
        while low < high:
            middle = (low + high + 1) // 2
            changed = replace(self, chunk=middle) if self.chunk else replace(self, batch=middle)
            low, high = (middle, high) if changed.peak(gpus, sharded) <= usable else (low, middle - 1)
        return low


def smallest(peak: Callable[[int, bool], int], *, shards: bool = True) -> str:
    """The first of one GPU, smallest first, then 2, 4 and 8 under FSDP (where `shards`) whose memory holds the peak.

    Args:
        peak: (GPUs, sharded) -> bytes a GPU.
    """
    for count in (1, 2, 4, 8) if shards else (1,):
        for gpu in GPUS.values():
            if peak(count, count > 1) <= gpu.usable:
                return f"{count}x {gpu.name}" + (" with FSDP" if count > 1 else "")
    return "none of the table"


def remedy(training: Training, usable: int, gpus: int, sharded: bool) -> str:
    """The nearest setting that fits into `usable` bytes a GPU, in words."""
    found = []
    if value := training.largest(usable, gpus, sharded):
        found.append(f"{training.knob}: {value}")
    if not training.checkpointing and training.shape.layers:
        again = replace(training, checkpointing=True)
        if value := again.largest(usable, gpus, sharded):
            found.append(f"gradient_checkpointing: true with {again.knob}: {value}")
    split = training.precision.lora_rank is not None and gpus > 1 and not sharded
    if split and training.peak(gpus, True) <= usable:
        found.append("FSDP, which splits weights, gradients and optimizer over the GPUs")
    return f"set {' or '.join(found)}" if found else f"take other hardware: {smallest(training.peak)}"


def refuse(step: str, training: Training, gpu: Gpu, gpus: int = 1, sharded: bool = False) -> None:
    """Stops before any weights load where a step cannot fit.

    Raises:
        HlmError: with both numbers, the parts, and the nearest setting that works.
    """
    memory = training.memory(gpus, sharded)
    if (peak := sum(memory.values())) > gpu.usable:
        parts = ", ".join(f"{name} {value / GIB:.1f}" for name, value in memory.items() if value >= 0.05 * GIB)
        raise HlmError(
            f"{step}: expected at most {gpu.usable / GIB:.1f} GiB a GPU ({gpu.name}), found {peak / GIB:.1f} "
            f"({parts}); {remedy(training, gpu.usable, gpus, sharded)}"
        )
