"""Pruning: scores against a computation by hand, cuts against a forward pass composed by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from uneven import TEXTS, uneven, vectors

from hlm.artefacts import HlmError
from hlm.encoders.families import ffn_parts, layers_of
from hlm.encoders.loading import load_encoder, pad, save_encoder, tokenise
from hlm.encoders.pruning import (
    ffn_activations,
    keep_layers,
    layer_norm_ratios,
    parameter_counts,
    prune,
)


@pytest.fixture(params=["tiny_bert", "tiny_qwen3"])
def model(request) -> SentenceTransformer:
    return uneven(request.getfixturevalue(request.param))


def by_hand(model: SentenceTransformer, text: str, layers: list[int] | None = None) -> tuple[list[torch.Tensor], list]:
    """One unpadded text through chosen layers, called one after the other.

    Returns the residual stream (before the first layer, after each) and the units each FFN's last projection reads.
    """
    backbone = model[0].model
    ids = torch.tensor([tokenise(model, [text])[0]])
    chosen = range(len(layers_of(backbone))) if layers is None else layers
    stream, units = [], []
    with torch.no_grad():
        if backbone.config.model_type == "bert":
            hidden, arguments = backbone.embeddings(input_ids=ids), {}
        else:
            hidden = backbone.embed_tokens(ids)
            count = ids.shape[1]
            mask = torch.full((1, 1, count, count), float("-inf")).triu(1)
            places = torch.arange(count)[None]
            rotary = backbone.rotary_emb(hidden, places)
            arguments = {"attention_mask": mask, "position_ids": places, "position_embeddings": rotary}
        stream.append(hidden)
        for number in chosen:
            layer = layers_of(backbone)[number]
            if backbone.config.model_type == "bert":
                middle = layer.attention(hidden)[0]
                units.append(torch.nn.functional.gelu(layer.intermediate.dense(middle)))
                hidden = layer.output(units[-1], middle)
            else:
                attended = layer.self_attn(layer.input_layernorm(hidden), **arguments)[0] + hidden
                normed = layer.post_attention_layernorm(attended)
                units.append(torch.nn.functional.silu(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed))
                hidden = attended + layer.mlp.down_proj(units[-1])
            stream.append(hidden)
    return stream, units


def pooled(model: SentenceTransformer, hidden: torch.Tensor) -> np.ndarray:
    """Mean pooling for BERT, final norm and last token for Qwen3; then length 1."""
    if model[0].model.config.model_type == "bert":
        vector = hidden[0].mean(dim=0)
    else:
        vector = model[0].model.norm(hidden)[0, -1]
    return torch.nn.functional.normalize(vector.detach(), dim=0).numpy()


def test_scores_match_a_computation_by_hand(model):
    streams, units = zip(*(by_hand(model, text) for text in TEXTS), strict=True)
    for number in range(6):
        ratio = torch.cat([s[number + 1][0].norm(dim=-1) / s[number][0].norm(dim=-1) for s in streams])
        mean = torch.cat([u[number][0].abs() for u in units]).mean(dim=0)
        assert layer_norm_ratios(model, TEXTS)[number] == pytest.approx(float(ratio.mean()), rel=1e-5)
        np.testing.assert_allclose(ffn_activations(model, TEXTS)[number], mean.numpy(), rtol=1e-4, atol=1e-6)
    # Every token weighs the same, so a mean of the texts' means would be something else.
    means = [float((s[1][0].norm(dim=-1) / s[0][0].norm(dim=-1)).mean()) for s in streams]
    assert abs(np.mean(means) - layer_norm_ratios(model, TEXTS)[0]) > 1e-4


def test_scores_have_the_documented_shape_and_leave_the_model_alone(model):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ratios, activations = layer_norm_ratios(model, TEXTS), ffn_activations(model, TEXTS)
    assert ratios.shape == (6,) and ratios.dtype == np.float64
    assert [units.shape for units in activations] == [(64,)] * 6
    assert all(units.dtype == np.float64 and (units >= 0).all() for units in activations)
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# Absolute positions move with left padding, so only a backbone with relative ones can be compared there.
@pytest.mark.parametrize("name, side", [("tiny_bert", "right"), ("tiny_qwen3", "right"), ("tiny_qwen3", "left")])
def test_padding_does_not_count(name, side, request, monkeypatch):
    model = uneven(request.getfixturevalue(name))
    alone = layer_norm_ratios(model, TEXTS, batch_size=1), ffn_activations(model, TEXTS, batch_size=1)

    def padded(model, ids):
        features = pad(model, [*ids, list(range(5, 45))])  # a 40 token row widens the batch and is taken out again
        shifts = [40 - len(row) if side == "left" else 0 for row in ids]
        return {
            name: torch.stack([row.roll(shift) for row, shift in zip(value[:-1], shifts, strict=True)])
            for name, value in features.items()
        }

    monkeypatch.setattr("hlm.encoders.pruning.pad", padded)
    np.testing.assert_allclose(layer_norm_ratios(model, TEXTS, batch_size=3), alone[0], rtol=1e-4)
    np.testing.assert_allclose(ffn_activations(model, TEXTS, batch_size=3), alone[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("texts, found", [([], "0 texts"), ("red shoe", "one str")])
def test_calibration_texts_are_checked(model, texts, found):
    with pytest.raises(HlmError, match=found):
        layer_norm_ratios(model, texts)
    with pytest.raises(HlmError, match=found):
        ffn_activations(model, texts)


def test_scores_that_are_not_finite_are_refused(model):
    with torch.no_grad():
        ffn_parts(model[0].model, layers_of(model[0].model)[2])[1].weight[0, 0] = float("nan")
    with pytest.raises(HlmError, match="finite"):
        layer_norm_ratios(model, TEXTS)


@pytest.mark.parametrize(
    "count, keep, kept",
    [
        (6, 4, [0, 1, 4, 5]),
        (6, 3, [0, 1, 5]),
        (6, 2, [0, 5]),
        (6, 1, [0]),
        (6, 6, [0, 1, 2, 3, 4, 5]),
        (12, 4, [0, 1, 10, 11]),
        (28, 14, [*range(7), *range(21, 28)]),
        (14, 7, [0, 1, 2, 3, 11, 12, 13]),
    ],
)
def test_middle_skip_keeps_both_ends(count, keep, kept):
    assert keep_layers(count, keep) == kept


def test_norm_ratio_drops_the_layers_nearest_to_one():
    scores = np.array([3.0, 1.02, 0.5, 0.97, 1.4, 1.01])  # distances 2, .02, .5, .03, .4, .01
    assert keep_layers(6, 4, "norm_ratio", scores) == [0, 2, 3, 4]
    assert keep_layers(6, 1, "norm_ratio", scores) == [0]
    assert keep_layers(3, 2, "norm_ratio", np.ones(3)) == [0, 1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((6, 7), "expected 1 to 6 .*found 7.*nearest that works is 6"),
        ((6, 0), "expected 1 to 6 .*found 0.*nearest that works is 1"),
        ((6, 3, "tail"), "middle_skip, norm_ratio, found 'tail'"),
        ((6, 3, "norm_ratio"), "expected 6 scores, found none"),
        ((6, 3, "norm_ratio", np.ones(5)), "expected 6 scores, found 5"),
    ],
)
def test_keep_layers_refuses(arguments, message):
    with pytest.raises(HlmError, match=message):
        keep_layers(*arguments)


@pytest.mark.parametrize("layers", [[0, 1, 4, 5], [0, 5], [3], [1, 2, 4]])
def test_a_shallower_model_runs_only_its_layers(model, layers):
    expected = np.stack([pooled(model, by_hand(model, text, layers)[0][-1]) for text in TEXTS])
    np.testing.assert_allclose(vectors(prune(model, layers=layers)), expected, atol=1e-5)
    assert np.abs(vectors(model) - expected).max() > 1e-2


def test_a_dropped_layer_is_one_that_passes_its_input_on(model):
    expected = vectors(prune(model, layers=[0, 1, 5]))
    for number in (2, 3, 4):
        layers_of(model[0].model)[number].forward = lambda hidden_states, *args, **kwargs: hidden_states
    np.testing.assert_allclose(vectors(model), expected, atol=1e-6)


def test_keeping_everything_changes_nothing(model):
    same = prune(model, layers=list(range(6)), ffn_width=64)
    assert same is not model and same[0].model is not model[0].model
    np.testing.assert_array_equal(vectors(same), vectors(model))
    assert parameter_counts(same) == parameter_counts(model)
    np.testing.assert_array_equal(vectors(prune(model)), vectors(model))


def test_units_that_reach_nothing_leave_the_output_unchanged(model):
    dead = np.array([0, 7, 31, 63])
    activations = [np.random.default_rng(number).uniform(1, 2, 64) for number in range(6)]
    with torch.no_grad():
        for layer in layers_of(model[0].model):
            ffn_parts(model[0].model, layer)[1].weight[:, dead] = 0
    for units in activations:
        units[dead] = 0.5
    cut_down = prune(model, ffn_width=60, activations=activations)
    np.testing.assert_allclose(vectors(cut_down), vectors(model), atol=1e-6)
    activations[3][7] = 3  # one dead unit stays and a live one goes
    assert np.abs(vectors(prune(model, ffn_width=60, activations=activations)) - vectors(model)).max() > 1e-4


def test_silent_units_score_zero_and_can_go(model):
    silent = np.arange(64) % 2 == 0
    with torch.no_grad():
        for layer in layers_of(model[0].model):
            for linear in ffn_parts(model[0].model, layer)[0]:
                linear.weight[silent] = 0
                if linear.bias is not None:
                    linear.bias[silent] = 0  # gelu(0) = 0
    activations = ffn_activations(model, TEXTS)
    assert all((units[silent] == 0).all() and (units[~silent] > 0).all() for units in activations)
    np.testing.assert_allclose(vectors(prune(model, ffn_width=32, activations=activations)), vectors(model), atol=1e-5)


def test_the_units_kept_are_the_most_active_in_their_own_order_and_bits(model):
    activations = [np.random.default_rng(number).permutation(64).astype(float) for number in range(6)]
    layers = [0, 2, 5]
    cut_down = prune(model, layers=layers, ffn_width=10, activations=activations)
    assert cut_down[0].model.config.intermediate_size == 10
    for number, layer in zip(layers, layers_of(cut_down[0].model), strict=True):
        units = np.flatnonzero(activations[number] >= 54)  # the ten highest of 0 ... 63
        into, out = ffn_parts(cut_down[0].model, layer)
        into_before, out_before = ffn_parts(model[0].model, layers_of(model[0].model)[number])
        for linear, before in zip(into, into_before, strict=True):
            assert torch.equal(linear.weight, before.weight[units]) and linear.out_features == 10
            assert (linear.bias is None) == (before.bias is None)
            assert linear.bias is None or torch.equal(linear.bias, before.bias[units])
        assert torch.equal(out.weight, out_before.weight[:, units]) and out.in_features == 10
        assert out.bias is None or torch.equal(out.bias, out_before.bias)
        assert all(linear.weight.is_contiguous() for linear in (*into, out))


def test_the_model_given_is_left_as_it_is(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, expected = copy.deepcopy(model[0].model.config), vectors(model)
    small = prune(model, layers=[0, 5], ffn_width=8, activations=ffn_activations(model, TEXTS))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert model[0].model.config.to_dict() == config.to_dict()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    np.testing.assert_array_equal(vectors(model), expected)


def test_frozen_weights_and_dtype_stay(model):
    model.requires_grad_(False).bfloat16()
    small = prune(model, layers=[0, 5], ffn_width=8, activations=[np.arange(64.0)] * 6)
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in small.parameters())


def test_saved_and_loaded_it_gives_equal_vectors(model, tmp_path):
    small = prune(model, layers=[0, 1, 5], ffn_width=24, activations=ffn_activations(model, TEXTS))
    save_encoder(small, tmp_path / "small", "student", inputs={}, config={})
    loaded = load_encoder(str(tmp_path / "small"), device="cpu")
    np.testing.assert_array_equal(vectors(loaded), vectors(small))
    config = loaded[0].model.config
    assert (config.num_hidden_layers, config.intermediate_size) == (3, 24)
    assert loaded.prompts == model.prompts and loaded.max_seq_length == model.max_seq_length
    assert parameter_counts(loaded) == parameter_counts(small)


def test_a_cut_model_trains(model):
    small = prune(model, layers=[0, 5], ffn_width=8, activations=ffn_activations(model, TEXTS)).train()
    small(pad(small, tokenise(small, TEXTS)))["sentence_embedding"][:, 0].sum().backward()
    for layer in layers_of(small[0].model):
        into, out = ffn_parts(small[0].model, layer)
        assert all(linear.weight.grad.shape == linear.weight.shape for linear in (*into, out))


def test_layer_numbers_types_and_cache_agree(tiny_qwen3):
    model = load_encoder(tiny_qwen3, device="cpu")
    config = model[0].model.config
    config.layer_types = [*["full_attention"] * 4, *["sliding_attention"] * 2]
    config.sliding_window = 4
    small = prune(model, layers=[0, 3, 5])[0].model
    assert small.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert [layer.self_attn.layer_idx for layer in small.layers] == [0, 1, 2]
    small.config.layer_types = ["full_attention"] * 3  # the tiny model's own: its layers have no window
    small.config.sliding_window = None
    ids = torch.tensor([tokenise(model, TEXTS[1:2])[0]])
    with torch.no_grad():
        whole = small(ids, use_cache=True)
        start = small(ids[:, :-1], use_cache=True)
        step = small(ids[:, -1:], past_key_values=start.past_key_values, use_cache=True)
    assert len(whole.past_key_values.layers) == 3
    torch.testing.assert_close(step.last_hidden_state[:, -1], whole.last_hidden_state[:, -1], atol=1e-5, rtol=1e-4)


def test_bert_layers_are_numbered_anew(tiny_bert):
    small = prune(load_encoder(tiny_bert, device="cpu"), layers=[0, 3, 5])[0].model
    assert [layer.attention.self.layer_idx for layer in small.encoder.layer] == [0, 1, 2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layers": []}, r"within 0\.\.5, found \[\]"),
        ({"layers": [0, 6]}, r"found \[0, 6\]; the nearest that works is \[0, 5\]"),
        ({"layers": [-1, 2]}, r"nearest that works is \[0, 2\]"),
        ({"layers": [5, 0]}, r"ascending .*nearest that works is \[0, 5\]"),
        ({"layers": [1, 1]}, r"nearest that works is \[1\]"),
        ({"ffn_width": 65, "activations": [np.ones(64)] * 6}, "expected 1 to 64 .*found 65.*works is 64"),
        ({"ffn_width": 0, "activations": [np.ones(64)] * 6}, "found 0.*works is 1"),
        ({"ffn_width": 32}, "32 of 64: expected activations .*ffn_activations"),
        ({"ffn_width": 32, "activations": [np.ones(64)] * 5}, "6 layers x 64 units"),
        ({"ffn_width": 32, "activations": [np.ones(32)] * 6}, "6 layers x 64 units"),
    ],
)
def test_prune_refuses(model, arguments, message):
    with pytest.raises(HlmError, match=message):
        prune(model, **arguments)


def test_adapters_must_be_merged_first(tiny_qwen3):
    from peft import LoraConfig, get_peft_model

    model = load_encoder(tiny_qwen3, device="cpu")
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model[0].model = get_peft_model(model[0].model, lora)
    with pytest.raises(HlmError, match="merge"):
        prune(model, layers=[0, 5])
    model[0].model = model[0].model.merge_and_unload()
    assert len(layers_of(prune(model, layers=[0, 5])[0].model)) == 2
