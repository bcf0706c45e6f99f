"""Folding: the embeddings of a cut student start as what the dropped first layers made of each token.

A layer far from the embeddings reads states that no embedding looks like. A student that keeps only late layers would
learn that first. What the first layers make of a token **alone** needs no layers: it is one row of a table. What they
make of its neighbours is lost, as in any cut. arXiv 2605.23572 does not do this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from transformers import PretrainedConfig

from hlm.artefacts import HlmError
from hlm.encoders.families import FAMILIES, family_of, part_of
from hlm.progress import progress

TOKENS_PER_STEP = 1024


def check_fold(config: PretrainedConfig, layers: Any) -> None:
    """Refuses a fold before any weights load.

    Raises:
        HlmError: layers that are not named or begin with the first one, or a backbone whose embeddings end in no norm.
    """
    if not isinstance(layers, Sequence) or not layers or layers[0] == 0:
        raise HlmError(
            f"fold: expected layers by their numbers, without the first one, 0, found {layers!r}; only first layers "
            "that are dropped are folded: name others, such as the last, or leave fold out"
        )
    if family_of(config).ending_norm is None:
        able = ", ".join(name for name, family in FAMILIES.items() if family.ending_norm)
        raise HlmError(
            f"fold: expected a backbone whose embeddings and layers end in a norm ({able}), found "
            f"'{config.model_type}'; leave fold out"
        )
    if (narrow := getattr(config, "embedding_size", config.hidden_size)) != config.hidden_size:
        raise HlmError(
            f"fold: expected embeddings as wide as the layers, {config.hidden_size}, found {narrow}; leave fold out"
        )


@torch.no_grad()
def fold_first_layers(student: SentenceTransformer, front: SentenceTransformer) -> None:
    """Makes the student's embeddings of each token, in place, what `front` makes of that token alone.

    Special tokens around a text get the mean of what they are beside all tokens. Positions keep the weight that they
    had beside tokens; token types are set to zero, for they are in the rows.

    Args:
        student: whose layers follow those of `front`; its embeddings are still front's.
        front: the model with its first layers alone, from `prune`.
    """
    backbone, first = student[0].model, front[0].model.eval()
    table = backbone.get_input_embeddings().weight
    family = family_of(backbone.config)
    norm: Any = part_of(part_of(first, family.layers)[-1], str(family.ending_norm))
    before, after = _around(student.tokenizer)
    states = torch.empty(table.shape, dtype=torch.float32)
    special = torch.zeros(len(before) + len(after), table.shape[1], dtype=torch.float64)
    beside = [place for place in range(len(before) + 1 + len(after)) if place != len(before)]
    for tokens in progress(torch.arange(len(table)).split(TOKENS_PER_STEP), what="fold first layers", unit="step"):
        ids = torch.empty(len(tokens), len(beside) + 1, dtype=torch.int64)
        ids[:, beside], ids[:, len(before)] = torch.tensor([*before, *after], dtype=torch.int64), tokens
        ids = ids.to(table.device)
        found = first(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.cpu().float()
        states[tokens] = found[:, len(before)]
        special += found[:, beside].double().sum(dim=0)
    for number, token in enumerate([*before, *after]):
        states[token] = (special[number] / len(table)).float()
    weight, bias = norm.weight.float().cpu(), norm.bias.float().cpu()
    # The norm that ends the embeddings becomes the layer's: a row has to be what that norm read, of any length.
    states = torch.where(weight.abs() > 1e-6, (states - bias) / weight, 0.0)
    length = table.float().norm(dim=1).median().cpu()
    table.copy_(states / states.norm(dim=1, keepdim=True).clamp_min(1e-6) * length)
    embeddings = backbone.embeddings
    embeddings.LayerNorm.load_state_dict(norm.state_dict())
    if hasattr(embeddings, "token_type_embeddings"):
        embeddings.token_type_embeddings.weight.zero_()


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens before and after a text."""
    read = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = read["input_ids"], read["special_tokens_mask"]
    text = [place for place, special in enumerate(mask) if not special]
    if not text:
        raise HlmError(f"fold: expected a tokenizer that reads the text 'a', found the tokens {ids} for it")
    return ids[: text[0]], ids[text[-1] + 1 :]
