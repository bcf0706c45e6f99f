"""What is known of the families of backbones: where layers and FFNs lie, which tokens attend to which, how positions
are counted. A family is one entry of `FAMILIES`, by the `model_type` of its config.json.

Imports neither torch nor transformers: what serves a model asks here as well.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hlm.errors import HlmError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

FULL, SLIDING = "full_attention", "sliding_attention"  # as `layer_types` names them


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """How configurations of before `layer_types` told the layers that attend to all tokens: layer i is one where
    (i + first) is a multiple of the field's value. Readers other than transformers may know this field alone."""

    field: str
    first: int = 0

    def value(self, kinds: Sequence[str], now: int) -> int | None:
        """The number that stands for these kinds of layers, `now` where it does; None where no number does."""
        for every in (now, *range(1, len(kinds) + self.first + 1)):
            if all((kind == FULL) == ((i + self.first) % every == 0) for i, kind in enumerate(kinds)):
                return every
        return None


@dataclass(frozen=True, kw_only=True)
class Family:
    """What pruning, export and planning know of a backbone.

    Attributes:
        layers: where the backbone has its list of layers.
        ffn_in: projections into the FFN's units, within a layer. A unit is a row of each; where a projection holds two
            (fused gate and input), the second half's rows follow the first's.
        ffn_out: the projection out of the units, which are its columns.
        gated: whether units are products of two projections.
        depth, hidden, ffn: fields of config.json: how many layers, how wide their states and how many FFN units.
        shifted_positions: position ids begin behind the padding token's id, so that as many rows of the table of
            positions stand for no token.
        first_stays: the first layer has no norm of its own at its entry, so that no other can take its place.
        pattern: see `Pattern`; None: the family never had one.
        inclusive_window: whether a token sees those as far away as its window is wide, and not only nearer ones.
        norm_offset: what RMSNorm adds to its weights.
        ending_norm: where the norm lies that ends a layer, as one ends the embeddings; None: norms begin the layers.
        lookups: embeddings and biases are BERT's, for which the online graph knows a shorter computation.
    """

    layers: str = "layers"
    ffn_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    ffn_out: str = "mlp.down_proj"
    gated: bool = True
    depth: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    ffn: str = "intermediate_size"
    shifted_positions: bool = False
    first_stays: bool = False
    pattern: Pattern | None = None
    inclusive_window: bool = False
    norm_offset: float = 0.0
    ending_norm: str | None = None
    lookups: bool = False


def _bert(*, ending_norm: str | None = "output.LayerNorm", **own: Any) -> Family:
    own |= {"ffn_in": ("intermediate.dense",), "ffn_out": "output.dense", "gated": False}
    return Family(layers="encoder.layer", ending_norm=ending_norm, **own)


FAMILIES: dict[str, Family] = {
    "bert": _bert(lookups=True),
    "electra": _bert(),
    "ernie": _bert(),
    "megatron-bert": _bert(ending_norm=None),
    "roberta": _bert(shifted_positions=True),
    "roberta-prelayernorm": _bert(shifted_positions=True, ending_norm=None),
    "xlm-roberta": _bert(shifted_positions=True),
    "xlm-roberta-xl": _bert(shifted_positions=True, ending_norm=None),
    "camembert": _bert(shifted_positions=True),
    "data2vec-text": _bert(shifted_positions=True),
    "mpnet": _bert(shifted_positions=True),
    "distilbert": Family(
        layers="transformer.layer",
        ffn_in=("ffn.lin1",),
        ffn_out="ffn.lin2",
        gated=False,
        depth="n_layers",
        hidden="dim",
        ffn="hidden_dim",
        ending_norm="output_layer_norm",
    ),
    "modernbert": Family(
        ffn_in=("mlp.Wi",),
        ffn_out="mlp.Wo",
        first_stays=True,
        pattern=Pattern(field="global_attn_every_n_layers"),
        inclusive_window=True,
    ),
    "gemma3_text": Family(pattern=Pattern(field="sliding_window_pattern", first=1), norm_offset=1.0),
    "qwen2": Family(),
    "qwen3": Family(),
    "llama": Family(),
    "mistral": Family(),
}


def known(config: PretrainedConfig | Mapping[str, Any]) -> Family | None:
    """The family of a configuration or of a config.json; None: not a known one."""
    kind = _value(config, "model_type")
    return FAMILIES.get(kind) if isinstance(kind, str) else None


