"""Cards: what they say is what the JSON says, nothing in the JSON can do more than be shown, and their code runs."""

import copy
import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import DatasetCardData, ModelCard, ModelCardData, RepoCard, parse_eval_result_entries

from hlm import redaction
from hlm.artefacts import HlmError
from hlm.encoders.loading import add_head, encode, fingerprint, load_encoder, save_encoder
from hlm.encoders.lora import add_lora, merge_lora
from hlm.indexes.faiss_index import AdIndex
from hlm.publishing import cards
from hlm.publishing.cards import dataset_card, eval_results, student_card, teacher_card
from hlm.vectors.store import VectorStore, write_store

TEXT = "cordless hedge trimmer"  # the query of every example


def result(value: float) -> dict:
    return {"value": value, "ci95": [value - 0.01234, value + 0.02345]}


def a_report(encoders: dict[str, str]) -> dict:
    def row(base: float, **more: float) -> dict:
        names = ("precision@10", "ndcg@10", "recall@100", "mrr@10")
        return {name: base + place / 37 for place, name in enumerate(names)} | more

    systems = {
        "teacher": row(0.51234, params_total=22_713_216, params_non_embedding=10_795_392),
        "aligned": row(0.49876, **{"overlap@10": 0.81237}, params_total=4_321, params_non_embedding=1_234),
        "student": row(0.50191, **{"overlap@10": 0.73671}, params_total=4_321, params_non_embedding=1_234),
    }
    kept = {name: {m: result(0.9 + place / 70) for place, m in enumerate(row(0))} for name in ("aligned", "student")}
    group = {
        "n": 17,
        "student_ndcg@10": 0.66301,
        "teacher_ndcg@10": 0.56523,
        "overlap@10": 0.6,
        "recovery": result(1.1),
    }
    return {
        "dataset": "/srv/private/team/shop", "split": "test", "k": 10, "queries": 80, "relevance_level": 2,
        "systems": systems, "recovery": kept["student"], "overlap@10": 0.73671, "recovery_by_system": kept,
        "slices": {"kind": {"brand": group}, "length": {"3-4": group | {"recovery": None}}},
        "environment": {
            "command": "recipes/evaluate.py --config /home/alice/secret/evaluate.yaml --token abc123secret",
            "date": "2026-11-23T18:23:22+00:00", "git_commit": "2f9a013fffd4f0b4d991e86eecb8ed5547437268",
            "python": "3.11.7", "versions": {"torch": "2.13.0+cpu"}, "cpu": "AMD EPYC", "cores": 2, "gpu": None,
            "encoders": encoders,
        },
    }  # fmt: skip


