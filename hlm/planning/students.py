"""What the steps make of a backbone: the shape of every student, from settings and small files, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from hlm.artefacts import HlmError
from hlm.encoders.families import check_layers
from hlm.encoders.folder import TOKENIZER, EncoderFolder
from hlm.encoders.folding import check_fold
from hlm.encoders.loading import resolve
from hlm.encoders.pruning import check_cascade, cut_config
from hlm.encoders.static import is_static_folder
from hlm.encoders.static_words import most_tokens
from hlm.encoders.vocabulary import check_vocabulary
from hlm.fields import read_json
from hlm.planning.footprint import Shape, backbone_config, file_of


@dataclass(frozen=True)
class Model:
    """A model as a step leaves it.

    Attributes:
        source: what it was made of, at first: a folder, a Hub id or package:...; its tokenizer is that one's.
        config: its config.json; None of a static student.
        table: (tokens, width) of a static student.
    """

    source: str
    config: PretrainedConfig | None
    table: tuple[int, int] = (0, 0)

    @cached_property
    def shape(self) -> Shape:
        """What it costs depends on.

        Raises:
            HlmError: a backbone of a family that is not known.
        """
        return Shape.static(*self.table) if self.config is None else Shape.of(self.config)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Parameters, those without embeddings, and LoRA's, of which it has none."""
        return self.shape.parameters, self.shape.parameters - self.shape.embeddings, 0


def model_at(source: str) -> Model:
    """The model in a folder, an installed package or on the Hub.

    Raises:
        HlmError: there is none, or the table of a static student cannot be read.
    """
    folder = Path(resolve(source))
    if not is_static_folder(folder):
        return Model(source, backbone_config(source))
    weights = folder / EncoderFolder(folder).modules()[0].path / "model.safetensors"
    try:
        with safe_open(weights, "numpy") as file:
            name = "embedding.weight" if "embedding.weight" in file.keys() else "embeddings"  # noqa: SIM118
            tokens, width = file.get_slice(name).get_shape()
    except (OSError, SafetensorError) as error:
        raise HlmError(f"{weights}: expected a table of tokens, found none ({error}); copy the folder again") from error
    return Model(source, None, (tokens, width))


def after_cut(model: Model, cut: Mapping[str, Any]) -> Model:
    """What `prune` leaves of a model. Of `vocabulary: {min_count: N}` that is not known: the table stays whole.

    Args:
        cut: the settings of the step.

    Raises:
        HlmError: a static student, which has no layers to cut; or settings that it cannot be cut by.
    """
    layers, ffn, vocabulary = cut["layers"] or cut["keep"], cut["ffn"], cut["vocabulary"]
    if cut["static"] is not None and (layers or ffn or vocabulary):
        raise HlmError("static: expected it alone, found layers, keep, ffn or vocabulary beside it; leave them out")
    if model.config is None:
        raise HlmError("model: expected one with layers to cut, found a static student; name another")
    check_vocabulary(vocabulary)
    ((_, shape, config),) = cascade(model.config, [{"layers": layers, "ffn": ffn, "fold": cut["fold"]}])
    if cut["static"] is not None:
        return Model(model.source, None, (_static_tokens(model.source, config, cut["static"]), shape.hidden))
    config.vocab_size = min(config.vocab_size, vocabulary.get("keep", config.vocab_size))
    if config.pad_token_id is not None:  # a cut numbers tokens anew
        config.pad_token_id = min(config.pad_token_id, config.vocab_size - 1)
    return Model(model.source, config)


def _static_tokens(source: str, config: PretrainedConfig, words: int) -> int:
    """How many tokens a static student of so many words has at most; without a tokenizer to read, all are taken."""
    if words < 1:
        raise HlmError(f"static: expected 1 word or more, found {words}")
    whole = 1 + words + max(words, config.vocab_size)
    tokenizer = file_of(resolve(source), TOKENIZER)
    return min(whole, most_tokens(read_json(tokenizer), words)) if tokenizer else whole


def cascade(config: PretrainedConfig, stages: list[dict[str, Any]]) -> list[tuple[dict, Shape, PretrainedConfig]]:
    """(stage, shape, config) after every stage of a cascade over this backbone; no weights are needed.

    Raises:
        HlmError: a stage that grows, in layers or FFN units, beyond the backbone or the stage before; layer numbers
            that the stage before does not have.
    """
    check_cascade(stages)
    found = []
    for number, stage in enumerate(stages, 1):
        layers, ffn = stage.get("layers"), stage.get("ffn")
        try:
            if stage.get("fold"):
                check_fold(config, layers)
            if isinstance(layers, list):
                check_layers(config, layers)
                layers = len(layers)
            shape = Shape.of(config, layers, ffn)
        except HlmError as error:
            raise HlmError(f"cascade, stage {number}: {error}") from error
        config = cut_config(config, shape.layers, shape.ffn)
        found.append((stage, shape, config))
    return found
