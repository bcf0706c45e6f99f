"""The start of a long text decides its ids: they are those of the whole text."""

import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from hlm.serving import long_texts
from hlm.serving.long_texts import first_ids, whole_characters
from hlm.serving.query_encoder import QueryEncoder

# Spaces of all kinds, marks that stand alone or join, deleted characters, scripts without spaces, sequences of emoji.
PIECES = [
    "red", "shoe ", " ", "  ", "\n", "\r\n", "\t", ",", "...", "1234567890", "x" * 30, "靴", "한국어",
    "\u1112\u1161\u11ab",
    "ไทย", "हिन्दी", "ا\u0644\u064b", "e\u0301", "\u0301", "\u0327", "\u0301" * 20, "\u200b", "\u200d", "\x00", "\ufffd",
    "👩‍👩‍👧", "🇩🇪", "ΣΑΣ", "İ", "ǅ", "ﬁ", "[MASK]",
    "[MA", "<|endoftext|>", "\u2028", "\u3000", "\u00ad", "don't", "a" * 7,
]  # fmt: skip
MEGABYTE = 1_000_000


def tokenizers(tiny_bert, tiny_qwen3):
    """The tokenizers of the tiny models, and others that cut words in their own ways."""
    bert, qwen3 = (Tokenizer.from_file(str(Path(folder) / "tokenizer.json")) for folder in (tiny_bert, tiny_qwen3))
    yield "bert", bert
    yield "qwen3", qwen3
    cased = Tokenizer.from_str(bert.to_str())
    cased.normalizer = normalizers.BertNormalizer(lowercase=False)
    cased.add_tokens([AddedToken("red shoe, 1234567890", normalized=False), AddedToken("xx", rstrip=True, lstrip=True)])
    yield "cased, with added tokens", cased
    qwen = Tokenizer.from_str(qwen3.to_str())
    qwen.normalizer = normalizers.NFC()
    cut = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    cut += r"|\s+(?!\S)|\s+"
    qwen.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(cut), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    yield "qwen's own words", qwen
    characters = sorted({character for piece in PIECES for character in piece} | {"▁"})
    pieces = [("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in characters if c != "▁"), ("red", -2.5), ("▁shoe", -2.0)]
    for name, before in (
        ("metaspace", pre_tokenizers.Metaspace()),
        ("no words", pre_tokenizers.Metaspace(split=False)),
    ):
        unigram = Tokenizer(models.Unigram(pieces, 0, False))
        unigram.normalizer = normalizers.NFKC()
        unigram.pre_tokenizer = before
        yield name, unigram


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("limit", [3, 8, 20])
def test_ids_are_those_of_the_whole_text(place, limit, tiny_bert, tiny_qwen3, monkeypatch):
    name, tokenizer = list(tokenizers(tiny_bert, tiny_qwen3))[place]
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    for setting, value in (("LONG", 16), ("CHARACTERS_A_TOKEN", 2), ("MARGIN", 8), ("FURTHER", 2)):
        monkeypatch.setattr(long_texts, setting, value)
    generator, shorter = np.random.default_rng(place), 0
    for _ in range(400):
        kinds = generator.choice(len(PIECES), generator.integers(1, 8))
        text = "".join(PIECES[kind] for kind in generator.choice(kinds, generator.integers(1, 60)))
        expected = tokenizer.encode(text).ids
        shorter += len(text) > whole_characters(tokenizer)
        assert first_ids(tokenizer, text) == expected, (name, text)
    assert shorter > 200


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_qwen3"])
@pytest.mark.parametrize(
    "piece", [",", "靴", "x", " ", "\u200b", "\u0301", "a ", "\n", "e\u0301", "\ud83d", "한", "\x00"]
)
def test_a_long_text_of_one_thing(name, piece, request):
    folder = request.getfixturevalue(name)
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(48)
    encoder = QueryEncoder(tokenizer, lambda ids, mask: ids[:, :2].astype(np.float32), 2)
    timed = piece in (",", "a ", "\n") and name == "tiny_bert"
    text = piece * ((MEGABYTE if timed else MEGABYTE // 8) // len(piece))  # the whole of it takes seconds to tokenise
    started = time.process_time()  # whatever else this machine does
    found = encoder.tokenise(["red shoe", text, "lamp"])
    took = time.process_time() - started
    whole = text.replace("\ud83d", "\ufffd")
    assert found == [tokenizer.encode(each).ids for each in ("red shoe", whole, "lamp")]
    if timed:
        assert took < 0.5


def test_a_start_is_enough_of_most_texts(tiny_bert):
    tokenizer = Tokenizer.from_file(str(Path(tiny_bert) / "tokenizer.json"))
    tokenizer.enable_truncation(48)
    assert long_texts._decides(tokenizer.encode("red shoe, " * 400), 3000)
    assert not long_texts._decides(tokenizer.encode("red shoe"), 3000)  # nothing lies beyond
    assert not long_texts._decides(tokenizer.encode("red " * 47), 3000)  # one word does
    assert whole_characters(tokenizer) == 4096
    tokenizer.enable_truncation(48, direction="left")
    assert whole_characters(tokenizer) == float("inf")
    tokenizer.no_truncation()
    assert whole_characters(tokenizer) == float("inf")
