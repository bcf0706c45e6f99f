"""What one backbone costs, from its config alone: parameters, bytes of memory and FLOPs; no weights are needed.

Bytes are those that autograd keeps for the backward pass, tensor by tensor, for BERT-style and Qwen3-style layers,
and within a tenth for those of ModernBERT and Gemma 3. SDPA is taken (flash or memory-efficient: the scores of
attention are not kept), and a padding mask. What the allocator rounds up and the CUDA context are not in them. One
multiply-add counts as two FLOPs, padding counts as tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from hlm.artefacts import HlmError
from hlm.encoders.families import depth_of, family_of, ffn_width_of, layers_of
from hlm.encoders.folder import MODULES, EncoderFolder
from hlm.encoders.loading import DTYPES, resolve
from hlm.encoders.pruning import cut_config, planned_parameters
from hlm.fields import field, read_json
from hlm.hub.cache import hub_file

SHIPPED_OWNER = "qwen"  # of the shapes in hlm/shapes, as their Hub ids begin
Calls = Sequence[tuple[int, int]]  # (rows, padded tokens a row) of every forward pass whose activations live together


def backbone_config(name_or_path: str) -> PretrainedConfig:
    """The config.json of a folder, an installed package or a Hub id. Of the shapes that are shipped nothing is asked of
    the Hub under the name of their owner; a copy of another owner falls back to them where it is out of reach.

    Raises:
        HlmError: neither is there; names the shapes that are shipped.
    """
    source = resolve(str(name_or_path))
    if (Path(source) / MODULES).is_file():
        source = str(Path(source) / EncoderFolder(source).modules()[0].path)
    local = Path(source).exists()
    owner, _, name = source.lower().rpartition("/")
    shipped = {path.name.removesuffix(".json"): path for path in (files("hlm.planning") / "shapes").iterdir()}
    shape = None if local else shipped.get(name)
    if shape is not None and owner == SHIPPED_OWNER:
        return AutoConfig.for_model(**json.loads(shape.read_text()))
    try:
        folder = source if local else str((hub_file(source, "config.json") or Path(source)).parent)
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (HlmError, OSError, ValueError) as error:
        if shape is not None:
            return AutoConfig.for_model(**json.loads(shape.read_text()))
        reason = str(error) if isinstance(error, HlmError) else type(error).__name__
        raise HlmError(
            f"expected the config.json of a backbone at '{source}', found none ({reason}); name a folder or a "
            f"reachable Hub id, or one whose shape is shipped: {', '.join(sorted(shipped))}"
        ) from error


def encoder_width(name_or_path: str, *, revision: str | None = None) -> int:
    """Width of an encoder's vectors, from its configuration files: of its last linear head, else of its backbone.

    Raises:
        HlmError: nothing to read there.
    """
    source = resolve(str(name_or_path))

    modules = file_of(source, MODULES, revision)
    heads = EncoderFolder(modules.parent).heads() if modules else []
    if heads and (head := file_of(source, f"{heads[-1]}/config.json", revision)):
        return field(read_json(head), int, "out_features", where=head, least=1)
    return backbone_config(name_or_path).hidden_size


def file_of(source: str, file: str, revision: str | None = None) -> Path | None:
    """One file of a folder or of a repository on the Hub; None: it has none, or is out of reach."""
    try:
        path = Path(source) / file if Path(source).is_dir() else hub_file(source, file, revision=revision)
    except HlmError:
        return None
    return path if path and path.is_file() else None


@dataclass(frozen=True)
class Shape:
    """What costs depend on. `linears` are (in, out) of one layer's linear layers, `norms` counts those of its whole
    width; `embeddings` counts every table."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    linears: tuple[tuple[int, int], ...]
    gated: bool
    norms: int
    qk_norm: bool
    parameters: int
    embeddings: int

    @classmethod
    def of(cls, config: PretrainedConfig, layers: int | None = None, ffn_width: int | None = None) -> Shape:
        """The shape of this backbone, cut to so many layers and FFN units.

        Raises:
            HlmError: a cut that grows, or a backbone that is not known.
        """
        total, body = planned_parameters(config, layers, ffn_width)
        few = cut_config(config, min(2, depth_of(config)), ffn_width)  # ModernBERT's first layer is unlike the others
        with torch.device("meta"):
            layer = layers_of(AutoModel.from_config(few))[-1]
        heads = config.num_attention_heads
        return cls(
            layers=layers or depth_of(config),
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            ffn=ffn_width_of(few),
            linears=tuple((part.in_features, part.out_features) for part in layer.modules() if _linear(part)),
            gated=family_of(config).gated,
            norms=sum(_norm(part, config.hidden_size) for part in layer.modules()),
            qk_norm=hasattr(getattr(layer, "self_attn", None), "q_norm"),
            parameters=total,
            embeddings=total - body,
        )

    @classmethod
    def static(cls, tokens: int, width: int) -> Shape:
        """The shape of a static student: a table of tokens, and no layer."""
        none = dict.fromkeys(("layers", "heads", "kv_heads", "head_dim", "ffn", "norms"), 0)
        table = tokens * width
        return cls(**none, hidden=width, linears=(), gated=False, qk_norm=False, parameters=table, embeddings=table)

    @cached_property
    def layer_weights(self) -> int:
        """Parameters of one layer's linear layers, biases left out."""
        return sum(into * out for into, out in self.linears)

    def lora_parameters(self, rank: int) -> int:
        """Parameters of a LoRA adapter on every linear layer: rank x (in + out) each."""
        return self.layers * sum(rank * (into + out) for into, out in self.linears)


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _norm(module: nn.Module, width: int) -> bool:
    return "Norm" in type(module).__name__ and getattr(module, "weight", torch.empty(0)).shape == (width,)


