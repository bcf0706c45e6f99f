"""Causal rows padded on the right need no mask: the same vectors and gradients, and nothing is read on the host."""

import numpy as np
import pytest
import torch
from on_device import OnDevice

from hlm.encoders.loading import encode, load_encoder, pad, tokenise
from hlm.encoders.lora import add_lora
from hlm.encoders.padding import leave_out_masks, right_padded

TEXTS = ["red shoe", "a used black laptop with charger", "kettle", "steel saw and drill for wooden desk " * 3]


def masks_given(model):
    """What the backbone gets for a mask in one pass."""
    found = []
    inner = model[0].model
    real = inner.forward

    def forward(*args, **kwargs):
        found.append(kwargs["attention_mask"])
        return real(*args, **kwargs)

    inner.forward = forward
    encode(model, TEXTS[:2])
    inner.forward = real
    return found


def test_the_cpu_keeps_its_mask_and_a_gpu_none(tiny_qwen3, tiny_bert, monkeypatch):
    causal, both_ways = load_encoder(tiny_qwen3), load_encoder(tiny_bert)
    assert all(isinstance(mask, torch.Tensor) for mask in masks_given(causal) + masks_given(both_ways))
    monkeypatch.setattr("hlm.encoders.padding.DEVICES", {"cpu"})
    assert masks_given(causal) == [{"full_attention": None}]
    assert all(isinstance(mask, torch.Tensor) for mask in masks_given(both_ways))
    causal[0].model.config.is_causal = False  # sees both ways: needs its mask
    assert all(isinstance(mask, torch.Tensor) for mask in masks_given(causal))
    causal[0].model.config.is_causal, causal[0].model.config._attn_implementation = True, "eager"
    assert all(isinstance(mask, torch.Tensor) for mask in masks_given(causal))


def test_the_same_vectors_and_no_hook_is_left(tiny_qwen3, monkeypatch):
    model = load_encoder(tiny_qwen3)
    wanted = encode(model, TEXTS, prompt_name="query")
    monkeypatch.setattr("hlm.encoders.padding.DEVICES", {"cpu"})
    found = encode(model, TEXTS, prompt_name="query")
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    assert not model[0]._forward_pre_hooks and not model[0]._forward_hooks


@pytest.mark.parametrize("lora", [False, True])
def test_the_same_gradients(tiny_qwen3, monkeypatch, lora):
    def gradients(devices):
        monkeypatch.setattr("hlm.encoders.padding.DEVICES", devices)
        torch.manual_seed(0)
        model = load_encoder(tiny_qwen3)
        if lora:
            add_lora(model, rank=4, alpha=8)
        leave_out_masks(model.train())
        with right_padded(model):  # as an evaluation within training does
            model(pad(model, tokenise(model, TEXTS)))["sentence_embedding"][:, :5].sum().backward()
        return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}

    wanted, found = gradients({"cuda"}), gradients({"cpu"})
    assert wanted
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_a_pass_reads_nothing_on_the_host(tiny_qwen3, monkeypatch):
    model = load_encoder(tiny_qwen3)
    features = {name: value.as_subclass(OnDevice) for name, value in pad(model, tokenise(model, TEXTS)).items()}
    with pytest.raises(AssertionError, match="the host waits for a GPU: __bool__"):  # transformers looks at the mask
        model(dict(features))
    monkeypatch.setattr("hlm.encoders.padding.DEVICES", {"cpu"})
    with right_padded(model), torch.no_grad():
        assert model(features)["sentence_embedding"].shape == (len(TEXTS), 32)
