"""Pruning: which layers and FFN units stay, and the surgery that leaves a smaller model of the same architecture.

BERT-style backbones (`encoder.layer`) and Qwen3-style ones (`layers`, gated FFN) are known. The cut model is a stock
one: it is saved and loaded like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import AutoModel, PretrainedConfig

from hlm.artefacts import HlmError
from hlm.encoders import pad, tokenise

METHODS = ("middle_skip", "norm_ratio")


def layers_of(backbone: nn.Module) -> nn.ModuleList:
    """The transformer layers, in order.

    Raises:
        HlmError: a backbone whose layers are found in neither place.
    """
    layers = getattr(getattr(backbone, "encoder", None), "layer", None)
    if layers is None:
        layers = getattr(backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise HlmError(
            f"expected a BERT-style (encoder.layer) or Qwen3-style (layers) backbone, found {type(backbone).__name__}; "
            "choose such a student"
        )
    return layers


def ffn_parts(layer: nn.Module) -> tuple[list[nn.Linear], nn.Linear]:
    """The projections into the FFN's units (their rows are the units) and the one out of them (its columns are)."""
    if hasattr(layer, "mlp") and hasattr(layer.mlp, "gate_proj"):
        return [layer.mlp.gate_proj, layer.mlp.up_proj], layer.mlp.down_proj
    if hasattr(layer, "intermediate"):
        return [layer.intermediate.dense], layer.output.dense
    raise HlmError(f"expected a BERT- or Qwen3-style FFN, found {type(layer).__name__}; leave ffn unset")