@dataclass(frozen=True)
class Precision:
    """`weights`: float32, bfloat16 or float16; `autocast`: whether the forward pass runs under half-precision autocast;
    `lora_rank`: rank of an fp32 adapter over frozen weights, or None where all weights train."""

    weights: str = "float32"
    autocast: bool = False
    lora_rank: int | None = None

    def __post_init__(self) -> None:
        if self.weights not in DTYPES:
            raise HlmError(f"dtype: expected one of {', '.join(DTYPES)}, found {self.weights!r}")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise HlmError(f"lora_rank: expected at least 1, found {self.lora_rank}")

    @property
    def weight_bytes(self) -> int:
        return DTYPES[self.weights].itemsize

    @property
    def activation_bytes(self) -> int:
        return 2 if self.autocast else self.weight_bytes


def saved_bytes(shape: Shape, sequence: int, precision: Precision) -> int:
    """Bytes that one layer keeps for the backward pass, for one token of a row of `sequence` padded tokens."""
    stream, inner = precision.weight_bytes, precision.activation_bytes
    hidden, attention, ffn = shape.hidden, shape.heads * shape.head_dim, shape.ffn
    trains = precision.lora_rank is None
    # Attention: the mask as a bias, the log-sum-exp, queries, and keys, values (repeated to all heads), the output.
    total = sequence * inner + 4 * shape.heads + 4 * attention * inner
    if shape.qk_norm:
        both = (shape.heads + shape.kv_heads) * shape.head_dim
        total += 4 * both + 4 * (shape.heads + shape.kv_heads) + (both * inner if trains else 0)
    if shape.gated:  # RMSNorms in fp32; gate, its activation and up
        total += shape.norms * (4 * hidden + 4 + (hidden * stream if trains else 0)) + 3 * ffn * inner
    else:  # two LayerNorms with mean and deviation; what the activation reads
        total += 2 * hidden * stream + 4 * stream + ffn * inner
    # Inputs of the linear layers. Where a cast stands before a layer, each keeps a copy of its own; under autocast the
    # output of attention needs none: it is kept above.
    if not trains and precision.autocast:
        copies = sum(into for into, _ in shape.linears) - attention
        total += 2 * (2 * hidden + ffn if precision.weight_bytes == 2 else copies)
    elif not trains and precision.weight_bytes == 2:
        total += 4 * sum(into for into, _ in shape.linears)  # the adapter's own precision
    elif precision.autocast and precision.weight_bytes == 4:
        total += (len(shape.linears) - 2) * hidden * inner + ffn * inner  # two inputs are in half precision already
    else:
        total += 2 * hidden * inner + ffn * inner
    if precision.lora_rank is not None:
        total += len(shape.linears) * precision.lora_rank * (2 if precision.autocast else 4)
    return total