def a_latency() -> dict:
    def system(p50: float, ratio: float) -> dict:
        times = {"p50": p50, "p95": 2 * p50, "p99": 3 * p50, "samples": 400, "contaminated": 0, "over": "clean"}
        return {
            "backend": "hlm", "dtype": "float32", "latency_ms": {"all": times}, "throughput": {},
            "ratio": {"p50": ratio, "throughput": ratio}, "best_queries_per_s": 1234.5, "best_batch_size": 32,
            "settings": {"model": "/srv/private/team/student"},
        }  # fmt: skip

    return {
        "data": "/srv/private/team/shop", "split": "test", "queries": 200, "lengths": {"3-4": 200},
        "reference": "teacher",
        "settings": {"repeats": 5, "max_other_load": 0.05}, "blocks": [{"contaminated": False, "other_load": 0.01}],
        "systems": {"teacher": system(15.4407, 1.0), "online": system(1.2345, 12.5077)},
        "environment": {"cpu": "AMD EPYC", "cores": 2, "gpu": None, "versions": {"torch": "2.13.0+cpu"}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def house(tmp_path_factory, tiny_bert, tiny_qwen3, tiny_family):
    home, gemma3 = tmp_path_factory.mktemp("cards"), tiny_family("gemma3_text")
    for name, path in (("bert", tiny_bert), ("qwen3", tiny_qwen3), ("head", tiny_bert), ("heads", gemma3)):
        model = load_encoder(path, device="cpu")
        if name == "head":
            vectors = encode(model, ["red shoe", "steel kettle", "lamp"])
            add_head(model, vectors, np.pad(vectors, ((0, 0), (0, 16))))
        if name == "heads":
            model[2].activation_function = torch.nn.Tanh()
        inputs = {"student": "0" * 16, "teacher": "1" * 16}
        config = {"student": "/srv/private/team/aligned", "hard_negatives": 4, "hub_token": "hf_abcdefghijklmnopqrst"}
        save_encoder(model, home / name, "student", inputs=inputs, config=config)
    return home


@pytest.fixture
def about(house):
    encoders = {"teacher": "1" * 16, "student": fingerprint(load_encoder(str(house / "bert"), device="cpu"))}
    return {
        "repo_id": "acme/query-encoder", "report": a_report(encoders), "latency": a_latency(), "licence": "apache-2.0",
        "language": ["en"], "base_model": "acme/backbone", "teacher_repo": "acme/teacher", "dataset_repo": "acme/ads",
    }  # fmt: skip


def front_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def blocks(card: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)


def tables(card: str) -> list[list[list[str]]]:
    found = re.findall(r"(?:^\|.*\|\n)+", card, flags=re.MULTILINE)
    return [
        [[cell.strip().replace("\\", "") for cell in line.strip("|").split(" | ")] for line in text.splitlines()]
        for text in found
    ]


def test_front_matter_is_valid_and_says_what_the_json_says(house, about):
    card = student_card(house / "bert", **about)
    data = ModelCard(card).data
    assert isinstance(data, ModelCardData)
    front = front_of(card)
    assert front["library_name"] == "sentence-transformers" and front["pipeline_tag"] == "sentence-similarity"
    assert front["base_model"] == "acme/backbone" and front["base_model_relation"] == "finetune"
    assert front["teacher"] == "acme/teacher" and front["datasets"] == ["acme/ads"]
    assert front["license"] == "apache-2.0" and front["language"] == ["en"] and "retrieval" in front["tags"]
    found = {one.metric_type: one.metric_value for one in data.eval_results}
    expected = about["report"]["systems"]["student"]
    assert found == {name: value for name, value in expected.items() if not name.startswith("params")}
    assert list(found) == front["metrics"]
    assert {(one.dataset_type, one.dataset_split) for one in data.eval_results} == {("acme/ads", "test")}


def test_every_number_of_the_tables_is_the_jsons(house, about):
    report, latency = about["report"], about["latency"]
    quality, by_slice, timed, lineage = tables(student_card(house / "bert", **about))
    header, _, *rows = quality
    assert [row[0] for row in rows] == ["teacher", "aligned", "student"]
    for row in rows:
        values, kept = report["systems"][row[0]], report["recovery_by_system"].get(row[0])
        for name, cell in zip(header[1:], row[1:], strict=True):
            if name.startswith("recovery"):
                assert cell == (percent(kept["ndcg@10"]) if kept else "-")
            elif name in ("parameters", "without embeddings"):
                key = "params_total" if name == "parameters" else "params_non_embedding"
                assert cell == f"{values[key]:,}"
            else:
                assert cell == (f"{values[name]:.4f}" if name in values else "-")
    group = report["slices"]["kind"]["brand"]
    assert by_slice[2:] == [
        ["kind brand", "17", "0.6630", "0.5652", percent(group["recovery"])],
        ["length 3-4", "17", "0.6630", "0.5652", "-"],
    ]
    header, _, *rows = timed
    for row in rows:
        cells, system = dict(zip(header, row, strict=True)), latency["systems"][row[0]]
        for name in ("p50", "p95", "p99"):
            assert cells[f"{name} ms"] == f"{system['latency_ms']['all'][name]:.2f}"
        assert cells["p50 x"] == f"{system['ratio']['p50']:.1f}x" and cells["queries/s"] == "1,234"
    assert [fingerprint(load_encoder(str(house / "bert"), device="cpu")), "0" * 16, "1" * 16] == re.findall(
        r"`([0-9a-f]{16})`", " ".join(lineage[2])
    )


def test_a_recovery_that_is_undefined_is_a_dash_with_its_reason(house, about):
    report = json.loads(json.dumps(about["report"]))
    none = {"value": None, "ci95": None, "reason": "the teacher scores 0 on all 80 queries"}
    open_ = {"value": 0.9, "ci95": None, "reason": "use more queries"}
    report["recovery_by_system"]["student"] |= {"ndcg@10": none, "precision@10": open_}
    report["slices"]["kind"]["brand"]["recovery"] = open_
    card = student_card(house / "bert", **(about | {"report": report})).replace("\\", "")
    quality, by_slice, *_ = tables(card)
    assert quality[-1][0] == "student" and "-" in quality[-1] and by_slice[2][-1] == "90.0% [-]"
    assert "recovery of ndcg@10: - (the teacher scores 0 on all 80 queries)" in card
    assert "recovery of precision@10: 90.0% [-] (use more queries)" in card and "None" not in card


def test_what_the_student_adds_to_an_ensemble_and_its_least_score(house, about):
    report = json.loads(json.dumps(about["report"]))
    member = {
        "without": {"ndcg@10": 0.4}, "uplift": {"ndcg@10": {"value": 0.05, "ci95": [-0.01, 0.11]}},
        "only_found": {"only": 7, "found": 90, "share": result(0.08)},
        "interleaving": {"simulated": True, "preference": result(0.6)},
    }  # fmt: skip
    fusion = {"systems": ["bm25", "student"], "weights": None, "members": {"student": member}}
    report["fusions"] = {"hybrid": fusion, "elsewhere": fusion | {"systems": ["bm25", "aligned"]}}
    reported = {"precision": result(0.88), "coverage": 0.75, "kept": 0.5, "shown_per_query": 1.25}
    least = {"threshold": 0.61237, "reported": reported}
    report["thresholds"] = {"wanted_precision": 0.9, "split": "dev", "systems": {"student": least, "bm25": least}}
    card = student_card(house / "bert", **(about | {"report": report})).replace("\\", "")
    _, _, added, shown, *_ = tables(card)
    assert added[2][1:] == ["0.4000", "+5.0% [-1.0, +11.0]", "8.0% [6.8, 10.3], 7 of 90", "60.0% [58.8, 62.3]"]
    assert shown[2:] == [["student", "0.6124", "88.0% [86.8, 90.3]", "75.0%", "50.0%", "1.25"]]
    assert "hybrid: bm25 + student, fused by reciprocal ranks." in card and "elsewhere" not in card
    assert "simulated" in card and "90% of the ads shown are relevant" in card


def percent(kept: dict) -> str:
    low, high = kept["ci95"]
    return f"{kept['value']:.1%} [{low:.1%}, {high:.1%}]"


def test_what_was_not_measured_is_said_and_no_figure_appears(house):
    card = student_card(house / "bert", repo_id="acme/query-encoder")
    assert card.count("Not measured") == 2 and "not stated" in card and "not recorded" in card
    front = front_of(card)
    assert not {"model-index", "metrics", "license", "language", "base_model", "datasets", "teacher"} & set(front)
    body = card.split("## Quality")[1].split("## Training")[0]
    assert not re.search(r"\d", body)
    ModelCard(card)


def test_a_report_of_another_encoder_is_refused(house, about):
    with pytest.raises(HlmError, match="expected a report of encoder .* leave the report out"):
        student_card(house / "qwen3", **about)
    encoders = about["report"]["environment"]["encoders"]
    encoders["aligned"] = encoders.pop("student")
    card = student_card(house / "bert", **about)  # the row is found by fingerprint
    assert "row `aligned`" in card
    assert ModelCard(card).data.eval_results[0].metric_value == about["report"]["systems"]["aligned"]["precision@10"]


@pytest.mark.parametrize("name", ["bert", "qwen3", "head", "heads"])
def test_the_code_in_the_card_runs_and_gives_equal_vectors(house, name):
    card = student_card(house / name, repo_id="acme/query-encoder")
    model = load_encoder(str(house / name), device="cpu")
    expected = encode(model, [TEXT], prompt_name="query")
    ran = 0
    for text in blocks(card):
        space: dict = {}
        exec(text.replace('"acme/query-encoder"', repr(str(house / name))), space)
        np.testing.assert_allclose(np.asarray(space["vectors"]), expected, atol=2e-5)
        ran += 1
    assert ran == 3
    assert [head in card for head in ("2_Dense", "3_Dense")] == [name in ("head", "heads"), name == "heads"]
    assert (json.dumps(model.prompts["query"])[1:-1] in card) or not model.prompts["query"]


def test_the_teachers_code_runs_and_gives_the_merged_teachers_vectors(tiny_qwen3, tmp_path):
    import torch
    from peft import get_peft_model_state_dict

    from hlm.training.teacher import save_adapter

    model = add_lora(load_encoder(tiny_qwen3, device="cpu", max_seq_length=20), rank=4, alpha=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    state = {f"0.model.{name}": value for name, value in get_peft_model_state_dict(model[0].model).items()}
    config = copy.deepcopy(model[0].model.peft_config["default"])
    merge_lora(model)
    save_encoder(
        model,
        tmp_path / "teacher",
        "teacher",
        inputs={"backbone": "2" * 16},
        config={"backbone": "acme/backbone"},
        beside=lambda folder: save_adapter(state, config, "acme/backbone", folder / "adapter"),
    )
    card = teacher_card(tmp_path / "teacher", repo_id="acme/teacher", student_repo="acme/query-encoder")
    front = front_of(card)
    assert front["library_name"] == "peft" and front["base_model_relation"] == "adapter"
    assert front["base_model"] == "acme/backbone" and ModelCard(card)
    (text,) = blocks(card)
    space: dict = {}
    text = text.replace('"acme/backbone"', repr(tiny_qwen3)).replace(
        '"acme/teacher"', repr(str(tmp_path / "teacher/adapter"))
    )
    exec(text, space)
    expected = encode(model, ["Cordless hedge trimmer. 18V"], prompt_name="document")
    np.testing.assert_allclose(space["vectors"], expected, atol=2e-5)
    assert not np.allclose(
        encode(load_encoder(tiny_qwen3, device="cpu"), ["Cordless hedge trimmer. 18V"]), expected, atol=1e-3
    )


EVIL = [
    "](javascript:alert(1)) ![x](https://evil.example/p.png)",
    "<script>alert(1)</script><img src=x>",
    "a | b\n\n# Heading\n\n```\nfence",
    "---\nlicense: mit\n---",
    "{{ 77777 * 77777 }} {% include '/etc/passwd' %} $x$",
    "`code` **bold** _it_ \u2028 ~~x~~",
    "${alert(1)} \\",
]


@pytest.mark.parametrize("evil", EVIL)
def test_what_metadata_say_is_only_shown(house, about, evil, tmp_path):
    report, latency = about["report"], about["latency"]
    plain = student_card(house / "bert", **about)
    report["slices"]["kind"] = {evil: report["slices"]["kind"]["brand"]}
    report["split"] = evil
    report["environment"] |= {"cpu": evil, "versions": {evil: evil}, "python": evil, "command": evil}
    latency["environment"] |= {"cpu": evil}
    latency["systems"]["online"]["backend"] = evil
    shutil.copytree(house / "bert", tmp_path / "bert")
    manifest = json.loads((tmp_path / "bert/hlm.json").read_text())
    manifest["inputs"]["vectors"], manifest["config"]["method"] = evil, evil
    (tmp_path / "bert/hlm.json").write_text(json.dumps(manifest))
    card = student_card(tmp_path / "bert", **about)
    assert {**front_of(card), "model-index": 0} == {**front_of(plain), "model-index": 0}
    for result in ModelCard(card).data.eval_results:
        assert result.dataset_split == " ".join(evil.replace("/etc/passwd", "passwd").split())
    body, usual = card.split("\n---\n", 1)[1], plain.split("\n---\n", 1)[1]
    for mark in (r"^#+ .*$", r"^```\w*$", r"^---$"):
        found, expected = (re.findall(mark, text, flags=re.MULTILINE) for text in (body, usual))
        assert found == expected
    outside = re.sub(r"(?s)^```.*?^```$|`[^`\n]*`", "", body, flags=re.MULTILINE)
    assert "<script" not in outside and "<img" not in outside and "6049261729" not in body
    assert not re.search(r"(?<!\\)\]\((?!https://huggingface\.co/)", outside)
    widths = [
        {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}
        for text in re.findall(r"(?:^\|.*\|\n)+", body, flags=re.MULTILINE)
    ]
    assert all(len(width) == 1 for width in widths) and len(widths) == 4


@pytest.mark.parametrize("prompt", ['"; import os; "', "```\nimport os\n```", "\\", "'\"\n\u2028\U0001f600`${x}`"])
def test_a_prompt_cannot_leave_its_literal(house, tmp_path, prompt):
    shutil.copytree(house / "bert", tmp_path / "bert")
    path = tmp_path / "bert/config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prompts": {"query": prompt, "document": ""}}))
    manifest = json.loads((tmp_path / "bert/hlm.json").read_text())
    manifest["onnx"] = {"fp32": {"file": "onnx/model.onnx", "fingerprint": "3" * 16, "min_cosine": 0.999991}}
    (tmp_path / "bert/hlm.json").write_text(json.dumps(manifest))
    card = student_card(tmp_path / "bert", repo_id="acme/query-encoder")
    text = next(text for text in blocks(card) if "AutoModel" in text)
    space: dict = {}
    exec(text.replace('"acme/query-encoder"', repr(str(tmp_path / "bert"))), space)
    assert space["texts"] == [prompt + TEXT]
    (script,) = blocks(card, "js")
    literal = re.search(r"await tokenizer\(\[(\".*\")\]", script).group(1)
    assert json.loads(literal) == prompt + TEXT and "0.999991" in card and "onnx" in front_of(card)["tags"]


