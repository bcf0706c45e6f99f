"""True shapes with random weights: whole models, cut ones, and what is measured where memory ends."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from hlm.artefacts import HlmError
from hlm.benchmark import random_weights
from hlm.benchmark.random_weights import (
    depths_that_fit,
    random_backbone,
    random_encoder,
    random_ids_encode,
    shallower,
    shape_config,
)
from hlm.encoders.loading import encode, load_encoder
from hlm.encoders.pruning import parameter_counts, planned_parameters
from hlm.encoders.qwen_tokenizer import find_tokenizer


@pytest.mark.parametrize(
    ("name", "layers", "ffn", "millions"),
    [
        ("Qwen/Qwen3-Embedding-0.6B", None, None, 595.8),
        ("Qwen3-Embedding-0.6B", 4, 768, 189.9),
        ("Qwen/Qwen3-Embedding-8B", None, None, 7567.3),
        ("Qwen/Qwen3-Embedding-4B", None, None, 4021.8),
    ],
)
def test_published_shapes(name, layers, ffn, millions):
    assert planned_parameters(shape_config(name, layers=layers, ffn=ffn))[0] / 1e6 == pytest.approx(millions, abs=0.05)


def test_only_qwen3_style_backbones_have_random_weights(tiny_bert):
    with pytest.raises(HlmError, match="found 'bert'"):
        shape_config(tiny_bert)


def test_a_random_backbone_computes_as_one_that_was_made_whole(tiny_qwen3):
    config = AutoConfig.from_pretrained(tiny_qwen3)
    ids = torch.tensor([[5, 9, 14, 3]])
    made = random_backbone(config, "float32")
    torch.manual_seed(0)
    whole = type(made)(config).eval()  # its tables for positions are computed by the library
    whole.load_state_dict(made.state_dict())
    torch.testing.assert_close(made(ids).last_hidden_state, whole(ids).last_hidden_state)
    half = random_backbone(config, "bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert torch.isfinite(half(ids).last_hidden_state).all()
    assert parameter_counts(made)[0] == planned_parameters(config)[0]
    weights = torch.cat([parameter.flatten() for parameter in made.parameters() if parameter.ndim > 1])
    assert weights.std() == pytest.approx(0.02, rel=0.05) and (weights == 0).float().mean() < 0.01


def test_the_first_layers_share_weights_and_compute_as_a_cut_model(tiny_qwen3):
    whole = random_backbone(AutoConfig.from_pretrained(tiny_qwen3), "float32")
    part = shallower(whole, 2)
    assert part.layers[1].mlp.up_proj.weight.data_ptr() == whole.layers[1].mlp.up_proj.weight.data_ptr()
    assert len(part.layers) == part.config.num_hidden_layers == 2 and len(whole.layers) == 6
    ids = torch.tensor([[5, 9, 14]])
    alone = random_backbone(part.config, "float32")
    alone.load_state_dict(part.state_dict())
    torch.testing.assert_close(part(ids).last_hidden_state, alone(ids).last_hidden_state)


def test_random_encoder_is_a_whole_model(tiny_qwen3, tmp_path):
    tokenizer = find_tokenizer(tiny_qwen3)
    model = random_encoder(random_backbone(AutoConfig.from_pretrained(tiny_qwen3), "float32"), tokenizer, prompt="Q: ")
    vectors = model.encode(["red shoe", "a long text about a steel kettle"], prompt_name="query")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    np.testing.assert_allclose(
        encode(load_encoder(str(tmp_path / "saved"), device="cpu"), ["red shoe"], prompt_name="query"),
        vectors[:1],
        atol=1e-5,
    )


def test_random_ids_have_the_texts_lengths(tiny_qwen3):
    backbone = random_backbone(AutoConfig.from_pretrained(tiny_qwen3), "float32")
    seen = []
    backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"].sum(1).tolist()), with_kwargs=True
    )
    vectors = random_ids_encode(backbone, prompt="1234")(["12345678", "1"])
    assert seen == [[4, 3]] and vectors.shape == (2, 32) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_depths_where_memory_does_not_allow_the_whole(monkeypatch):
    config = shape_config("Qwen/Qwen3-Embedding-8B")  # 14.4 GiB in bfloat16, of which a layer is 368 MiB
    for free_gib, expected in ((24, None), (8, (6, 12)), (3, (1, 2))):
        monkeypatch.setattr(random_weights, "memory_mib", lambda field, free_gib=free_gib: free_gib * 2**10)
        assert depths_that_fit(config, "bfloat16") == expected
    monkeypatch.setattr(random_weights, "memory_mib", lambda field: 2**10)
    with pytest.raises(HlmError, match="expected memory for two layers.*1024 MiB free"):
        depths_that_fit(config, "bfloat16")
    monkeypatch.setattr(random_weights, "memory_mib", lambda field: None)
    assert depths_that_fit(config, "bfloat16") is None
