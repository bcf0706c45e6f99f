"""QueryEncoder gives sentence-transformers' vectors without torch, from threads and from asyncio."""

import asyncio
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from hlm.artefacts import HlmError, write_manifest
from hlm.encoders.loading import encode, load_encoder
from hlm.serving import engines
from hlm.serving import query_encoder as runtime
from hlm.serving.bulk import cut_by_length
from hlm.serving.cuda_graphs import GRAPH_TOKENS, LENGTHS, ROWS, CudaGraphs, pad, padded_shape
from hlm.serving.export import export, export_model
from hlm.serving.micro_batches import AsyncQueryEncoder
from hlm.serving.query_encoder import QueryEncoder

TEXTS = ["red shoe", "", "used laptop with a black cable " * 20, "größe 靴 🎒", "a", "cheap steel bottle 2 litre"]


@pytest.fixture(scope="module", params=["online_bert", "online_qwen3"])
def online(request):
    return str(request.getfixturevalue(request.param))


def test_the_vectors_are_those_of_sentence_transformers(online):
    encoder = QueryEncoder.from_pretrained(online, threads=1)
    expected = encode(load_encoder(online, device="cpu"), TEXTS, prompt_name="query")
    found = encoder.encode(TEXTS)
    assert found.dtype == np.float32 and found.shape == (len(TEXTS), encoder.dim)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for text, row in zip(TEXTS, expected, strict=True):
        np.testing.assert_allclose(encoder.encode(text), row, atol=1e-5)
    assert encoder.encode([]).shape == (0, 32)
    assert (encoder.precision, encoder.fingerprint, encoder.teacher) == ("fp32", "e" * 16, "t" * 16)
    quantised = QueryEncoder.from_pretrained(online, precision="int8", threads=1).encode(TEXTS)
    assert (quantised * expected).sum(axis=1).min() > 0.995
    other = QueryEncoder.from_pretrained(online, backend="openvino", threads=1)
    np.testing.assert_allclose(other.encode(TEXTS), expected, atol=1e-4)
    np.testing.assert_allclose(other.encode("red shoe"), expected[0], atol=1e-4)
    assert (other.backend, other.precision, other.dim) == ("openvino", "fp32", encoder.dim)
    for backend, precision, tolerance in (("torch", "fp32", 1e-5), ("torch", "bf16", 0.03), ("openvino", "bf16", 0.03)):
        slow = QueryEncoder.from_pretrained(online, backend=backend, precision=precision)
        np.testing.assert_allclose(slow.encode(TEXTS), expected, atol=tolerance)
        np.testing.assert_allclose(np.linalg.norm(slow.encode(TEXTS), axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        (("auto", "auto", None), ("onnxruntime", "fp32")),
        (("auto", "auto", "cuda:0"), ("torch", "bf16")),
        (("auto", "int8", "cpu"), ("onnxruntime", "int8")),
        (("auto", "bf16", None), ("openvino", "bf16")),
        (("auto", "fp16", None), ("torch", "fp16")),
    ],
)
def test_what_auto_stands_for(given, chosen):
    assert runtime._choose(*given) == chosen


@pytest.mark.parametrize(
    ("instructions", "weights", "precision", "chosen"),
    [
        (["avx2", "avx512_bf16"], 1_000, "auto", ("openvino", "bf16")),
        (["avx2", "amx_bf16"], 10_000_000, "auto", ("onnxruntime", "fp32")),  # of this body: some 60,000
        (["avx2"], 1_000, "auto", ("onnxruntime", "fp32")),
        (["avx2", "amx_bf16"], 1_000, "fp32", ("onnxruntime", "fp32")),
        (None, 1_000, "auto", ("onnxruntime", "fp32")),
    ],
)
def test_bf16_is_chosen_for_a_large_body_where_the_processor_has_it(
    online, instructions, weights, precision, chosen, monkeypatch
):
    monkeypatch.setattr(runtime, "instructions", lambda: instructions)
    monkeypatch.setattr(runtime, "BF16_WEIGHTS", weights)
    encoder = QueryEncoder.from_pretrained(online, precision=precision, threads=1)
    assert (encoder.backend, encoder.precision) == chosen


