"""Vocabulary pruning: texts of kept tokens keep their vectors to the bit, and no text gets an unknown token anew."""

import json
import random

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

from hlm.artefacts import HlmError
from hlm.encoders.loading import encode, fingerprint, load_encoder, save_encoder, tokenise
from hlm.encoders.vocabulary import choose_tokens, count_tokens, cut_vocabulary, share_kept
from tests.conftest import WORDS, sentence_transformer

LOG = ["red shoe", "used laptop with black cable", "small red kettle", "camera without helmet", "red shoe"]
OTHERS = ["wooden drill 55 inch", "ü 靴 shöe", "Kettle-cameras", "saw", "x" * 60, "<pad> [UNK] red", ""]


@pytest.fixture(scope="module")
def tiny_unigram(tmp_path_factory) -> str:
    """XLM-R with a Unigram tokenizer: it counts positions from the number of its padding token."""
    characters = sorted({*"".join(WORDS), "▁"})
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -3.0 - n / 50) for n, word in enumerate(WORDS) if len(word) > 1]
    pieces += [("▁sh", -4.0), ("oe", -4.1), ("é", -20.0), ("▁caf", -5.0), ("aø", -7.0), ("rarely", -30.0)]
    pieces += [(character, -8.0 - n / 100) for n, character in enumerate(characters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, sep_token="</s>", model_max_length=48, **names)
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    return sentence_transformer(XLMRobertaModel(config), fast, tmp_path_factory.mktemp("unigram"), "mean", {})


@pytest.fixture(params=["bert", "qwen3", "unigram", "gemma3_text", "modernbert"])
def whole(request, tiny_family, tiny_unigram) -> SentenceTransformer:
    return load_encoder(tiny_unigram if request.param == "unigram" else tiny_family(request.param), device="cpu")


def names_of(model, text: str) -> list[str]:
    return model.tokenizer.convert_ids_to_tokens(tokenise(model, [text])[0])


def random_texts(count: int) -> list[str]:
    generator = random.Random(0)
    return [
        " ".join(generator.choice(WORDS) + generator.choice(["", "s", "é", "1"]) for _ in range(3))
        for _ in range(count)
    ]


def test_texts_of_kept_tokens_keep_their_vectors_to_the_bit(whole, tmp_path):
    before = fingerprint(whole)
    kept = choose_tokens(whole, count_tokens(whole, LOG), min_count=1)
    small = cut_vocabulary(whole, kept)
    table = small[0].model.get_input_embeddings()
    assert len(kept) == small[0].model.config.vocab_size == table.num_embeddings == len(table.weight)
    assert len(kept) == len(small.tokenizer) < len(whole.tokenizer)
    assert fingerprint(whole) == before != fingerprint(small)
    texts = [text for text in (*LOG, *OTHERS, *random_texts(200)) if share_kept(whole, kept, [text])]
    assert len(texts) > len(LOG)
    for prompt_name in (None, "query"):
        found, wanted = (encode(model, texts, prompt_name=prompt_name) for model in (small, whole))
        np.testing.assert_array_equal(found, wanted)
    assert [names_of(small, text) for text in texts] == [names_of(whole, text) for text in texts]
    # Saved and read again, by HLM and by sentence-transformers alone.
    save_encoder(small, tmp_path / "small", "student", inputs={}, config={})
    again = load_encoder(str(tmp_path / "small"), device="cpu")
    assert fingerprint(again) == fingerprint(small)
    assert again.max_seq_length == whole.max_seq_length
    stock = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    assert stock.tokenizer.pad_token == whole.tokenizer.pad_token
    for name in ("pad", "eos", "bos", "cls", "sep", "unk"):
        token = getattr(whole.tokenizer, f"{name}_token")
        if token is not None:
            assert stock.tokenizer.convert_tokens_to_ids(token) == getattr(stock.tokenizer, f"{name}_token_id")
    config = stock[0].model.config
    of_whole, of_stock = whole.tokenizer.convert_ids_to_tokens, stock.tokenizer.convert_ids_to_tokens
    for name, number in whole[0].model.config.to_dict().items():
        if name.endswith("_token_id") and isinstance(number, int):
            assert of_stock(getattr(config, name)) == of_whole(number)
    assert table.padding_idx == config.pad_token_id


def test_no_text_has_an_unknown_token_that_it_did_not_have(whole):
    small = cut_vocabulary(whole, choose_tokens(whole, count_tokens(whole, LOG[:1]), min_count=1))
    unknown = whole.tokenizer.unk_token
    for text in [*OTHERS, *random_texts(200), "cafér", "aø", "raøre"]:
        assert names_of(small, text).count(unknown) <= names_of(whole, text).count(unknown), text
        assert len(names_of(small, text)) >= 1


def test_the_most_used_tokens_stay_within_a_number(whole):
    counts = count_tokens(whole, LOG)
    needed = choose_tokens(whole, np.zeros_like(counts), min_count=1)
    few = choose_tokens(whole, counts, keep=len(needed) + 8)
    assert set(needed) < set(few) <= set(choose_tokens(whole, counts, min_count=1)) and len(few) <= len(needed) + 8
    assert share_kept(whole, few, ["red shoe"]) >= share_kept(whole, few, ["used laptop with black cable"])
    assert share_kept(whole, few, []) == 0
    with pytest.raises(HlmError, match=f"expected {len(needed)} or more .*found 3"):
        choose_tokens(whole, counts, keep=3)
    with pytest.raises(HlmError, match="found both"):
        choose_tokens(whole, counts, keep=3, min_count=1)
    with pytest.raises(HlmError, match="min_count: expected 1"):
        choose_tokens(whole, counts, min_count=0)


def test_a_kept_token_of_bpe_keeps_the_pieces_that_it_is_merged_from(tiny_qwen3):
    whole = load_encoder(tiny_qwen3, device="cpu")
    id_of = whole.tokenizer.get_vocab()
    counts = np.zeros(len(id_of), np.int64)
    counts[id_of["shoe"]] = 5
    small = cut_vocabulary(whole, choose_tokens(whole, counts, min_count=1))
    left = small.tokenizer.get_vocab().keys()
    assert {"sh", "sho", "shoe"} <= left and not {"re", "red", "ke"} & left
    written = json.loads(small.tokenizer.backend_tokenizer.to_str())["model"]
    assert [tuple(pair) for pair in written["merges"]] == [("s", "h"), ("sh", "o"), ("sho", "e")]
    assert names_of(small, "shoe red")[:2] == ["shoe", "Ġ"]


def test_another_kind_of_tokenizer_is_refused(tiny_bert):
    model = load_encoder(tiny_bert, device="cpu")
    model.tokenizer._tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    with pytest.raises(HlmError, match="expected a tokenizer of kind WordPiece, BPE or Unigram, found WordLevel"):
        choose_tokens(model, np.zeros(1, np.int64), min_count=1)
