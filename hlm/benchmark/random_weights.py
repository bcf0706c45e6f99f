"""True architectures with random weights, to time models whose weights are not at hand.

The shapes of published backbones come with HLM. What such a model answers means nothing; how long it takes is
what the trained one takes, since dense arithmetic does not depend on the values.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedTokenizerFast

from hlm.artefacts import HlmError
from hlm.benchmark.systems import (
    HLM,
    SENTENCE_TRANSFORMERS,
    System,
    load_system,
    query_encoder_class,
    query_encoder_system,
    sentence_transformers_system,
)
from hlm.encoders.families import layers_of
from hlm.encoders.loading import DTYPES, write_legacy_layout
from hlm.encoders.pruning import cut_config, planned_parameters
from hlm.machine import memory_mib
from hlm.planning.footprint import backbone_config

SHARE_OF_MEMORY = 0.7  # of what is free, for weights: activations and the tokenizer need the rest
RANDOM_IDS = "torch"  # the backend where no tokenizer is at hand: a plain forward pass over random token ids
BYTES_PER_TOKEN = 4  # of English under Qwen's tokenizer, about; only where no tokenizer is at hand


def shape_config(shape: str, *, layers: int | None = None, ffn: int | None = None) -> PretrainedConfig:
    """The config of a Qwen3-style backbone, cut to `layers` and an FFN of `ffn` units; None keeps its own.

    Args:
        shape: as in `footprint.backbone_config`: "Qwen/Qwen3-Embedding-8B" needs neither a Hub nor weights.

    Raises:
        HlmError: no such shape (names those that are shipped), another architecture, or a cut that grows.
    """
    config = backbone_config(shape)
    if config.model_type != "qwen3":
        raise HlmError(f"shape: expected a Qwen3-style backbone, found '{config.model_type}' at {shape}")
    return cut_config(config, layers, ffn)


def weight_mib(config: PretrainedConfig, dtype: str) -> float:
    """MiB of the weights of this backbone in `dtype`."""
    return planned_parameters(config)[0] * DTYPES[dtype].itemsize / 2**20


def depths_that_fit(config: PretrainedConfig, dtype: str, *, device: str = "cpu") -> tuple[int, int] | None:
    """None where the whole backbone fits in `SHARE_OF_MEMORY` of what is free; else two depths to derive it from.

    Raises:
        HlmError: not even two layers fit.
    """
    if torch.device(device).type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] / 2**20
    else:
        free = memory_mib("MemAvailable")
    whole = weight_mib(config, dtype)
    if free is None or whole <= SHARE_OF_MEMORY * free:
        return None
    one = weight_mib(cut_config(config, 1), dtype)
    layer = (whole - one) / max(1, config.num_hidden_layers - 1)
    deepest = int((SHARE_OF_MEMORY * free - one) / layer) + 1 if layer else 1
    if deepest < 2:
        raise HlmError(
            f"expected memory for two layers ({one + layer:.0f} MiB in {dtype}), found {free:.0f} MiB free, of which "
            f"{SHARE_OF_MEMORY:.0%} is for weights; take a smaller shape or a dtype of two bytes"
        )
    deepest = min(deepest, config.num_hidden_layers - 1)
    return max(1, deepest // 2), deepest


def random_backbone(config: PretrainedConfig, dtype: str, *, device: str = "cpu", seed: int = 0) -> nn.Module:
    """A backbone with normal weights (0, 0.02) and norms of 1, made in `dtype` without a copy in float32.

    Every page is written: memory that was never touched is one shared page of zeros, which streams for free.
    """
    if dtype not in DTYPES:
        raise HlmError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=DTYPES[dtype])
    model = model.to_empty(device=device)
    generator = torch.Generator().manual_seed(seed)
    noise = (torch.randn(2**20 + 7, generator=generator) * 0.02).to(DTYPES[dtype]).to(device)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        if parameter.ndim == 1:
            flat.fill_(1.0)
            continue
        for start in range(0, flat.numel(), noise.numel()):
            piece = flat[start : start + noise.numel()]
            piece.copy_(noise[: piece.numel()])
    # Tables that are computed and not loaded were emptied with the rest.
    model.rotary_emb = type(model.rotary_emb)(config=config).to(device)
    model.config.use_cache = False  # as sentence-transformers loads an encoder: no keys and values are kept
    return model.eval().requires_grad_(False)


def shallower(model: nn.Module, layers: int) -> nn.Module:
    """The first `layers` layers of a backbone, sharing its weights."""
    with torch.device("meta"):
        part = AutoModel.from_config(cut_config(model.config, layers), dtype=model.dtype)
    part.embed_tokens, part.norm, part.rotary_emb = model.embed_tokens, model.norm, model.rotary_emb
    part.layers = nn.ModuleList(layers_of(model)[:layers])
    return part.eval()


def random_encoder(backbone: nn.Module, tokenizer: PreTrainedTokenizerFast, *, prompt: str = "") -> SentenceTransformer:
    """A whole sentence-transformers model around a backbone: last-token pooling, normalised, `prompt` for queries."""
    tiny = backbone.config.to_dict() | {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "head_dim": 8,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "vocab_size": 8,
    }
    tiny.pop("layer_types", None)
    with tempfile.TemporaryDirectory() as folder:  # Transformer is made from a folder: a small one, then the real body
        AutoModel.from_config(type(backbone.config).from_dict(tiny)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        transformer = Transformer(folder)
    transformer.model = backbone
    transformer.max_seq_length = 512
    modules = [transformer, Pooling(backbone.config.hidden_size, pooling_mode="lasttoken"), Normalize()]
    prompts = {"query": prompt, "document": ""}
    return SentenceTransformer(modules=modules, prompts=prompts, device=str(backbone.device)).eval()


def guess_tokens(texts: list[str]) -> list[int]:
    """One token for every `BYTES_PER_TOKEN` and one more, which is pooled."""
    return [-(-len(text.encode()) // BYTES_PER_TOKEN) + 1 for text in texts]


def random_ids_encode(backbone: nn.Module, *, prompt: str = "", seed: int = 0) -> Callable[[list[str]], np.ndarray]:
    """Where no tokenizer is at hand: random token ids, one for every 4 bytes of prompt and text and one more.

    Returns:
        texts -> float32 (len(texts), width), normalised; right-padded, last real token pooled.
    """
    generator = torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def encode(texts: list[str]) -> np.ndarray:
        lengths = torch.tensor(guess_tokens([prompt + text for text in texts]))
        longest = int(lengths.max())
        ids = torch.randint(backbone.config.vocab_size, (len(texts), longest), generator=generator)
        mask = (torch.arange(longest)[None, :] < lengths[:, None]).long()
        hidden = backbone(input_ids=ids.to(backbone.device), attention_mask=mask.to(backbone.device)).last_hidden_state
        pooled = hidden[torch.arange(len(texts)), (lengths - 1).to(hidden.device)]
        return nn.functional.normalize(pooled.float(), dim=-1).cpu().numpy()

    return encode


def served(encoder: SentenceTransformer, *, engine: str, precision: str, device: str) -> System:
    """The encoder behind a QueryEncoder: from memory under "torch", for an 8B need not go over the disk; else by way of
    a folder, which is gone afterwards."""
    if engine == "torch":
        return query_encoder_system(query_encoder_class().from_model(encoder))
    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder, create_model_card=False)
        write_legacy_layout(Path(folder))
        return load_system(folder, backend=HLM, engine=engine, precision=precision, device=device)


@dataclass(frozen=True)
class Derivation:
    """A system that is not measured itself: its first `depths` layers are, under `names`."""

    names: tuple[str, str]
    depths: tuple[int, int]
    layers: int
    facts: dict[str, Any]


def shape_systems(
    name: str,
    shape: str,
    *,
    layers: int | None = None,
    ffn: int | None = None,
    dtype: str = "float32",
    depths: Sequence[int] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    prompt: str = "",
    backend: str = SENTENCE_TRANSFORMERS,
    engine: str = "auto",
    precision: str = "auto",
    device: str = "cpu",
    seed: int = 0,
) -> tuple[dict[str, System], Derivation | None]:
    """What to measure for a shape: itself, or its first layers at two depths where memory does not allow the whole.

    Args:
        shape, layers, ffn: as in `shape_config`.
        depths: derive it from these two depths; None does so where `depths_that_fit` says.
        tokenizer: None feeds random token ids.
        prompt: before every query.
        backend, engine, precision: as in `systems.load_system`; "hlm" needs a tokenizer and the whole depth, and
            under "torch" `dtype` in place of `precision`.

    Raises:
        HlmError: an unknown shape or dtype, depths out of range, too little memory, or "hlm" without its needs.
    """
    if dtype not in DTYPES:
        raise HlmError(f"{name}: dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    if (backend, engine) == (HLM, "torch") and precision != "auto":
        raise HlmError(f"{name}: precision: under engine 'torch' a shape computes in `dtype`, found {precision!r} too")
    config = shape_config(shape, layers=layers, ffn=ffn)
    whole = config.num_hidden_layers
    if depths is not None and (len(depths) != 2 or not 1 <= depths[0] < depths[1] <= whole):
        raise HlmError(f"{name}: depths: expected two within 1 to {whole}, rising, found {list(depths)}")
    depths = depths or depths_that_fit(config, dtype, device=device)
    if backend == HLM and (tokenizer is None or depths):
        found = "no tokenizer" if tokenizer is None or depths is None else f"memory for {depths[1]} of {whole} layers"
        raise HlmError(f"{name}: backend 'hlm' reads a whole model with a tokenizer, found {found}")
    backbone = random_backbone(cut_config(config, depths[1]) if depths else config, dtype, device=device, seed=seed)
    total, without_embeddings = planned_parameters(config)
    facts = {
        "shape": shape,
        "weights": "random",
        "layers": whole,
        "ffn": config.intermediate_size,
        "input": f"random token ids, one for every {BYTES_PER_TOKEN} bytes of prompt and text; tokenisation not timed"
        if tokenizer is None
        else f"texts under a tokenizer of {len(tokenizer)} tokens" + (f", prompt {prompt!r}" if prompt else ""),
        "params_total": total,
        "params_non_embedding": without_embeddings,
    }

    def count_tokens(texts: list[str]) -> list[int]:
        return list(map(len, tokenizer([prompt + text for text in texts])["input_ids"]))  # type: ignore[misc]

    def system(backbone: nn.Module) -> System:
        if tokenizer is None:
            own = {"backend": RANDOM_IDS, "dtype": dtype, "device": str(backbone.device)}
            encode = random_ids_encode(backbone, prompt=prompt, seed=seed)
            return System(encode, own, lambda texts: guess_tokens([prompt + text for text in texts]))
        encoder = random_encoder(backbone, tokenizer, prompt=prompt)
        if backend != HLM:
            return sentence_transformers_system(encoder)
        made = served(encoder, engine=engine, precision=precision, device=device)
        return replace(made, count_tokens=count_tokens)  # its own would read the folder, which is gone

    if not depths:
        made = system(backbone)
        return {name: replace(made, facts=made.facts | facts)}, None
    names = (f"{name} ({depths[0]} layers)", f"{name} ({depths[1]} layers)")
    parts = {names[0]: system(shallower(backbone, depths[0])), names[1]: system(backbone)}
    return parts, Derivation(names, (depths[0], depths[1]), whole, parts[names[1]].facts | facts)
