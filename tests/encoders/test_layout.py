"""Saved folders as the programs that serve them read them.

The readers below follow documented parsing rules, each named by its source file; no line of theirs is copied.
"""

import asyncio
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModel, AutoTokenizer

from hlm.encoders.layout import write_legacy_layout
from hlm.encoders.loading import add_head, encode, fingerprint, load_encoder, save_encoder, tokenise
from hlm.serving.export import export

NODE = Path(__file__).parents[1] / "node"
TEXTS = ["red shoe", "new laptop", "without a cable 1 2 3 4 5 6 7 8 9 0 " * 6]


@pytest.fixture(scope="module", params=["bert", "qwen3", "head"])
def saved(request, tiny_bert, tiny_qwen3, tmp_path_factory) -> Path:
    model = load_encoder(tiny_qwen3 if request.param == "qwen3" else tiny_bert, device="cpu")
    if request.param == "head":
        vectors = encode(model, TEXTS)
        add_head(model, vectors, np.pad(vectors, ((0, 0), (0, 16))))
    folder = tmp_path_factory.mktemp("layout") / request.param
    save_encoder(model, folder, "student", inputs={}, config={})
    return folder


def read(path: Path):
    return json.loads(path.read_text())


def tei(folder: Path) -> dict:
    """What text-embeddings-inference finds; raises where it would not start.

    router/src/lib.rs: `PoolConfig` (two flags required, lasttoken optional; cls before mean before lasttoken),
    `STConfig` (max_seq_length required), `NewSTConfig` (prompts); backends/src/lib.rs: `ModuleType` (closed list) and
    `parse_dense_paths_from_modules`; backends/candle/src/models/dense.rs: `DenseConfig`, `DenseActivation`.
    """
    flags = read(folder / "1_Pooling/config.json")
    assert isinstance(flags["pooling_mode_cls_token"], bool) and isinstance(flags["pooling_mode_mean_tokens"], bool)
    order = ("cls_token", "mean_tokens", "lasttoken")
    pooling = next(name for name in order if flags.get(f"pooling_mode_{name}", False))
    limit = read(folder / "sentence_bert_config.json")["max_seq_length"]
    assert isinstance(limit, int) and limit >= 0
    dense = []
    for module in read(folder / "modules.json"):
        assert isinstance(module["idx"], int) and isinstance(module["name"], str)
        package, name = module["type"].rsplit(".", 1)
        assert package == "sentence_transformers.models" and name in ("Transformer", "Pooling", "Dense", "Normalize")
        if name == "Dense":
            config = read(folder / module["path"] / "config.json")
            weights = load_file(folder / module["path"] / "model.safetensors")
            assert weights["linear.weight"].shape == (config["out_features"], config["in_features"])
            assert ("linear.bias" in weights) == config["bias"]
            activations = ("torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity", None)
            assert config.get("activation_function") in activations
            dense.append(weights["linear.weight"])
    prompts = read(folder / "config_sentence_transformers.json").get("prompts") or {}
    assert all(isinstance(text, str) for text in prompts.values())
    assert (folder / "tokenizer.json").is_file() and read(folder / "config.json")["max_position_embeddings"]
    return {"pooling": pooling, "limit": limit, "dense": dense, "prompts": prompts}


def vllm(folder: Path) -> dict:
    """What vLLM finds.

    vllm/transformers_utils/config.py: `get_pooling_config` (exact module types; every flag that is true names a pooling
    by its first word, so the last one wins), `get_sentence_transformer_tokenizer_config` (both keys or nothing),
    `try_get_dense_modules`.
    """
    modules = {module["type"]: module for module in read(folder / "modules.json")}
    prefix = "sentence_transformers.models."
    flags = read(folder / modules[f"{prefix}Pooling"]["path"] / "config.json")
    words = [name.removeprefix("pooling_mode_").split("_")[0] for name, value in flags.items() if value is True]
    types = [{"lasttoken": "LAST", "mean": "MEAN", "cls": "CLS"}.get(word) for word in words]
    limits = read(folder / "sentence_bert_config.json")
    dense = modules.get(f"{prefix}Dense")
    return {
        "pooling": [name for name in types if name],
        "normalize": f"{prefix}Normalize" in modules,
        "limit": limits["max_seq_length"] if {"max_seq_length", "do_lower_case"} <= set(limits) else None,
        "dense": [load_file(folder / dense["path"] / "model.safetensors")["linear.weight"]] if dense else [],
    }


def plain(folder: Path, texts: list[str], pooling: str, limit: int, dense: list[np.ndarray]) -> np.ndarray:
    """What a serving program computes from what it read: AutoModel, pooling, head, normalisation."""
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(
        texts, padding=True, truncation=True, max_length=limit, padding_side="right", return_tensors="pt"
    )
    with torch.inference_mode():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"]
    if pooling == "mean":
        vectors = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    else:
        vectors = hidden[torch.arange(len(texts)), mask.sum(1) - 1]
    for weight in dense:
        vectors = vectors @ torch.from_numpy(weight).T
    return torch.nn.functional.normalize(vectors, dim=-1).numpy()


