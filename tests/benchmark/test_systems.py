"""hlm.benchmark.systems: what is measured, loaded by path or from an object, and cold starts in fresh processes."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hlm.artefacts import HlmError
from hlm.benchmark import systems

QUERIES = ["shoe", "red shoe", "red steel kettle", "a kettle for two cups"]


def test_any_object_with_encode_is_a_system(tiny_bert):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(tiny_bert, device="cpu")

    class Encoder:
        backend, precision = "onnxruntime", "float32"

        def encode(self, texts):
            return model.encode(texts)

    by_path = systems.load_system(tiny_bert, device="cpu")
    duck = systems.query_encoder_system(Encoder())
    np.testing.assert_allclose(by_path.encode(["red shoe"]), duck.encode(["red shoe"]), atol=1e-6)
    assert duck.facts == {"backend": "hlm", "engine": "onnxruntime", "precision": "float32"}
    assert by_path.facts["backend"] == "sentence-transformers" and by_path.facts["dtype"] == "float32"
    assert 0 < by_path.facts["params_non_embedding"] < by_path.facts["params_total"]


def test_the_models_prompt_goes_before_every_query(tiny_qwen3):
    from hlm.encoders.loading import encode, load_encoder

    expected = encode(load_encoder(tiny_qwen3, device="cpu"), ["red shoe"], prompt_name="query")
    with_prompt, without = (systems.load_system(tiny_qwen3, prompt_name=p, device="cpu") for p in ("query", None))
    np.testing.assert_allclose(with_prompt.encode(["red shoe"]), expected, atol=1e-5)
    assert np.abs(without.encode(["red shoe"]) - expected).max() > 1e-3


def test_unknown_backend_and_a_runtime_that_does_not_import(monkeypatch):
    with pytest.raises(HlmError, match="backend: expected one of sentence-transformers, hlm, .*, found 'onnx'"):
        systems.load_system("x", backend="onnx")
    monkeypatch.setitem(sys.modules, "hlm.serving.query_encoder", None)
    with pytest.raises(HlmError, match="backend 'hlm' needs hlm.serving.query_encoder"):
        systems.load_system("x", backend="hlm")


@pytest.fixture(params=["mean", "cls", "lasttoken"])
def onnx_folder(request, tiny_bert, tmp_path):
    """tiny_bert with another pooling, a prompt and an ONNX file that adds up a table's rows, token by token."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    flags = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}
    config = {f"pooling_mode_{flag}": mode == request.param for mode, flag in flags.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config | {"word_embedding_dimension": 8}))
    settings = json.loads((folder / "config_sentence_transformers.json").read_text()) | {"prompts": {"query": "new "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    table = np.random.default_rng(0).normal(size=(1000, 8)).astype(np.float32)
    ports = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["rows", "tokens"])
        for name in ("input_ids", "attention_mask")
    ]
    outputs = [
        helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["rows", "tokens", 8]),
        helper.make_tensor_value_info("sentence_embedding", TensorProto.INT64, ["rows", "tokens"]),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["found"]),
        helper.make_node("CumSum", ["found", "axis"], ["last_hidden_state"]),
        helper.make_node("Identity", ["attention_mask"], ["sentence_embedding"]),
    ]
    constants = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array(1), "axis")]
    graph = helper.make_graph(nodes, "rows", ports, outputs, constants)
    (folder / "onnx").mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "onnx" / "model.onnx")
    return folder, request.param, table


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_session_with_glue_pools_what_the_model_read(onnx_folder, backend):
    pytest.importorskip(backend)
    folder, pooling, table = onnx_folder
    texts = ["red shoe", "a kettle for two cups"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = []
    for text in texts:
        rows = table[tokenizer("new " + text)["input_ids"]].cumsum(axis=0)
        pooled = {"mean": rows.mean(axis=0), "cls": rows[0], "lasttoken": rows[-1]}[pooling]
        expected.append(pooled / np.linalg.norm(pooled))
    system = systems.load_system(str(folder), backend=backend)
    vectors = system.encode(texts)
    assert vectors.dtype == np.float32 and system.facts["backend"] == backend and system.facts["prompt"] == "new "
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(system.encode(texts[:1]), expected[:1], atol=1e-5)
    assert system.count_tokens(texts) == [len(tokenizer("new " + text)["input_ids"]) for text in texts]
    without = systems.load_system(str(folder), backend=backend, prompt_name=None)
    assert pooling == "cls" or np.abs(without.encode(texts) - vectors).max() > 1e-3
    assert without.count_tokens(["red shoe"]) == [4]


def test_glue_says_what_it_lacks(tiny_bert, tmp_path, monkeypatch):
    with pytest.raises(HlmError, match="needs .*onnx/model.onnx, found none; export the model"):
        systems.load_system(tiny_bert, backend="onnxruntime")
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").touch()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(HlmError, match="'openvino' does not import here"):
        systems.load_system(str(folder), backend="openvino")
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*modules[:2], dense, *modules[2:]]))
    with pytest.raises(HlmError, match="found Transformer, Pooling, Dense, Normalize; use backend 'hlm'"):
        systems.load_system(str(folder), backend="onnxruntime")


