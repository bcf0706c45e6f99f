"""Recipes refuse what cannot work before any weights load: here the weights are garbage, so that loading would show."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from hlm.artefacts import HlmError, write_manifest
from hlm.planning import plan
from hlm.planning.footprint import encoder_width
from hlm.planning.hardware import Gpu

ROOT = Path(__file__).resolve().parents[2]


def recipe(name: str):
    spec = importlib.util.spec_from_file_location(f"refusing_{name}", ROOT / f"recipes/{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module", params=["tiny_bert", "tiny_qwen3"])
def garbage(request, tmp_path_factory) -> str:
    """A model whose configuration is whole and whose weights are no weights."""
    folder = tmp_path_factory.mktemp("garbage") / "model"
    shutil.copytree(request.getfixturevalue(request.param), folder)
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(b"no weights")
    write_manifest(folder, "student", inputs={"teacher": "t" * 16}, config={}, encoder="e" * 16, dim=32)
    return str(folder)


@pytest.fixture
def small_gpu(monkeypatch):
    """As `check_step` sees a GPU of 0.2 GiB beside the context of CUDA."""
    real = plan.check_step
    gpu = Gpu("Tiny-GPU", int(1.2 * 2**30), 0.0)
    monkeypatch.setattr("hlm.training.trainer.check_step", lambda *args, **more: real(*args, **more, gpu=gpu))


@pytest.mark.parametrize(
    ("name", "given", "more", "message"),
    [
        ("align", "--student", ["--cascade", '[{"layers": 7}]'], "1 to 6 .*found 7.*nearest that works is 6"),
        ("align", "--student", ["--cascade", '[{"ffn": 65}]'], "1 to 64 .*found 65.*nearest that works is 64"),
        ("align", "--student", ["--cascade", '[{"layers": 2}, {"layers": 3}]'], "grows from 2 to 3"),
        ("prune", "--model", ["--ffn", "65"], "1 to 64 .*found 65.*nearest that works is 64"),
        ("prune", "--model", ["--layers", "0", "6"], r"within 0\.\.5, found \[0, 6\]"),
        ("embed", "--model", ["--dim", "33"], "dim: expected 1 to 32 .*found 33.*nearest that works is 32"),
        ("embed", "--model", ["--dim", "16", "--index", "Flat", "--index_dim", "17"], "index_dim: expected 1 to 16 "),
    ],
)
def test_shapes(garbage, catalogue_200, tmp_path, name, given, more, message):
    arguments = [given, garbage, "--data", catalogue_200, "--output", str(tmp_path / "out")]
    if name != "embed":
        arguments += ["--vectors", str(tmp_path / "none")]
    with pytest.raises(HlmError, match=message):
        recipe(name)([*arguments, *more])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "given"), [("teacher", "--backbone"), ("align", "--student"), ("refine", "--student")]
)
def test_a_batch_that_cannot_fit(garbage, catalogue_200, tmp_path, small_gpu, name, given):
    arguments = [given, garbage, "--data", catalogue_200, "--output", str(tmp_path / "out")]
    if name != "teacher":
        arguments += ["--vectors", str(tmp_path / "none")]
    told = r".*expected at most 0\.1 GiB a GPU \(Tiny-GPU\), found .*set per_device_train_batch_size: "
    with pytest.raises(HlmError, match=name + told):
        recipe(name)([*arguments, "--per_device_train_batch_size", "4096"])


def test_garbage_weights_are_what_is_left_to_refuse(garbage, catalogue_200, tmp_path):
    """Without a fault in the settings the weights are read: the refusals above came before that."""
    with pytest.raises(Exception, match="(?i)safetensors|header|weights"):
        recipe("embed")(["--model", garbage, "--data", catalogue_200, "--output", str(tmp_path), "--dim", "16"])


def test_a_backbone_of_another_family_is_not_refused(tmp_path, caplog):
    from transformers import DebertaV2Config

    DebertaV2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2).save_pretrained(tmp_path)
    caplog.set_level("INFO")
    settings = {"student": str(tmp_path), "cascade": [], "max_seq_length": None}
    plan.check_step("align", settings, gpu=Gpu("Tiny-GPU", 2**20, 0.0))
    assert "not known beforehand" in caplog.text


def test_the_width_of_an_encoder(tiny_bert, tmp_path):
    import numpy as np

    from hlm.encoders.loading import add_head, load_encoder

    assert encoder_width(tiny_bert) == 32
    model = load_encoder(tiny_bert, device="cpu")
    rng = np.random.default_rng(0)
    add_head(model, rng.normal(size=(64, 32)), rng.normal(size=(64, 48)))
    model.save_pretrained(str(tmp_path / "headed"), create_model_card=False)
    assert encoder_width(str(tmp_path / "headed")) == 48