@pytest.mark.parametrize("reader", [tei, vllm])
def test_what_serving_programs_read_gives_equal_vectors(saved, reader):
    model = load_encoder(str(saved), device="cpu")
    expected = encode(model, TEXTS)
    found = reader(saved)
    pooling = found["pooling"] if reader is tei else found["pooling"][0]
    pooling = {"mean_tokens": "mean", "MEAN": "mean", "lasttoken": "last", "LAST": "last"}[pooling]
    assert pooling == ("last" if saved.name == "qwen3" else "mean")
    assert found["limit"] == model.max_seq_length == 48
    assert len(found["dense"]) == (saved.name == "head")
    if reader is tei:
        assert found["prompts"] == model.prompts
    else:
        assert len(found["pooling"]) == 1 and found["normalize"]
    np.testing.assert_allclose(plain(saved, TEXTS, pooling, found["limit"], found["dense"]), expected, atol=2e-6)


def test_the_newer_layout_would_not_be_read(tiny_bert, tmp_path):
    """Why the layout is rewritten at all: these readers can fail."""
    model = load_encoder(tiny_bert, device="cpu")
    model.save_pretrained(str(tmp_path / "new"), create_model_card=False)
    with pytest.raises((KeyError, AssertionError)):
        tei(tmp_path / "new")
    with pytest.raises(KeyError):
        vllm(tmp_path / "new")
    write_legacy_layout(tmp_path / "new")
    once = {path: path.read_bytes() for path in (tmp_path / "new").rglob("*.json")}
    assert tei(tmp_path / "new")["pooling"] == "mean_tokens" and vllm(tmp_path / "new")["pooling"] == ["MEAN"]
    write_legacy_layout(tmp_path / "new")  # an older folder may be rewritten again
    assert once == {path: path.read_bytes() for path in (tmp_path / "new").rglob("*.json")}
    assert fingerprint(load_encoder(str(tmp_path / "new"), device="cpu")) == fingerprint(model)


def test_transformers_js_gives_equal_vectors(saved, tmp_path):
    """The library that browsers run, in Node."""
    if not (NODE / "node_modules/@huggingface/transformers").is_dir():
        pytest.skip("transformers.js is not installed: npm ci --ignore-scripts --prefix tests/node")
    shutil.copytree(saved, tmp_path / "online")
    export(str(saved), tmp_path / "online")
    model = load_encoder(str(saved), device="cpu")
    prompt = model.prompts["query"]
    # transformers.js cuts a text that is too long behind its closing token, which is then lost; the card says so.
    short = [TEXTS[0], TEXTS[1], TEXTS[2][:35]]
    texts = [prompt + text for text in short]
    expected, ids = encode(model, short, prompt_name="query"), tokenise(model, texts)
    assert max(map(len, ids)) < model.max_seq_length
    for dtype, least in (("fp32", 0.999999), ("q8", 0.99)):
        words = ["node", str(NODE / "vectors.mjs"), str(tmp_path / "online"), dtype]
        run = subprocess.run(words, input=json.dumps(texts), capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
        found = json.loads(run.stdout)
        assert [row[: len(tokens)] for row, tokens in zip(found["ids"], ids, strict=True)] == ids
        vectors = np.array(found["values"], dtype=np.float32).reshape(found["dims"])
        cosines = (vectors * expected).sum(axis=1)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert cosines.min() > least, cosines
        if dtype == "fp32":
            np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_vllms_own_reader_finds_the_same(saved):
    """Its parsing functions alone need no GPU: pip install --no-deps vllm, beside what it imports."""
    own = pytest.importorskip("vllm.transformers_utils.config", reason="vllm is not installed")
    pooling = {"use_activation": True, "seq_pooling_type": "LAST" if saved.name == "qwen3" else "MEAN"}
    assert own.get_pooling_config(str(saved)) == pooling
    limits = own.get_sentence_transformer_tokenizer_config(str(saved))
    assert limits["max_seq_length"] == vllm(saved)["limit"] == 48 and limits["do_lower_case"] is False
    dense = own.try_get_dense_modules(str(saved)) or []
    assert [module["folder"] for module in dense] == (["2_Dense"] if saved.name == "head" else [])


def test_infinity_serves_equal_vectors(saved):
    """A serving program that runs on a CPU: pip install --no-deps infinity-emb."""
    infinity = pytest.importorskip("infinity_emb", reason="infinity-emb is not installed")
    model = load_encoder(str(saved), device="cpu")
    texts = [model.prompts["query"] + text for text in TEXTS]
    settings = infinity.EngineArgs(
        model_name_or_path=str(saved),
        engine="torch",
        device="cpu",
        dtype="float32",
        model_warmup=False,
        bettertransformer=False,
    )

    async def serve():
        engine = infinity.AsyncEmbeddingEngine.from_args(settings)
        async with engine:
            return (await engine.embed(sentences=texts))[0]

    np.testing.assert_allclose(np.array(asyncio.run(serve())), encode(model, TEXTS, prompt_name="query"), atol=1e-5)
