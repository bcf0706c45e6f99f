"""Cutting a student in stages: which layers stay, what is refused, and how many parameters a plan counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import Qwen3Config, Qwen3Model
from uneven import TEXTS, uneven, vectors

from hlm.artefacts import HlmError
from hlm.encoders.families import layers_of
from hlm.encoders.loading import load_encoder
from hlm.encoders.pruning import (
    check_cascade,
    cut,
    ffn_activations,
    keep_layers,
    layer_norm_ratios,
    parameter_counts,
    planned_parameters,
    prune,
)


@pytest.fixture(params=["tiny_bert", "tiny_qwen3"])
def model(request) -> SentenceTransformer:
    return uneven(request.getfixturevalue(request.param))


def test_the_cascade_28_14_7_4_keeps_the_ends(tiny_qwen3):
    model = load_encoder(tiny_qwen3, device="cpu")
    torch.manual_seed(1)
    config = Qwen3Config(**(model[0].model.config.to_diff_dict() | {"num_hidden_layers": 28, "layer_types": None}))
    model[0].model = Qwen3Model(config).eval()
    expected = prune(model, layers=[0, 1, 26, 27])
    small = model
    for keep in (14, 7, 4):
        small = cut(small, keep, None, "middle_skip", TEXTS)
        backbone = small[0].model
        assert len(backbone.layers) == backbone.config.num_hidden_layers == len(backbone.config.layer_types) == keep
        assert [layer.self_attn.layer_idx for layer in backbone.layers] == list(range(keep))
    np.testing.assert_array_equal(vectors(small), vectors(expected))
    assert len(layers_of(model[0].model)) == 28


def test_cut_scores_where_the_method_needs_it(model):
    kept = keep_layers(6, 3, "norm_ratio", layer_norm_ratios(model, TEXTS))
    expected = prune(model, layers=kept, ffn_width=16, activations=ffn_activations(model, TEXTS))
    np.testing.assert_array_equal(vectors(cut(model, 3, 16, "norm_ratio", TEXTS)), vectors(expected))
    np.testing.assert_array_equal(
        vectors(cut(model, [0, 4], None, "norm_ratio", [])), vectors(prune(model, layers=[0, 4]))
    )
    with pytest.raises(HlmError, match="nearest that works is 6"):
        cut(model, 7, None, "norm_ratio", TEXTS)


@pytest.mark.parametrize(
    "stages, message",
    [
        ([{"layers": 4}, {"layers": 6}], "stage 2: layers grows from 4 to 6.*4 at most"),
        ([{"layers": [0, 5]}, {"layers": 3}], "grows from 2 to 3"),
        ([{"ffn": 16}, {"layers": 2}, {"ffn": 32}], "stage 3: ffn grows from 16 to 32"),
        ([{"layer": 4}], "found 'layer'"),
        ([{"layers": 0}], "above 0 .*found 0"),
        ([{"layers": []}], r"found \[\]"),
        ([{"layers": "4"}], "found '4'"),
        ([{"layers": True}], "found True"),
        ([{"ffn": -1}], "ffn: expected a number above 0, found -1"),
    ],
)
def test_a_cascade_that_cannot_work_is_refused(stages, message):
    with pytest.raises(HlmError, match=message):
        check_cascade(stages)


def test_a_cascade_that_works_passes():
    check_cascade([{"layers": 14, "epochs": 1}, {"layers": [0, 1, 13], "ffn": 1024}, {"ffn": 768}, {"layers": 3}])


def test_planned_counts_are_the_cut_models(model):
    backbone = model[0].model
    assert planned_parameters(backbone.config) == parameter_counts(backbone) == parameter_counts(model)
    small = prune(model, layers=[0, 5], ffn_width=16, activations=ffn_activations(model, TEXTS))
    assert planned_parameters(backbone.config, 2, 16) == parameter_counts(small)
    assert backbone.config.num_hidden_layers == 6 and backbone.config.intermediate_size == 64


@pytest.mark.parametrize(
    "layers, width, millions",
    [(28, 3072, 595.8), (4, 3072, 218.2), (4, 1024, 193.1), (4, 768, 189.9), (2, 3072, 186.8)],
)
def test_planned_counts_of_qwen3_embedding(layers, width, millions):
    config = Qwen3Config(
        vocab_size=151_669,
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        tie_word_embeddings=True,
    )
    total, body = planned_parameters(config, layers=layers, ffn_width=width)
    assert round(total / 1e6, 1) == millions and total - body == 151_669 * 1024


@pytest.mark.parametrize("arguments, nearest", [((7,), 6), ((0,), 1), ((6, 65), 64), ((None, 0), 1)])
def test_a_plan_cannot_grow(model, arguments, nearest):
    with pytest.raises(HlmError, match=f"nearest that works is {nearest}"):
        planned_parameters(model[0].model.config, *arguments)
