"""A query encoder as modules that trace to few steps: of a short query a step costs what its arithmetic costs.

`hlm.serving.export` traces them. `OnlineGraph` gives what any reader of ONNX files computes with, `LookupGraph` what
`hlm.QueryEncoder` computes with under ONNX Runtime.
"""

from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from hlm.encoders.families import Family, depth_of, ffn_width_of, is_causal, known, reaches
from hlm.encoders.static import is_static

# Look-ups are worth their tables where these have at most so many bytes, and stand for this share of the weights that
# a token is multiplied by.
LOOKUP_BYTES, LOOKUP_SHARE = 2**28, 0.1
# Of LayerNorm's outputs, which are of the order of 1: a larger one costs digits.
LARGEST_SHIFT = 10.0


class OnlineGraph(torch.nn.Module):
    """(input_ids, attention_mask), int64 (batch, length), right padding -> float32 last hidden states
    (batch, length, width) and vectors (batch, dim), L2-normalised."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        backbone = self.model[0].model
        family = known(backbone.config)
        if family is not None and family.lookups:
            _fold_biases(backbone)
            backbone.embeddings = _BertEmbeddings(backbone.embeddings)
        for name, module in list(self.model.named_modules()):
            if type(module).__name__.endswith("RMSNorm") and (found := _rms_norm(module, family)):
                self.model.set_submodule(name, found)
        self.causal = is_causal(backbone)
        self.reaches = reaches(backbone.config, model.max_seq_length)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lowest = torch.finfo(torch.float32).min / 2  # two of them add up to a number still
        present = attention_mask.float()
        hidden = ((1 - present) * lowest)[:, None, None, :]
        length = input_ids.shape[1]
        if self.causal:
            hidden = hidden + torch.full((length, length), lowest).triu(1)
        masks = {kind: self._within(hidden, reach, length, lowest) for kind, reach in self.reaches.items()}
        alike = len(set(self.reaches.values())) == 1
        states = self._backbone(input_ids, next(iter(masks.values())) if alike else masks)
        return states, self._pooled(states, attention_mask, (present[:, None, :] @ states).squeeze(1))

    def _within(self, hidden: torch.Tensor, reach: int | None, length: int, lowest: float) -> torch.Tensor:
        """The mask without what is more than `reach` tokens away; no place is masked more than twice."""
        if reach is None:
            return hidden
        hidden = hidden + torch.full((length, length), lowest).tril(-reach - 1)
        return hidden if self.causal else hidden + torch.full((length, length), lowest).triu(reach + 1)

    def _backbone(self, input_ids: torch.Tensor, hidden: Any) -> torch.Tensor:
        """`hidden`: what is added to the scores of attention, float32 (batch, 1, 1 or length, length); of a model whose
        layers are of several kinds one for each, by name."""
        features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": hidden}
        if "token_type_ids" in inspect.signature(self.model[0].model.forward).parameters:
            features["token_type_ids"] = torch.zeros(1, 1, dtype=torch.int64)  # one row for all: a constant
        return self.model[0](features)["token_embeddings"]

    def _pooled(self, states: torch.Tensor, mask: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """What comes after the backbone; `total`: the sum of each text's states."""
        features = {"token_embeddings": states, "attention_mask": mask}
        modules = list(self.model)[1:]
        for module, then in zip(modules, [*modules[1:], None], strict=True):
            mean = isinstance(module, Pooling) and module.pooling_mode == "mean"
            if mean and isinstance(then, Normalize):  # a sum has the same direction
                features["sentence_embedding"] = total
            elif isinstance(module, Normalize):
                vectors = features["sentence_embedding"]
                features["sentence_embedding"] = vectors / vectors.norm(dim=-1, keepdim=True)
            else:
                features = module(features)
        return features["sentence_embedding"]


class StaticGraph(torch.nn.Module):
    """As `OnlineGraph`, of a static student: its last hidden states are the tokens' vectors."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.model({"input_ids": input_ids, "attention_mask": attention_mask})
        return features["token_embeddings"], features["sentence_embedding"]


class LookupGraph(OnlineGraph):
    """input_ids of texts of one length -> the vectors, of a model that `lookup_pays` for: the first layer's queries,
    keys and values come from tables, and attention is one step of ONNX Runtime's own."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__(model)
        backbone = self.model[0].model
        backbone.embeddings = _LookedUp(backbone.embeddings, backbone.encoder.layer[0].attention)
        for layer in backbone.encoder.layer:
            layer.attention.self = _OneStepAttention(layer.attention.self)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # it has no mask
        states = self._backbone(input_ids, None)
        return self._pooled(states, torch.ones_like(input_ids), states.sum(1))


def _rms_norm(module: torch.nn.Module, family: Family | None) -> _RMSNorm | None:
    """The same norm as ONNX Runtime knows it; None of one that is not known."""
    if hasattr(module, "variance_epsilon"):
        return _RMSNorm(module.weight, module.variance_epsilon)
    if family is not None and family.norm_offset:
        return _RMSNorm(torch.nn.Parameter(module.weight.detach() + family.norm_offset), module.eps)
    return None


