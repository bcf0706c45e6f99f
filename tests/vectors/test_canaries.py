"""A student and a catalogue that do not belong together are refused, whatever their manifests say; so are files that
were cut short or changed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hlm.artefacts import HlmError, fingerprint_file, read_manifest
from hlm.encoders.loading import encode, fingerprint, load_encoder, save_encoder
from hlm.indexes.faiss_index import AdIndex
from hlm.indexes.lineage import verify
from hlm.vectors import canaries
from hlm.vectors.store import VectorStore
from recipes import embed

TEACHERS = ("bert", "qwen3")


@pytest.fixture(scope="module")
def house(tmp_path_factory, tiny_bert, tiny_qwen3, catalogue_200):
    """Two teachers, the first one's vectors of a catalogue and index, and a student near to it."""
    home = tmp_path_factory.mktemp("canaries")
    for name, path in zip(TEACHERS, (tiny_bert, tiny_qwen3), strict=True):
        model = load_encoder(path, device="cpu")
        teacher = fingerprint(model)
        save_encoder(model, home / name, "teacher", inputs={}, config={})
        with torch.no_grad():
            model[0].model.get_input_embeddings().weight.mul_(1.01)  # another encoder, close to its teacher
        save_encoder(model, home / f"{name}_student", "student", inputs={"teacher": teacher}, config={})
        argv = ["--model", str(home / name), "--data", catalogue_200, "--output", str(home / f"{name}_vectors")]
        embed.main([*argv, "--parts", "corpus", "--shard_rows", "80", "--index", "Flat"])
    return home


@pytest.fixture
def pair(house, tmp_path):
    for name in ("bert_student", "bert_vectors"):
        shutil.copytree(house / name, tmp_path / name)
    return tmp_path / "bert_student", tmp_path / "bert_vectors"


def edit(folder: Path, change) -> None:
    manifest = json.loads((folder / "hlm.json").read_text())
    change(manifest)
    (folder / "hlm.json").write_text(json.dumps(manifest))


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("target", ["corpus", "index"])
def test_a_pair_that_belongs_together(house, teacher, target):
    facts = verify(house / f"{teacher}_student", house / f"{teacher}_vectors" / target)
    assert facts["vectors"] == 200 and facts["teacher"] == fingerprint(load_encoder(str(house / teacher), device="cpu"))
    assert facts["canaries"] >= 10 and facts["of"] == len(canaries.QUERIES) and facts["mean_cosine"] > 0.9


@pytest.mark.parametrize("teacher", TEACHERS)
def test_canaries_are_the_teachers_vectors_and_travel_with_the_index(house, teacher):
    store = VectorStore.open(house / f"{teacher}_vectors/corpus")
    index = AdIndex.load(house / f"{teacher}_vectors/index")
    assert store.canaries == index.canaries == AdIndex.build(store).canaries
    texts = store.canaries["texts"]
    expected = encode(load_encoder(str(house / teacher), device="cpu"), texts, prompt_name="query")
    np.testing.assert_allclose(canaries.vectors_of(store.canaries, 32, where="store"), expected, atol=1e-3)
    narrow = canaries.vectors_of(store.canaries, 8, where="store")
    cut = expected[:, :8] / np.linalg.norm(expected[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(narrow, cut, atol=2e-3)


def test_another_teachers_index_is_refused_naming_both(house):
    first, second = (fingerprint(load_encoder(str(house / name), device="cpu")) for name in TEACHERS)
    for target in ("corpus", "index"):
        with pytest.raises(HlmError) as refused:
            verify(house / "bert_student", house / "qwen3_vectors" / target)
        assert first in str(refused.value) and second in str(refused.value)


def test_a_manifest_that_names_the_wrong_teacher_is_found_by_the_canaries(house, pair):
    """Equal widths and a forged fingerprint: nothing but the vectors tells."""
    student, _ = pair
    other = house / "qwen3_vectors/corpus"
    edit(student, lambda manifest: manifest["inputs"].update(teacher=VectorStore.open(other).encoder))
    with pytest.raises(HlmError, match="canary queries nearest.*use that teacher's student"):
        verify(student, other)


def test_weights_changed_after_saving_are_refused(pair):
    student, vectors = pair
    weights = load_file(student / "model.safetensors")
    name = next(name for name in weights if "layer.0" in name)
    weights[name].view(-1)[0] += 1e-3  # far too little for any canary
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HlmError, match="model.safetensors: expected content"):
        verify(student, vectors / "index")
    edit(student, lambda manifest: manifest.pop("files"))  # as an older version wrote it
    with pytest.raises(HlmError, match="expected encoder .* were changed after it was written"):
        verify(student, vectors / "index")
    for tensor in weights.values():
        tensor.copy_(torch.randn_like(tensor, dtype=torch.float32).to(tensor.dtype))
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    found = fingerprint(load_encoder(str(student), device="cpu"))
    edit(student, lambda manifest: manifest.update(encoder=found))  # even with the fingerprint written anew
    with pytest.raises(HlmError, match="canary queries"):
        verify(student, vectors / "index")


def test_settings_changed_after_saving_are_refused(pair):
    student, vectors = pair
    config = json.loads((student / "1_Pooling/config.json").read_text())
    config |= {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    (student / "1_Pooling/config.json").write_text(json.dumps(config))
    with pytest.raises(HlmError, match="1_Pooling/config.json: expected content"):
        verify(student, vectors / "index")
    edit(student, lambda manifest: manifest.pop("files"))
    with pytest.raises(HlmError, match="expected encoder"):
        verify(student, vectors / "index")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "x", "config.json: expected a JSON object"),
        ("config.json", "[" * 100_000, "config.json: expected a JSON object"),
        ("config.json", '{"dtype": 7}', "expected a text as 'dtype', found int 7"),
        ("config.json", '{"model_type": "bert", "hidden_size": "wide"}', "could not load the model"),
        ("modules.json", "{", "modules.json: expected a list of modules"),
        ("modules.json", "{}", "modules.json: expected a list as 'modules', found dict"),
        ("modules.json", '[{"idx": 0, "path": "", "type": 3}]', "expected a text as 'type', found int 3"),
        ("modules.json", '[{"path": "", "type": "evil_module.Evil"}]', "found 'evil_module.Evil'; nothing of another"),
        ("modules.json", '[{"path": "", "type": "sentence_transformers.util.Evil"}]', "nothing of another package"),
        ("modules.json", "[]", "could not load the model|Transformer with Pooling"),
        ("tokenizer.json", "{}", "could not load the model"),
        ("1_Pooling/config.json", "[]", "could not load the model"),
        ("model.safetensors", "cut short", "could not load the model"),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_a_damaged_student_ends_in_one_error(pair, monkeypatch, tmp_path, name, text, message, recorded):
    student, vectors = pair
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil_module.py").write_text("raise SystemExit('code from outside ran')")
    (student / name).write_text(text)
    if not recorded:
        edit(student, lambda manifest: manifest.pop("files"))
    with pytest.raises(HlmError, match=f"{name}: expected content" if recorded else message):
        verify(student, vectors / "index")


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"files": {"model.safetensors": None}},
        {"onnx": [1]},
        {"onnx": {"fp32": {"file": 3}}},
        {"dim": "x"},
        {"dim": float("nan")},
        {"dim": 10**30},
        {"encoder": None},
        {"inputs": None},
        {"inputs": {"teacher": 5}},
    ],
    ids=str,
)
def test_a_damaged_manifest_of_a_student_ends_in_one_error(pair, change):
    student, vectors = pair
    edit(student, lambda manifest: manifest.update(change))
    with pytest.raises(HlmError, match="expected|neither"):
        verify(student, vectors / "index")