def _value(config: PretrainedConfig | Mapping[str, Any], name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def family_of(config: PretrainedConfig) -> Family:
    """The family of a backbone's configuration.

    Raises:
        HlmError: not a known one; names what is not known of it.
    """
    family = known(config)
    if family is None:
        raise HlmError(
            f"expected a backbone of a known family ({', '.join(FAMILIES)}), found "
            f"'{getattr(config, 'model_type', None)}' ({type(config).__name__}); where its layers lie, how its FFN is "
            "cut and which tokens attend to which is not known: choose a known one, or add it to FAMILIES in "
            "hlm/encoders/families.py"
        )
    return family


def layers_of(backbone: nn.Module) -> nn.ModuleList:
    """The transformer layers of `model[0].model`, in order.

    Raises:
        HlmError: a backbone of no known family.
    """
    return part_of(backbone, family_of(backbone.config).layers)


def ffn_parts(backbone: nn.Module, layer: nn.Module) -> tuple[list[nn.Linear], nn.Linear]:
    """The projections into a layer's FFN units (rows are units, see `Family.ffn_in`), and the one out of them (columns
    are units)."""
    family = family_of(backbone.config)
    return [part_of(layer, path) for path in family.ffn_in], part_of(layer, family.ffn_out)


def part_of(module: nn.Module, path: str) -> Any:
    """The module at this path within another.

    Raises:
        HlmError: transformers lays the family out in another way.
    """
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise HlmError(
            f"expected '{path}' in a {type(module).__name__}, found none; the installed transformers lays it out in "
            "another way than hlm/encoders/families.py says: correct it, or install the version in constraints.txt"
        ) from error


def depth_of(config: PretrainedConfig) -> int:
    return getattr(config, family_of(config).depth)


def depth_field(config: Mapping[str, Any]) -> str:
    """The field of a config.json that says how many layers there are."""
    return (known(config) or Family()).depth


def ffn_width_of(config: PretrainedConfig) -> int:
    return getattr(config, family_of(config).ffn)


def check_layers(config: PretrainedConfig, layers: Sequence[int]) -> None:
    """Refuses layers that cannot be those that stay.

    Raises:
        HlmError: not ascending or not there, or without the first one where it has to stay; names the nearest.
    """
    count, first_stays = depth_of(config), family_of(config).first_stays
    nearest = sorted({min(max(number, 0), count - 1) for number in layers} | ({0} if first_stays else set())) or [0]
    if list(layers) != sorted(set(layers)) or not layers or layers[0] < 0 or layers[-1] >= count:
        raise HlmError(
            f"layers: expected ascending numbers within 0..{count - 1}, found {list(layers)}; the nearest that works "
            f"is {nearest}"
        )
    if first_stays and layers[0] != 0:
        raise HlmError(
            f"layers: expected the first one, 0, among those that stay, found {list(layers)}; only the first layer of "
            f"{config.model_type} reads the embeddings without a norm: the nearest that works is {nearest}"
        )


def set_cut(config: PretrainedConfig, layers: Sequence[int] | None = None, ffn_width: int | None = None) -> None:
    """Makes a configuration, in place, that of a model with these layers and so many FFN units; None: as it is."""
    family = family_of(config)
    if ffn_width is not None:
        setattr(config, family.ffn, ffn_width)
    if layers is None:
        return
    setattr(config, family.depth, len(layers))
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[number] for number in layers]
        if family.pattern is not None:
            _set_pattern(config, family.pattern)


def _set_pattern(config: PretrainedConfig, pattern: Pattern) -> None:
    for name in (pattern.field, f"_{pattern.field}"):
        now = getattr(config, name, None)
        if now is None:
            continue
        every = pattern.value(config.layer_types, now)
        if every is not None:
            setattr(config, name, every)
        else:
            logger.warning(
                "the layers that stay are %s, which no %s stands for; readers that do not know `layer_types` would "
                "compute another model",
                ", ".join(kind.removesuffix("_attention") for kind in config.layer_types),
                pattern.field,
            )


def longest_text(config: PretrainedConfig | Mapping[str, Any]) -> int | None:
    """Tokens of the longest text that a configuration or a config.json has positions for; None: it names no limit."""
    limit = _value(config, "max_position_embeddings")
    if isinstance(limit, int) and has_shifted_positions(config):
        limit -= (_value(config, "pad_token_id") or 0) + 1
    return limit


def has_shifted_positions(config: PretrainedConfig | Mapping[str, Any]) -> bool:
    """`Family.shifted_positions`; of an unknown family false."""
    return (known(config) or Family()).shifted_positions


def is_causal(backbone: nn.Module) -> bool:
    """Whether a token attends to those before it alone. `is_causal` false in the configuration takes that from a model
    whose layers are made for it."""
    made_for_it = any(getattr(module, "is_causal", False) for module in backbone.modules())
    return made_for_it and getattr(backbone.config, "is_causal", True) is not False


def reaches(config: PretrainedConfig, longest: int | None) -> dict[str, int | None]:
    """How many tokens away the layers of each kind see, of texts of `longest` tokens at the most; None: all."""
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or (), None)
    window = getattr(config, "sliding_window", None)
    family = known(config)
    if window is not None:
        reach = window if family is not None and family.inclusive_window else window - 1
        kind = SLIDING if kinds else FULL  # a model without kinds (Mistral) has one window for all layers
        if (kind in kinds or not kinds) and (longest is None or longest > reach + 1):
            kinds[kind] = reach
    return kinds or {FULL: None}
