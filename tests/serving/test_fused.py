"""FusedQwen3 gives the vectors of transformers' Qwen3Model, and knows which models it cannot stand in for."""

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling

from hlm.encoders.loading import load_encoder
from hlm.serving.fused import FusedQwen3
from hlm.serving.query_encoder import QueryEncoder


@pytest.fixture
def model(tiny_qwen3):
    model = load_encoder(tiny_qwen3, device="cpu").eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms of ones would not show where a weight is left out
            parameter.data = 0.5 + torch.rand(parameter.shape, generator=generator)
    return model


def last_tokens(model, ids, mask):
    hidden = model[0].model(input_ids=ids).last_hidden_state
    return hidden[torch.arange(len(ids)), mask.sum(1) - 1]


@pytest.mark.parametrize("lengths", [[1], [7], [3, 9, 1, 9], [40] * 3])
@torch.inference_mode()
def test_the_vectors_are_those_of_the_module(model, lengths):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model[0].model.config.vocab_size, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    expected = last_tokens(model, ids, mask)
    found = FusedQwen3(model, 64)(ids, mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    others = torch.where(mask == 1, ids, 3)  # what pads is not seen
    torch.testing.assert_close(FusedQwen3(model, 64)(others, mask), found)

    model.bfloat16()  # as far from float32 as the module is
    error, own = (
        torch.linalg.norm(vectors.float() - expected) / torch.linalg.norm(expected)
        for vectors in (FusedQwen3(model, 64)(ids, mask), last_tokens(model, ids, mask))
    )
    assert error < 1.5 * own and own < 0.05


@torch.inference_mode()
def test_the_model_stays_as_it_was_and_can_be_saved(model, tmp_path):
    texts = ["red shoe", "cheap steel bottle 2 litre"]
    expected, size = model.encode(texts), sum(part.numel() for part in model.parameters())
    FusedQwen3(model, 64)
    np.testing.assert_array_equal(model.encode(texts), expected)
    assert sum(part.numel() for part in model.parameters()) == size
    attention = model[0].model.layers[0].self_attn
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.k_proj.weight.untyped_storage().data_ptr()
    model.save_pretrained(str(tmp_path / "saved"))
    np.testing.assert_allclose(load_encoder(str(tmp_path / "saved"), device="cpu").encode(texts), expected, atol=1e-6)


def test_a_text_longer_than_the_tables_is_encoded_by_the_module(model, monkeypatch):
    text = "used laptop with a black cable " * 20
    expected = QueryEncoder.from_model(model).encode(text)
    monkeypatch.setattr("hlm.serving.cuda_graphs.LENGTHS", (8,))
    np.testing.assert_allclose(QueryEncoder.from_model(model).encode(text), expected, atol=1e-6)


def test_it_stands_in_for_causal_qwen3_of_last_token_pooling_alone(model, tiny_bert):
    assert FusedQwen3.fits(model)
    assert not FusedQwen3.fits(load_encoder(tiny_bert, device="cpu"))
    config, pooling, out = model[0].model.config, model[1], model[0].model.layers[0].self_attn.o_proj
    for change, restore in (
        (lambda: setattr(config, "is_causal", False), lambda: setattr(config, "is_causal", True)),
        (
            lambda: setattr(config, "layer_types", ["sliding_attention", *config.layer_types[1:]]),
            lambda: setattr(config, "layer_types", ["full_attention"] * len(config.layer_types)),
        ),
        (
            lambda: setattr(out, "bias", torch.nn.Parameter(torch.ones(out.out_features))),
            lambda: setattr(out, "bias", None),
        ),
        (lambda: model.__setitem__(1, Pooling(32, "mean")), lambda: model.__setitem__(1, pooling)),
    ):
        change()
        assert not FusedQwen3.fits(model)
        restore()
    assert FusedQwen3.fits(model)
