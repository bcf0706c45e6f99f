"""The online path on a GPU: whether it computes the same vectors, and how fast, against what FLOPs and bytes allow."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import BertConfig, BertModel, Qwen3Config

from hlm.benchmark.floor import gemm_rate, stream_rate
from hlm.benchmark.gpu_inputs import made_encoder, made_texts, made_tokenizer
from hlm.benchmark.gpu_timing import peaks, reset_peak, timed
from hlm.benchmark.gpu_work import BANDWIDTH_UTILISATION, PREDICTED
from hlm.encoders.loading import DTYPES
from hlm.planning.footprint import Shape, forward_flops
from hlm.planning.hardware import GPUS
from hlm.serving.query_encoder import QueryEncoder

# A kernel of a small batch, launched by a graph, waits for the one before it: seen on an H200, 2026-11.
KERNEL_SECONDS = 3.5e-6
KERNELS = (13, 22)  # of `hlm.serving.fused.FusedQwen3`: in each layer, and around them with the copies
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.03, "float16": 0.01}  # of components of a vector of length 1; fp32 has TF32


def ceilings(device: str, *, mib: int = 4096) -> dict[str, Any]:
    """What this machine reaches: bytes/s of reading `mib` MiB of weights, and FLOP/s of a large bf16 product."""
    side = 8192 if device.startswith("cuda") else 512
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {
        "stream_bytes_per_s": stream_rate(mib * 2**20, device=device, seconds=1.0),
        "gemm_flop_per_s": {
            "bfloat16": 2 * side**3 / min(timed(lambda: left @ right) for _ in range(5)),
            "float32_small": gemm_rate("float32", device=device, seconds=0.5),
        },
    }


def parity(device: str) -> dict[str, Any]:
    """Tiny encoders of each family in each precision, kernel by kernel and as served, against the CPU in float32.

    Returns:
        {"qwen3 bfloat16": {"served", "eager": the largest difference of a component, "agrees": within `TOLERANCE` and
        the same from four threads}, ..., "agrees": whether all do}.
    """
    texts = made_texts(40, 8, 30)
    found: dict[str, Any] = {}
    for family, model in (("qwen3", _tiny_qwen3()), ("bert", _tiny_bert())):
        expected = model.encode(texts, normalize_embeddings=True)
        for dtype in TOLERANCE:
            moved = copy.deepcopy(model).to(device=device, dtype=DTYPES[dtype])
            eager = moved.encode(texts)
            encoder = QueryEncoder.from_model(moved)
            served = encoder.encode(texts)
            with ThreadPoolExecutor(4) as pool:
                alone = np.stack(list(pool.map(encoder.encode, texts)))
            differences = {
                name: float(np.abs(vectors - expected).max())
                for name, vectors in (("served", served), ("alone", alone), ("eager", eager))
            }
            agrees = max(differences["served"], differences["alone"]) < TOLERANCE[dtype]
            found[f"{family} {dtype}"] = differences | {"agrees": bool(agrees)}
    return found | {"agrees": all(each["agrees"] for each in found.values())}


def online(
    model: SentenceTransformer,
    queries: Sequence[str],
    *,
    batch_sizes: Sequence[int],
    seconds: float,
    note: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """One encoder as HLM serves it and as sentence-transformers does, tokenisation in both.

    Args:
        model: on its device; its prompt "query" stands before every query.
        queries: batch 1 takes them in turn; a larger batch repeats them.
        seconds: of calls, shared out among batch sizes, both ways to encode and the parts.
        note: called with what is there so far.

    Returns:
        {"measured", "work", "predicted": {GPU: ...}}: `p50_ms` at batch 1, `queries_per_s` by batch size.
    """
    prompt, each = model.prompts.get("query", ""), seconds / (5 + 2 * len(batch_sizes))
    shape = Shape.of(model[0].model.config)
    reset_peak()
    encoder = QueryEncoder.from_model(model)
    ids = encoder.tokenise(queries)
    tokens = float(np.mean([len(row) for row in ids]))
    measured: dict[str, Any] = {"tokens": tokens, "dtype": str(model.dtype).removeprefix("torch.")}
    facts = {"measured": measured, "work": _work(shape, tokens, model.dtype.itemsize)}
    facts["predicted"] = _predicted(facts["work"])
    measured |= _times("", [partial(encoder.encode, [text]) for text in queries], each)
    measured |= _times("tokenise_", [partial(encoder.tokenise, [text]) for text in queries], each / 2)
    measured |= _times("model_", [partial(encoder.encode_ids, [row]) for row in ids], each / 2)
    note(facts)

    def eager(texts: list[str]) -> None:
        model.encode(texts, prompt=prompt or None, batch_size=len(texts), show_progress_bar=False)

    for name, call in (("", encoder.encode), ("eager_", eager)):
        measured[f"{name}queries_per_s"] = {}
        for size in batch_sizes:
            batch = (list(queries) * (size // len(queries) + 1))[:size]
            took = _times("", [partial(call, batch)], each, least=2)["p50_ms"]
            measured[f"{name}queries_per_s"][str(size)] = 1e3 * size / took
            note(facts)
    measured |= _times("eager_", [partial(eager, [text]) for text in queries], each)
    batch = (list(queries) * (max(batch_sizes) // len(queries) + 1))[: max(batch_sizes)]
    rows = encoder.tokenise(batch)
    parts: dict[str, Callable[[], Any]] = {
        "tokenise": partial(encoder.tokenise, batch),
        "model": partial(encoder.encode_ids, rows),
    }
    for name, part in parts.items():
        measured[f"{name}_queries_per_s"] = 1e3 * len(batch) / _times("", [part], each / 2, least=2)["p50_ms"]
    for name in ("", "eager_"):
        measured[f"{name}best_queries_per_s"] = max(measured[f"{name}queries_per_s"].values())
    return facts | {"measured": measured | peaks(model)}


def faiss_gpu(rows: int, dim: int, *, queries: int = 256, k: int = 100) -> dict[str, Any]:
    """Exact search of `rows` vectors on the GPU and on the CPU: the share of equal ads, and queries/s of both; skipped
    where FAISS has no GPU kernels."""
    import faiss

    count = getattr(faiss, "get_num_gpus", lambda: 0)()
    if not count:
        return {"skipped": f"FAISS {faiss.__version__} has no GPU kernels here; faiss-gpu-cu12 has"}
    generator = np.random.default_rng(0)
    vectors, asked = (generator.standard_normal((n, dim), dtype=np.float32) for n in (rows, queries))
    index = faiss.IndexFlatIP(dim)
    index.add(vectors)
    on_gpu = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    _, expected = index.search(asked, k)
    _, found = on_gpu.search(asked, k)
    rates = {
        name: queries / min(timed(partial(each.search, asked, k)) for _ in range(3))
        for name, each in (("cpu", index), ("gpu", on_gpu))
    }
    same = float(np.mean([len(set(a) & set(b)) / k for a, b in zip(found, expected, strict=True)]))
    return {"measured": {"overlap": same, **{f"{name}_queries_per_s": rate for name, rate in rates.items()}}}


def _times(name: str, calls: Sequence[Callable[[], Any]], seconds: float, least: int = 20) -> dict[str, float]:
    """Percentiles in ms of the calls, in turn for `seconds`; every one is called once before. What a call gives lies on
    the host, so that its end is the end of the work."""
    for call in calls:
        call()
    taken: list[float] = []
    until = perf_counter() + seconds
    while len(taken) < least or perf_counter() < until:
        began = perf_counter()
        calls[len(taken) % len(calls)]()
        taken.append(perf_counter() - began)
    return {f"{name}p{share}_ms": 1e3 * float(np.percentile(taken, share)) for share in (50, 99)}


def _work(shape: Shape, tokens: float, itemsize: int) -> dict[str, float]:
    return {
        "flops_a_query": forward_flops(shape, 1, tokens),
        "weight_bytes": shape.layers * shape.layer_weights * itemsize,
        "kernels": KERNELS[0] * shape.layers + KERNELS[1],
    }


def _predicted(work: dict[str, float]) -> dict[str, Any]:
    """Of each GPU: milliseconds at batch 1, of which the weights take `memory_ms` to stream; and the queries/s that
    arithmetic allows at 60% of the data sheet's rate, without tokenisation."""
    found = {}
    for name in PREDICTED:
        gpu = GPUS[name]
        memory = work["weight_bytes"] / (gpu.bandwidth * BANDWIDTH_UTILISATION)
        found[name] = {
            "memory_ms": 1e3 * memory,
            "model_p50_ms": 1e3 * max(memory, work["kernels"] * KERNEL_SECONDS),
            "best_queries_per_s": 0.6 * gpu.flops / work["flops_a_query"],
        }
    return found


def _tiny_qwen3() -> SentenceTransformer:
    config = Qwen3Config(
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    return made_encoder(config, "float32", "cpu", 32)


def _tiny_bert() -> SentenceTransformer:
    config = BertConfig(
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        BertModel(config).save_pretrained(folder)
        made_tokenizer(config.vocab_size).save_pretrained(folder)
        transformer = Transformer(folder)
    transformer.max_seq_length = 32
    return SentenceTransformer(modules=[transformer, Pooling(64, "mean"), Normalize()], device="cpu").eval()
