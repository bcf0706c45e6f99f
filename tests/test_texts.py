"""Texts are checked at one place, the same for serving and for training."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from hlm.artefacts import HlmError
from hlm.encoders.loading import encode, load_encoder, tokenise
from hlm.serving.query_encoder import QueryEncoder
from hlm.texts import as_texts, well_formed

ODD = [
    json.loads('"red shoe \\ud83d"'),
    "\ude00 lamp",
    "caf\udce9 table",
    "\ud83d\ude00 tent",
    "red\x00shoe",
    "\x00",
    "",
    " \u200b\u0301",
    "Ärger\u2028größe",
    "e\u0301\ud800a",
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("red", "red"),
        ("größe 👩‍🦰", "größe 👩‍🦰"),
        ("a\ud83d", "a\ufffd"),
        ("\ude00a", "\ufffda"),
        ("\ud83dx\ud83d\ud83d", "\ufffdx\ufffd\ufffd"),
        ("\ud83d\ude00", "😀"),
        ("\udce9", "\ufffd"),
        ("a\x00", "a\x00"),
    ],
)
def test_halves_of_surrogate_pairs_are_joined_or_replaced(text, expected):
    assert well_formed(text) == expected


def test_any_collection_in_an_order_is_a_list_of_plain_texts():
    for texts in (
        ("a", "b"),
        (letter for letter in "ab"),
        np.array(["a", "b"]),
        np.array(["a", "b"], dtype=object),
        [np.str_("a"), np.str_("b")],
    ):
        found = as_texts(texts)
        assert found == ["a", "b"] and [type(text) for text in found] == [str, str]
    assert as_texts([]) == []


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ("red", "str"),
        (b"red", "bytes"),
        (3, "int"),
        (None, "NoneType"),
        ({"a": 1}, "dict"),
        ({"a"}, "set"),
        (np.array("a"), "ndarray"),
        (np.array([["a"]]), "ndarray of 2 dimensions"),
        (["a", None], "NoneType at place 1"),
        (["a", "b", ["c"]], "list at place 2"),
        ([b"a"], "bytes at place 0"),
        ((text for text in ("a", 1.5)), "float at place 1"),
        (np.array([1, 2]), "int64 at place 0"),
    ],
)
def test_what_is_no_text_is_named_with_its_place(texts, said):
    with pytest.raises(HlmError, match=f"expected texts to encode, found .*{said}"):
        as_texts(texts)


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_qwen3"])
def test_serving_and_training_read_the_same_text_in_the_same_way(name, request):
    model = load_encoder(request.getfixturevalue(name), device="cpu")
    encoder = QueryEncoder.from_model(model)
    prompt = encoder.prompt
    assert encoder.tokenise(ODD) == tokenise(model, ODD, prompt) == [tokenise(model, [text], prompt)[0] for text in ODD]
    expected = encode(model, (text for text in ODD), prompt_name="query")
    np.testing.assert_allclose(encoder.encode(ODD), expected, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(np.str_(ODD[0])), expected[0], atol=1e-5)
    with pytest.raises(HlmError, match="found str"):
        encode(model, "red")
    with pytest.raises(HlmError, match="found str"):
        encoder.tokenise("red")


def test_a_text_without_any_token_is_refused(tiny_bert):
    tokenizer = Tokenizer.from_file(str(Path(tiny_bert) / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    encoder = QueryEncoder(tokenizer, lambda ids, mask: ids[:, :1].astype(np.float32), 1)
    for texts, place in (([""], 0), (["red", "\u200b"], 1)):
        with pytest.raises(HlmError, match=f"at least one token, found .* at place {place}"):
            encoder.encode(texts)
    assert encoder.encode("red").shape == (1,)
