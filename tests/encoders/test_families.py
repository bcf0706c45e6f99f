"""Every family that is known: cut, saved, aligned, exported and served, its vectors stay sentence-transformers'."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, DebertaV2Config, Gemma3TextConfig, ModernBertConfig

from hlm import QueryEncoder
from hlm.artefacts import HlmError
from hlm.encoders.families import (
    FAMILIES,
    FULL,
    SLIDING,
    check_layers,
    ffn_parts,
    is_causal,
    layers_of,
    longest_text,
    reaches,
    set_cut,
)
from hlm.encoders.loading import fingerprint, load_encoder, pad, save_encoder, tokenise
from hlm.encoders.pruning import cut, cut_config, layer_norm_ratios, parameter_counts, planned_parameters, prune
from hlm.planning.footprint import Shape, backbone_config
from hlm.planning.plan import cascade
from hlm.serving.export import export_model
from hlm.serving.online_graph import OnlineGraph
from recipes import align, embed

TEXTS = ["red shoe", "used laptop with a black cable " * 9, "kettle", "ü 靴", "a small camera without helmet"]
# Of those that share their code one is traced; test_export.py has BERT and Qwen3.
EXPORTED = ("roberta", "mpnet", "distilbert", "mistral")


def stock(folder) -> np.ndarray:
    """What sentence-transformers makes of the folder."""
    return SentenceTransformer(str(folder), device="cpu").encode(TEXTS, prompt_name="query")


def graph_difference(model) -> float:
    """Largest difference between what is traced and the model itself, without the tracing; in one padded batch."""
    model[0].model.set_attn_implementation("eager")
    features = pad(model, tokenise(model, TEXTS))
    with torch.no_grad():
        expected = model(dict(features))["sentence_embedding"]
        _, found = OnlineGraph(model).eval()(features["input_ids"], features["attention_mask"])
    return float((found - expected).abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_cut_and_saved_it_is_a_stock_model_of_the_planned_size(name, tiny_family, tmp_path):
    model = load_encoder(tiny_family(name), device="cpu")
    small = cut(model, 4, 24, "middle_skip", TEXTS)
    backbone = small[0].model
    shape = Shape.of(model[0].model.config, 4, 24)
    assert planned_parameters(model[0].model.config, 4, 24) == parameter_counts(backbone)
    assert (shape.parameters, shape.layers, shape.ffn, shape.hidden) == (parameter_counts(backbone)[0], 4, 24, 32)
    for layer in layers_of(backbone):
        into, out = ffn_parts(backbone, layer)
        assert out.in_features == 24 and sum(part.out_features for part in into) == 24 * (1 + FAMILIES[name].gated)
    save_encoder(small, tmp_path / "student", "student", inputs={"teacher": "t"}, config={})
    assert fingerprint(load_encoder(str(tmp_path / "student"), device="cpu")) == fingerprint(small)
    expected = small.encode(TEXTS, prompt_name="query")
    np.testing.assert_allclose(stock(tmp_path / "student"), expected, atol=1e-6)
    assert np.abs(model.encode(TEXTS, prompt_name="query") - expected).max() > 1e-2
    assert graph_difference(small) < 1e-5


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_and_served_it_gives_sentence_transformers_vectors(name, tiny_family, tmp_path):
    small = prune(load_encoder(tiny_family(name), device="cpu"), layers=[0, 5])
    save_encoder(small, tmp_path, "student", inputs={"teacher": "t"}, config={})
    expected, facts = stock(tmp_path), export_model(small, tmp_path)
    assert facts["fp32"]["max_abs_difference"] < 1e-5 and facts["int8"]["min_cosine"] > 0.95
    served = QueryEncoder.from_pretrained(tmp_path, threads=1)
    for found in (served.encode(TEXTS), np.stack([served.encode(text) for text in TEXTS])):
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["modernbert", "gemma3_text"])
def test_the_recipe_aligns_it_and_what_is_served_is_what_was_trained(name, tiny_family, catalogue_200, tmp_path):
    teacher, where = tiny_family(name), ["--data", catalogue_200, "--output"]
    embed.main(["--model", teacher, *where, str(tmp_path / "vectors")])
    align.main(
        ["--student", teacher, "--vectors", str(tmp_path / "vectors"), *where, str(tmp_path / "student")]
        + ["--cascade", json.dumps([{"layers": 4, "epochs": 1}, {"layers": 2, "ffn": 32}]), "--method", "norm_ratio"]
        + "--num_train_epochs 1 --per_device_train_batch_size 32 --learning_rate 3e-3".split()
        + "--disable_tqdm true --save_strategy no".split()
    )
    model = load_encoder(str(tmp_path / "student"), device="cpu")
    backbone = model[0].model
    assert len(layers_of(backbone)) == len(backbone.config.layer_types) == 2
    assert list(map(type, load_encoder(teacher))) == list(map(type, model))
    expected = stock(tmp_path / "student")
    export_model(model, tmp_path / "student")
    np.testing.assert_allclose(QueryEncoder.from_pretrained(tmp_path / "student").encode(TEXTS), expected, atol=1e-4)
    quantised = QueryEncoder.from_pretrained(tmp_path / "student", precision="int8").encode(TEXTS)
    assert (quantised * expected).sum(axis=1).min() > 0.95 and np.abs(quantised - expected).max() > 1e-5


def test_the_readme_names_families_that_are_known():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (named,) = re.findall(r"cut from these backbones: ([^.]+)\.", text)
    types = {"XLM-R": "xlm-roberta", "Gemma 3 as in EmbeddingGemma": "gemma3_text"}
    found = [name for name in re.split(r",\s+(?:and )?", " ".join(named.split()))]
    assert len(found) == 12 and {types.get(name, name.lower()) for name in found} <= set(FAMILIES)


# ---- kinds of attention


@pytest.mark.parametrize("name, window", [("modernbert", 4), ("gemma3_text", 5)])
def test_the_window_is_the_models_own(name, window, tiny_family, monkeypatch):
    """A token at a window's edge shows it: an edge one further or nearer gives other vectors."""
    model = prune(load_encoder(tiny_family(name), device="cpu"), layers=[0, 1, 5])
    config = model[0].model.config
    inclusive = FAMILIES[name].inclusive_window
    assert set(config.layer_types) == {FULL, SLIDING} and config.sliding_window == window
    assert reaches(config, 48) == dict.fromkeys(config.layer_types) | {SLIDING: window if inclusive else window - 1}
    assert set(reaches(config, 4).values()) == {None}  # of so short texts every layer sees all
    assert graph_difference(model) < 1e-5
    for off in (-1, 1):
        wrong = {kind: reach and reach + off for kind, reach in reaches(config, 48).items()}
        monkeypatch.setattr("hlm.serving.online_graph.reaches", lambda *_, wrong=wrong: wrong)
        assert graph_difference(model) > 1e-3


