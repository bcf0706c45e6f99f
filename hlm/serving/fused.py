"""Qwen3's forward pass in a third of the kernels: on a GPU a short text waits for kernels, not for weights.

The arithmetic is that of transformers' `Qwen3Model`, put together in another way: queries and keys come from one matrix
product and are normalised and rotated together, gate and up come from one, residuals are added by the product itself,
and behind the last attention only the token that is pooled is computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Model


class _Layer(NamedTuple):
    """Weights of one layer; rows of products that read the same input are stacked."""

    norm: Tensor  # (width,), before attention
    queries_keys: Tensor  # ((heads + key heads) * head width, width)
    values: Tensor  # (key heads * head width, width)
    cosines: Tensor  # (longest, heads + key heads, head width): the rotation's, times the weights of the norm before
    sines: Tensor  # likewise, with the sign that the rotation gives each half
    out: Tensor  # (heads * head width, width), transposed
    ffn_norm: Tensor  # (width,)
    gate_up: Tensor  # (2 * FFN, width)
    down: Tensor  # (FFN, width), transposed


class FusedQwen3:
    """The backbone and the last-token pooling of a Qwen3 encoder.

    The stacked weights take the place of the model's own, which become views of them: nothing is held twice.

    Args:
        model: one that `fits`.
        longest: tokens of the longest text.
    """

    def __init__(self, model: SentenceTransformer, longest: int) -> None:
        backbone = model[0].model
        config = backbone.config
        self.longest = longest
        self._width = config.head_dim
        self._heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        self._epsilon = config.rms_norm_eps
        self._table, self._norm = backbone.embed_tokens.weight, backbone.norm.weight
        places = torch.arange(longest, device=backbone.device)[None]
        # In float32, whatever the model computes in: the tables are rounded once, with the norms' weights in them.
        cosines, sines = backbone.rotary_emb(torch.empty(0, device=backbone.device), places)
        self._layers = [self._layer(layer, cosines[0], sines[0]) for layer in backbone.layers]

    @staticmethod
    def fits(model: SentenceTransformer) -> bool:
        """Whether the model is a causal Qwen3 with full attention, no biases, and last-token pooling, in eval mode."""
        backbone: Any = getattr(model[0], "model", None)
        if type(backbone) is not Qwen3Model or len(model) < 2:
            return False
        config, pooling = backbone.config, model[1]
        linear = [module for module in backbone.modules() if isinstance(module, nn.Linear)]
        return (
            getattr(config, "is_causal", True) is not False
            and set(config.layer_types) == {"full_attention"}
            and config.hidden_act == "silu"
            and config.rope_parameters["rope_type"] == "default"
            and all(type(module) is nn.Linear and module.bias is None for module in linear)
            and getattr(pooling, "pooling_mode", None) in ("lasttoken", ("lasttoken",))
        )

    def _layer(self, layer: nn.Module, cosines: Tensor, sines: Tensor) -> _Layer:
        attention, ffn = layer.self_attn, layer.mlp
        norms = torch.cat(
            [
                attention.q_norm.weight.expand(self._heads, -1),
                attention.k_norm.weight.expand(self._key_heads, -1),
            ]
        ).float()
        half = self._width // 2
        # rotate_half(x) is x rolled by half its width, its first half negated. Of x * w, the weights roll as well.
        sign = torch.ones(self._width, device=sines.device)
        sign[:half] = -1
        dtype = attention.q_proj.weight.dtype
        return _Layer(
            norm=layer.input_layernorm.weight,
            queries_keys=_stacked(attention.q_proj, attention.k_proj),
            values=attention.v_proj.weight,
            cosines=(cosines[:, None] * norms).to(dtype),
            sines=((sines * sign)[:, None] * norms.roll(half, -1)).to(dtype),
            out=attention.o_proj.weight.T,
            ffn_norm=layer.post_attention_layernorm.weight,
            gate_up=_stacked(ffn.gate_proj, ffn.up_proj),
            down=ffn.down_proj.weight.T,
        )

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Last-token vectors.

        Args:
            ids, mask: int64 (rows, tokens), right padding; at most `longest` tokens.

        Returns:
            (rows, width) in the model's dtype, after the last norm; not L2-normalised.
        """
        rows, tokens = ids.shape
        hidden = F.embedding(ids.flatten(), self._table)
        shape = hidden.shape[-1:]
        pooled = mask.sum(1).add_(torch.arange(-1, rows * tokens - 1, tokens, device=ids.device))
        for layer in self._layers:
            attended = self._attention(layer, F.rms_norm(hidden, shape, layer.norm, self._epsilon), rows, tokens)
            if layer is self._layers[-1]:
                hidden, attended = hidden[pooled], attended[pooled]
            hidden.addmm_(attended, layer.out)
            inner = F.linear(F.rms_norm(hidden, shape, layer.ffn_norm, self._epsilon), layer.gate_up)
            gate, up = inner.chunk(2, dim=-1)
            hidden.addmm_(F.silu(gate).mul_(up), layer.down)
        return F.rms_norm(hidden, shape, self._norm, self._epsilon)

    def _attention(self, layer: _Layer, normed: Tensor, rows: int, tokens: int) -> Tensor:
        """What heads attend to: (rows * tokens, heads * head width)."""
        both = F.linear(normed, layer.queries_keys).view(rows, tokens, -1, self._width)
        both = F.rms_norm(both, (self._width,), None, self._epsilon)
        turned = both.roll(self._width // 2, -1).mul_(layer.sines[:tokens])
        queries, keys = turned.addcmul_(both, layer.cosines[:tokens]).split([self._heads, self._key_heads], dim=2)
        values = F.linear(normed, layer.values).view(rows, tokens, -1, self._width)
        attended = F.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in (queries, keys, values)),
            is_causal=tokens > 1,
            enable_gqa=self._heads != self._key_heads,
        )
        return attended.transpose(1, 2).reshape(rows * tokens, -1)


def _stacked(*parts: nn.Linear) -> Tensor:
    """The weights of products that read the same input, one above the other; the parts become views of it."""
    whole = torch.cat([part.weight.data for part in parts])
    for part, piece in zip(parts, whole.split([part.out_features for part in parts]), strict=True):
        part.weight.data = piece
    return whole
