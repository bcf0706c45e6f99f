"""A static student: stock to load, trained and exported like any other, and what it cannot do."""

import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules

import hlm
from hlm import QueryEncoder
from hlm.artefacts import HlmError
from hlm.data.contract import load
from hlm.encoders.loading import encode, fingerprint, load_encoder, save_encoder
from hlm.encoders.pruning import parameter_counts
from hlm.encoders.static import is_static_folder
from hlm.encoders.static_words import static_student
from hlm.indexes.lineage import verify_student
from hlm.publishing.cards import student_card

LOG = ["red shoe", "red shoe with laces", "laces without shoe", "Shoetree", "camera"]
TEXTS = ["red shoe", "a shoetree", "Red CAMERAS without laces", "ü 靴", "", "shoe without laces, red " * 40]


@pytest.fixture(params=["tiny_bert", "tiny_qwen3"])
def made(request, tmp_path):
    teacher = load_encoder(request.getfixturevalue(request.param), device="cpu")
    student = static_student(teacher, LOG, 4)
    save_encoder(student, tmp_path / "static", "student", inputs={"teacher": "t" * 16}, config={})
    return teacher, student, tmp_path / "static"


def test_tokens_are_words_of_the_log_and_start_as_the_teacher_encodes_them(made):
    teacher, student, _ = made
    cut = student.tokenizer.backend_tokenizer.encode
    assert cut("Red shoe").tokens == ["red", "shoe"]  # the most frequent words: shoe, red, laces, and one of the rest
    assert len(cut("shoetree").tokens) > 1 and "[UNK]" not in cut("shoetree cameras").tokens
    rows = student[0].embedding.weight.detach().numpy()
    read = encode(teacher, ["red", "camera"], prompt_name="query")
    for word, wanted in zip(("red", "camera"), read, strict=True):
        found = rows[student.tokenizer.convert_tokens_to_ids(word)] if len(cut(word).tokens) == 1 else wanted
        np.testing.assert_allclose(found / np.linalg.norm(found), wanted, atol=1e-5)
    # The more often a token occurs, the lighter it is: "shoe" 3 times of 11 words, "red" twice.
    weight = np.linalg.norm(rows, axis=1)
    heavy, light = (weight[student.tokenizer.convert_tokens_to_ids(word)] for word in ("red", "shoe"))
    assert light < heavy < 1
    assert parameter_counts(student) == (rows.size, 0)


def test_sentence_transformers_loads_it_without_code_of_its_own(made):
    _, student, folder = made
    assert is_static_folder(folder)
    stock = SentenceTransformer(str(folder), device="cpu")
    assert type(stock[0]) is modules.StaticEmbedding
    found = encode(student, TEXTS)
    np.testing.assert_allclose(stock.encode(TEXTS), found, atol=1e-6)
    np.testing.assert_allclose(student.encode(TEXTS), found, atol=1e-6)
    again = load_encoder(str(folder), device="cpu")
    assert fingerprint(again) == fingerprint(student)
    np.testing.assert_array_equal(encode(again, TEXTS), found)
    again[0].embedding.weight.data[0] += 1
    assert fingerprint(again) != fingerprint(student)
    with pytest.raises(HlmError, match="which cuts no text"):
        load_encoder(str(folder), device="cpu", max_seq_length=8)


def test_it_does_not_read_order(made):
    _, student, _ = made
    one, other = encode(student, ["shoe without laces", "laces without shoe"])
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_through_the_recipe_to_what_serves(tiny_bert, catalogue_200, tmp_path):
    vectors = hlm.embed(tiny_bert, catalogue_200, tmp_path / "vectors")
    hlm.prune(tiny_bert, catalogue_200, vectors, tmp_path / "static", static=500)
    settings = {"per_device_train_batch_size": 64, "use_cpu": True, "learning_rate": 1e-2, "seed": 1}
    best = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True}
    best |= {"eval_steps": 5, "save_steps": 5, "metric_for_best_model": "dev_ndcg@10", "greater_is_better": True}
    hlm.align(tmp_path / "static", catalogue_200, vectors, tmp_path / "aligned", max_steps=20, **settings, **best)
    hlm.refine(tmp_path / "aligned", catalogue_200, vectors, tmp_path / "refined", max_steps=2, **settings)
    data = load(catalogue_200, splits=("test",))
    texts = [text for _, text in data.split_queries("test")]
    teacher = encode(load_encoder(tiny_bert, device="cpu"), texts)
    cosines = {}
    for name in ("static", "aligned"):
        vectors_of = encode(load_encoder(str(tmp_path / name), device="cpu"), texts)
        cosines[name] = float((vectors_of * teacher).sum(axis=1).mean())
    assert cosines["aligned"] > cosines["static"]
    hlm.export(tmp_path / "refined", tmp_path / "online")
    online = QueryEncoder.from_pretrained(tmp_path / "online")
    stock = SentenceTransformer(str(tmp_path / "online"), device="cpu")
    texts = [*texts[:20], *(text for text in TEXTS if text)]
    np.testing.assert_allclose(online.encode(texts), stock.encode(texts), atol=1e-5)
    assert json.loads((tmp_path / "online/hlm.json").read_text())["onnx"].keys() == {"fp32"}
    verify_student(tmp_path / "online")
    card = student_card(tmp_path / "online", repo_id="acme/static")
    assert "StaticEmbedding" in card and "neither the order of words" in card
    assert not any(words in card for words in ("AutoModel", "transformers.js", "vLLM", "None"))
    systems = {"teacher": {"model": tiny_bert, "corpus": str(vectors / "corpus")}, "static": str(tmp_path / "online")}
    report = hlm.evaluate(catalogue_200, systems, output=tmp_path / "report", bootstrap_samples=100)
    assert report["recovery_by_system"]["static"]["ndcg@10"]["value"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"static": 100, "keep": 2}, "static: expected it alone"), ({"static": 0}, "expected 1 word or more, found 0")],
)
def test_settings_are_refused(tiny_bert, catalogue_200, tmp_path, settings, message):
    with pytest.raises(HlmError, match=message):
        hlm.prune(
            tiny_bert,
            catalogue_200,
            hlm.embed(tiny_bert, catalogue_200, tmp_path / "v", parts=["corpus"]),
            tmp_path / "out",
            **settings,
        )
