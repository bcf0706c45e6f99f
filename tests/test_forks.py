"""A server may load an encoder and then fork, or send it to its processes."""

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from hlm.artefacts import HlmError
from hlm.encoders.loading import load_encoder
from hlm.serving.query_encoder import QueryEncoder

MANY = [f"red shoe number {n} with a long tail of words to fill the batch" for n in range(200)]


@pytest.fixture(scope="module")
def folder(online_bert):
    return online_bert


def in_child(work, seconds=30):
    """The exit status of a forked child that runs `work`."""
    child = os.fork()
    if not child:
        try:
            signal.alarm(seconds)
            work()
        except BaseException as error:
            print(repr(error), file=sys.__stderr__)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def check(encoder, one, many):
    for _ in range(2):
        np.testing.assert_allclose(encoder.encode("red shoe"), one, atol=1e-5)
        np.testing.assert_allclose(encoder.encode(MANY), many, atol=1e-5)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("used", [True, False])
def test_a_forked_child_answers(folder, backend, threads, used):
    reference = QueryEncoder.from_pretrained(folder, backend=backend, threads=1)
    one, many = reference.encode("red shoe"), reference.encode(MANY)
    encoder = QueryEncoder.from_pretrained(folder, backend=backend, threads=threads)
    if used:
        check(encoder, one, many)

    def child_and_its_own():
        check(encoder, one, many)
        assert in_child(lambda: check(encoder, one, many)) == 0

    assert in_child(child_and_its_own) == 0
    check(encoder, one, many)  # nothing changed here


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_forked_child_ends(folder, backend, tmp_path):
    script = tmp_path / "server.py"
    script.write_text(f"""
import os, signal, sys
from hlm import QueryEncoder
encoder = QueryEncoder.from_pretrained({str(folder)!r}, backend={backend!r}, threads=2)
texts = ["red shoe with a long tail of words"] * 100
encoder.encode(texts)
child = os.fork()
if not child:
    signal.alarm(30)
    encoder.encode("red")
    encoder.encode(texts)
    sys.exit(7)  # runs the destructors of what the parent loaded
sys.exit(0 if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7 else 1)
""")
    assert subprocess.run([sys.executable, script], timeout=120, check=False).returncode == 0


def test_torch_says_at_once_what_to_do(folder):
    for encoder in (
        QueryEncoder.from_pretrained(folder, backend="torch"),
        QueryEncoder.from_model(load_encoder(str(folder))),
    ):

        def work(encoder=encoder):
            for texts in ("red", MANY):
                with pytest.raises(HlmError, match="found a forked one; load the encoder in each process"):
                    encoder.encode(texts)

        assert in_child(work) == 0
        assert encoder.encode("red").shape == (32,)


def test_a_file_that_was_replaced_since_is_not_loaded_by_a_child(folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "student")
    encoder = QueryEncoder.from_pretrained(folder, threads=2)
    encoder.encode(MANY)
    os.replace(folder / "onnx" / "model_quantized.onnx", folder / "onnx" / "model.onnx")

    def work():
        with pytest.raises(HlmError, match=r"model.onnx as it was when this process was forked, found it replaced"):
            encoder.encode("red")

    assert in_child(work) == 0
    assert encoder.encode("red").shape == (32,)


def first(encoder):
    return encoder.encode("red shoe"), encoder.encode(MANY[:40]), encoder.fingerprint, encoder.precision


@pytest.mark.parametrize("settings", [{"threads": 2}, {"threads": 1, "precision": "int8"}, {"backend": "openvino"}])
def test_a_pickled_encoder_works_in_a_spawned_process(folder, settings, monkeypatch):
    monkeypatch.chdir(folder.parent)
    encoder = QueryEncoder.from_pretrained(folder.name, **settings)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(first, (encoder,))
    one, many, *facts = first(encoder)
    np.testing.assert_allclose(found[0], one, atol=1e-5)
    np.testing.assert_allclose(found[1], many, atol=1e-5)
    assert list(found[2:]) == facts


def test_a_pickled_encoder_is_refused_where_its_folder_changed(folder, tiny_bert, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "student")
    kept = pickle.dumps(QueryEncoder.from_pretrained(folder, threads=1))
    assert pickle.loads(kept).encode("red").shape == (32,)
    manifest = (folder / "hlm.json").read_text()
    (folder / "hlm.json").write_text(manifest.replace('"files": {', '"files": {"another": "0000000000000000",'))
    with pytest.raises(HlmError, match="as it was when the QueryEncoder was pickled, found it replaced"):
        pickle.loads(kept)
    shutil.rmtree(folder)
    with pytest.raises(HlmError, match="expected a folder or a Hub id"):
        pickle.loads(kept)
    with pytest.raises(HlmError, match="found one of a model in memory; save the model"):
        pickle.dumps(QueryEncoder.from_model(load_encoder(tiny_bert)))
