"""Right-padded rows through a causal backbone: no token sees the padding on its right, so that attention needs no mask.

With one, attention takes a slower kernel, repeats keys and values to all heads, and transformers looks at the mask in
every pass, where the host waits for the GPU. On the CPU the mask stays, and so does every bit of what is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import Qwen3Model

from hlm.encoders.families import is_causal

FULL = "full_attention"
DEVICES = {"cuda"}  # whose attention is faster without a mask


@contextlib.contextmanager
def right_padded(model: SentenceTransformer) -> Iterator[None]:
    """Inside, `model` is fed rows that are padded on the right, by `hlm.encoders.loading.pad_rows`, and no others."""
    handles = leave_out_masks(model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def leave_out_masks(model: SentenceTransformer) -> list[Any]:
    """The same for good, as far as this object goes: for a model in training. Returns the handles of its hooks."""
    backbone: Any = getattr(model[0], "model", None)
    inner = backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone
    # Only where it is known that layers take a mask each by their kind, and that SDPA is causal without one.
    if not isinstance(inner, Qwen3Model) or not is_causal(inner) or set(inner.config.layer_types) != {FULL}:
        return []
    if inner.config._attn_implementation != "sdpa":
        return []
    kept: list[Tensor] = []

    def before(module: nn.Module, inputs: tuple) -> tuple | None:
        features, *rest = inputs
        mask = features.get("attention_mask")
        kept.clear()
        if not isinstance(mask, Tensor) or mask.device.type not in DEVICES:
            return None
        kept.append(mask)  # the pooling asks for it
        return {**features, "attention_mask": {FULL: None}}, *rest

    def after(module: nn.Module, inputs: tuple, output: dict[str, Any]) -> dict[str, Any]:
        if kept:
            output["attention_mask"] = kept.pop()
        return output

    return [model[0].register_forward_pre_hook(before), model[0].register_forward_hook(after)]
