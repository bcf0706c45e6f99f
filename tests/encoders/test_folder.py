"""A saved encoder read without torch says what sentence-transformers would load of it."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoConfig

from hlm.artefacts import HlmError, fingerprint_file
from hlm.encoders.folder import GRAPHS, POOLING, EncoderFolder, graph_files
from hlm.encoders.loading import fingerprint, load_encoder, save_encoder, tokenise
from hlm.encoders.pruning import prune
from hlm.integrity import file_state
from hlm.serving.export import export_model


@pytest.fixture(scope="module")
def exported(tiny_family, tmp_path_factory):
    """EmbeddingGemma's layout: two heads, prompts, graphs."""
    folder = tmp_path_factory.mktemp("folder") / "student"
    model = prune(load_encoder(tiny_family("gemma3_text"), device="cpu"), layers=[0, 5])
    save_encoder(model, folder, "student", inputs={"teacher": "t" * 16}, config={})
    export_model(model, folder)
    return folder, model


def changed(source, target, **changes):
    folder = shutil.copytree(source, target / "student")
    manifest = json.loads((folder / "hlm.json").read_text())
    (folder / "hlm.json").write_text(json.dumps(manifest | changes))
    return folder, EncoderFolder(folder)


def test_it_says_what_the_loaded_model_is(exported):
    folder, model = exported
    files = EncoderFolder(folder)
    assert [module.name for module in files.modules()] == [type(module).__name__ for module in model]
    assert (files.pooling(), files.heads()) == ("mean", ["2_Dense", "3_Dense"])
    assert files.prompts() == model.prompts and files.prompt() == model.prompts["query"] != ""
    assert files.prompt("document") == model.prompts["document"] != "" == files.prompt("none") == files.prompt(None)
    assert files.longest() == model.max_seq_length == 48
    assert (files.encoder(), files.teacher()) == (fingerprint(model), "t" * 16)
    text = "used laptop with a black cable " * 30
    assert files.tokenizer().encode(text).ids == tokenise(model, [text])[0]
    assert list(files.graphs()) == ["fp32", "int8"]
    files.check_all()


@pytest.mark.parametrize("mode", POOLING)
@pytest.mark.parametrize("legacy", [False, True])
def test_pooling_is_read_as_it_is_written_now_and_as_it_was(mode, legacy, tiny_bert, tmp_path):
    model = load_encoder(tiny_bert, device="cpu")
    model[1] = Pooling(32, pooling_mode=mode)
    if legacy:
        save_encoder(model, tmp_path / "model", "student", inputs={}, config={})
    else:
        model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    flags = json.loads((tmp_path / "model/1_Pooling/config.json").read_text())
    assert ("pooling_mode" in flags) != legacy
    assert EncoderFolder(tmp_path / "model").pooling() == mode


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"pooling_mode": ["mean", "cls"]}, "mean+cls"),
        ({"pooling_mode": "average"}, r"pooling among cls, .*, lasttoken, found \['average'\]"),
        ({"pooling_mode": 3}, "found 3"),
        ({}, "found none"),
        ({"pooling_mode": []}, "found none"),
    ],
)
def test_pooling_that_is_none(config, found, tiny_bert, tmp_path):
    folder = shutil.copytree(tiny_bert, tmp_path / "model")
    (folder / "1_Pooling/config.json").write_text(json.dumps(config))
    if found == "mean+cls":
        assert EncoderFolder(folder).pooling() == found
        return
    with pytest.raises(HlmError, match=f"1_Pooling/config.json: expected .*{found}"):
        EncoderFolder(folder).pooling()


def test_a_limit_that_counts_rows_without_a_token_is_lowered(tiny_family, tmp_path):
    """RoBERTa's positions begin behind the padding token's id."""
    model = load_encoder(tiny_family("roberta"), device="cpu", max_seq_length=64)
    offset = AutoConfig.from_pretrained(tiny_family("roberta")).pad_token_id + 1
    assert model.max_seq_length == 64 - offset
    save_encoder(model, tmp_path / "model", "student", inputs={}, config={})
    files = EncoderFolder(tmp_path / "model")
    assert files.longest() == 64 - offset and files.json("config.json")["max_position_embeddings"] == 64
    long = model.encode(["used laptop with a black cable " * 30])
    assert np.isfinite(long).all()
    assert fingerprint(load_encoder(str(tmp_path / "model"), device="cpu")) == files.encoder()


# ---- what hlm.json tells


def test_a_file_that_two_places_tell_of_is_told_of_once(exported, tmp_path):
    onnx = json.loads((exported[0] / "hlm.json").read_text())["onnx"]
    onnx["int8"]["fingerprint"] = "0" * 16
    _, files = changed(exported[0], tmp_path, onnx=onnx)
    for check in (files.check_all, lambda: files.check_graph("int8"), lambda: files.check(["modules.json"])):
        with pytest.raises(HlmError, match=r"expected one fingerprint of onnx/model_quantized.onnx, found .* and 0000"):
            check()


def test_all_files_are_hashed_once(exported, monkeypatch):
    seen = []
    monkeypatch.setattr("hlm.integrity.known_fingerprint", lambda path: seen.append(path) or fingerprint_file(path))
    files = EncoderFolder(exported[0])
    files.check_all()
    assert len(seen) == len(set(seen)) == len(files.records) and exported[0] / GRAPHS["int8"] in seen


def test_graphs_of_a_later_version_are_no_fault(exported, tmp_path):
    onnx = json.loads((exported[0] / "hlm.json").read_text())["onnx"]
    _, files = changed(exported[0], tmp_path, onnx=onnx | {"fp8": {"somewhere": "else"}})
    assert list(files.graphs()) == ["fp32", "int8"]
    files.check_all()


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_weights_beside_a_graph_that_nobody_told_of(name, exported, tmp_path):
    folder, files = changed(exported[0], tmp_path)
    files.check_graph(name)
    (folder / f"{GRAPHS[name]}_data").write_bytes(b"weights that nobody told of")
    with pytest.raises(HlmError, match=f"{GRAPHS[name]}_data: expected no such file"):
        files.check_graph(name)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "'onnx.fp32.file', found nothing"),
        ({"file": "onnx/model.onnx"}, "onnx.fp32.fingerprint"),
        ({"file": "onnx/other.onnx", "fingerprint": "0"}, "a record of onnx/model.onnx, found one of onnx/other.onnx"),
        ({"file": "onnx/model.onnx", "fingerprint": "0", "data": {"file": "x"}}, "record of onnx/model.onnx_data"),
    ],
)
def test_a_damaged_record_of_a_graph(record, message, tmp_path):
    with pytest.raises(HlmError, match=message):
        graph_files("fp32", record, tmp_path / "hlm.json")


def test_a_file_is_told_from_its_successor(tmp_path):
    path = tmp_path / "file"
    assert file_state(path) is None
    path.write_bytes(b"one")
    first, strict = file_state(path), file_state(path, strict=True)
    with open(path, "rb") as opened:
        assert file_state(opened.fileno()) == file_state(path) == first == strict[:3]
    os.link(path, tmp_path / "link")  # no other content
    assert file_state(path) == first
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_state(path) == first and file_state(path, strict=True) != strict
    (tmp_path / "other").write_bytes(b"one")
    os.replace(tmp_path / "other", path)
    assert file_state(path) != first


def test_it_is_read_without_torch(exported):
    code = (
        "import sys; from hlm.encoders.folder import EncoderFolder; files = EncoderFolder(sys.argv[1]); "
        "files.check_all(); files.tokenizer(); files.pooling(); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(exported[0])], check=True)