class _RMSNorm(torch.nn.Module):
    """With a division, by which ONNX Runtime knows it and computes it in one step instead of seven."""

    def __init__(self, weight: torch.nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden / torch.sqrt(hidden.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.weight


class _BertEmbeddings(torch.nn.Module):
    """One table of positions and of the one token type there is, and no look-up in it: positions are its first rows."""

    def __init__(self, embeddings: torch.nn.Module) -> None:
        super().__init__()
        self.word_embeddings, self.LayerNorm = embeddings.word_embeddings, embeddings.LayerNorm
        table = embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]
        self.positions = torch.nn.Parameter(table)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.LayerNorm(self.word_embeddings(input_ids) + self.positions[: input_ids.shape[1]])


class _LookedUp(torch.nn.Module):
    """BERT's embeddings, and what the first layer makes of them before its tokens meet: queries, keys and values.

    LayerNorm(w + p) is g (w + p - mean) / deviation + b, of which the deviation alone joins token and position. So
    W LayerNorm(w + p) is (W g (w - mean(w)) + W g (p - mean(p))) / deviation + W b, and the two products are rows of
    tables made here.
    """

    @torch.no_grad()
    def __init__(self, embeddings: _BertEmbeddings, attention: torch.nn.Module) -> None:
        super().__init__()
        heads, out = attention.self, attention.output.dense
        self.word_embeddings, self.positions = embeddings.word_embeddings, embeddings.positions
        self.norm = norm = embeddings.LayerNorm
        projections = torch.cat([heads.query.weight, heads.key.weight, heads.value.weight]).double() * norm.weight
        tables = []
        for table in (self.word_embeddings.weight, self.positions):
            centred = table.double() - table.double().mean(1, keepdim=True)
            tables.append(torch.nn.Parameter((centred @ projections.T).float()))
        self.of_tokens, self.of_positions = tables
        query_bias = heads.query.bias + heads.query.weight @ norm.bias
        # A key's constant changes no score beside another. A value's comes out whole, and nothing but the residual path
        # reads the norm any more.
        norm.bias += out.weight @ (heads.value.weight @ norm.bias)
        if out.bias is not None:
            norm.bias += out.bias
            out.bias = None
        self.found = SimpleNamespace()
        heads.query, heads.key, heads.value = (_Found(self.found, part) for part in ("query", "key", "value"))
        heads.query.bias = torch.nn.Parameter(query_bias)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        length, width = input_ids.shape[1], self.positions.shape[1]
        hidden, _mean, scale = torch.native_layer_norm(
            self.word_embeddings(input_ids) + self.positions[:length],
            [width],
            self.norm.weight,
            self.norm.bias,
            self.norm.eps,
        )
        rows = torch.nn.functional.embedding(input_ids, self.of_tokens) + self.of_positions[:length]
        self.found.query, self.found.key, self.found.value = (rows * scale).chunk(3, dim=-1)
        return hidden


class _Found(torch.nn.Module):
    """In place of a projection: what the embeddings have looked up."""

    def __init__(self, found: SimpleNamespace, part: str) -> None:
        super().__init__()
        self.found, self.part = found, part

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return getattr(self.found, self.part)


class _OneStepAttention(torch.nn.Module):
    """BERT's self-attention over texts without padding, as one step of ONNX Runtime in place of eleven.

    Its bias is of queries alone: `_fold_biases` has taken those of keys and values away.
    """

    def __init__(self, heads: torch.nn.Module) -> None:
        super().__init__()
        self.query, self.key, self.value = heads.query, heads.key, heads.value
        self.num_heads = heads.num_attention_heads
        bias, self.query.bias = self.query.bias.detach(), None
        self.bias = torch.nn.Parameter(torch.cat([bias, torch.zeros(2 * len(bias))]))

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        query, key, value = self.query(hidden_states), self.key(hidden_states), self.value(hidden_states)
        attended = torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            (query, key, value, self.bias),
            {"num_heads": self.num_heads},
            dtype=query.dtype,
            shape=query.shape,
            version=1,
        )
        return attended, None


@torch.no_grad()
def _fold_biases(backbone: torch.nn.Module) -> None:
    """Takes those biases out of BERT's layers that another parameter can stand for.

    A key's adds the same to all scores of a query, so the softmax takes it away. A value's comes out whole, for a
    query's weights sum to 1, and goes into the bias of what follows. What is added to both sides of a sum's residual
    path can be added before it: FFN(x) + b + x is FFN'(x + b) + (x + b) with b taken out of FFN' at its entry, and
    x + b is x of a LayerNorm with another bias. So it is with attention, where of a shift s of x the values carry
    W_o W_v s into the sum: s + W_o W_v s = b.
    """
    norm = backbone.embeddings.LayerNorm
    for layer in backbone.encoder.layer:
        heads, out, within = layer.attention.self, layer.attention.output.dense, layer.attention.output.LayerNorm
        bias = out.bias + out.weight @ heads.value.bias
        heads.key.bias = heads.value.bias = None
        passed = torch.eye(len(bias), dtype=torch.float64) + out.weight.double() @ heads.value.weight.double()
        shift = torch.linalg.lstsq(passed, bias.double()[:, None]).solution[:, 0].float()
        if shift.abs().max() < LARGEST_SHIFT:
            norm.bias += shift
            heads.query.bias -= heads.query.weight @ shift
            out.bias = None
        else:
            out.bias.copy_(bias)
        within.bias += layer.output.dense.bias
        layer.intermediate.dense.bias -= layer.intermediate.dense.weight @ layer.output.dense.bias
        layer.output.dense.bias = None
        norm = layer.output.LayerNorm


def lookup_share(config: Any) -> float:
    """Share of the multiply-adds of a token, attention's scores aside, that the first layer's look-ups stand for."""
    layers, hidden, ffn = depth_of(config), config.hidden_size, ffn_width_of(config)
    return 3 * hidden / (layers * (4 * hidden + 2 * ffn))


def lookup_pays(model: SentenceTransformer) -> bool:
    """Whether the tables are of a BERT, small enough, and save a tenth of the multiply-adds."""
    if is_static(model):
        return False
    config = model[0].model.config
    family = known(config)
    if family is None or not family.lookups or lookup_share(config) < LOOKUP_SHARE:
        return False
    rows = config.vocab_size + config.max_position_embeddings
    return rows * 3 * config.hidden_size * 4 <= LOOKUP_BYTES