def test_threads_and_asyncio_get_their_own_vectors(online):
    encoder = QueryEncoder.from_pretrained(online, threads=1)
    expected = [encoder.encode(text) for text in TEXTS]
    with ThreadPoolExecutor(8) as pool:
        for place, found in enumerate(pool.map(encoder.encode, TEXTS * 50)):
            np.testing.assert_allclose(found, expected[place % len(TEXTS)], atol=1e-6)

    async def many():
        async with AsyncQueryEncoder(encoder, window_ms=2, max_tokens=64) as queue:
            cancelled = asyncio.create_task(queue.encode("red shoe"))
            await asyncio.sleep(0)
            cancelled.cancel()
            tasks = [*map(queue.encode, TEXTS * 20), queue.encode(3)]
            return await asyncio.gather(*tasks, return_exceptions=True), queue

    found, queue = asyncio.run(many())
    assert isinstance(found.pop(), HlmError)
    for place, vector in enumerate(found):
        np.testing.assert_allclose(vector, expected[place % len(TEXTS)], atol=1e-5)
    with pytest.raises(HlmError, match="closed"):
        asyncio.run(queue.encode("red shoe"))


def test_queries_that_come_while_a_batch_is_computed_make_the_next_one(online):
    encoder = QueryEncoder.from_pretrained(online, threads=1)
    expected, calls, go, encode_ids = encoder.encode("red shoe"), [], threading.Event(), encoder.encode_ids

    def slow(ids):
        calls.append(len(ids))
        assert go.wait(30)
        return encode_ids(ids)

    encoder.encode_ids = slow

    async def many(**settings):
        calls.clear(), go.clear()
        async with AsyncQueryEncoder(encoder, **settings) as queue:
            first = asyncio.create_task(queue.encode("red shoe"))
            while not calls:
                await asyncio.sleep(0.001)
            others = [asyncio.create_task(queue.encode("red shoe")) for _ in range(5)]
            await asyncio.sleep(0.01)
            go.set()
            for vector in await asyncio.gather(first, *others):
                np.testing.assert_allclose(vector, expected, atol=1e-5)
        return calls

    assert asyncio.run(many()) == [1, 5]
    tokens = len(encoder.tokenise(["red shoe"])[0])
    assert asyncio.run(many(max_tokens=2 * tokens)) == [1, 2, 2, 1]


def test_a_window_waits_for_others_and_is_closed_once_its_batch_is_full(online):
    encoder = QueryEncoder.from_pretrained(online, threads=1)
    calls, encode_ids = [], encoder.encode_ids
    encoder.encode_ids = lambda ids: (calls.append(len(ids)), encode_ids(ids))[1]
    tokens = len(encoder.tokenise(["red shoe"])[0])

    async def one_by_one(count, **settings):
        calls.clear()
        async with AsyncQueryEncoder(encoder, **settings) as queue:
            tasks = []
            for _ in range(count):
                tasks.append(asyncio.create_task(queue.encode("red shoe")))
                await asyncio.sleep(0.005)
            await asyncio.wait_for(asyncio.gather(*tasks), 30)
        return calls

    assert asyncio.run(one_by_one(3, window_ms=1000)) == [3]
    assert asyncio.run(one_by_one(4, window_ms=1e6, max_tokens=2 * tokens)) == [2, 2]  # for ever, were it not full


def test_many_texts_on_a_core_each_get_the_same_vectors(online):
    encoder = QueryEncoder.from_pretrained(online, threads=2)
    expected = np.stack([encoder.encode(text) for text in TEXTS])
    calls, run = [], encoder._run
    encoder._run = lambda ids, mask: (calls.append(ids.shape), run(ids, mask))[1]
    np.testing.assert_allclose(encoder.encode(TEXTS * 40), np.tile(expected, (40, 1)), atol=1e-5)
    assert not calls  # that session computes a product on all cores
    np.testing.assert_allclose(encoder.encode(TEXTS[:2]), expected[:2], atol=1e-5)
    assert calls  # too few tokens to share out
    alone = QueryEncoder.from_pretrained(online, threads=1)
    np.testing.assert_allclose(alone.encode(TEXTS * 40), np.tile(expected, (40, 1)), atol=1e-5)


def test_a_file_that_was_replaced_since_loading_is_not_mixed_in(online, tmp_path, caplog):
    folder = shutil.copytree(online, tmp_path / "student")
    encoder = QueryEncoder.from_pretrained(folder, threads=2)
    expected = np.stack([encoder.encode(text) for text in TEXTS])
    (folder / "onnx" / "model.onnx").write_bytes(b"another")
    np.testing.assert_allclose(encoder.encode(TEXTS * 40), np.tile(expected, (40, 1)), atol=1e-5)
    assert "was replaced" in caplog.text