def test_no_path_and_no_token_reaches_a_card(house, about, monkeypatch):
    card = student_card(house / "bert", **about)
    for secret in ("/srv", "private", "/home", "alice", "secret", "abc123", "hf_abc", str(house)):
        assert secret not in card
    assert "evaluate.yaml" in card and "git checkout 2f9a013fffd4f0b4d991e86eecb8ed5547437268" in card
    monkeypatch.setattr(redaction, "get_token", lambda: "plain-looking-token")
    with pytest.raises(HlmError, match="token"):
        student_card(house / "bert", **about, command="make quickstart KEY=plain-looking-token")
    with pytest.raises(HlmError, match="token"):
        student_card(house / "bert", **about, commit="hf_ABCDEFGHIJKLMNOPQRSTUVWX")
    with pytest.raises(HlmError, match="repo_id: expected a Hub id"):
        student_card(house / "bert", repo_id="acme/x](http://evil)")
    with pytest.raises(HlmError, match="licence: expected codes"):
        student_card(house / "bert", repo_id="acme/x", licence="mit\n---\n# Heading")


def test_eval_results_are_what_the_hub_reads(about):
    text = eval_results(about["report"], dataset_repo="acme/ads", repo_id="acme/query-encoder", revision="v1")
    entries = parse_eval_result_entries(yaml.safe_load(text))
    expected = about["report"]["systems"]["student"]
    metrics = ("precision@10", "ndcg@10", "recall@100", "mrr@10", "overlap@10")
    assert {entry.task_id: entry.value for entry in entries} == {m.replace("@", "_"): expected[m] for m in metrics}
    assert {entry.dataset_id for entry in entries} == {"acme/ads"} and entries[0].dataset_revision == "v1"
    assert entries[0].date == about["report"]["environment"]["date"] and "private" not in text


