"""Traps of the recipe, each seen to bite, that no other file tests: one test each, named after its trap."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router
from transformers import AutoModel

from hlm.artefacts import HlmError
from hlm.data.contract import load
from hlm.encoders.loading import add_head, encode, fingerprint, load_encoder, save_encoder
from hlm.encoders.lora import add_lora, merge_lora
from hlm.steps import TeacherConfig
from hlm.training.teacher import Pairs, mine
from hlm.training.trainer import RecipeTrainer
from hlm.vectors.store import VectorStore
from recipes import align, embed

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["red shoe", "a used black laptop with charger", "kettle"]
ONE_STEP = [
    "--max_steps",
    "1",
    "--save_strategy",
    "no",
    "--per_device_train_batch_size",
    "16",
    "--disable_tqdm",
    "true",
]


@pytest.fixture(scope="module")
def vectors(tiny_qwen3, catalogue_200, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("vectors"))
    embed.main(["--model", tiny_qwen3, "--data", catalogue_200, "--output", folder])
    return folder


def align_arguments(student, data, vectors, output, *more):
    given = ["--student", student, "--data", data, "--vectors", vectors, "--output", str(output)]
    return [*given, "--parts", "train", *ONE_STEP, *more]


def test_dtype_the_student_trains_in_fp32_weights_under_autocast(
    tiny_qwen3, catalogue_200, vectors, tmp_path, monkeypatch
):
    save_encoder(load_encoder(tiny_qwen3, dtype="bfloat16"), tmp_path / "half", "student", inputs={}, config={})
    seen = {}

    class Watched(RecipeTrainer):
        def training_step(self, model, *rest):
            layer = self.model[0].model.layers[0].mlp.up_proj
            hook = layer.register_forward_hook(
                lambda module, args, out: seen.update(weight=module.weight.dtype, out=out.dtype)
            )
            loss = super().training_step(model, *rest)
            hook.remove()
            return loss

    monkeypatch.setattr("hlm.training.align.RecipeTrainer", Watched)
    align.main(align_arguments(str(tmp_path / "half"), catalogue_200, vectors, tmp_path / "aligned", "--bf16", "true"))
    assert seen == {"weight": torch.float32, "out": torch.bfloat16}  # although the checkpoint is in bf16
    saved = AutoModel.from_pretrained(tmp_path / "aligned")
    assert {parameter.dtype for parameter in saved.parameters()} == {torch.float32}


def test_padding_a_store_keeps_to_the_dtype_it_was_begun_with(tiny_qwen3, catalogue_200, tmp_path):
    words = ["--model", tiny_qwen3, "--data", catalogue_200, "--output", str(tmp_path), "--parts", "queries"]
    embed.main([*words, "--dtype", "bfloat16"])
    with pytest.raises(HlmError, match="another run"):
        embed.main(words)


def test_lora_vectors_of_an_unmerged_teacher_are_not_the_merged_ones(tiny_qwen3):
    model = add_lora(load_encoder(tiny_qwen3), rank=4, alpha=8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted, unmerged = encode(model, TEXTS), fingerprint(model)
    assert isinstance(model[0].model, PeftModel)
    merged = merge_lora(model)
    assert not isinstance(merged[0].model, PeftModel)
    np.testing.assert_allclose(encode(merged, TEXTS), adapted, atol=1e-5)
    assert fingerprint(merged) != unmerged  # so vectors kept before the merge are refused


def test_mined_negatives_of_another_backbone_of_the_same_name_are_refused(
    tiny_qwen3, tiny_bert, catalogue_200, tmp_path
):
    config = TeacherConfig(backbone="model", data=catalogue_200, output="none", min_score=3, hard_negatives=1)
    pairs = Pairs(load(catalogue_200, splits=("train",)), config)
    mine(load_encoder(tiny_qwen3), pairs, config, str(tmp_path / "backbone"), "source")
    with pytest.raises(HlmError, match="encoder"):
        mine(load_encoder(tiny_bert), pairs, config, str(tmp_path / "backbone"), "source")


def test_label_columns_the_trainer_sees_row_numbers_and_the_store_gives_half_precision(
    tiny_qwen3, catalogue_200, vectors, tmp_path, monkeypatch
):
    seen = []

    class Watched(RecipeTrainer):
        def training_step(self, model, inputs, *rest):
            seen.append((self.train_dataset.column_names, inputs["teacher"].dtype, tuple(inputs["teacher"].shape)))
            return super().training_step(model, inputs, *rest)

    monkeypatch.setattr("hlm.training.align.RecipeTrainer", Watched)
    align.main(align_arguments(tiny_qwen3, catalogue_200, vectors, tmp_path / "aligned"))
    assert seen == [(["row"], torch.float32, (16, 32))]
    shard = next(Path(vectors, "queries").glob("*.safetensors"))
    store = VectorStore.open(Path(vectors) / "queries")
    assert shard.stat().st_size < len(store) * (32 * 2 + 16) + 4096  # two bytes a value, and no float64 list


def test_a_head_is_the_models_own_once_however_many_stages_a_cascade_has(tiny_qwen3, catalogue_200, vectors, tmp_path):
    stages = json.dumps([{"layers": 4}, {"layers": 2}])
    words = align_arguments(tiny_qwen3, catalogue_200, vectors, tmp_path / "aligned", "--head", "true")
    align.main([*words, "--cascade", stages])
    model = load_encoder(str(tmp_path / "aligned"))
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Dense", "Normalize"]


def test_a_head_has_no_huge_weights_where_samples_hardly_vary(tiny_bert):
    """Random weights and short queries: some directions hold rounding errors alone."""
    model = load_encoder(tiny_bert)
    generator = np.random.default_rng(0)
    student = np.ones((64, 32), dtype=np.float32) + 1e-2 * generator.normal(size=(64, 32)).astype(np.float32)
    student[:, 1] = student[:, 0] + 1e-7 * generator.normal(size=64)
    add_head(model, student, generator.normal(size=(64, 24)).astype(np.float32))
    assert model[-2].linear.weight.abs().max() < 1e3


def test_a_dense_headed_repo_keeps_its_head_where_automodel_loses_it(tiny_bert, tmp_path):
    model = load_encoder(tiny_bert)
    plain = encode(model, TEXTS)
    add_head(model, plain, plain @ np.linalg.qr(np.random.default_rng(0).normal(size=(32, 32)))[0].astype(np.float32))
    headed = encode(model, TEXTS)
    model.save_pretrained(str(tmp_path / "headed"), create_model_card=False)
    assert np.abs(headed - plain).max() > 0.01
    np.testing.assert_allclose(encode(load_encoder(str(tmp_path / "headed")), TEXTS), headed, atol=1e-6)
    assert not any("linear" in name for name in AutoModel.from_pretrained(tmp_path / "headed").state_dict())


def test_a_router_whose_plain_encode_takes_the_document_route_is_refused(tiny_bert, tmp_path):
    routes = {name: list(SentenceTransformer(tiny_bert, device="cpu")) for name in ("query", "document")}
    router = Router.for_query_document(routes["query"], routes["document"])
    SentenceTransformer(modules=[router], device="cpu").save_pretrained(str(tmp_path), create_model_card=False)
    with pytest.raises(HlmError, match="found Router.*single-route"):
        load_encoder(str(tmp_path))


def test_packages_that_drag_the_stack_down_are_no_dependency_of_ours():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    pinning = ("optimum", "fastembed", "light-embed", "sentence-transformers[", "diskannpy")
    assert wanted and not [name for name in wanted if name.startswith(pinning)]
