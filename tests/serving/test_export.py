"""The exported graph gives the model's vectors."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import BertConfig

import hlm.serving.online_graph
from hlm.artefacts import HlmError, read_manifest
from hlm.encoders.folder import GRAPHS, graph_files
from hlm.encoders.loading import add_head, load_encoder, pad, save_encoder, tokenise
from hlm.encoders.pruning import prune
from hlm.integrity import check_files
from hlm.serving.export import (
    FP32_TOLERANCE,
    export,
    export_model,
)
from hlm.serving.online_graph import lookup_pays, lookup_share


def vectors(path, model, texts):
    """What the graph gives, and what the model gives; a graph without a mask gets texts of one length."""
    features = pad(model, tokenise(model, texts))
    session = onnxruntime.InferenceSession(str(path))
    names = [part.name for part in session.get_inputs()]
    *hidden, found = session.run(None, {name: features[name].numpy() for name in names})
    if path.name == "model_lookup.onnx":
        assert names == ["input_ids"] and not hidden and features["attention_mask"].all()
    else:
        assert names == ["input_ids", "attention_mask"]
        assert hidden[0].shape[:2] == tuple(features["input_ids"].shape)
    with torch.no_grad():
        return found, model(features)["sentence_embedding"].numpy()


def shallow(folder, layers):
    """A BERT with that many layers, whose norms and biases have been trained."""
    model = load_encoder(folder, device="cpu")
    backbone = model[0].model
    backbone.encoder.layer, backbone.config.num_hidden_layers = backbone.encoder.layer[:layers], layers
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "LayerNorm" in name:
            torch.nn.init.normal_(weight, mean=float(name.endswith("weight")), std=0.1)
    return model


def two_layers(folder):
    """What a test asks of a graph does not depend on its depth, and tracing takes a second a layer."""
    return prune(load_encoder(folder, device="cpu"), layers=[0, 5])


@pytest.mark.parametrize("name", ["online_bert", "online_qwen3"])
def test_both_files_give_the_models_vectors(name, request):
    folder = request.getfixturevalue(name)
    facts = read_manifest(folder, "student")["onnx"]
    assert facts["fp32"]["max_abs_difference"] <= FP32_TOLERANCE and facts["int8"]["min_cosine"] > 0.97
    model = load_encoder(str(folder), device="cpu")
    texts = ["red shoe", "", "used laptop with a black cable " * 20, "ü 靴"]
    found, expected = vectors(folder / GRAPHS["fp32"], model, texts)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    found, expected = vectors(folder / GRAPHS["int8"], model, texts)
    assert (found * expected).sum(axis=1).min() > 0.97 and np.abs(found - expected).max() > 1e-5
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == ["model.onnx", "model_quantized.onnx"]


def test_many_weights_lie_beside_the_graph_and_go_when_they_are_few_again(tiny_bert, tmp_path, monkeypatch):
    model = two_layers(tiny_bert)
    monkeypatch.setattr("hlm.serving.export.EXTERNAL_BYTES", 1000)
    facts = export_model(model, tmp_path, lookup=False)
    names = ["model.onnx", "model.onnx_data", "model_quantized.onnx", "model_quantized.onnx_data"]
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == names
    for name, record in facts.items():
        file = GRAPHS[name]
        assert record["file"] == file and record["data"]["file"] == f"{file}_data"
        told = graph_files(name, record, tmp_path)
        check_files(tmp_path, told, told)
        found, expected = vectors(tmp_path / file, model, ["red shoe", "kettle without cable"])
        assert (found * expected).sum(axis=1).min() > 0.97
        with open(tmp_path / f"{file}_data", "r+b") as weights:
            weights.write(b"changed")
        with pytest.raises(HlmError, match="onnx_data: expected content"):
            check_files(tmp_path, told, told)
    monkeypatch.undo()
    assert "data" not in export_model(model, tmp_path, lookup=False)["fp32"]
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == names[::2]
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


def test_a_head_and_cls_pooling_are_in_the_graph(tiny_bert, tmp_path):
    model = two_layers(tiny_bert)
    model[1] = Pooling(32, pooling_mode="cls")
    generator = np.random.default_rng(0)
    add_head(model, *(generator.standard_normal((64, width)).astype(np.float32) for width in (32, 48)))
    export_model(model, tmp_path, int8=False, lookup=False)
    found, expected = vectors(tmp_path / GRAPHS["fp32"], model, ["red shoe", "kettle without cable"])
    assert found.shape == (2, 48)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not (tmp_path / GRAPHS["int8"]).exists()


@pytest.mark.parametrize("largest_shift", [hlm.serving.online_graph.LARGEST_SHIFT, 0.0])
def test_biases_that_others_can_stand_for_leave_the_graph_and_not_the_model(
    largest_shift, tiny_bert, tmp_path, monkeypatch
):
    monkeypatch.setattr("hlm.serving.online_graph.LARGEST_SHIFT", largest_shift)
    model = two_layers(tiny_bert)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():  # where training starts, they are nothing
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    export_model(model, tmp_path, int8=False, lookup=False)
    found, expected = vectors(tmp_path / GRAPHS["fp32"], model, ["red shoe", "kettle without cable"])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    graph = onnx.load(str(tmp_path / GRAPHS["fp32"])).graph
    names = " ".join(value.name for value in graph.initializer)
    assert names.count("query.bias") == names.count("intermediate.dense.bias") == 2
    assert not any(f"{name}.bias" in names for name in ("key", "value")) and "token_type" not in names
    assert names.count("output.dense.bias") == (0 if largest_shift else 2)  # of attention, where a shift costs digits
    assert not [node for node in graph.node if node.op_type == "Concat"]  # shapes are known, not put together


@pytest.mark.parametrize(("layers", "largest_shift"), [(1, hlm.serving.online_graph.LARGEST_SHIFT), (2, 0.0)])
def test_look_ups_in_place_of_the_first_projections(layers, largest_shift, tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setattr("hlm.serving.online_graph.LARGEST_SHIFT", largest_shift)
    model = shallow(tiny_bert, layers)
    facts = export_model(model, tmp_path)
    assert list(facts) == ["fp32", "lookup", "int8"] and facts["lookup"]["file"] == GRAPHS["lookup"]
    assert facts["lookup"]["max_abs_difference"] <= facts["lookup"]["tolerance"] == FP32_TOLERANCE
    told = graph_files("lookup", facts["lookup"], tmp_path)
    assert list(told) == [GRAPHS["lookup"], f"{GRAPHS['lookup']}_data"]
    check_files(tmp_path, told, told)
    for texts in (["red shoe", "shoe red", "red red"], [""], ["kettle without cable " * 99], ["ü 靴"]):
        np.testing.assert_allclose(*vectors(tmp_path / GRAPHS["lookup"], model, texts), atol=1e-5)
    graphs = [onnx.load(str(tmp_path / file)).graph for file in (GRAPHS["fp32"], GRAPHS["lookup"])]
    products = [sum(node.op_type == "MatMul" for node in graph.node) for graph in graphs]
    assert products == [8 * layers + 1, 6 * layers - 3]
    assert sum(node.op_type == "MultiHeadAttention" for node in graphs[1].node) == layers
    names = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert names == {"model.onnx", "model_quantized.onnx", "model_lookup.onnx", "model_lookup.onnx_data"}
    assert set(export_model(model, tmp_path, lookup=False, int8=False)) == {"fp32"}
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["model.onnx"]  # none of an earlier student


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_look_ups_under_other_modules(pooling, tiny_bert, tmp_path):
    model = shallow(tiny_bert, 1)
    model[1] = Pooling(32, pooling_mode=pooling)
    generator = np.random.default_rng(0)
    add_head(model, *(generator.standard_normal((64, width)).astype(np.float32) for width in (32, 48)))
    assert export_model(model, tmp_path, int8=False)["lookup"]["max_abs_difference"] <= FP32_TOLERANCE
    np.testing.assert_allclose(*vectors(tmp_path / GRAPHS["lookup"], model, ["red shoe", "shoe red"]), atol=1e-5)


def test_look_ups_are_made_where_they_pay(tiny_bert, tiny_qwen3, monkeypatch):
    assert lookup_share(BertConfig(num_hidden_layers=1, hidden_size=384, intermediate_size=192)) == 3 / 5
    assert not lookup_pays(load_encoder(tiny_bert, device="cpu"))  # one of six layers: 1/16
    qwen3 = load_encoder(tiny_qwen3, device="cpu")
    qwen3[0].model.config.num_hidden_layers = 1
    assert not lookup_pays(qwen3)
    model = shallow(tiny_bert, 1)
    config = model[0].model.config
    size = (config.vocab_size + config.max_position_embeddings) * 3 * config.hidden_size * 4
    for limit, pays in ((size, True), (size - 1, False)):
        monkeypatch.setattr("hlm.serving.online_graph.LOOKUP_BYTES", limit)
        assert lookup_pays(model) == pays


def test_a_model_that_was_made_bidirectional_stays_so(tiny_qwen3, tmp_path):
    causal, model = (two_layers(tiny_qwen3) for _ in range(2))
    model[0].model.config.is_causal = False
    assert export_model(model, tmp_path, int8=False)["fp32"]["max_abs_difference"] <= FP32_TOLERANCE
    found, expected = vectors(tmp_path / GRAPHS["fp32"], model, ["red shoe", "kettle without cable"])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - causal.encode(["red shoe", "kettle without cable"])).max() > 1e-3


def test_padding_on_the_left_gives_the_same_vectors(tiny_qwen3, tmp_path):
    model = two_layers(tiny_qwen3)
    export_model(model, tmp_path, int8=False)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / GRAPHS["fp32"]), options)
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert kinds.count("SimplifiedLayerNormalization") == 2 * 4 + 1  # each norm in one step
    short, long = (np.array(ids) for ids in tokenise(model, ["red shoe", "used laptop with a black cable"]))
    ids = np.stack([np.concatenate([np.zeros(len(long) - len(short), dtype=np.int64), short]), long])
    mask = np.stack([np.arange(len(long)) >= len(long) - len(short), np.ones(len(long))]).astype(np.int64)
    (found,) = session.run(["sentence_embedding"], {"input_ids": ids, "attention_mask": mask})
    with torch.no_grad():
        expected = model(pad(model, [short.tolist(), long.tolist()]))["sentence_embedding"].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_graph_beyond_the_tolerance_is_refused_and_leaves_no_file(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setattr("hlm.serving.export.FP32_TOLERANCE", 1e-12)
    with pytest.raises(HlmError, match="within 1e-12, found a difference"):
        export_model(two_layers(tiny_bert), tmp_path, lookup=False)
    assert not list(tmp_path.iterdir())


def test_only_fp32_weights_are_exported(tiny_bert, tmp_path):
    with pytest.raises(HlmError, match="float32"):
        export_model(load_encoder(tiny_bert, device="cpu", dtype="bfloat16"), tmp_path)


def test_exporting_into_an_artefact_amends_its_manifest(tiny_bert, tmp_path):
    from hlm import QueryEncoder
    from hlm.artefacts import file_records

    model = two_layers(tiny_bert)
    save_encoder(model, tmp_path / "student", "student", inputs={"teacher": "t"}, config={})
    before = read_manifest(tmp_path / "student", "student")
    facts = export(str(tmp_path / "student"), tmp_path / "student")
    manifest = read_manifest(tmp_path / "student", "student")
    assert manifest == before | {"files": file_records(tmp_path / "student"), "onnx": facts}
    QueryEncoder.from_pretrained(tmp_path / "student", threads=1)
    (tmp_path / "student/config.json").write_text("{}")
    export_model(model, tmp_path / "student", int8=False, lookup=False)
    assert read_manifest(tmp_path / "student", "student")["files"]["config.json"] == before["files"]["config.json"]