@torch.inference_mode()
def score(
    model: SentenceTransformer, texts: Sequence[str], *, batch_size: int = 64
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Scores layers and FFN units on calibration queries (arXiv 2605.23572).

    Returns:
        ratios: float64 (layers,), mean over real tokens of ||layer output|| / ||layer input||. A ratio near 1 is a layer
            that changes little; such layers go first.
        activations: per layer float64 (FFN width,), mean over real tokens of |unit|: |gate x up| in a gated FFN. Units
            with the smallest mean go first.
    """
    if not len(texts):
        raise HlmError("expected calibration texts, found none; give unlabelled queries")
    layers = layers_of(model[0].model)
    ratios = np.zeros(len(layers))
    units = [np.zeros(ffn_parts(layer)[1].in_features) for layer in layers]
    seen: dict[str, Any] = {"mask": None}

    def layer_hook(number: int):
        def hook(module, args, kwargs, output):
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            ratio = after.float().norm(dim=-1) / before.float().norm(dim=-1).clamp(min=1e-12)
            ratios[number] += float(ratio[seen["mask"]].double().sum())

        return hook

    def unit_hook(number: int):
        def hook(module, args):
            units[number] += args[0].float().abs()[seen["mask"]].double().sum(dim=0).cpu().numpy()

        return hook

    handles = []
    for number, layer in enumerate(layers):
        handles.append(layer.register_forward_hook(layer_hook(number), with_kwargs=True))
        handles.append(ffn_parts(layer)[1].register_forward_pre_hook(unit_hook(number)))
    was_training, tokens = model.training, 0
    model.eval()
    try:
        for start in range(0, len(texts), batch_size):
            features = pad(model, tokenise(model, list(texts[start : start + batch_size])))
            features = {name: value.to(model.device) for name, value in features.items()}
            seen["mask"] = features["attention_mask"].bool()
            tokens += int(seen["mask"].sum())
            model(features)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return ratios / tokens, [unit / tokens for unit in units]


def keep_layers(count: int, keep: int, method: str = "middle_skip", ratios: np.ndarray | None = None) -> list[int]:
    """Which `keep` of `count` layers stay, in order.

    "middle_skip" keeps both ends and drops a contiguous middle block (the front has the odd one): 6 -> 3 is [0, 1, 5].
    "norm_ratio" drops the layers whose ratio is nearest to 1.

    Raises:
        HlmError: `keep` outside 1 ... count, an unknown method, or norm_ratio without ratios.
    """
    if not 1 <= keep <= count:
        raise HlmError(f"layers: expected 1 to {count} (what the model has), found {keep}; a cut cannot grow a model")
    if method == "middle_skip":
        front = (keep + 1) // 2
        return [*range(front), *range(count - (keep - front), count)]
    if method != "norm_ratio" or ratios is None:
        raise HlmError(f"method: expected one of {', '.join(METHODS)} (norm_ratio with its ratios), found {method!r}")
    change = np.abs(np.asarray(ratios) - 1)
    return sorted(np.argsort(-change, kind="stable")[:keep].tolist())


def prune(
    model: SentenceTransformer,
    *,
    layers: Sequence[int] | None = None,
    ffn: int | None = None,
    activations: Sequence[np.ndarray] | None = None,
) -> SentenceTransformer:
    """A copy of `model` with these layers and this FFN width; the model given is left as it is.

    Args:
        layers: layer numbers that stay, ascending; None keeps all.
        ffn: FFN units a layer keeps, those with the highest mean activation; None keeps all.
        activations: per layer of the uncut model float (FFN width,), from `score`; needed with `ffn`.

    Raises:
        HlmError: layers that are not there or not ascending, or an FFN wider than the model's.
    """
    model = copy.deepcopy(model)
    backbone = model[0].model
    found = layers_of(backbone)
    layers = list(range(len(found))) if layers is None else list(layers)
    if not layers or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= len(found):
        raise HlmError(f"layers: expected ascending numbers within 0..{len(found) - 1}, found {layers}")
    kept = [found[number] for number in layers]
    config = backbone.config
    if ffn is not None and ffn != config.intermediate_size:
        if not 1 <= ffn <= config.intermediate_size:
            raise HlmError(f"ffn: expected 1 to {config.intermediate_size} (the model's width), found {ffn}")
        if activations is None:
            raise HlmError("ffn: expected activations to choose units by, found none; pass those of score()")
        for number, layer in zip(layers, kept, strict=True):
            _cut_ffn(layer, np.sort(np.argsort(-activations[number], kind="stable")[:ffn]))
        config.intermediate_size = ffn
    if len(kept) < len(found):
        del found[:]
        found.extend(kept)
        config.num_hidden_layers = len(kept)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[number] for number in layers]
        for number, layer in enumerate(kept):
            # Key-value caches and saving go by this number.
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = number
    return model


def _cut_ffn(layer: nn.Module, units: np.ndarray) -> None:
    into, out = ffn_parts(layer)
    index = torch.from_numpy(units).to(out.weight.device)
    with torch.no_grad():
        for linear in into:
            linear.weight = nn.Parameter(linear.weight[index].clone())
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias[index].clone())
            linear.out_features = len(units)
        out.weight = nn.Parameter(out.weight[:, index].clone())
        out.in_features = len(units)
    if hasattr(layer, "mlp") and hasattr(layer.mlp, "intermediate_size"):
        layer.mlp.intermediate_size = len(units)


def cut(
    model: SentenceTransformer, layers: int | Sequence[int] | None, ffn: int | None, method: str, texts: Sequence[str]
) -> SentenceTransformer:
    """One stage of a cascade: scores `model` on `texts` where the method needs it, and prunes.

    Args:
        layers: how many layers stay (`method` chooses them), or which; None keeps all.
        ffn: FFN units a layer keeps; None keeps all.
        texts: calibration queries.
    """
    count = len(layers_of(model[0].model))
    by_ratio = isinstance(layers, int) and method == "norm_ratio"
    ratios, activations = score(model, texts) if by_ratio or ffn is not None else (None, None)
    if isinstance(layers, int):
        layers = keep_layers(count, layers, method, ratios)
    return prune(model, layers=layers, ffn=ffn, activations=activations)


def check_cascade(stages: Sequence[dict[str, Any]]) -> None:
    """Refuses a cascade with unknown keys, wrong types, or a stage that grows, before any weights load.

    Raises:
        HlmError: naming the stage, what was found and what is allowed.
    """
    depth = width = None
    for number, stage in enumerate(stages, 1):
        where = f"cascade, stage {number}"
        unknown = sorted(set(stage) - {"layers", "ffn", "epochs"})
        if unknown:
            raise HlmError(f"{where}: expected the keys layers, ffn and epochs, found '{unknown[0]}'")
        layers, ffn = stage.get("layers"), stage.get("ffn")
        whole = isinstance(layers, list) and layers and all(type(value) is int for value in layers)
        if not (layers is None or type(layers) is int or whole):
            raise HlmError(f"{where}: layers: expected a number or a list of numbers, found {layers!r}")
        if not (ffn is None or (type(ffn) is int and ffn > 0)):
            raise HlmError(f"{where}: ffn: expected a number above 0, found {ffn!r}")
        keep = len(layers) if isinstance(layers, list) else layers
        for name, now, before in (("layers", keep, depth), ("ffn", ffn, width)):
            if now is not None and before is not None and now > before:
                raise HlmError(f"{where}: {name} grows from {before} to {now}; a cascade only cuts: {before} at most")
        depth, width = keep if keep is not None else depth, ffn if ffn is not None else width


def planned_parameters(
    config: PretrainedConfig, *, layers: int | None = None, ffn: int | None = None
) -> tuple[int, int]:
    """(total, non-embedding) parameters of this architecture cut to `layers` and `ffn`, counted on the meta device."""
    config = copy.deepcopy(config)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    if ffn is not None:
        config.intermediate_size = ffn
    with torch.device("meta"):
        return parameter_counts(AutoModel.from_config(config))


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(total, non-embedding) parameters; shared ones count once, every `nn.Embedding` is left out of the second."""
    total = {id(parameter): parameter.numel() for parameter in model.parameters()}
    tables = {
        id(module.weight): module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding)
    }
    return sum(total.values()), sum(total.values()) - sum(tables.values())
