"""Vocabulary pruning: a model keeps the tokens that its log uses, and gives the same vectors for texts of these tokens.

A small encoder is mostly its table of token vectors. What stays beside the log's tokens is what every other text needs:
special tokens, bytes and single characters, so that a text has no unknown token that it did not have before. The cut
model is a stock one, with a tokenizer of the same kind.

Why texts of kept tokens are cut as before: WordPiece takes the longest piece that it knows, Unigram the best path, BPE
the first merge. The smaller vocabulary offers a part of the same choices, and what was chosen is among them.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch import nn
from transformers import PretrainedConfig

from hlm.artefacts import HlmError
from hlm.encoders.families import has_shifted_positions
from hlm.encoders.loading import prompt_of, tokenise
from hlm.settings import closest

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BATCH = 1024  # texts that are tokenised at a time


def check_vocabulary(given: Mapping[str, int], *, needed: bool = False) -> None:
    """Refuses settings that `choose_tokens` cannot follow; none at all are fine unless they are needed.

    Raises:
        HlmError: says what was expected.
    """
    for name, value in given.items():
        if name not in ("keep", "min_count"):
            raise HlmError(
                f"vocabulary: expected keep or min_count, found '{name}'{closest(name, ('keep', 'min_count'))}"
            )
        if value < 1:
            raise HlmError(f"vocabulary: {name}: expected 1 or more, found {value}")
    if len(given) > 1 or (needed and not given):
        raise HlmError(f"vocabulary: expected keep or min_count, found {'both' if given else 'neither'}")


def count_tokens(model: SentenceTransformer, texts: Iterable[str]) -> np.ndarray:
    """How often each token occurs in the texts, without a prompt and with that of queries, which alignment drops: int64
    (ids,)."""
    counts = np.zeros(len(model[0].model.get_input_embeddings().weight), np.int64)
    for ids in _tokens(model, texts):
        np.add.at(counts, ids, 1)
    return counts


def share_kept(model: SentenceTransformer, kept: Iterable[int], texts: Iterable[str]) -> float:
    """Share of the texts that are made of these tokens of `model` alone, without and with the prompt of queries. Of no
    texts it is 0."""
    known = set(kept)
    whole = [known.issuperset(ids) for ids in _tokens(model, texts)]
    return sum(whole) / len(whole) if whole else 0.0


def _tokens(model: SentenceTransformer, texts: Iterable[str]) -> Iterator[list[int]]:
    """Of each text its tokens, those after the prompt too where the model has one."""
    prompt, rest = prompt_of(model, "query"), iter(texts)
    while batch := list(islice(rest, _BATCH)):
        bare = tokenise(model, batch)
        if prompt:
            prompted = tokenise(model, batch, prompt)
            bare = [one + other for one, other in zip(bare, prompted, strict=True)]
        yield from bare


def choose_tokens(
    model: SentenceTransformer, counts: np.ndarray, *, keep: int | None = None, min_count: int | None = None
) -> list[int]:
    """The tokens that stay, ascending: those that every text needs, and the most used.

    A token of BPE brings along the pieces that it is merged from.

    Args:
        counts: see `count_tokens`.
        keep: tokens in all, at most; no unused ones are taken to fill up.
        min_count: instead of `keep`: all that occur at least so often.

    Raises:
        HlmError: neither or both given, fewer tokens than every text needs, or a tokenizer of another kind.
    """
    asked = {"keep": keep, "min_count": min_count}
    check_vocabulary({name: value for name, value in asked.items() if value is not None}, needed=True)
    described = _described(model)
    vocabulary = _vocabulary(described)
    kept = {vocabulary[token] for token in _needed(described["model"], vocabulary)}
    kept |= {added["id"] for added in described["added_tokens"]}
    kept |= {number for number in model.tokenizer.all_special_ids if number is not None}
    config = model[0].model.config
    for _, numbers in _numbered(config):
        kept |= {number for number in numbers if 0 <= number < len(counts)}
    if has_shifted_positions(config):  # positions are counted from the padding token's number, which must stay
        kept |= set(range((config.pad_token_id or 0) + 1))
    if keep is not None and len(kept) > keep:
        raise HlmError(
            f"vocabulary: keep: expected {len(kept):,} or more (special tokens, bytes and characters, which every text "
            f"needs), found {keep:,}"
        )
    pieces = _Pieces(described["model"], vocabulary)
    least = 1 if min_count is None else min_count
    used = [number for number in np.argsort(-counts, kind="stable").tolist() if counts[number] >= least]
    for number in used:
        more = pieces.of(number) - kept
        if keep is not None and len(kept) + len(more) > keep:
            break
        kept |= more
    return sorted(kept)


def cut_vocabulary(model: SentenceTransformer, kept: list[int]) -> SentenceTransformer:
    """A copy of `model` with these tokens, numbered anew in the same order; the model given is left as it is.

    Vectors of texts of these tokens are the same to the bit. Of other texts, longer tokens fall into shorter ones.

    Args:
        kept: from `choose_tokens`.

    Raises:
        HlmError: a tokenizer that cannot be rewritten.
    """
    described = _described(model)
    number_of = {old: new for new, old in enumerate(kept)}
    rewritten = _rewritten(described, number_of)
    tokenizer = Tokenizer.from_str(json.dumps(rewritten))
    wanted = {token: number_of[old] for token, old in _all_tokens(described).items() if old in number_of}
    if tokenizer.get_vocab() != wanted:
        raise HlmError(
            "vocabulary: expected added tokens after all others or among them, found a tokenizer that numbers them in "
            "another way; leave its vocabulary whole"
        )
    model = copy.deepcopy(model)
    model.tokenizer._tokenizer = tokenizer
    backbone = model[0].model
    table = backbone.get_input_embeddings()
    rows = torch.tensor(kept, device=table.weight.device)
    table.weight = nn.Parameter(table.weight.detach().index_select(0, rows), requires_grad=table.weight.requires_grad)
    table.num_embeddings = len(kept)
    if table.padding_idx is not None:
        table.padding_idx = number_of[table.padding_idx]
    config = backbone.config
    config.vocab_size = len(kept)
    for name, numbers in _numbered(config):
        renumbered = [number_of.get(number) for number in numbers]
        setattr(config, name, renumbered if isinstance(getattr(config, name), list) else renumbered[0])
    return model


def _numbered(config: PretrainedConfig) -> list[tuple[str, list[int]]]:
    """Settings that name tokens by their numbers, such as pad_token_id."""
    found = ((name, value) for name, value in config.to_dict().items() if name.endswith("_token_id"))
    return [(name, value if isinstance(value, list) else [value]) for name, value in found if value is not None]


def _described(model: SentenceTransformer) -> dict[str, Any]:
    """tokenizer.json of a model whose tokenizer can be cut."""
    described: dict[str, Any] = json.loads(model.tokenizer.backend_tokenizer.to_str())
    if described["model"]["type"] not in ("WordPiece", "BPE", "Unigram"):
        raise HlmError(
            f"vocabulary: expected a tokenizer of kind WordPiece, BPE or Unigram, found {described['model']['type']}; "
            "leave its vocabulary whole"
        )
    return described


def _vocabulary(described: Mapping[str, Any]) -> dict[str, int]:
    """Token -> number, without added tokens that the model does not know."""
    found = described["model"]["vocab"]
    return dict(found) if isinstance(found, dict) else {token: number for number, (token, _) in enumerate(found)}


def _all_tokens(described: Mapping[str, Any]) -> dict[str, int]:
    return _vocabulary(described) | {added["content"]: added["id"] for added in described["added_tokens"]}


def _needed(settings: Mapping[str, Any], vocabulary: Mapping[str, int]) -> Iterator[str]:
    """The tokens without which some text would have an unknown token that it does not have now."""
    prefix, suffix = settings.get("continuing_subword_prefix") or "", settings.get("end_of_word_suffix") or ""
    merged = settings["type"] == "BPE"
    if settings.get("unk_token") in vocabulary:
        yield settings["unk_token"]
    for token in vocabulary:
        characters = _characters(token, prefix, suffix)
        if len(characters) == 1 or (settings.get("byte_fallback") and _BYTE.fullmatch(token)):
            yield token
        elif not merged and not all(character in vocabulary for character in characters):
            yield token  # it alone covers a character; what BPE merges always starts from single ones
    if settings["type"] == "Unigram":
        scores = [score for _, score in settings["vocab"]]
        yield settings["vocab"][int(np.argmin(scores))][0]  # the score of an unknown token follows from the lowest
        if settings["unk_id"] is not None:
            yield settings["vocab"][settings["unk_id"]][0]


def _characters(token: str, prefix: str, suffix: str) -> list[str]:
    """The smallest pieces of a token: "##an" -> "##a", "##n"."""
    continues = bool(prefix) and token.startswith(prefix) and len(token) > len(prefix)
    ends = bool(suffix) and token.endswith(suffix) and len(token) > len(suffix)
    body = token[len(prefix) if continues else 0 : len(token) - len(suffix) if ends else None]
    pieces = [(prefix if continues or place else "") + character for place, character in enumerate(body)]
    return [*pieces[:-1], pieces[-1] + suffix] if ends else pieces


class _Pieces:
    """Which tokens a token needs, itself included: with BPE those that it is merged from."""

    def __init__(self, settings: Mapping[str, Any], vocabulary: Mapping[str, int]) -> None:
        self.vocabulary = vocabulary
        self.token_of = {number: token for token, number in vocabulary.items()}
        self.prefix, self.suffix = (
            settings.get("continuing_subword_prefix") or "",
            settings.get("end_of_word_suffix") or "",
        )
        self.ranks = {pair: rank for rank, pair in enumerate(_merges(settings))} if settings["type"] == "BPE" else {}

    def of(self, number: int) -> set[int]:
        token = self.token_of.get(number)
        if token is None or not self.ranks:
            return {number}
        pieces = _characters(token, self.prefix, self.suffix)
        found = set(pieces)
        while len(pieces) > 1:
            pairs = [(self.ranks[pair], place) for place, pair in enumerate(pairwise(pieces)) if pair in self.ranks]
            if not pairs:
                return {number}  # no merges lead to it: it is only found as a whole
            _, place = min(pairs)
            pieces[place : place + 2] = [_joined(pieces[place], pieces[place + 1], self.prefix)]
            found.add(pieces[place])
        return {self.vocabulary[piece] for piece in found if piece in self.vocabulary}


def _joined(left: str, right: str, prefix: str) -> str:
    return left + right.removeprefix(prefix)


def _merges(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of BPE; older files write both halves in one text."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in settings["merges"])
    return [(left, right) for left, right in pairs]


def _rewritten(described: Mapping[str, Any], number_of: Mapping[int, int]) -> dict[str, Any]:
    """tokenizer.json with the kept tokens, by their new numbers."""
    rewritten = copy.deepcopy(dict(described))
    settings = rewritten["model"]
    kept = {token: number_of[old] for token, old in _vocabulary(described).items() if old in number_of}
    if settings["type"] == "Unigram":
        settings["vocab"] = [entry for number, entry in enumerate(settings["vocab"]) if number in number_of]
        settings["unk_id"] = number_of.get(settings["unk_id"])
    else:
        settings["vocab"] = kept
    if settings["type"] == "BPE":
        prefix = settings.get("continuing_subword_prefix") or ""
        settings["merges"] = [
            [left, right]
            for left, right in _merges(settings)
            if left in kept and right in kept and _joined(left, right, prefix) in kept
        ]
    for added in rewritten["added_tokens"]:
        added["id"] = number_of[added["id"]]
    if rewritten.get("padding"):
        rewritten["padding"]["pad_id"] = number_of[rewritten["padding"]["pad_id"]]
    _renumber(rewritten.get("post_processor"), number_of)
    return rewritten


def _renumber(processor: Any, number_of: Mapping[int, int]) -> None:
    """The numbers of special tokens in a post-processor, in place."""
    if processor is None:
        return
    for inner in processor.get("processors", ()):
        _renumber(inner, number_of)
    if processor["type"] == "TemplateProcessing":
        for special in processor["special_tokens"].values():
            special["ids"] = [number_of[old] for old in special["ids"]]
    for name in ("sep", "cls"):
        if name in processor:
            processor[name][1] = number_of[processor[name][1]]
