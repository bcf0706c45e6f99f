"""How far a query encoder's times are above what the machine allows: memory bandwidth and GEMM rate, both measured.

At batch 1 a query takes at least as long as the body's weights take to stream from memory, and as its multiply-adds
take at the rate of a large matrix product, whichever is longer (the roofline; Williams, Waterman and Patterson 2009).
Large batches are bound by arithmetic alone: their share of that rate is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from hlm.benchmark.latency import synchronise
from hlm.encoders.loading import DTYPES
from hlm.machine import instructions, other_load, read_counters
from hlm.planning.footprint import Shape, forward_flops
from hlm.report_types import Floor, Rates
from hlm.serving.engines import PRECISIONS

WEIGHT_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | {"int8": 1}
# Instructions with which a CPU multiplies faster than in float32; without them torch is slower by a hundred.
NATIVE = {"bfloat16": {"avx512_bf16", "amx_bf16", "bf16"}, "int8": {"avx2", "asimd"}}
SIDES = (768, 1536)  # of square matrices: in caches and beyond, the faster one counts
MIB = 2**20
LARGEST_MIB = 1024  # larger weights stream no slower


@dataclass(frozen=True)
class Work:
    """What an encoder must do for a sample of queries.

    Attributes:
        weights: parameters outside embedding tables; a lookup touches a few rows only.
        precision: of the weights, a key of `WEIGHT_BYTES`.
        tokens: of each query, special ones and the prompt counted, padding not.
        flops: of each query.
        left: of all that, what an encoder still multiplies that looks up what its first layer projects.
    """

    weights: int
    precision: str
    tokens: list[int]
    flops: list[float]
    left: Work | None = None

    @property
    def weight_bytes(self) -> int:
        return self.weights * WEIGHT_BYTES[self.precision]


def work_of(config: PretrainedConfig, tokens: Sequence[int], precision: str, *, lookup: bool = False) -> Work | None:
    """The work of a backbone, see `footprint.forward_flops`; None for a precision of weights of unknown size.

    Args:
        lookup: the encoder has tables for its first layer's queries, keys and values (`hlm.serving.online_graph`).
    """
    precision = PRECISIONS.get(precision, precision)
    if precision not in WEIGHT_BYTES:
        return None
    shape = Shape.of(config)
    weights = shape.parameters - shape.embeddings
    flops, left = [forward_flops(shape, 1, count) for count in tokens], None
    if lookup:
        tables = 3 * shape.hidden**2
        less = [of_query - 2 * tables * count for of_query, count in zip(flops, tokens, strict=True)]
        left = Work(weights - tables, precision, list(tokens), less)
    return Work(weights, precision, list(tokens), flops, left)


def measure_rates(works: Sequence[Work], *, device: str = "cpu", seconds: float = 0.5) -> Rates:
    """The best that this machine does, at the default number of threads; the fastest repeat counts.

    Args:
        works: bandwidth is measured over as many bytes as the weights of each have: small ones stay in a cache.
        seconds: for each figure and way to take it.

    Returns:
        {"bandwidth_gb_per_s": {MiB as text: GB/s}, "gemm_gflop_per_s": {precision: GFLOP/s}, "other_load": share of the
        CPUs that others took meanwhile, or None}. Precisions: float32 and those of the works that the device has
        instructions for; "int8" is of 8-bit integers with 32-bit sums.
    """
    before = read_counters()
    works = [*works, *(work.left for work in works if work.left)]
    bandwidth = {}
    for size in sorted({_mib(work) for work in works}):
        bandwidth[str(size)] = stream_rate(size * MIB, device=device, seconds=seconds) / 1e9
    cpu = torch.device(device).type == "cpu"
    has = set(instructions() or ())
    wanted = {work.precision for work in works if not cpu or NATIVE.get(work.precision, set()) & has}
    gemm = {
        precision: gemm_rate(precision, device=device, seconds=seconds) / 1e9
        for precision in sorted(wanted | {"float32"})
    }
    load = other_load(before, read_counters())
    return {"bandwidth_gb_per_s": bandwidth, "gemm_gflop_per_s": gemm, "other_load": load}


def _mib(work: Work) -> int:
    return min(LARGEST_MIB, max(1, round(work.weight_bytes / MIB)))


def stream_rate(size: int, *, device: str = "cpu", seconds: float = 0.5) -> float:
    """Bytes/s at which `size` bytes of weights are read: the faster of a product of matrix and vector and of a sum."""
    weights = torch.ones(max(1, size // 4096), 1024, device=device)
    vector = torch.ones(1024, device=device)
    taken = min(_fastest(lambda: weights @ vector, seconds / 2), _fastest(lambda: weights.sum(), seconds / 2))
    return weights.nbytes / taken


def gemm_rate(precision: str, *, device: str = "cpu", seconds: float = 0.5) -> float:
    """FLOP/s (a multiply-add is two) of a product of square matrices: the best over `SIDES` and, on a CPU, over torch
    and ONNX Runtime."""
    rates = []
    for side in SIDES:
        for call in _products(precision, side, device):
            rates.append(2 * side**3 / _fastest(call, seconds / len(SIDES)))
    return max(rates)


def _products(precision: str, side: int, device: str) -> list[Callable[[], Any]]:
    calls = []
    if precision in DTYPES:
        left, right = (torch.ones(side, side, dtype=DTYPES[precision], device=device) for _ in range(2))
        calls.append(lambda: left @ right)
    if torch.device(device).type == "cpu" and precision in ("float32", "int8"):
        calls.append(_onnx_product(precision, side))
    elif precision == "int8":
        a, b = (torch.ones(side, side, dtype=torch.int8, device=device) for _ in range(2))
        calls.append(lambda: torch._int_mm(a, b.t()))
    return calls


def _onnx_product(precision: str, side: int) -> Callable[[], Any]:
    """With constant weights, which ONNX Runtime packs once, as it does in a model."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    left = np.ones((side, side), np.float32 if precision == "float32" else np.uint8)
    weights = np.ones((side, side), np.float32 if precision == "float32" else np.int8)
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT) if precision == "float32" else (TensorProto.UINT8, TensorProto.INT32)
    operator = "MatMul" if precision == "float32" else "MatMulInteger"
    ports = [
        helper.make_tensor_value_info(name, kind, [side, side]) for name, kind in zip(("a", "c"), kinds, strict=True)
    ]
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["c"])],
        "product",
        ports[:1],
        ports[1:],
        [numpy_helper.from_array(weights, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"a": left})