def test_a_dataset_card(catalogue_200, tiny_bert, tmp_path):
    folder = tmp_path / "ads"
    shutil.copytree(catalogue_200, folder)
    model = load_encoder(tiny_bert, device="cpu")
    rows = [(f"a{number}", f"red shoe {number}") for number in range(5)]
    known = {"dim": 32, "encoder": "1" * 16, "source": "4" * 16}
    write_store(folder / "vectors/corpus", rows, lambda texts: encode(model, texts), **known, n_rows=5)
    AdIndex.build(VectorStore.open(folder / "vectors/corpus"), dim=8).save(folder / "index")
    card = dataset_card(folder, repo_id="acme/ads", student_repo="acme/query-encoder", licence="apache-2.0")
    data = RepoCard(card).data
    front = front_of(card)
    assert DatasetCardData(**front).to_dict() == data.to_dict()
    assert front["task_categories"] == ["text-retrieval"] and front["size_categories"] == ["n<1K"]
    configs = {config["config_name"]: config["data_files"] for config in front["configs"]}
    assert set(configs) == {"corpus", "queries", "unlabelled", "qrels"}
    assert [file["split"] for file in configs["qrels"]] == ["train", "dev", "test"]
    assert all((folder / file["path"]).is_file() for files in configs.values() for file in files)
    assert "5 vectors, 32 wide" in card and "5 vectors, 8 wide, engine `faiss` `Flat`" in card and "synthetic" in card
    first, second = (text.replace('"acme/ads"', repr(str(folder))) for text in blocks(card))
    for text in (first, second):
        exec(text, space := {})
    assert len(space["index"]) == 5
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(HlmError, match="found neither"):
        dataset_card(empty, repo_id="acme/ads")


def test_templates_are_found_in_an_installed_package_too(house, tmp_path, monkeypatch):
    """The wheel puts model_cards/ inside hlm/."""
    monkeypatch.setattr(cards, "TEMPLATES", (tmp_path / "nowhere", cards.TEMPLATES[0]))
    assert student_card(house / "bert", repo_id="acme/query-encoder")
    monkeypatch.setattr(cards, "TEMPLATES", (tmp_path / "nowhere", tmp_path / "nowhere"))
    with pytest.raises(HlmError, match="card templates"):
        student_card(house / "bert", repo_id="acme/query-encoder")