def test_torch_compile_compiles_what_encode_calls(tiny_bert, monkeypatch):
    compile_, graphs = torch.compile, []

    def count(graph, inputs):  # instead of inductor, whose C++ compiler takes a minute
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda module, **options: compile_(module, backend=count, **options))
    plain = systems.load_system(tiny_bert, device="cpu")
    system = systems.load_system(tiny_bert, backend="torch.compile", device="cpu")
    np.testing.assert_allclose(system.encode(QUERIES), plain.encode(QUERIES), atol=1e-6)
    assert graphs and system.facts == plain.facts | {"backend": "torch.compile"}
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(HlmError, match="needs a C\\+\\+ compiler.*found no 'no-such-compiler'"):
        systems.load_system(tiny_bert, backend="torch.compile", device="cpu")


def test_cold_starts_are_fresh_processes_and_take_turns(tiny_bert):
    found = systems.cold_starts({"tiny": {"model": tiny_bert, "device": "cpu"}}, "red shoe", 1)["tiny"]
    parts = found["import_s"] + found["load_s"] + found["first_query_s"]
    assert 0 < parts < found["total_s"] and found["peak_memory_mib"] > 50 and found["processes"] == 1
    assert systems.cold_starts({"tiny": {"model": tiny_bert}}, "red shoe", 0) == {}
    with pytest.raises(HlmError, match="cold start of x: the process ended with 1: .*backend: expected one of"):
        systems.cold_start({"model": "x", "backend": "onnx"}, "red shoe")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_cold_start_ends_with_the_measurement(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(  # the cold start, and it alone, says who it is, and takes long
        "import os, sys\n"
        "if 'hlm.benchmark.systems' in sys.orig_argv:\n"
        "    import time, hlm.processes as processes\n"
        "    end = processes.end_with_parent\n"
        "    def late(parent):\n"
        "        end(parent)\n"
        "        open('pid', 'w').write(str(os.getpid()))\n"
        "        time.sleep(600)\n"
        "    processes.end_with_parent = late\n"
    )
    code = "from hlm.benchmark import systems; systems.cold_start({'model': 'x'}, 'q')"
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(systems.__file__).parents[2])])}
    measuring = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=variables)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert measuring.poll() is None
        time.sleep(0.05)
    measuring.kill()
    measuring.wait()
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    for _ in range(500):
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("left running")


def test_medians_over_cold_starts(monkeypatch):
    times, order = {"a": iter([3.0, 1.0, 2.0]), "b": iter([5.0, 5.0, 9.0])}, []

    def start(settings, query):
        order.append(settings["model"])
        return {"total_s": next(times[settings["model"]]), "other_load": 0.1 * len(order)}

    monkeypatch.setattr(systems, "cold_start", start)
    found = systems.cold_starts({name: {"model": name} for name in "ab"}, "q", 3, max_other_load=0.35)
    assert order == list("ababab")
    # The third start of "a" is contaminated, and so are the last two of "b".
    facts = {"processes": 3, "contaminated": 1, "over": "clean", "other_load": pytest.approx(0.5)}
    assert found["a"] == {"total_s": 2.0} | facts
    assert found["b"]["total_s"] == 5.0 and found["b"]["contaminated"] == 2


@pytest.mark.parametrize(("load", "over"), [(0.5, "all"), (None, "clean")])
def test_cold_starts_without_a_clean_one_rest_on_all(monkeypatch, load, over):
    monkeypatch.setattr(systems, "cold_start", lambda settings, query: {"total_s": 1.0, "other_load": load})
    found = systems.cold_starts({"a": {"model": "a"}}, "q", 2)["a"]
    assert found["over"] == over and found["total_s"] == 1.0 and found["other_load"] == load