def test_torch_is_not_imported(online):
    code = (
        "import sys; from hlm import QueryEncoder; "
        f"QueryEncoder.from_pretrained({online!r}, threads=1).encode('red shoe'); "
        "assert not {'torch', 'transformers', 'sentence_transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_weights_beside_the_graph(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setattr("hlm.serving.export.EXTERNAL_BYTES", 1000)
    folder = shutil.copytree(tiny_bert, tmp_path / "student")
    facts = export(str(folder), folder)
    write_manifest(folder, "student", inputs={}, config={}, encoder="e" * 16, dim=32, onnx=facts)
    expected = encode(load_encoder(tiny_bert, device="cpu"), TEXTS, prompt_name="query")
    for settings, atol in (
        ({"threads": 2}, 1e-5),
        ({"threads": 2, "precision": "int8"}, 0.03),
        ({"backend": "openvino"}, 1e-4),
    ):
        found = QueryEncoder.from_pretrained(folder, **settings).encode(TEXTS * 40)
        np.testing.assert_allclose(found, np.tile(expected, (40, 1)), atol=atol)
    (folder / "onnx" / "model.onnx_data").unlink()
    with pytest.raises(HlmError, match="model.onnx_data: expected content .* found no file"):
        QueryEncoder.from_pretrained(folder)


def test_look_ups_are_taken_where_they_are(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setenv("HLM_CACHE", str(tmp_path / "cache"))
    model = load_encoder(tiny_bert, device="cpu")
    backbone = model[0].model
    backbone.encoder.layer, backbone.config.num_hidden_layers = backbone.encoder.layer[:1], 1
    model.save(str(tmp_path / "student"))
    opened, load = [], engines.onnxruntime
    monkeypatch.setattr(engines, "onnxruntime", lambda path, threads: (opened.append(path), load(path, threads))[1])
    expected = encode(model, TEXTS)

    def check(folder, **settings):
        encoder = QueryEncoder.from_pretrained(folder, threads=2, **settings)
        for times in (1, 40):  # one after the other, and side by side
            np.testing.assert_allclose(encoder.encode(TEXTS * times), np.tile(expected, (times, 1)), atol=1e-5)
        if encoder.lookup:
            with pytest.raises(HlmError, match="expected texts of one length"):
                encoder._run(np.ones((2, 3), np.int64), np.array([[1, 1, 1], [1, 1, 0]]))
        return [str(path.relative_to(tmp_path)) for path in opened]

    cached = check(tmp_path / "student")  # exported there
    assert len(cached) == 2 and {Path(name).name for name in cached} == {"model_lookup.onnx"}
    opened.clear()
    folder = shutil.copytree(tmp_path / "student", tmp_path / "online")
    facts = export_model(model, folder)
    write_manifest(folder, "student", inputs={}, config={}, encoder="e" * 16, dim=32, onnx=facts)
    assert check(folder) == ["online/onnx/model_lookup.onnx"] * 2
    opened.clear()
    assert not check(folder, backend="openvino")  # the other one
    with open(folder / "onnx" / "model_lookup.onnx_data", "r+b") as tables:
        tables.write(b"changed")
    with pytest.raises(HlmError, match="lookup.onnx_data: expected content"):
        check(folder)
    facts = export_model(model, folder, lookup=False)
    write_manifest(folder, "student", inputs={}, config={}, encoder="e" * 16, dim=32, onnx=facts)
    assert check(folder) == ["online/onnx/model.onnx"] * 2


def test_bad_input_is_refused(online, tmp_path):
    encoder = QueryEncoder.from_pretrained(online)
    for wrong in (3, ["red", None], [b"red"], b"red"):
        with pytest.raises(HlmError, match="expected texts"):
            encoder.encode(wrong)
    for settings in (
        {"backend": "tensorrt"},
        {"precision": "int4"},
        {"threads": 0},
        {"device": "cuda", "backend": "openvino"},
        {"precision": "bf16", "backend": "onnxruntime"},
        {"device": "cuda:0"},
    ):
        with pytest.raises(HlmError, match=next(iter(settings))):
            QueryEncoder.from_pretrained(online, **settings)
    with pytest.raises(HlmError, match="expected a folder or a Hub id"):
        QueryEncoder.from_pretrained(tmp_path / "none")
    shutil.copytree(online, tmp_path / "changed")
    with open(tmp_path / "changed" / "onnx" / "model.onnx", "ab") as file:
        file.write(b"x")
    with pytest.raises(HlmError, match="it was changed, added or cut short"):
        QueryEncoder.from_pretrained(tmp_path / "changed")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_a_loaded_model_is_served_as_a_folder_is(online, dtype, tolerance):
    model = load_encoder(online, device="cpu", dtype=dtype)
    encoder = QueryEncoder.from_model(model)
    assert (encoder.backend, encoder.precision) == ("torch", {"float32": "fp32", "bfloat16": "bf16"}[dtype])
    by_folder = QueryEncoder.from_pretrained(online, threads=1)
    assert encoder.tokenise(TEXTS) == by_folder.tokenise(TEXTS) and encoder.prompt == by_folder.prompt
    np.testing.assert_allclose(encoder.encode(TEXTS), by_folder.encode(TEXTS), atol=tolerance)
    with pytest.raises(HlmError, match="expected a model in float32.*found float64"):
        QueryEncoder.from_model(model.double())


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_causal_model_needs_no_mask_and_another_one_does(bidirectional, tiny_qwen3, monkeypatch):
    monkeypatch.setattr("hlm.serving.fused.FusedQwen3.fits", lambda model: False)  # it never asks for one
    model = load_encoder(tiny_qwen3, device="cpu")
    if bidirectional:
        model[0].model.config.is_causal = False
    forward, masks = model[0].model.forward, []
    model[0].model.forward = lambda **given: (masks.append("attention_mask" in given), forward(**given))[1]
    encoder = QueryEncoder.from_model(model)
    texts = [text for text in TEXTS if len(text) < 100]
    together = encoder.encode(texts)
    assert set(masks) == {bidirectional} and len(masks) < len(texts)  # some are padded
    np.testing.assert_allclose(np.stack([encoder.encode(text) for text in texts]), together, atol=1e-5)


def test_batches_padded_to_few_shapes_give_the_same_vectors(online):
    encoder = QueryEncoder.from_pretrained(online, threads=1)
    shapes, run = set(), encoder._run

    def padded(ids, mask):
        both = np.full((2, *padded_shape(*ids.shape)), 7)
        pad(ids, mask, both)
        shapes.add(both.shape[1:])
        return run(*both)[: len(ids)]

    encoder._run = padded
    expected = QueryEncoder.from_pretrained(online, threads=1)
    for count in (1, 3, 5, 70):
        texts = (TEXTS * 12)[:count]
        np.testing.assert_allclose(encoder.encode(texts), expected.encode(texts), atol=1e-5)
    assert {length for _, length in shapes} <= set(LENGTHS)
    assert {rows for rows, length in shapes if 64 * length <= GRAPH_TOKENS} <= set(ROWS)


def test_batches_come_back_in_order_while_the_next_is_computed(online):
    model = load_encoder(online, device="cpu")
    encoder = QueryEncoder.from_model(model)
    expected = encoder.encode(TEXTS * 3)

    def forward(ids, mask):
        return torch.from_numpy(run(ids.numpy(), mask.numpy()))

    run, started = encoder._run, []
    graphs = CudaGraphs(lambda ids, mask: (started.append(len(ids)), forward(ids, mask))[1], torch.device("cpu"))
    encoder._run, encoder._batch_tokens = graphs, 8
    np.testing.assert_allclose(encoder.encode(TEXTS * 3), expected, atol=1e-5)
    assert len(started) > 3
    started.clear()
    batches = cut_by_length(encoder.tokenise(TEXTS), 8)
    stream = graphs.stream(batches)
    next(stream)
    assert len(started) == 2
    np.testing.assert_allclose(graphs(np.ones((2, 5), np.int64), None), run(np.ones((2, 5), np.int64), None), atol=1e-5)
    assert not list(graphs.stream([]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_cuda_graphs_give_the_same_vectors_from_threads(online, precision):
    encoder = QueryEncoder.from_pretrained(online, device="cuda", precision=precision)
    expected = encode(load_encoder(online, device="cpu"), TEXTS, prompt_name="query")
    with ThreadPoolExecutor(4) as pool:
        for place, found in enumerate(pool.map(encoder.encode, TEXTS * 20)):
            np.testing.assert_allclose(found, expected[place % len(TEXTS)], atol=0.03)
    np.testing.assert_allclose(encoder.encode(TEXTS * 20), np.tile(expected, (20, 1)), atol=0.03)
    captured = encoder._run._run.captured
    assert captured and all(each is not None for each in captured.values())