def test_a_window_over_all_layers(tiny_family):
    """Mistral's: one window, no kinds of layers."""
    model = prune(load_encoder(tiny_family("mistral"), device="cpu"), layers=[0, 5])
    assert reaches(model[0].model.config, 48) == {FULL: None}  # 4,096 is more than a text has
    model[0].model.config.sliding_window = 6
    assert reaches(model[0].model.config, 48) == {FULL: 5}
    assert graph_difference(model) < 1e-5


def test_windows_of_some_layers_of_a_causal_model(tiny_family):
    model = prune(load_encoder(tiny_family("qwen2"), device="cpu"), layers=[0, 5])
    config = model[0].model.config
    config.layer_types, config.sliding_window = [FULL, SLIDING], 6
    model[0].model.has_sliding_layers = True
    assert reaches(config, 48) == {FULL: None, SLIDING: 5}
    assert graph_difference(model) < 1e-5


@pytest.mark.parametrize(
    "config, layers, kinds, every",
    [
        (ModernBertConfig(num_hidden_layers=22, global_attn_every_n_layers=3), [0, 1, 20, 21], "fssf", 3),
        (ModernBertConfig(num_hidden_layers=22, global_attn_every_n_layers=3), [0, 21], "ff", 1),
        (ModernBertConfig(num_hidden_layers=22, global_attn_every_n_layers=3), [0, 1, 21], "fsf", 2),
        (ModernBertConfig(num_hidden_layers=22, global_attn_every_n_layers=3), [0, 1, 2, 4], "fsss", 4),
        (ModernBertConfig(num_hidden_layers=22, global_attn_every_n_layers=3), [0, 1, 3, 6], "fsff", None),
        (Gemma3TextConfig(num_hidden_layers=24), [0, 1, 2, 21, 22, 23], "sssssf", 6),
        (Gemma3TextConfig(num_hidden_layers=24), [0, 23], "sf", 2),
        (Gemma3TextConfig(num_hidden_layers=24), [0, 1], "ss", 6),
        (Gemma3TextConfig(num_hidden_layers=24), [5, 6], "fs", None),
    ],
)
def test_layers_keep_their_kind_for_old_readers_too(config, layers, kinds, every, caplog):
    set_cut(config, layers)
    assert [kind[0] for kind in config.layer_types] == list(kinds) and config.num_hidden_layers == len(layers)
    field = FAMILIES[config.model_type].pattern.field
    written = config.to_dict()
    found = written.get(field, written.get(f"_{field}"))
    if every is None:
        assert "another model" in caplog.text and f"no {field} stands for" in caplog.text
    else:
        assert found == every and not caplog.text
    again = type(config).from_dict(written)
    assert again.layer_types == config.layer_types and again.sliding_window == config.sliding_window
    assert again.rope_parameters == config.rope_parameters and set(again.rope_parameters) == {FULL, SLIDING}


