"""Pruning: which layers and FFN units stay, and the surgery that leaves a smaller model of the same architecture.

Backbones of the families in `hlm.encoders.families` can be cut. The cut model is a stock one: it is saved and loaded
like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import AutoModel, PretrainedConfig

from hlm.artefacts import HlmError
from hlm.encoders.families import check_layers, depth_of, family_of, ffn_parts, ffn_width_of, layers_of, set_cut
from hlm.encoders.folding import check_fold, fold_first_layers
from hlm.encoders.loading import pad, tokenise
from hlm.encoders.static import is_static

METHODS = ("middle_skip", "norm_ratio")


def layer_norm_ratios(model: SentenceTransformer, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
    """Scores layers on calibration queries: mean over real tokens of ||layer output|| / ||layer input||.

    The ratio is arXiv 2605.23572's score. Which ratios mean "less important" is HLM's reading: a layer whose ratio is
    nearest to 1 changes the size of its input least, and goes first. (One that only turns its input looks idle, too.)
    A BERT-style layer ends in a LayerNorm, whose weights set the ratio whatever the layer does: take middle_skip there.

    Returns:
        float64 (layers,).

    Raises:
        HlmError: no texts, a backbone that is not known, or values that are not finite.
    """

    def ratio(args: tuple, kwargs: dict[str, Any], output: Any) -> torch.Tensor:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        return after.float().norm(dim=-1) / before.float().norm(dim=-1).clamp(min=1e-12)

    return np.array(_token_means(model, texts, batch_size, list(layers_of(model[0].model)), ratio))


def ffn_activations(model: SentenceTransformer, texts: Sequence[str], batch_size: int = 64) -> list[np.ndarray]:
    """Scores FFN units on calibration queries: mean over real tokens of |unit| as the last projection reads it.

    That is |act(gate) x up| in a gated FFN (arXiv 2605.23572) and |act(unit)| in another. Units with the smallest mean
    go first.

    Returns:
        For each layer float64 (FFN width,).

    Raises:
        HlmError: as `layer_norm_ratios`.
    """
    backbone = model[0].model
    out = [ffn_parts(backbone, layer)[1] for layer in layers_of(backbone)]
    return _token_means(model, texts, batch_size, out, lambda args, kwargs, output: args[0].float().abs())


@torch.no_grad()  # not inference_mode: a buffer made under it could not be trained through afterwards
def _token_means(
    model: SentenceTransformer,
    texts: Sequence[str],
    batch_size: int,
    modules: list[nn.Module],
    measure: Callable[[tuple, dict[str, Any], Any], torch.Tensor],
) -> list[np.ndarray]:
    """`measure` ((rows, tokens) or (rows, tokens, width)) at each module's call, averaged over unpadded tokens."""
    if isinstance(texts, str) or not len(texts) or batch_size < 1:
        found = "one str" if isinstance(texts, str) else f"{len(texts)} texts in batches of {batch_size}"
        raise HlmError(f"expected a list of calibration texts, found {found}; give unlabelled queries")
    sums: list[Any] = [0.0] * len(modules)
    mask = torch.empty(0)

    def hook_of(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            sums[number] += measure(args, kwargs, output)[mask].double().sum(dim=0).cpu().numpy()

        return hook

    handles = [module.register_forward_hook(hook_of(i), with_kwargs=True) for i, module in enumerate(modules)]
    was_training, tokens = model.training, 0
    model.eval()
    try:
        for start in range(0, len(texts), batch_size):
            features = pad(model, tokenise(model, list(texts[start : start + batch_size])))
            features = {name: value.to(model.device) for name, value in features.items()}
            mask = features["attention_mask"].bool()
            tokens += int(mask.sum())
            model(features)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    means = [total / tokens for total in sums]
    if not all(np.isfinite(mean).all() for mean in means):
        raise HlmError("expected finite activations on the calibration texts, found inf or nan; load in float32")
    return means


def keep_layers(count: int, keep: int, method: str = "middle_skip", scores: np.ndarray | None = None) -> list[int]:
    """Which `keep` of `count` layers stay, in order.

    "middle_skip" keeps both ends and drops a contiguous middle block (the front has the odd one): 6 -> 3 is [0, 1, 5].
    "norm_ratio" drops the layers whose score is nearest to 1.

    Args:
        scores: (count,), from `layer_norm_ratios`; needed for norm_ratio.

    Raises:
        HlmError: `keep` outside 1 ... count, an unknown method, or norm_ratio without a score for every layer.
    """
    _within("layers", keep, count)
    if method == "middle_skip":
        front = (keep + 1) // 2
        return [*range(front), *range(count - (keep - front), count)]
    if method != "norm_ratio":
        raise HlmError(f"method: expected one of {', '.join(METHODS)}, found {method!r}")
    if scores is None or len(scores) != count:
        found = "none" if scores is None else len(scores)
        raise HlmError(f"norm_ratio: expected {count} scores, found {found}; pass those of layer_norm_ratios()")
    change = np.abs(np.asarray(scores) - 1)
    return sorted(np.argsort(-change, kind="stable")[:keep].tolist())


def _within(what: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise HlmError(
            f"{what}: expected 1 to {most} (what the model has), found {value}; a cut neither grows nor empties a "
            f"model: the nearest that works is {min(max(value, 1), most)}"
        )


def prune(
    model: SentenceTransformer,
    *,
    layers: Sequence[int] | None = None,
    ffn_width: int | None = None,
    activations: Sequence[np.ndarray] | None = None,
) -> SentenceTransformer:
    """A copy of `model` with these layers and this FFN width; the model given is left as it is.

    What stays has the same bits and the same order, in the model's own dtype and on its own device.

    Args:
        layers: layer numbers that stay, ascending; None keeps all.
        ffn_width: FFN units a layer keeps, those with the highest mean activation; None keeps all.
        activations: for each layer of the model given (FFN width,), from `ffn_activations`; needed with `ffn_width`.

    Raises:
        HlmError: layers that are not there or not ascending, an FFN wider than the model's or without one score a unit,
            or LoRA adapters that are not merged.
    """
    layers = list(range(len(layers_of(model[0].model)))) if layers is None else list(layers)
    check_layers(model[0].model.config, layers)
    if hasattr(model[0].model, "peft_config"):
        raise HlmError("expected a model without LoRA adapters, found some; merge them before the cut")
    units = None if ffn_width is None else _units_that_stay(model[0].model, ffn_width, activations)
    model = copy.deepcopy(model)
    backbone = model[0].model
    found = layers_of(backbone)
    kept = [found[number] for number in layers]
    if units is not None:
        for number, layer in zip(layers, kept, strict=True):
            _cut_ffn(backbone, layer, units[number])
        set_cut(backbone.config, ffn_width=ffn_width)
    if len(kept) < len(found):
        set_cut(backbone.config, layers)
        del found[:]
        found.extend(kept)
        for number, layer in enumerate(kept):
            # Key-value caches and saving go by this number.
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = number
    return model


def _units_that_stay(
    backbone: nn.Module, ffn_width: int, activations: Sequence[np.ndarray] | None
) -> list[np.ndarray] | None:
    """The `ffn_width` most active units of every layer, ascending; None where all stay."""
    width, depth = ffn_width_of(backbone.config), depth_of(backbone.config)
    _within("FFN width", ffn_width, width)
    if ffn_width == width:
        return None
    if activations is None:
        raise HlmError(
            f"FFN width {ffn_width} of {width}: expected activations to choose units by, found none; pass those of "
            "ffn_activations(), or leave the width unset"
        )
    if [np.shape(units) for units in activations] != [(width,)] * depth:
        raise HlmError(
            f"expected activations of {depth} layers x {width} units, found shapes "
            f"{[np.shape(units) for units in activations]}; score the very model that is cut"
        )
    return [np.sort(np.argsort(-np.asarray(scores), kind="stable")[:ffn_width]) for scores in activations]


def _cut_ffn(backbone: nn.Module, layer: nn.Module, units: np.ndarray) -> None:
    into, out = ffn_parts(backbone, layer)
    width = out.in_features

    def cut_down(parameter: nn.Parameter, dim: int, rows: np.ndarray) -> nn.Parameter:
        index = torch.from_numpy(rows).to(parameter.device)
        return nn.Parameter(parameter.detach().index_select(dim, index), requires_grad=parameter.requires_grad)

    for linear in into:
        rows = np.concatenate([units + start for start in range(0, linear.out_features, width)])
        linear.weight = cut_down(linear.weight, 0, rows)
        if linear.bias is not None:
            linear.bias = cut_down(linear.bias, 0, rows)
        linear.out_features = len(rows)
    out.weight = cut_down(out.weight, 1, units)
    out.in_features = len(units)
    if hasattr(layer, "mlp") and hasattr(layer.mlp, "intermediate_size"):
        layer.mlp.intermediate_size = len(units)


def cut(
    model: SentenceTransformer,
    layers: int | Sequence[int] | None,
    ffn: int | None,
    method: str,
    texts: Sequence[str],
    *,
    fold: bool = False,
) -> SentenceTransformer:
    """One stage of a cascade: scores `model` on `texts` where the method needs it, and prunes.

    Args:
        layers: how many layers stay (`method` chooses them), or which, as `model` numbers them; None keeps all.
        ffn: FFN units a layer keeps; None keeps all.
        texts: calibration queries.
        fold: token embeddings start as what the dropped first layers make of each token, see `hlm.encoders.folding`.

    Raises:
        HlmError: a shape that the model cannot be cut to, or a fold that it cannot have.
    """
    if is_static(model):
        if layers is not None or ffn is not None or fold:
            raise HlmError("expected a student with layers to cut, found a static one; leave layers, ffn and fold out")
        return copy.deepcopy(model)
    config = model[0].model.config
    count = depth_of(config)
    if fold:
        check_fold(config, layers)
    if isinstance(layers, int):
        _within("layers", layers, count)  # before the calibration, which takes its time
        scores = layer_norm_ratios(model, texts) if method == "norm_ratio" else None
        if scores is not None and family_of(config).first_stays:
            scores[0] = np.inf
        layers = keep_layers(count, layers, method, scores)
    activations = ffn_activations(model, texts) if ffn is not None else None
    small = prune(model, layers=layers, ffn_width=ffn, activations=activations)
    if fold and layers:
        fold_first_layers(small, prune(model, layers=range(layers[0])))
    return small


def check_cascade(stages: Sequence[dict[str, Any]]) -> None:
    """Refuses a cascade with unknown keys, wrong types, or a stage that grows, before any weights load.

    Raises:
        HlmError: naming the stage, what was found and what is allowed.
    """
    depth = width = None
    for number, stage in enumerate(stages, 1):
        where = f"cascade, stage {number}"
        unknown = sorted(set(stage) - {"layers", "ffn", "epochs", "fold"})
        if unknown:
            raise HlmError(f"{where}: expected the keys layers, ffn, epochs and fold, found '{unknown[0]}'")
        layers, ffn = stage.get("layers"), stage.get("ffn")
        if type(stage.get("fold", False)) is not bool:
            raise HlmError(f"{where}: fold: expected true or false, found {stage['fold']!r}")
        whole = isinstance(layers, list) and layers and all(type(value) is int for value in layers)
        if not (layers is None or (type(layers) is int and layers > 0) or whole):
            raise HlmError(f"{where}: layers: expected a number above 0 or a list of layer numbers, found {layers!r}")
        if not (ffn is None or (type(ffn) is int and ffn > 0)):
            raise HlmError(f"{where}: ffn: expected a number above 0, found {ffn!r}")
        keep = len(layers) if isinstance(layers, list) else layers
        name: str
        now: int | None
        before: int | None
        for name, now, before in (("layers", keep, depth), ("ffn", ffn, width)):
            if now is not None and before is not None and now > before:
                raise HlmError(f"{where}: {name} grows from {before} to {now}; a cascade only cuts: {before} at most")
        depth, width = keep if keep is not None else depth, ffn if ffn is not None else width


def planned_parameters(
    config: PretrainedConfig, layers: int | None = None, ffn_width: int | None = None
) -> tuple[int, int]:
    """(total, non-embedding) parameters of this backbone cut to so many layers and FFN units; no weights are needed.

    Raises:
        HlmError: more layers or units than `config` has, or less than one.
    """
    with torch.device("meta"):
        return parameter_counts(AutoModel.from_config(cut_config(config, layers, ffn_width)))


def cut_config(config: PretrainedConfig, layers: int | None = None, ffn_width: int | None = None) -> PretrainedConfig:
    """A copy with its first so many layers and this FFN width (None: as it is): what a cut model's config.json says.

    Raises:
        HlmError: more layers or units than `config` has, or less than one.
    """
    config = copy.deepcopy(config)
    if layers is not None:
        _within("layers", layers, depth_of(config))
    if ffn_width is not None:
        _within("FFN width", ffn_width, ffn_width_of(config))
    set_cut(config, None if layers is None else range(layers), ffn_width)
    return config


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(total, non-embedding) parameters; shared ones count once, embedding tables are left out of the second."""
    total = {id(parameter): parameter.numel() for parameter in model.parameters()}
    tables = {
        id(module.weight): module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    return sum(total.values()), sum(total.values()) - sum(tables.values())
