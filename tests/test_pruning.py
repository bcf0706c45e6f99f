"""Pruning: scores against hand computations, surgery against a hand-composed forward, counts of the real shapes."""

import numpy as np
import pytest
import torch
from transformers import Qwen3Config

from hlm.artefacts import HlmError
from hlm.encoders import encode, load_encoder, pad, save_encoder, tokenise
from hlm.pruning import (
    check_cascade,
    cut,
    ffn_parts,
    keep_layers,
    layers_of,
    parameter_counts,
    planned_parameters,
    prune,
    score,
)

TEXTS = ["red shoe", "a used black laptop with charger", "kettle"]


@pytest.fixture(params=["tiny_bert", "tiny_qwen3"])
def model(request):
    return load_encoder(request.getfixturevalue(request.param))


def test_keep_layers():
    assert keep_layers(6, 4) == [0, 1, 4, 5]
    assert keep_layers(6, 3) == [0, 1, 5]
    assert keep_layers(6, 2) == [0, 5]
    assert keep_layers(28, 14) == [*range(7), *range(21, 28)]
    assert keep_layers(4, 2, "norm_ratio", np.array([1.5, 1.01, 0.9, 0.2])) == [0, 3]
    with pytest.raises(HlmError, match="expected 1 to 6.*found 7"):
        keep_layers(6, 7)
    with pytest.raises(HlmError, match="norm_ratio with its ratios"):
        keep_layers(6, 2, "norm_ratio")


def test_keeping_all_layers_changes_nothing(model):
    np.testing.assert_array_equal(encode(prune(model, layers=range(6)), TEXTS), encode(model, TEXTS))


def test_a_dropped_layer_is_one_that_passes_its_input_on(model):
    pruned = encode(prune(model, layers=[0, 1, 5]), TEXTS)
    for number in (2, 3, 4):
        layer = layers_of(model[0].model)[number]
        layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    np.testing.assert_allclose(encode(model, TEXTS), pruned, atol=1e-6)


def test_pruned_models_are_stock_ones(model, tmp_path):
    small = cut(model, [0, 1, 4, 5], 16, "middle_skip", TEXTS)
    config = small[0].model.config
    assert config.num_hidden_layers == 4 and config.intermediate_size == 16
    assert len(getattr(config, "layer_types", None) or [0] * 4) == 4
    indices = [m.layer_idx for m in small[0].model.modules() if hasattr(m, "layer_idx")]
    assert sorted(set(indices)) in ([], [0, 1, 2, 3])
    save_encoder(small, tmp_path / "small", "student", inputs={}, config={})
    np.testing.assert_array_equal(encode(load_encoder(str(tmp_path / "small")), TEXTS), encode(small, TEXTS))


def test_the_original_is_left_alone(model):
    before = encode(model, TEXTS)
    cut(model, 2, 8, "norm_ratio", TEXTS)
    np.testing.assert_array_equal(encode(model, TEXTS), before)


def test_silent_units_can_go(model):
    silent = torch.arange(64) % 2 == 0
    with torch.no_grad():
        for layer in layers_of(model[0].model):
            into, _ = ffn_parts(layer)
            for linear in into:
                linear.weight[silent] = 0
                if linear.bias is not None:
                    linear.bias[silent] = 0  # gelu(0) = 0
    _, activations = score(model, TEXTS)
    assert all((units[silent.numpy()] == 0).all() and (units[~silent.numpy()] > 0).all() for units in activations)
    np.testing.assert_allclose(
        encode(prune(model, ffn=32, activations=activations), TEXTS), encode(model, TEXTS), atol=1e-5
    )


def test_norm_ratios_by_hand_over_real_tokens_only(model):
    ratios, _ = score(model, TEXTS, batch_size=2)  # the second batch has other padding than the first
    states = []
    handles = [
        layer.register_forward_hook(
            lambda module, args, kwargs, out: states.append(
                (args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out)
            ),
            with_kwargs=True,
        )
        for layer in layers_of(model[0].model)
    ]
    total, tokens = np.zeros(6), 0
    with torch.no_grad():
        for text in TEXTS:
            states.clear()
            model(pad(model, tokenise(model, [text])))
            tokens += states[0][0].shape[1]
            total += [float((after.norm(dim=-1) / before.norm(dim=-1)).sum()) for before, after in states]
    for handle in handles:
        handle.remove()
    np.testing.assert_allclose(ratios, total / tokens, rtol=1e-5)


def test_cascade_of_the_paper_on_a_tiny_model(model):
    wide = cut(model, 4, 48, "middle_skip", TEXTS)
    deep = cut(wide, 2, 16, "norm_ratio", TEXTS)
    assert len(layers_of(deep[0].model)) == 2 and encode(deep, TEXTS).shape == (3, 32)


@pytest.mark.parametrize(
    ("layers", "ffn", "message"),
    [([0, 9], None, "0..5"), ([], None, "ascending"), ([3, 1], None, "ascending"), (None, 65, "1 to 64")],
)
def test_what_is_not_there_cannot_be_kept(model, layers, ffn, message):
    with pytest.raises(HlmError, match=message):
        prune(model, layers=layers, ffn=ffn, activations=[np.zeros(64)] * 6)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"layers": 4}, {"layers": 5}], "stage 2: layers grows from 4 to 5"),
        ([{"layers": 4, "ffn": 8}, {"ffn": 9}], "ffn grows"),
        ([{"layer": 4}], "found 'layer'"),
        ([{"layers": "4"}], "expected a number or a list"),
        ([{"ffn": 0}], "above 0"),
    ],
)
def test_a_cascade_only_cuts(stages, message):
    with pytest.raises(HlmError, match=message):
        check_cascade(stages)


@pytest.mark.parametrize(
    ("layers", "ffn", "millions"),
    [(28, 3072, 595.8), (4, 3072, 218.2), (4, 1024, 193.1), (4, 768, 189.9), (2, 3072, 186.8)],
)
def test_parameters_of_the_published_shapes(layers, ffn, millions):
    config = Qwen3Config(
        vocab_size=151669,
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
    )
    total, body = planned_parameters(config, layers=layers, ffn=ffn)
    assert round(total / 1e6, 1) == millions
    assert total - body == 151669 * 1024


def test_planned_parameters_are_the_counted_ones(model):
    small = cut(model, 4, 16, "middle_skip", TEXTS)
    assert planned_parameters(model[0].model.config, layers=4, ffn=16) == parameter_counts(small[0].model)