def training_memory(
    shape: Shape,
    calls: Calls,
    precision: Precision,
    *,
    checkpointing: bool = False,
    gpus: int = 1,
    sharded: bool = False,
    loss_bytes: int = 0,
) -> dict[str, int]:
    """Bytes on each GPU at the peak of a training step with AdamW (fused), part by part; the sum is the peak.

    Args:
        calls: forward passes whose activations are alive together; under gradient caching the largest one alone.
        checkpointing: each layer keeps its input and is computed again.
        gpus: data-parallel processes; two and more add DDP's gradient buckets.
        sharded: FSDP: weights, gradients and optimizer are split over the GPUs, two layers and the embeddings gathered.
        loss_bytes: what the loss itself needs.
    """
    train = shape.lora_parameters(precision.lora_rank) if precision.lora_rank else shape.parameters
    share = gpus if sharded else 1
    parts = {
        "weights": shape.parameters * precision.weight_bytes // share,
        "LoRA": train * 4 // share if precision.lora_rank else 0,
        "gradients": train * 4 // share,
        "optimizer": train * 8 // share,
    }
    if sharded:
        gathered = 2 * shape.layer_weights + shape.embeddings
        parts["gathered"] = gathered * precision.weight_bytes
    elif gpus > 1:
        parts["DDP buckets"] = train * 4
    tokens = sum(rows * sequence for rows, sequence in calls)
    layer = [rows * sequence * saved_bytes(shape, sequence, precision) for rows, sequence in calls]
    linears = shape.lora_parameters(precision.lora_rank) if precision.lora_rank else shape.layers * shape.layer_weights
    copies = 2 * linears if precision.autocast else 0  # autocast keeps a half-precision copy of each trained weight
    if precision.autocast and precision.lora_rank and precision.weight_bytes == 4:
        copies += 2 * shape.layers * shape.layer_weights * len(calls)  # frozen weights are cast anew in every pass
    ends = 8 + (4 * shape.hidden * (2 if shape.gated and not precision.lora_rank else 1))
    largest = max(rows * sequence for rows, sequence in calls)
    if checkpointing and shape.layers:
        parts["activations"] = tokens * (shape.layers * shape.hidden * precision.weight_bytes + ends)
        parts["one layer again"] = max(layer) + copies // shape.layers
    else:
        parts["activations"] = shape.layers * sum(layer) + tokens * ends + copies
    parts["working"] = largest * _working(shape, precision, checkpointing)
    parts["loss"] = loss_bytes
    return {name: value for name, value in parts.items() if value}


def _working(shape: Shape, precision: Precision, checkpointing: bool) -> int:
    """Bytes a token that come and go within one layer at the peak: measured in real steps, tests hold them to it."""
    hidden, ffn = shape.hidden, shape.ffn
    if not shape.layers:  # gradients of the vectors that were looked up, in both precisions under autocast
        return (6 if precision.autocast else 4) * hidden
    if precision.lora_rank and precision.autocast:
        if shape.gated:
            return max(4 * ffn, 8 * hidden) if checkpointing else 16 * hidden
        if precision.weight_bytes == 2:
            return 4 * ffn if checkpointing else 4 * max(0, ffn - hidden)
        return (18 if checkpointing else 12) * hidden
    if not checkpointing:
        return max(8 * ffn + 4 * hidden, 20 * hidden) if precision.lora_rank else 16 * hidden
    adapter = max(8 * ffn, 16 * hidden)
    inside = adapter if precision.lora_rank else ffn * precision.activation_bytes
    return inside + (0 if shape.gated else 8 * hidden)


def inference_memory(shape: Shape, rows: int, sequence: int, weights: str) -> dict[str, int]:
    """Bytes at the peak of encoding `rows` rows of `sequence` padded tokens without gradients."""
    each = Precision(weights).weight_bytes
    attention = (4 * shape.heads + 2 * shape.kv_heads) * shape.head_dim + 3 * shape.hidden
    ffn = 3 * shape.ffn + 4 * shape.hidden if shape.gated else 2 * shape.ffn + 3 * shape.hidden
    return {
        "weights": shape.parameters * each,
        "working": rows * sequence * each * (max(attention, ffn) + sequence),
    }


def forward_flops(shape: Shape, rows: int, sequence: float) -> float:
    """FLOPs of encoding `rows` rows of `sequence` padded tokens: 2 a weight and token, and attention's two products."""
    attention = 4 * sequence * shape.heads * shape.head_dim
    return rows * sequence * shape.layers * (2 * shape.layer_weights + attention)


def training_flops(
    shape: Shape,
    rows: int,
    sequence: float,
    *,
    lora_rank: int | None = None,
    checkpointing: bool = False,
    caching: bool = False,
) -> float:
    """FLOPs of forward and backward over `rows` rows of `sequence` padded tokens.

    A backward pass costs two forward passes where weights train, one through frozen weights (their inputs' gradients).
    Checkpointing and gradient caching each add a forward pass.
    """
    forward = forward_flops(shape, rows, sequence)
    if lora_rank is None:
        return forward * (3 + checkpointing + caching)
    tokens = rows * sequence
    adapter = 2 * tokens * shape.lora_parameters(lora_rank)
    attention = 4 * sequence * shape.heads * shape.head_dim * tokens * shape.layers
    frozen = forward - attention
    return 2 * frozen + 3 * (adapter + attention) + (forward + adapter) * (checkpointing + caching)