def test_modernberts_first_layer_stays(tiny_family):
    model = load_encoder(tiny_family("modernbert"), device="cpu")
    with pytest.raises(HlmError, match=r"the first one, 0, .*found \[1, 5\].*nearest that works is \[0, 1, 5\]"):
        prune(model, layers=[1, 5])
    with pytest.raises(HlmError, match="stage 1: layers: expected the first one"):
        cascade(model[0].model.config, [{"layers": [1, 5]}])
    with torch.no_grad():  # the others change far more than the first one does
        for layer in layers_of(model[0].model)[1:]:
            ffn_parts(model[0].model, layer)[1].weight.mul_(50)
    scores = layer_norm_ratios(model, TEXTS)
    assert np.abs(scores - 1).argsort()[-2:].min() > 0
    kept = cut(model, 2, None, "norm_ratio", TEXTS)[0].model
    assert type(layers_of(kept)[0].attn_norm) is torch.nn.Identity and len(layers_of(kept)) == 2


def test_causality_is_the_models_own(tiny_family):
    found = {name: is_causal(load_encoder(tiny_family(name), device="cpu")[0].model) for name in FAMILIES}
    assert [name for name, causal in found.items() if causal] == ["qwen2", "qwen3", "llama", "mistral"]


# ---- positions, sizes, and what is not known


@pytest.mark.parametrize(
    "config, longest",
    [
        ({"model_type": "bert", "max_position_embeddings": 512, "pad_token_id": 0}, 512),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "mpnet", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "unheard-of", "max_position_embeddings": 100}, 100),
        ({"model_type": "qwen3"}, None),
    ],
)
def test_the_longest_text_has_a_position_for_every_token(config, longest):
    assert longest_text(config) == longest


def test_positions_of_roberta_end_where_said(tiny_family):
    backbone = load_encoder(tiny_family("roberta"), device="cpu")[0].model
    longest = longest_text(backbone.config.to_dict())
    with torch.no_grad():
        backbone(torch.full((1, longest), 7))
        with pytest.raises((IndexError, RuntimeError)):
            backbone(torch.full((1, longest + 1), 7))


def test_the_first_layers_of_a_configuration(tiny_family):
    config = backbone_config(tiny_family("distilbert"))
    assert (cut_config(config, 2, 16).n_layers, cut_config(config, 2, 16).hidden_dim) == (2, 16)
    assert cut_config(backbone_config(tiny_family("modernbert")), 2).layer_types == [FULL, SLIDING]
    check_layers(config, [1, 5])


def test_an_unknown_family_is_named_with_what_is_missing():
    with torch.device("meta"):
        backbone = AutoModel.from_config(DebertaV2Config(num_hidden_layers=1))
    with pytest.raises(HlmError, match=r"known family \(bert, .*'deberta-v2' \(DebertaV2Config\); where its"):
        layers_of(backbone)
    with pytest.raises(HlmError, match="known family"):
        Shape.of(DebertaV2Config(num_hidden_layers=1))


def test_an_unknown_family_is_exported_where_its_graph_is_true_and_refused_where_not(tiny_bert, tmp_path, monkeypatch):
    model = load_encoder(tiny_bert, device="cpu")
    config = model[0].model.config
    torch.manual_seed(0)
    model[0].model = AutoModel.from_config(
        DebertaV2Config(
            vocab_size=config.vocab_size,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    ).eval()
    with pytest.raises(HlmError, match="found a difference of nan"):  # it reads a mask that is added in its own way
        export_model(model, tmp_path)

    def untraceable(*args, **kwargs):
        raise RuntimeError("no such operator\nmore")

    monkeypatch.setattr("hlm.serving.export._traced", untraceable)
    with pytest.raises(HlmError, match=r"'deberta-v2' \(RuntimeError: no such operator\); families that .*modernbert"):
        export_model(model, tmp_path, int8=False)
    assert not list(tmp_path.iterdir())