@torch.inference_mode()
def _fastest(call: Callable[[], Any], seconds: float) -> float:
    """Seconds of the fastest of the calls that fit into `seconds`, three at the least; the first is not timed."""
    call()
    taken: list[float] = []
    end = perf_counter() + seconds
    while len(taken) < 3 or perf_counter() < end:
        synchronise()
        started = perf_counter()
        call()
        synchronise()
        taken.append(perf_counter() - started)
    return min(taken)


def floor_of(work: Work, rates: Rates, summary: Mapping[str, Any]) -> Floor:
    """A system's figures over the floor.

    Args:
        rates: of `measure_rates`, with this work among its works. Weights of another precision can be widened, so the
            faster of that precision and float32 counts.
        summary: the system's, of `hlm.benchmark.latency.summarise` or `derive`.

    Returns:
        {"weight_mib", "tokens", "gflop": means over the queries, "memory_ms", "arithmetic_ms": medians of the two
        bounds, "floor_ms": the median of the higher one, "over": p50 at batch 1 / floor_ms, "gemm_share": FLOP/s at
        the best batch size / GEMM rate; "left": the same of `work.left`, where there is such}.
    """
    memory_ms = 1e3 * work.weight_bytes / (1e9 * rates["bandwidth_gb_per_s"][str(_mib(work))])
    gemm = rates["gemm_gflop_per_s"]
    rate = 1e9 * max(gemm.get(work.precision, 0), gemm["float32"])
    arithmetic_ms = 1e3 * np.array(work.flops) / rate
    floor_ms = float(np.median(np.maximum(memory_ms, arithmetic_ms)))
    found: Floor = {
        "weight_mib": work.weight_bytes / MIB,
        "tokens": float(np.mean(work.tokens)),
        "gflop": float(np.mean(work.flops)) / 1e9,
        "memory_ms": memory_ms,
        "arithmetic_ms": float(np.median(arithmetic_ms)),
        "floor_ms": floor_ms,
        "over": summary["latency_ms"]["all"]["p50"] / floor_ms,
        "gemm_share": float(np.mean(work.flops)) * summary["best_queries_per_s"] / rate,
    }
    if work.left:
        found["left"] = floor_of(work.left, rates, summary)
    return found