@pytest.mark.parametrize("name", ["vectors-00001.safetensors", "ids-00002.parquet"])
def test_a_shard_cut_short_or_changed_is_found(pair, name):
    student, vectors = pair
    path = vectors / "corpus" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(HlmError, match=f"{name}: expected {len(whole)} bytes, found {len(whole) - 1} bytes"):
        verify(student, vectors / "corpus")
    path.write_bytes(whole)
    flip(path, len(whole) // 2)
    with pytest.raises(HlmError, match=f"{name}: expected SHA-256 .* changed after it was written"):
        verify(student, vectors / "corpus")


@pytest.mark.parametrize("name", ["index.faiss", "ads.arrow"])
def test_an_index_cut_short_or_changed_is_found(pair, name):
    student, vectors = pair
    path = vectors / "index" / name
    whole = path.read_bytes()
    for damage in (lambda: path.write_bytes(whole[:-1]), lambda: flip(path, len(whole) // 2), path.unlink):
        path.write_bytes(whole)
        damage()
        with pytest.raises(HlmError, match=f"{name}: expected content"):
            verify(student, vectors / "index")


def test_an_exported_graph_that_was_changed_is_found(pair):
    student, vectors = pair
    (student / "onnx").mkdir()
    (student / "onnx/model.onnx").write_bytes(b"graph" * 100)
    entry = {"file": "onnx/model.onnx", "fingerprint": fingerprint_file(student / "onnx/model.onnx")}
    edit(student, lambda manifest: manifest.update(onnx={"fp32": entry}))
    assert verify(student, vectors / "index")["vectors"] == 200
    flip(student / "onnx/model.onnx", 7)
    with pytest.raises(HlmError, match="onnx/model.onnx: expected content"):
        verify(student, vectors / "index")
    (student / "onnx/model.onnx").unlink()
    with pytest.raises(HlmError, match="found no file"):
        verify(student, vectors / "index")


@pytest.mark.parametrize(
    "damage",
    [
        {"vectors": "no base64!"},
        {"vectors": 5},
        {"dim": 7},
        {"dim": None},
        {"dim": 10**30},
        {"dim": -1},
        {"texts": ["one"]},
        {"texts": []},
        {"texts": None},
        {"texts": [1] * 12},
        {"vectors": "AAAA"},
    ],
    ids=str,
)
def test_damaged_canaries_are_named(pair, damage):
    student, vectors = pair
    edit(vectors / "index", lambda manifest: manifest["canaries"].update(damage))
    with pytest.raises(HlmError, match="canaries"):
        verify(student, vectors / "index")


def test_what_is_older_than_canaries_is_verified_by_fingerprint_and_gets_them(house, pair, catalogue_200):
    student, vectors = pair
    before = {name: (vectors / name / "hlm.json").read_bytes() for name in ("corpus", "index")}
    for name in before:
        edit(vectors / name, lambda manifest: manifest.pop("canaries"))
        facts = verify(student, vectors / name)
        assert facts["canaries"] is None and facts["vectors"] == 200
    argv = ["--model", str(house / "bert"), "--data", catalogue_200, "--output", str(vectors)]
    shards = {path: path.stat().st_mtime_ns for path in vectors.rglob("*-0*")}
    embed.main([*argv, "--parts", "corpus", "--shard_rows", "80", "--index", "Flat"])
    assert shards == {path: path.stat().st_mtime_ns for path in vectors.rglob("*-0*")}
    for name, manifest in before.items():
        assert read_manifest(vectors / name, "index" if name == "index" else "vectors") == json.loads(manifest)
