"""What is checked of a student's folder is what is served; damage ends in one clear error."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import children
import numpy as np
import pytest
from hub_server import HubServer

from hlm.artefacts import HlmError
from hlm.encoders.loading import encode, load_encoder
from hlm.serving.export import export
from hlm.serving.query_encoder import QueryEncoder


@pytest.fixture
def copied(online_bert, tmp_path, monkeypatch):
    monkeypatch.setenv("HLM_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(online_bert, tmp_path / "student")


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rotate(tokenizer):
    words = tokenizer["model"]["vocab"]
    names = [name for name in words if not name.startswith("[")]
    ids = [words[name] for name in names]
    words.update(zip(names, ids[1:] + ids[:1], strict=True))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer.json", rotate),
        ("tokenizer.json", lambda v: v["normalizer"].update(lowercase=False)),
        ("config_sentence_transformers.json", lambda v: v.update(prompts={"query": "passage: "})),
        ("sentence_bert_config.json", lambda v: v.update(max_seq_length=4)),
        ("tokenizer_config.json", lambda v: v.update(model_max_length=4)),
        ("config.json", lambda v: v.update(max_position_embeddings=4)),
        ("modules.json", lambda v: v.pop()),
    ],
)
def test_a_changed_configuration_is_refused(copied, file, change):
    edit(copied / file, change)
    for settings in ({}, {"precision": "int8"}, {"backend": "openvino"}, {"backend": "torch"}):
        with pytest.raises(HlmError, match=rf"{file}: expected content .* as hlm.json says, found"):
            QueryEncoder.from_pretrained(copied, threads=1, **settings)


@pytest.mark.parametrize(
    "file", ["tokenizer_config.json", "sentence_bert_config.json", "onnx/model.onnx", "config.json"]
)
def test_a_missing_file_is_refused(copied, file):
    (copied / file).unlink()
    with pytest.raises(HlmError, match=f"{file}: expected content .* found no file"):
        QueryEncoder.from_pretrained(copied, threads=1)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("onnx/model.onnx_data", {}),
        ("adapter_config.json", {"backend": "torch"}),
        ("2_Dense/config.json", {"backend": "torch"}),
        ("pytorch_model.bin", {"backend": "torch"}),
        ("model.safetensors.index.json", {"backend": "torch"}),
        ("vocab.txt", {"backend": "torch"}),
    ],
)
def test_an_added_file_that_would_be_read_is_refused(copied, file, settings):
    (copied / file).parent.mkdir(exist_ok=True)
    (copied / file).write_text("{}")
    with pytest.raises(HlmError, match=f"{file}: expected no such file as hlm.json says"):
        QueryEncoder.from_pretrained(copied, threads=1, **settings)


@pytest.mark.parametrize("file", ["model.safetensors", "1_Pooling/config.json"])
def test_under_torch_weights_and_pooling_are_checked_too(copied, file):
    path = copied / file
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(HlmError, match=f"{file}: expected content"):
        QueryEncoder.from_pretrained(copied, backend="torch")
    assert QueryEncoder.from_pretrained(copied, threads=1).encode("red").shape == (32,)  # which reads neither


def test_what_the_hub_adds_is_no_change(copied):
    expected = QueryEncoder.from_pretrained(copied, threads=1).encode("red")
    (copied / "README.md").write_text("a card")
    (copied / ".gitattributes").write_text("*.onnx filter=lfs")
    edit(copied / "hlm.json", lambda v: v.update(config={"output": "cut"}, canaries={"texts": []}))
    for backend in ("onnxruntime", "torch"):
        found = QueryEncoder.from_pretrained(copied, threads=1, backend=backend)
        np.testing.assert_allclose(found.encode("red"), expected, atol=1e-5)
        assert (found.fingerprint, found.teacher) == ("e" * 16, "t" * 16)


def test_a_folder_that_has_no_records_is_read_as_it_is(copied):
    expected = QueryEncoder.from_pretrained(copied, threads=1).encode("red shoe")
    edit(copied / "hlm.json", lambda v: v.pop("files"))
    edit(copied / "sentence_bert_config.json", lambda v: v.update(max_seq_length=3))
    assert QueryEncoder.from_pretrained(copied, threads=1).max_tokens == 3
    edit(copied / "sentence_bert_config.json", lambda v: v.pop("max_seq_length"))
    (copied / "hlm.json").unlink()  # of sentence-transformers alone, with a graph
    found = QueryEncoder.from_pretrained(copied, threads=1)
    np.testing.assert_allclose(found.encode("red shoe"), expected, atol=1e-5)
    assert found.fingerprint is None and found.max_tokens == 48


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["onnx"]["fp32"].update(file="onnx/model_quantized.onnx"),
        lambda v: v["onnx"]["fp32"].update(data={"file": "onnx/kept", "fingerprint": "0" * 16}),
        lambda v: v["onnx"]["fp32"].update(data=None),
        lambda v: v["onnx"].update(fp32=None),
        lambda v: v["onnx"].update(fp32=[]),
        lambda v: v["onnx"]["fp32"].pop("fingerprint"),
        lambda v: v["onnx"].update(lookup=None),
        lambda v: v.update(onnx=3),
        lambda v: v.update(encoder={}),
        lambda v: v.update(inputs=3),
        lambda v: v["inputs"].update(teacher=3),
        lambda v: v.update(schema_version=99),
    ],
)
@pytest.mark.parametrize("records", [True, False])
def test_a_damaged_manifest_is_refused(copied, change, records):
    edit(copied / "hlm.json", change)
    if not records:
        edit(copied / "hlm.json", lambda v: v.pop("files"))
    with pytest.raises(HlmError, match="hlm.json"):
        QueryEncoder.from_pretrained(copied, threads=1)


@pytest.mark.parametrize("records", [[], "x", {}, 3, {"tokenizer.json": None}])
def test_damaged_records_are_refused(copied, records):
    edit(copied / "hlm.json", lambda v: v.update(files=records))
    with pytest.raises(HlmError, match="hlm.json"):
        QueryEncoder.from_pretrained(copied, threads=1)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("hlm.json", "{"), ("hlm.json", "[1]"), ("hlm.json", "null"), ("hlm.json", "[" * 100_000),
        ("tokenizer.json", "{}"), ("tokenizer.json", "[]"), ("tokenizer.json", ""), ("modules.json", None),
        ("config_sentence_transformers.json", '{"prompts": []}'), ("tokenizer_config.json", "\x00"),
        ("config_sentence_transformers.json", '{"prompts": {"query": 3}}'), ("sentence_bert_config.json", "7"),
        ("tokenizer_config.json", '{"truncation_side": "up"}'), ("config.json", '"x"'),
        *(("sentence_bert_config.json", f'{{"max_seq_length": {value}}}')
          for value in ('"abc"', -1, 0, "true", "[]", "NaN", 1.5)),
        ("onnx/model.onnx", ""), ("onnx/model.onnx", "onnx"),
    ],
)  # fmt: skip
def test_damage_ends_in_one_clear_error(copied, file, text):
    if file != "hlm.json":
        (copied / "hlm.json").unlink()  # with records, they tell
    if text is None:
        (copied / file).unlink()
    else:
        (copied / file).write_text(text)
    with pytest.raises(HlmError, match=Path(file).name):
        QueryEncoder.from_pretrained(copied, threads=1)


def test_settings_that_mean_nothing_special_are_taken(copied):
    (copied / "hlm.json").unlink()
    (copied / "config_sentence_transformers.json").write_text('{"prompts": null}')
    (copied / "sentence_bert_config.json").write_text('{"max_seq_length": null}')
    edit(copied / "tokenizer_config.json", lambda v: v.update(model_max_length=1e30))
    edit(copied / "config.json", lambda v: v.update(max_position_embeddings=-1))
    encoder = QueryEncoder.from_pretrained(copied, threads=1)
    assert (encoder.prompt, encoder.max_tokens) == ("", None)
    edit(copied / "tokenizer_config.json", lambda v: v.update(model_max_length=6, truncation_side="left"))
    words = "red blue green black white steel wooden"
    (copied / "config_sentence_transformers.json").write_text("{}")  # sentence-transformers wants prompts or none
    (copied / "sentence_bert_config.json").write_text("{}")
    edit(copied / "config.json", lambda v: v.update(max_position_embeddings=64))
    model = load_encoder(str(copied), device="cpu")
    found = QueryEncoder.from_pretrained(copied, threads=1)
    np.testing.assert_allclose(found.encode([words]), encode(model, [words]), atol=1e-5)
    assert len(found.tokenise([words])[0]) == 6
    (copied / "sentence_bert_config.json").write_text('{"max_seq_length": 2}')
    with pytest.raises(HlmError, match="expected room for a text in the model's limit of 2 tokens, found 2 special"):
        QueryEncoder.from_pretrained(copied, threads=1)


def test_a_graph_of_others_is_refused_with_the_remedy(copied):
    import onnx

    (copied / "hlm.json").unlink()
    graph = onnx.load(str(copied / "onnx/model.onnx"))
    for place, value in enumerate(graph.graph.output):
        if value.name == "sentence_embedding":
            del graph.graph.output[place]
            break
    onnx.save(graph, str(copied / "onnx/model.onnx"))
    for backend in ("onnxruntime", "openvino"):
        with pytest.raises(HlmError, match="sentence_embedding of a fixed width.*move this folder's onnx/ away"):
            QueryEncoder.from_pretrained(copied, backend=backend, threads=1)


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "nonsense", "cpu:"])
def test_a_device_that_is_not_there(online_bert, device):
    import torch

    if torch.cuda.is_available() and device == "cuda":
        pytest.skip("it is there")
    with pytest.raises(HlmError, match="device: expected"):
        QueryEncoder.from_pretrained(online_bert, backend="torch", device=device)


@pytest.mark.parametrize("threads", ["2", 1.5, -1, 10**9])
def test_threads_are_a_number_of_them(online_bert, threads):
    with pytest.raises(HlmError, match="threads: expected a number from 1 to 1024"):
        QueryEncoder.from_pretrained(online_bert, threads=threads)


SERVE = """
import logging, sys, warnings
root = logging.getLogger()
before = root.level, root.handlers[:], root.filters[:]
from hlm import QueryEncoder
vector = QueryEncoder.from_pretrained(sys.argv[1], threads=1).encode("red shoe")
assert (root.level, root.handlers, root.filters) == before, root.handlers
print(vector.tolist())
"""


def serve(folder, cache, **settings):
    return children.Popen(
        [sys.executable, "-c", SERVE, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HLM_CACHE": str(cache)},
        **settings,
    )


def test_exporting_leaves_loggers_warnings_and_bars_as_they_were(tiny_bert, tmp_path, recwarn, caplog):
    import warnings

    from transformers.utils.logging import is_progress_bar_enabled

    names = ("torch.onnx", "onnxruntime.quantization.matmul_nbits_quantizer", None)
    before = [logging.getLogger(name).level for name in names], warnings.filters[:], is_progress_bar_enabled()
    with caplog.at_level(logging.INFO):
        export(tiny_bert, tmp_path)
    assert not recwarn.list
    # Our own progress is told where it takes over ten seconds.
    told = [record for record in caplog.records if record.levelno >= logging.INFO and record.name != "hlm.progress"]
    assert not told
    assert before == ([logging.getLogger(name).level for name in names], warnings.filters[:], is_progress_bar_enabled())


def test_two_processes_export_once_in_one_line_and_sweep_what_a_killed_one_left(tiny_bert, tmp_path):
    """Nor do they touch the root logger; see `SERVE`."""
    cache = tmp_path / "cache"
    killed = serve(tiny_bert, cache)
    for _ in range(1200):
        if list(cache.glob(".*.partial")):
            break
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(list(cache.glob(".*.partial"))) == 1
    both = [serve(tiny_bert, cache) for _ in range(2)]
    (first, said), (second, others) = (process.communicate(timeout=300) for process in both)
    assert [process.returncode for process in both] == [0, 0], said + others
    (line,) = (said + others).splitlines()
    assert "exporting them, once" in line and "recipes/export.py" in line
    expected = encode(load_encoder(tiny_bert, device="cpu"), ["red shoe"])[0]
    np.testing.assert_allclose(json.loads(first), expected, atol=1e-5)
    assert first == second
    assert not list(cache.glob(".*.partial"))
    assert len(list(cache.glob("*/onnx/model.onnx"))) == 1
    again, silence = serve(tiny_bert, cache).communicate(timeout=200)
    assert again == first and silence == ""


@pytest.fixture(scope="module")
def cached(tiny_bert, tmp_path_factory):
    """A cache with the export of a folder that has no ONNX files, and the vector it gave."""
    cache = tmp_path_factory.mktemp("cache") / "hlm"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HLM_CACHE", str(cache))
        return cache, QueryEncoder.from_pretrained(tiny_bert, threads=1).encode("red shoe")


def test_a_folder_without_onnx_is_exported_once(cached, tiny_bert, monkeypatch):
    cache, first = cached
    monkeypatch.setenv("HLM_CACHE", str(cache))
    monkeypatch.setattr("hlm.serving.export.export", None)
    np.testing.assert_array_equal(QueryEncoder.from_pretrained(tiny_bert).encode("red shoe"), first)


def test_a_damaged_export_is_made_again(cached, tiny_bert, tmp_path, monkeypatch):
    cache, expected = cached
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("HLM_CACHE", str(tmp_path))
    (graph,) = tmp_path.glob("*/onnx/model.onnx")
    graph.write_bytes(graph.read_bytes()[:1000])
    np.testing.assert_allclose(QueryEncoder.from_pretrained(tiny_bert, threads=1).encode("red shoe"), expected)
    (manifest,) = tmp_path.glob("*/hlm.json")
    manifest.write_text("[]")
    np.testing.assert_allclose(QueryEncoder.from_pretrained(tiny_bert, threads=1).encode("red shoe"), expected)


def test_a_cache_that_cannot_be_written_is_named(tiny_bert, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(HlmError, match="file .*; set HLM_CACHE to a folder that can be written to.*recipes/export.py"):
        QueryEncoder.from_pretrained(tiny_bert, threads=1)
    monkeypatch.setenv("HLM_CACHE", "/proc/nowhere/hlm")
    with pytest.raises(HlmError, match="/proc/nowhere/hlm .*set HLM_CACHE"):
        QueryEncoder.from_pretrained(tiny_bert, threads=1)


FROM_THE_HUB = """
import sys
from huggingface_hub import HfApi
from hlm import QueryEncoder

api = HfApi()
api.create_repo("acme/student")
api.upload_folder(repo_id="acme/student", folder_path=sys.argv[1])
kept = QueryEncoder.from_pretrained(sys.argv[1], threads=1).encode("red shoe")
pulled = QueryEncoder.from_pretrained("acme/student", threads=1)
assert (pulled.encode("red shoe") == kept).all()
assert (QueryEncoder.from_pretrained("acme/student", precision="int8", threads=1).encode("red shoe") != kept).any()
assert pulled._origin["revision"] is None and "torch" not in sys.modules
"""


def test_of_a_hub_id_what_is_needed_is_downloaded(online_bert, tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        environment = os.environ | hub.environment("acme", home=tmp_path / "home")
        command = [sys.executable, "-c", FROM_THE_HUB, str(online_bert)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    cached = {path.name for path in (tmp_path / "home").rglob("*.onnx")}
    assert cached == {"model.onnx", "model_quantized.onnx"}
    assert not list((tmp_path / "home").rglob("*.safetensors"))  # weights are for torch
