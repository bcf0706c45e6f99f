"""Qwen's tokenizer from its file of ranks."""

import base64
import itertools

import pytest
from tokenizers import pre_tokenizers

from hlm.artefacts import HlmError
from hlm.encoders.qwen_tokenizer import find_tokenizer, qwen_tokenizer


def joined_by_rank(word, ranks):
    """Tiktoken's rule, written plainly: join the two neighbours whose union has the lowest rank until none is known."""
    parts = [bytes([byte]) for byte in word]
    while True:
        known = [(ranks[a + b], place) for place, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not known:
            return [ranks[part] for part in parts]
        place = min(known)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def test_qwen_tokenizer_from_ranks(tmp_path):
    pieces = [bytes([byte]) for byte in range(256)]
    pieces += [b"ed", b" s", b"re", b"red", b"ho", b" sho", b"oe", b" shoe", "é".encode(), b"12", b"hoe"]
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    lines = [f"{base64.b64encode(piece).decode()} {rank}" for piece, rank in ranks.items()]
    (tmp_path / "tiny.tiktoken").write_text("\n".join(lines) + "\n")
    tokenizer = qwen_tokenizer(tmp_path / "tiny.tiktoken")
    end = len(pieces)
    for words in (["red", " shoe"], [" shoes"], ["hoed"], ["café"], ["1", "2"], [" ", " red"]):
        expected = [rank for word in words for rank in joined_by_rank(word.encode(), ranks)]
        assert tokenizer("".join(words))["input_ids"] == [*expected, end], words
    assert tokenizer("cafe\u0301")["input_ids"] == tokenizer("café")["input_ids"]  # NFC
    assert tokenizer("red", truncation=True, max_length=1)["input_ids"] == [end]
    assert tokenizer.decode(tokenizer("red shoe")["input_ids"], skip_special_tokens=True) == "red shoe"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (end, end + 2)
    assert len(set(pre_tokenizers.ByteLevel.alphabet())) == 256 <= len(tokenizer) == end + 3


def test_a_tokenizer_that_is_not_there():
    with pytest.raises(HlmError, match="tokenizer: expected one at nowhere/at/all"):
        find_tokenizer("nowhere/at/all")
