"""Encoders: loading, token-exact encoding, fingerprints, LoRA merge, the saved layout."""

import json
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from hlm.artefacts import HlmError
from hlm.encoders.loading import (
    add_head,
    encode,
    fingerprint,
    load_encoder,
    pad,
    prompt_of,
    save_encoder,
    token_batches,
    tokenise,
)
from hlm.encoders.lora import add_lora, enable_gradient_checkpointing, merge_lora, weaken_lora

TEXTS = ["red shoe", "a used black laptop with charger", "kettle", "steel saw and drill for wooden desk " * 6]


@pytest.fixture(params=["tiny_bert", "tiny_qwen3"])
def path(request):
    return request.getfixturevalue(request.param)


def test_encode_equals_sentence_transformers(path):
    model = load_encoder(path)
    for prompt_name in ("query", "document"):
        want = SentenceTransformer(path, device="cpu").encode(TEXTS, prompt_name=prompt_name)
        got = encode(model, TEXTS, prompt_name=prompt_name, batch_tokens=40)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, atol=2e-6)
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


def test_vectors_do_not_depend_on_the_batch(path):
    model = load_encoder(path)
    alone = np.concatenate([encode(model, [text]) for text in TEXTS])
    np.testing.assert_allclose(encode(model, TEXTS, batch_tokens=100_000), alone, atol=2e-6)


def test_left_and_right_padding_give_the_same_vectors(tiny_qwen3):
    model = load_encoder(tiny_qwen3)
    ids = tokenise(model, TEXTS)
    right = model({k: v for k, v in pad(model, ids).items()})["sentence_embedding"]
    longest = max(map(len, ids))
    left = {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids]),
    }
    np.testing.assert_allclose(right.detach(), model(left)["sentence_embedding"].detach(), atol=1e-5)


def test_qwen3_pools_endoftext_after_truncation_too(tiny_qwen3):
    model = load_encoder(tiny_qwen3)
    pooled = model.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert model.tokenizer.eos_token_id != pooled  # the trap: eos_token is <|im_end|>
    ids = tokenise(model, [*TEXTS, "laptop " * 500], prompt_of(model, "query"))
    assert all(row[-1] == pooled for row in ids)
    assert len(ids[-1]) == model.max_seq_length == 48


def test_prompt_is_a_real_newline_and_no_space(tiny_qwen3):
    model = load_encoder(tiny_qwen3)
    text = model.tokenizer.decode(tokenise(model, ["shoe"], prompt_of(model, "query"))[0])
    assert text == "Instruct: find the ad\nQuery:shoe<|endoftext|>"
    assert prompt_of(model, "document") == ""


def test_qwen3_is_causal(tiny_qwen3):
    backbone = load_encoder(tiny_qwen3)[0].model
    a, b = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 9]])
    with torch.no_grad():
        first, second = backbone(a).last_hidden_state, backbone(b).last_hidden_state
    torch.testing.assert_close(first[:, :3], second[:, :3])
    assert not torch.allclose(first[:, 3], second[:, 3])


def test_matryoshka_slice_is_normalised(path):
    model = load_encoder(path)
    whole = encode(model, TEXTS)
    want = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(encode(model, TEXTS, dim=8), want, atol=1e-6)
    with pytest.raises(HlmError, match="expected 1 to 32.*found 33"):
        encode(model, TEXTS, dim=33)


def test_a_bare_backbone_is_refused(path, tmp_path):
    AutoModel.from_pretrained(path).save_pretrained(tmp_path / "bare")
    with pytest.raises(HlmError, match="modules.json"):
        load_encoder(str(tmp_path / "bare"))


@pytest.mark.parametrize("name", ["package:no_such_package/model", "package:hlm/no_such_folder", "./no/such/folder"])
def test_what_is_not_there_is_named(name):
    with pytest.raises(HlmError, match="found none"):
        load_encoder(name)


