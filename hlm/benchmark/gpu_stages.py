"""Training and embedding at true sizes with random weights, beside what `hlm plan` says: what a GPU has to prove.

Every stage runs the code that its recipe runs (encoder, tokens, losses, gradient caching, trainer, store), on texts of
made-up words, one token each. What it computes means nothing; how long it takes and what it holds are the real thing.

A stage returns JSON values: `measured`, `planned` (what the planner says of the same settings on this GPU), `predicted`
(from FLOPs and bytes, for the GPUs of `hlm.benchmark.gpu_work.PREDICTED`), and `work`, what `predicted` follows from.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import PretrainedConfig

from hlm.benchmark.gpu_inputs import SEED, made_encoder, made_store, made_texts, token_table
from hlm.benchmark.gpu_timing import expected, facts, peaks, planned_of, report, reset_peak, run_steps, this_gpu, timed
from hlm.benchmark.gpu_work import align_work, embed_work, lora_work, loss_flops, refine_work
from hlm.encoders.loading import encode, pad, token_batches, tokenise
from hlm.encoders.lora import add_lora, enable_gradient_checkpointing
from hlm.planning.footprint import Shape, forward_flops, training_flops
from hlm.planning.settings import Assumptions
from hlm.steps import TeacherConfig
from hlm.training.frozen import FrozenVectors
from hlm.training.losses import l2_alignment, matryoshka, refinement_contrastive
from hlm.training.teacher import Batches
from hlm.vectors.store import write_store

Note = Callable[[dict[str, Any]], None]
MOST_BATCHES = 64  # of made-up rows; they come again in every epoch


def lora_step(
    config: PretrainedConfig,
    step: Mapping[str, Any],
    sizes: Assumptions,
    *,
    device: str = "cuda",
    steps: int = 5,
    seconds: float = 120.0,
    note: Note = lambda known: None,
) -> dict[str, Any]:
    """The teacher's training steps: LoRA over frozen random weights, contrastive loss, gradient caching.

    Args:
        config: the backbone's, such as `shape_config("Qwen/Qwen3-Embedding-8B")`.
        step: settings of the step as `hlm.planning.settings.read_steps` gives them.
        sizes: lengths of the texts and what the plan assumes.
        steps, seconds: it ends after so many measured steps, or earlier when the time is over; one step warms up, one
            is measured in any case.
        note: told what is known before the first step, which a stage that fails would lose.
    """
    began = perf_counter()
    shape = Shape.of(config)
    work, phase = lora_work(shape, step, sizes)
    note(expected(work, phase))
    model = made_encoder(config, step["dtype"], device, step["max_seq_length"])
    add_lora(model, rank=step["lora_rank"], alpha=2 * step["lora_rank"])
    if step["gradient_checkpointing"]:
        enable_gradient_checkpointing(model)
    batch, per_query = step["per_device_train_batch_size"], 1 + step["hard_negatives"]
    count = batch * min(MOST_BATCHES, steps + 1)
    query_length, document_length = (limit for _, limit in phase.training.rows)
    queries = token_table(model, count, sizes.query_tokens + sizes.prompt_tokens, query_length)
    documents = token_table(model, count * per_query, sizes.document_tokens, document_length)
    numbers = np.arange(count)
    batches = Batches(
        rows=np.stack([numbers, numbers], axis=1),
        excluded=torch.from_numpy(numbers[:, None]),
        negatives=numbers[:, None] + count * np.arange(1, per_query),
        queries=queries,
        documents=documents,
        read=np.arange(count * per_query),
        config=TeacherConfig("", "", "", hard_negatives=step["hard_negatives"], cache_chunk=step["cache_chunk"]),
    )
    left = seconds - (perf_counter() - began)
    ran = run_steps(model, batches.collate, batches.loss, count, step, steps=steps, seconds=left)
    flops_of = partial(
        training_flops,
        shape,
        lora_rank=step["lora_rank"],
        checkpointing=phase.training.checkpointing,
        caching=bool(step["cache_chunk"]),
    )
    flops = sum(flops_of(rows, tokens) for name in ("query", "document") for rows, tokens in ran.shapes[name])
    return report(ran, flops / ran.steps, work, phase, batch, device)


def align_rate(
    config: PretrainedConfig,
    step: Mapping[str, Any],
    sizes: Assumptions,
    *,
    teacher_width: int,
    device: str = "cuda",
    steps: int = 200,
    seconds: float = 30.0,
    note: Note = lambda known: None,
) -> dict[str, Any]:
    """The student's alignment steps against vectors of the teacher's width in a store; arguments as in `lora_step`."""
    shape = Shape.of(config)
    work, phase = align_work(shape, step, sizes)
    note(expected(work, phase))
    model = made_encoder(config, "float32", device, step["max_seq_length"])
    model.requires_grad_(True)
    count = step["per_device_train_batch_size"] * min(MOST_BATCHES, steps + 1)
    queries = token_table(model, count, sizes.query_tokens, phase.training.rows[0][1])
    width = model.get_embedding_dimension()
    with tempfile.TemporaryDirectory() as folder:
        store = made_store(folder, count, teacher_width)

        def collate(rows: list[int]) -> dict[str, Any]:
            return {"query": queries.features(rows), "teacher": torch.from_numpy(store.gather(rows))}

        def loss(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
            return l2_alignment(model(batch["query"])["sentence_embedding"], matryoshka(batch["teacher"], width))

        ran = run_steps(
            model, collate, loss, count, step, steps=steps, seconds=seconds, block=20, keys=queries.lengths()
        )
    flops = sum(training_flops(shape, rows, tokens) for rows, tokens in ran.shapes["query"])
    return report(ran, flops / ran.steps, work, phase, step["per_device_train_batch_size"], device)


def refine_rate(
    config: PretrainedConfig,
    step: Mapping[str, Any],
    sizes: Assumptions,
    *,
    teacher_width: int,
    documents: int,
    device: str = "cuda",
    steps: int = 200,
    seconds: float = 60.0,
    note: Note = lambda known: None,
) -> dict[str, Any]:
    """The student's refinement steps; arguments as in `lora_step`. Hard negatives are drawn, not mined.

    Args:
        teacher_width: of the frozen vectors in the store.
        documents: how many there are; each step draws its pool from them.
    """
    shape = Shape.of(config)
    work, phase = refine_work(shape, step, sizes)
    note(expected(work, phase))
    model = made_encoder(config, "float32", device, None)
    model.requires_grad_(True)
    batch, pool, hard = step["per_device_train_batch_size"], min(step["pool"], documents), step["hard_negatives"]
    count = batch * min(MOST_BATCHES, steps + 1)
    queries = token_table(model, count, sizes.query_tokens, phase.training.rows[0][1])
    generator = np.random.default_rng(SEED)
    ads = generator.integers(documents, size=(count, 1 + hard))
    with tempfile.TemporaryDirectory() as folder:
        store = made_store(folder, documents, teacher_width)
        frozen = FrozenVectors(store, model.get_embedding_dimension(), model.device)

        def collate(rows: list[int]) -> dict[str, Any]:
            drawn = np.sort(generator.choice(documents, pool, replace=False))
            ids = {"ads": torch.from_numpy(ads[rows]), "pool": torch.from_numpy(drawn)}
            return {"query": queries.features(rows), **ids}

        def loss(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
            positive, negative = batch["ads"][:, 0].contiguous(), batch["ads"][:, 1:].contiguous()
            hard_vectors = frozen.gather(negative.view(-1)).view(*negative.shape, -1) if hard else None
            return refinement_contrastive(
                model(batch["query"])["sentence_embedding"],
                frozen.gather(positive),
                frozen.gather(batch["pool"]),
                positive_ids=positive,
                pool_ids=batch["pool"],
                negatives=hard_vectors,
                negative_ids=negative if hard else None,
            )

        ran = run_steps(
            model, collate, loss, count, step, steps=steps, seconds=seconds, block=20, keys=queries.lengths()
        )
    flops = sum(training_flops(shape, rows, tokens) for rows, tokens in ran.shapes["query"]) / ran.steps
    flops += loss_flops(batch, pool, shape.hidden)
    found = report(ran, flops, work, phase, batch, device)
    return found | {"frozen_vectors_on": str(frozen.device) if frozen.table is not None else "memory map"}


def store_rate(
    config: PretrainedConfig,
    step: Mapping[str, Any],
    sizes: Assumptions,
    *,
    device: str = "cuda",
    seconds: float = 60.0,
    note: Note = lambda known: None,
) -> dict[str, Any]:
    """Ads through the teacher into a vector store: tokens, forward pass, copy to the host, shards on disk.

    As many ads as `seconds` allow after one batch that warms up and one that is timed. Beside the whole it measures
    the tokeniser alone, and the forward pass alone with the padding mask and without: right-padded rows of a causal
    model give the same vectors without, and may take a faster kernel of attention.
    """
    began = perf_counter()
    shape = Shape.of(config)
    work, phase = embed_work(shape, step, sizes)
    note(expected(work, phase))
    limit = step["max_seq_length"] or sizes.longest_document
    model = made_encoder(config, step["dtype"], device, limit)
    reset_peak()
    sample = made_texts(2 * work.rows, sizes.document_tokens, limit)
    encode_texts = partial(encode, model, prompt_name="document", dim=step["dim"], batch_tokens=step["batch_tokens"])
    encode_texts(sample)
    pace = timed(lambda: encode_texts(sample)) / len(sample)
    passes = _passes(model, sample, step["batch_tokens"])
    left = seconds - (perf_counter() - began)
    count = max(len(sample), int(0.8 * left / pace)) if left > 0 else len(sample)
    texts = made_texts(count, sizes.document_tokens, limit)
    lengths = np.array([len(text.split()) + 1 for text in texts])
    with tempfile.TemporaryDirectory() as folder:
        records = [(str(row), text) for row, text in enumerate(texts)]
        took = timed(
            lambda: write_store(
                folder,
                records,
                encode_texts,
                dim=step["dim"] or shape.hidden,
                encoder="random",
                source="made-up words",
                n_rows=count,
                shard_rows=min(4096, count),
            )
        )
    tokens = sum(
        len(rows) * int(lengths[rows].max())
        for start in range(0, count, 4096)
        for rows in token_batches(lengths[start : start + 4096], step["batch_tokens"])
    )
    flops = sum(forward_flops(shape, 1, length) for length in lengths)
    measured = {
        "rows": count,
        "seconds": took,
        "step_seconds": took * work.rows / count,
        "rows_per_s": count / took,
        "padded_tokens_per_s": tokens / took,
        "tokenise_rows_per_s": len(sample) / timed(lambda: tokenise(model, sample)),
        **{f"{name}_rows_per_s": len(sample) / value for name, value in passes.items()},
    }
    gpu = this_gpu(device)
    measured |= peaks(model) | {"fraction_of_peak": flops / took / gpu.flops if gpu else None}
    planned = planned_of(phase, gpu, work.rows, sizes.documents)
    return facts(measured, planned, work, phase, device)


def _passes(model: SentenceTransformer, texts: list[str], batch_tokens: int) -> dict[str, float]:
    """Seconds of the forward passes over `texts` alone, with the padding mask and without."""
    ids = tokenise(model, texts)
    batches = [
        {name: value.to(model.device) for name, value in pad(model, [ids[row] for row in rows]).items()}
        for rows in token_batches(np.array(list(map(len, ids))), batch_tokens)
    ]
    backbone = model[0].model

    @torch.inference_mode()
    def run(masked: bool) -> None:
        for features in batches:
            backbone(input_ids=features["input_ids"], attention_mask=features["attention_mask"] if masked else None)

    found = {}
    for name, masked in (("masked_forward", True), ("unmasked_forward", False)):
        run(masked)
        found[name] = timed(partial(run, masked))
    return found