def test_dtype_is_what_was_asked(path):
    assert load_encoder(path).dtype == torch.float32
    assert load_encoder(path, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(HlmError, match="dtype"):
        load_encoder(path, dtype="fp8")


def test_fingerprint_covers_what_decides_vectors(path):
    model = load_encoder(path)
    first = fingerprint(model)
    encode(model, TEXTS)  # the tokenizer's state moves, the fingerprint must not
    assert fingerprint(model) == fingerprint(load_encoder(path)) == first
    assert fingerprint(load_encoder(path, max_seq_length=20)) != first
    model.prompts = {**model.prompts, "query": "other: "}
    assert fingerprint(model) != first
    model = load_encoder(path)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert fingerprint(model) != first


def settings_changed(path, folder, **changed):
    shutil.copytree(path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    return load_encoder(str(folder), device="cpu")


CHANGES = {
    "tiny_bert": [("num_attention_heads", 8), ("layer_norm_eps", 0.1), ("is_decoder", True), ("hidden_act", "relu")],
    "tiny_qwen3": [
        ("rms_norm_eps", 0.1),
        ("is_causal", False),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_theta": 100.0, "rope_type": "default"}),
    ],
}


@pytest.mark.parametrize(("family", "name", "value"), [(k, *change) for k, rows in CHANGES.items() for change in rows])
def test_fingerprint_covers_the_configuration(request, tmp_path, family, name, value):
    path = request.getfixturevalue(family)
    model, changed = load_encoder(path, device="cpu"), settings_changed(path, tmp_path / "changed", **{name: value})
    assert np.abs(encode(model, TEXTS) - encode(changed, TEXTS)).max() > 1e-4
    assert fingerprint(model) != fingerprint(changed)


def test_fingerprint_leaves_out_what_decides_nothing(path, tmp_path):
    model = load_encoder(path, device="cpu")
    harmless = {
        "transformers_version": "5.17.0",
        "architectures": ["Other"],
        "attention_dropout": 0.3,
        "hidden_dropout_prob": 0.3,
        "id2label": {"0": "a"},
        "use_cache": True,
        "initializer_range": 0.5,
        "classifier_dropout": 0.2,
        "_name_or_path": "elsewhere",
        "output_hidden_states": False,
        "dtype": "bfloat16",
    }
    changed = settings_changed(path, tmp_path / "changed", **harmless)
    np.testing.assert_array_equal(encode(model, TEXTS), encode(changed, TEXTS))
    assert fingerprint(model) == fingerprint(changed)


def test_fingerprint_is_that_of_the_model_in_memory(path, tmp_path):
    """Put together by hand, saved and loaded, saved again, moved: one encoder, one fingerprint."""
    loaded = load_encoder(path, device="cpu")
    config = loaded[0].model.config
    unknown = ("use_cache", "architectures")
    values = {name: value for name, value in config.to_diff_dict().items() if name not in unknown}
    backbone = type(loaded[0].model)(type(config)(**values))
    backbone.load_state_dict(loaded[0].model.state_dict())
    assert backbone.config.use_cache and not backbone.config.architectures  # as no loaded model has it
    loaded[0].model = backbone.eval()
    first = fingerprint(loaded)
    assert first == fingerprint(load_encoder(path, device="cpu"))
    for number in range(2):
        save_encoder(loaded, tmp_path / f"saved{number}", "student", inputs={}, config={})
        loaded = load_encoder(str(tmp_path / f"saved{number}"), device="cpu")
        assert fingerprint(loaded) == first
    loaded[0].model.set_attn_implementation("eager")
    assert fingerprint(loaded) == first


def test_fingerprint_covers_the_scale_of_adapters(path):
    def adapted(alpha):
        model = load_encoder(path, device="cpu")
        torch.manual_seed(0)
        add_lora(model, rank=4, alpha=alpha)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
        return model

    model, other = adapted(8), adapted(16)  # equal weights
    assert np.abs(encode(model, TEXTS) - encode(other, TEXTS)).max() > 1e-3
    assert len({fingerprint(model), fingerprint(other), fingerprint(load_encoder(path, device="cpu"))}) == 3
    assert fingerprint(adapted(8)) == fingerprint(model)
    with model[0].model.disable_adapter():
        assert fingerprint(model) != fingerprint(adapted(8))
    merged = merge_lora(model)
    np.testing.assert_allclose(encode(merged, TEXTS), encode(adapted(8), TEXTS), atol=1e-5)
    assert fingerprint(merged) != fingerprint(adapted(8))  # other numbers, to the last bit


def test_saved_layout_is_read_alike_by_old_and_new(path, tmp_path):
    model = load_encoder(path)
    save_encoder(model, tmp_path / "saved", "student", inputs={}, config={})
    again = load_encoder(str(tmp_path / "saved"))
    assert np.array_equal(encode(again, TEXTS, prompt_name="query"), encode(model, TEXTS, prompt_name="query"))
    assert fingerprint(again) == fingerprint(model)
    modules = json.loads((tmp_path / "saved/modules.json").read_text())
    assert [module["type"].rsplit(".", 1)[0] for module in modules] == ["sentence_transformers.models"] * 3
    pooling = json.loads((tmp_path / "saved/1_Pooling/config.json").read_text())
    assert sum(value for name, value in pooling.items() if name.startswith("pooling_mode_")) == 1
    assert json.loads((tmp_path / "saved/hlm.json").read_text())["encoder"] == fingerprint(model)


def test_a_failed_save_leaves_what_was_there(path, tmp_path):
    model = load_encoder(path)
    save_encoder(model, tmp_path / "saved", "student", inputs={}, config={})
    before = (tmp_path / "saved/model.safetensors").read_bytes()

    def fail(folder):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_encoder(model, tmp_path / "saved", "student", beside=fail, inputs={}, config={})
    assert (tmp_path / "saved/model.safetensors").read_bytes() == before


def test_lora_changes_the_vectors_and_merges_exactly(path):
    model = add_lora(load_encoder(path), rank=4, alpha=8)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    before = encode(model, TEXTS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    adapted = encode(model, TEXTS)
    assert np.abs(adapted - before).max() > 1e-3
    np.testing.assert_allclose(encode(merge_lora(model), TEXTS), adapted, atol=1e-5)
    assert not any("lora" in name for name in model.state_dict())


def test_weakened_lora_lies_on_the_line_to_the_backbone(tiny_bert):
    def tuned(weight):
        model = load_encoder(tiny_bert)
        torch.manual_seed(0)
        add_lora(model, rank=4, alpha=8)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        weaken_lora(model, weight)
        return merge_lora(model).state_dict()

    backbone, whole, half = load_encoder(tiny_bert).state_dict(), tuned(1.0), tuned(0.5)
    for name in backbone:
        torch.testing.assert_close(half[name], (backbone[name] + whole[name]) / 2)
    assert any(not torch.equal(whole[name], backbone[name]) for name in backbone)
    with pytest.raises(HlmError, match="above 0 and up to 1, found 1.5"):
        tuned(1.5)


def test_gradient_checkpointing_under_lora_reaches_the_first_layer(path):
    model = add_lora(load_encoder(path), rank=4, alpha=8).train()
    enable_gradient_checkpointing(model)
    model(pad(model, tokenise(model, TEXTS)))["sentence_embedding"][:, 0].sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_head_lives_in_the_model(path, tmp_path):
    model = load_encoder(path)
    student = encode(model, TEXTS)
    teacher = np.linalg.qr(np.random.default_rng(0).normal(size=(48, 32)))[0].astype(np.float32)  # 32 -> 48 wide
    add_head(model, student, student @ teacher.T)
    got = encode(model, TEXTS)
    np.testing.assert_allclose(got, student @ teacher.T, atol=1e-4)
    save_encoder(model, tmp_path / "saved", "student", inputs={}, config={})
    assert np.array_equal(encode(load_encoder(str(tmp_path / "saved")), TEXTS), got)


def test_token_batches_keep_the_budget_and_lose_no_row():
    lengths = np.array([3, 50, 7, 7, 120, 1])
    batches = token_batches(lengths, 60)
    assert sorted(np.concatenate(batches).tolist()) == list(range(6))
    assert all(len(rows) == 1 or len(rows) * lengths[rows].max() <= 60 for rows in batches)


def test_texts_must_be_texts(path):
    with pytest.raises(HlmError, match="found NoneType"):
        encode(load_encoder(path), ["shoe", None])


def test_folder_can_move(path, tmp_path):
    shutil.copytree(path, tmp_path / "elsewhere")
    assert fingerprint(load_encoder(str(tmp_path / "elsewhere"))) == fingerprint(load_encoder(path))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_casts_left_to_autocast_change_no_bit_and_keep_less(path, monkeypatch, dtype):
    """Against PEFT as it is: equal vectors and gradients under autocast, fewer bytes kept, and no need of autocast."""

    def step(peft_as_it_is: bool):
        with monkeypatch.context() as patch:
            if peft_as_it_is:
                patch.setattr("hlm.encoders.lora.leave_casts_to_autocast", lambda model: None)
            torch.manual_seed(0)
            model = add_lora(load_encoder(path, dtype=dtype), rank=4, alpha=8).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        with torch.no_grad():
            for name, parameter in trained.items():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        kept = {}

        def keep(value):
            kept[value.untyped_storage().data_ptr()] = value
            return value

        features = pad(model, tokenise(model, TEXTS))
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
            torch.autocast("cpu", dtype=torch.bfloat16),
        ):
            vectors = model(features)["sentence_embedding"]
        vectors.float()[:, :5].sum().backward()
        size = sum(value.untyped_storage().nbytes() for value in kept.values())
        return vectors.detach(), {name: value.grad for name, value in trained.items()}, size, encode(model, TEXTS)

    (vectors, gradients, size, without), (same, equal, more, again) = step(False), step(True)
    assert torch.equal(vectors, same) and all(torch.equal(gradients[name], equal[name]) for name in gradients)
    assert size < more and np.array_equal(without, again)
