"""recipes/benchmark.py end to end with real, tiny encoders; true shapes with random weights; Qwen's tokenizer."""

import json
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from hlm.artefacts import HlmError
from hlm.benchmark import entries as benchmark_entries
from hlm.benchmark import floor as latency_floor
from hlm.benchmark import latency, random_weights
from hlm.benchmark import systems as hlm_systems
from hlm.config import run_recipe
from hlm.data.contract import document_text, load
from hlm.encoders.loading import encode, fingerprint, load_encoder, save_encoder
from hlm.encoders.pruning import prune
from hlm.evaluation.metrics import dense_run, mean, per_query
from hlm.indexes.faiss_index import AdIndex
from hlm.machine import Counters
from hlm.report_files import write_report
from hlm.vectors.store import VectorStore, write_store
from recipes import benchmark

# Whatever else runs beside the tests, their blocks count as clean.
QUICK = {
    "queries": 20,
    "repeats": 2,
    "block_s": 0.02,
    "batch_sizes": [4],
    "cold_starts": 0,
    "device": "cpu",
    "max_other_load": 1.0,
}


@pytest.fixture(scope="module")
def inputs(tiny_qwen3, catalogue_200, tmp_path_factory):
    """A teacher, a student of half its depth, the teacher's store and what evaluate would have said of both."""
    root = tmp_path_factory.mktemp("benchmark")
    teacher = load_encoder(tiny_qwen3, device="cpu")
    prune(teacher, layers=[0, 1, 5]).save_pretrained(str(root / "student"), create_model_card=False)
    save_encoder(teacher, root / "teacher", "teacher", inputs={}, config={})
    given = {"teacher": fingerprint(teacher)}
    save_encoder(prune(teacher, layers=[0, 5]), root / "smaller", "student", inputs=given, config={})
    data = load(catalogue_200, splits=("test",))
    write_store(
        root / "store",
        [(row["_id"], document_text(row)) for row in data.corpus],
        lambda texts: encode(teacher, texts, prompt_name="document"),
        dim=32,
        encoder=fingerprint(teacher),
        source=data.fingerprint("corpus"),
        n_rows=len(data.corpus),
    )
    kept = {"ndcg@10": {"value": 0.9, "ci95": [0.85, 0.95]}}
    report = {
        "dataset": "shop",
        "split": "test",
        "k": 10,
        "queries": 80,
        "relevance_level": 2,
        "systems": {"teacher": {"ndcg@10": 0.5}, "student": {"ndcg@10": 0.45, "overlap@10": 0.7}},
        "recovery": kept,
        "recovery_by_system": {"student": kept},
        "slices": {},
        "environment": {},
    }
    write_report(root, report)
    return root


@pytest.fixture
def run(inputs, tiny_qwen3, catalogue_200, tmp_path, monkeypatch):
    """Runs the recipe; returns latency.json."""
    monkeypatch.setattr(latency_floor, "SIDES", (64,))  # the rate of small products is a lower one, found sooner

    def run(*flags, systems=None, **settings):
        systems = systems or {"teacher": tiny_qwen3, "student": str(inputs / "student")}
        paths = {"data": catalogue_200, "output": str(tmp_path / "out"), "tokenizer": tiny_qwen3}
        config = paths | {"systems": systems} | QUICK | settings
        (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        benchmark.main(["--config", str(tmp_path / "benchmark.yaml"), *flags])
        return json.loads((tmp_path / "out" / "latency.json").read_text())

    return run


def evaluated(model, inputs, catalogue):
    """nDCG@10 over the test split, as recipes/evaluate.py finds it."""
    data = load(catalogue, splits=("test",))
    ids, texts = zip(*data.split_queries("test"), strict=True)
    index = AdIndex.build(VectorStore.open(inputs / "store"))
    found = dense_run(encode(model, list(texts), prompt_name="query"), index, ids, 100)
    return mean(per_query(found, data.qrels["test"])["ndcg@10"])


def test_end_to_end(run, inputs, tiny_qwen3, catalogue_200, tmp_path, capsys):
    half, smaller = {"model": str(inputs / "teacher"), "dtype": "bfloat16"}, str(inputs / "smaller")
    models = {"teacher": str(inputs / "teacher"), "teacher_bf16": half, "smaller": smaller}
    report = run(
        systems=models | {"student": str(inputs / "student")},
        report=str(inputs / "report.json"),
        corpus=str(inputs / "store"),
    )
    assert (
        list(report["systems"]) == ["teacher", "teacher_bf16", "smaller", "student"]
        and report["reference"] == "teacher"
    )
    assert report["queries"] == sum(report["lengths"].values()) == 20
    student = report["systems"]["student"]
    assert student["quality"]["recovery"] == 0.9 and student["settings"]["model"] == str(inputs / "student")
    assert student["params_total"] < report["systems"]["teacher"]["params_total"]
    assert student["latency_ms"]["all"]["p50"] <= student["latency_ms"]["all"]["p99"]
    assert set(student["throughput"]) == {"1", "4"}
    assert "agreement" not in student
    same = report["systems"]["teacher_bf16"]["agreement"]
    assert same["with"] == "teacher" and 0.99 < same["min_cosine"] < 1 and 0 < same["overlap"] <= 1
    assert same["ratio"]["p50"] == report["systems"]["teacher_bf16"]["ratio"]["p50"]  # the reference is that teacher
    # The report knows neither bfloat16 nor the smaller student: all queries of the split search the ads here.
    for name, dtype, folder in (("teacher_bf16", "bfloat16", "teacher"), ("smaller", "float32", "smaller")):
        measured = report["systems"][name]["quality"]
        alone = evaluated(load_encoder(str(inputs / folder), dtype=dtype, device="cpu"), inputs, catalogue_200)
        assert measured["ndcg"] == pytest.approx(alone, abs=2e-3) and measured["system"] == name
        assert measured["recovery"] == pytest.approx(measured["ndcg"] / 0.5)
    assert len(report["blocks"]) == 2 * 2 * 4
    floors = {name: system["floor"] for name, system in report["systems"].items()}
    assert floors["teacher"]["weight_mib"] == 2 * floors["teacher_bf16"]["weight_mib"] > 0
    assert floors["teacher"]["tokens"] == floors["student"]["tokens"] > 3  # the prompt's counted
    assert floors["student"]["gflop"] == pytest.approx(floors["teacher"]["gflop"] / 2)
    assert floors["student"]["over"] == pytest.approx(
        student["latency_ms"]["all"]["p50"] / floors["student"]["floor_ms"]
    )
    environment = report["environment"]
    assert environment["command"].startswith("recipes/benchmark.py --config") and environment["threads"]["torch"]
    assert {"torch", "transformers", "sentence-transformers"} <= set(environment["versions"])
    with Image.open(tmp_path / "out" / "latency.png") as image:
        assert image.format == "PNG"
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("teacher_bf16", "p99 ms", "90.0%", "cosine", "x floor", "GFLOP/s"))


def test_from_text_to_ads(run, inputs, capsys, tmp_path):
    index = AdIndex.build(VectorStore.open(inputs / "store"), "HNSW8")
    index.measured = {"recall": 0.97, "k": 7}
    index.save(tmp_path / "index")
    teacher = str(inputs / "teacher")
    searching = {"model": teacher, "index": str(tmp_path / "index"), "k": 7}
    flags = ["--budget", "e2e_p99_ms=1000", "--budget", "e2e_recall=0.9", "--budget", "agreement=0.9"]
    systems = {"encoder": teacher, "shop": searching}
    report = run(*flags, systems=systems, corpus=str(inputs / "store"), queries=10)
    shop = report["systems"]["shop"]
    assert shop["index"] == {"engine": "faiss", "factory": "HNSW8", "ads": 200, "k": 7, "recall": 0.97}
    assert shop["agreement"]["min_cosine"] == pytest.approx(1) and "floor" not in shop
    assert {check["budget"]: check["passed"] for check in report["budgets"]}["e2e_recall"]
    assert report["systems"]["encoder"]["floor"]
    assert "shop: from text to 7 ads of 200, ids included, in HNSW8, of recall 0.9700" in capsys.readouterr().out
    for settings, message in (
        ({"systems": {"a": teacher}}, "e2e_p99_ms of 'a' needs `index` in the system's settings"),
        ({"systems": {"a": {"model": teacher, "k": 3}}}, "'k' does not apply to a model without an index"),
        ({"systems": {"a": searching | {"k": 0}}}, "k: expected 1 or more"),
        (
            {"systems": {"a": searching | {"model": str(inputs / "smaller"), "index": str(tmp_path / "other")}}},
            "of enc",
        ),
    ):
        AdIndex.from_vectors(np.eye(32), list(map(str, range(32))), encoder="other").save(tmp_path / "other")
        with pytest.raises(HlmError, match=message):
            run("--budget", "e2e_p99_ms=1000", **settings)


def test_cold_starts_of_every_model(run, inputs, tiny_qwen3, monkeypatch):
    monkeypatch.setattr(
        hlm_systems,
        "cold_start",
        lambda settings, query: {
            "total_s": len(settings["model"]),
            "peak_memory_mib": 1.0,
            "other_load": 0.0,
            "query": len(query),
        },
    )
    report = run(cold_starts=2)
    found = {name: system["cold_start"] for name, system in report["systems"].items()}
    assert found["teacher"]["total_s"] == len(tiny_qwen3) and found["student"]["processes"] == 2


def test_budgets_are_a_gate(run, inputs, capsys):
    budgets = {"p50_ms": 1e6, "recovery": 0.98}
    with pytest.raises(SystemExit) as stop:
        run("--budget", "teacher.p99_ms=1e-9", report=str(inputs / "report.json"), budgets=budgets)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "budget failed: student: recovery: wanted at least 0.98, found 0.9" in error
    assert "budget failed: teacher: p99_ms: wanted at most 1e-09" in error and "p50_ms" not in error
    # The command line wins over the file, and what keeps its budget ends well.
    kept = run("--budget", "recovery=0.8", report=str(inputs / "report.json"), budgets=budgets)["budgets"]
    assert [(b["budget"], b["wanted"], b["passed"]) for b in kept] == [("p50_ms", 1e6, True), ("recovery", 0.8, True)]


def test_a_failed_gate_has_written_its_report(run, tmp_path):
    with pytest.raises(SystemExit):
        run(budgets={"p99_ms": 1e-9})
    assert json.loads((tmp_path / "out" / "latency.json").read_text())["budgets"][0]["passed"] is False


def test_a_gate_that_saw_only_contaminated_blocks_says_so(run, inputs, tmp_path, monkeypatch, capsys):
    busy = iter(range(1_000_000))

    def crowded():  # whatever time passes, others use all of two CPUs meanwhile
        now = float(next(busy))
        return Counters(wall_s=now, busy_s=2 * now, own_s=0.0, cpus=2)

    monkeypatch.setattr(latency, "read_counters", crowded)
    budgets = {"p50_ms": 1e6, "p99_ms": 1e-9, "recovery": 0.8}
    for more, status in (({}, 3), ({"ndcg": 0.99}, 1)):  # a budget that is surely broken goes first
        with pytest.raises(SystemExit) as stop:
            run(report=str(inputs / "report.json"), budgets=budgets | more, max_other_load=0.05)
        assert stop.value.code == status
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("budget")]
    assert [line[:34] for line in lines[:2]] == [
        "budget inconclusive: student: p50_",
        "budget inconclusive: student: p99_",
    ]
    assert "measure again on an idle machine" in lines[0] and lines[2].startswith("budget failed: student: ndcg")
    kept = json.loads((tmp_path / "out" / "latency.json").read_text())["budgets"]
    assert [budget["passed"] for budget in kept] == [None, None, True, False]


def test_a_budget_on_an_undefined_recovery_is_inconclusive(run, inputs, tmp_path, capsys):
    report = json.loads((inputs / "report.json").read_text())
    none = {"value": None, "ci95": None, "reason": "the teacher scores 0 on all 80 queries"}
    report["recovery_by_system"]["student"]["ndcg@10"] = none
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(SystemExit) as stop:
        run("--budget", "recovery=0.98", report=str(tmp_path / "report.json"))
    assert stop.value.code == 3 and "found no figure: the teacher scores 0 on all 80" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["latency.json", "latency.png"])
def test_somebody_elses_file_is_not_overwritten(run, tmp_path, monkeypatch, name):
    monkeypatch.setattr(benchmark_entries, "load_system", lambda **_: pytest.fail("loaded"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(HlmError, match=f"found {name} in .*/out, which HLM did not write"):
        run()
    assert (tmp_path / "out" / name).read_text() == "{}"


def test_an_older_report_is_replaced(run):
    run(repeats=1)
    assert run(repeats=1, seed=1)["settings"]["seed"] == 1


def test_as_a_script_an_unknown_budget_ends_at_once(monkeypatch, capsys):
    words = ["benchmark.py", "--systems", '{"a": "nowhere"}', "--budget", "p99=3"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        run_recipe(benchmark.main)
    assert stop.value.code == 2 and capsys.readouterr().err.splitlines()[-1].endswith("did you mean 'p99_ms'?")


@pytest.mark.parametrize(
    ("systems", "settings", "words"),
    [
        ({"a": {"model": "x", "modle": "y"}}, {}, "systems: 'a': unknown key 'modle'; did you mean 'model'"),
        ({"a": {"model": "x", "backend": "onnx"}}, {}, "'a': backend: expected one of 'sentence-transformers', 'hlm'"),
        ({"a": {"backend": "hlm"}}, {}, "expected a model or a shape, found neither"),
        ({"a": ["x"]}, {}, "expected a model or settings for 'a'"),
        ({"a": {"model": "x", "layers": 4}}, {}, "'layers' does not apply to a model"),
        ({"a": {"model": "x", "precision": "int8"}}, {}, "'precision' does not apply to a model under backend 'sent"),
        ({"a": {"model": "x", "backend": "hlm", "dtype": "bfloat16"}}, {}, "'dtype' does not apply"),
        ({"a": {"model": "x", "backend": "openvino", "dtype": "bfloat16"}}, {}, "'dtype' does not apply"),
        (
            {"a": {"shape": "Qwen3-Embedding-8B", "backend": "onnxruntime"}},
            {"random_weights": True},
            "expected a shape",
        ),
        ({"a": {"shape": "Qwen3-Embedding-8B", "layers": "4"}}, {}, "layers: expected a whole number"),
        ({"a": {"shape": "Qwen3-Embedding-8B"}}, {}, "add --random_weights"),
        ({"a": {"shape": "Qwen3-Embedding-9B"}}, {"random_weights": True}, "qwen3-embedding-8b"),
        ({"a": {"shape": "Qwen3-Embedding-8B", "depths": [8, 4]}}, {"random_weights": True}, "two within 1 to 36"),
        ({"a": {"shape": "Qwen3-Embedding-8B", "layers": 99}}, {"random_weights": True}, "expected 1 to 36"),
        ({"a": "x"}, {"reference": "b"}, "reference: expected one of a, found 'b'"),
        ({"a": "x"}, {"candidate": "b"}, "candidate: expected one of a"),
        ({"a": "x"}, {"budgets": {"recovery": 1}}, "recovery of 'a' needs `report`"),
        ({"a": "x"}, {"budgets": {"cold_start_s": 1}}, "cold_start_s of 'a' needs `cold_starts`"),
        ({"a": "x", "b": "y"}, {"budgets": {"min_cosine": 1}}, "min_cosine of 'b' needs another system of the same"),
        ({"a": "x", "b": "x"}, {"budgets": {"agreement": 1}}, "agreement of 'b' needs.*`corpus`"),
        ({"a": {"model": "x", "quality": "b"}}, {}, "set `report`"),
        ({"a": "x"}, {"report": "nowhere.json"}, "report: nowhere.json: expected a JSON object, found none"),
        ({"a": "x"}, {"queries": 0}, "queries: expected 1 or more"),
        ({"a": "x", "b": "./no/such/student"}, {}, "expected a model folder at ./no/such/student, found none"),
        ({"a": "x"}, {"device": "cuda:99"}, "device: expected cuda:99"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(run, monkeypatch, systems, settings, words):
    monkeypatch.setattr(benchmark_entries, "load_system", lambda **_: pytest.fail("loaded"))
    with pytest.raises(HlmError, match=words):
        run(systems=systems, **settings)


def test_quality_names_a_system_of_the_report(run, inputs, tiny_qwen3):
    with pytest.raises(HlmError, match="among teacher, student, found 'studnet'"):
        run(systems={"a": {"model": tiny_qwen3, "quality": "studnet"}}, report=str(inputs / "report.json"))


def test_shapes_beside_a_model_and_derived_from_fewer_layers(run, tiny_qwen3):
    report = run(
        "--shape",
        f"{tiny_qwen3}:layers=2,ffn=16,dtype=bfloat16",
        "--random_weights",
        systems={
            "whole": {"shape": tiny_qwen3, "depths": [1, 3], "prompt": "Query:"},
            "real": tiny_qwen3,
            "small_fp32": {"shape": tiny_qwen3, "layers": 2, "ffn": 16},
        },
    )
    whole, small = report["systems"]["whole"], report["systems"]["model:layers=2,ffn=16,dtype=bfloat16"]
    assert list(report["systems"])[:2] == ["whole", "real"] and len(report["systems"]) == 4
    assert whole["derived"] == "derived from 1 and 3 of 6 layers" and set(whole["measured"]) == {"1", "3"}
    assert whole["params_total"] == report["systems"]["real"]["params_total"] and "derived" not in small
    assert whole["weights"] == small["weights"] == "random" and "prompt 'Query:'" in whole["input"]
    assert small["dtype"] == "bfloat16" and small["layers"] == 2 and small["ffn"] == 16
    assert whole["ratio"]["p50"] == 1 and small["ratio"]["p50"] > 0
    measured = whole["measured"]["3"]["latency_ms"]["all"]["p50"]
    assert whole["latency_ms"]["all"]["p50"] >= measured
    same = small["agreement"]  # the same random weights in another precision
    assert same["with"] == "small_fp32" and 0.99 < same["min_cosine"] < 1 and "agreement" not in whole
    # The floor of a derived system is of its whole depth, as that of the real one; the prompt makes its texts longer.
    assert whole["floor"]["weight_mib"] == report["systems"]["real"]["floor"]["weight_mib"]
    assert small["floor"]["tokens"] < whole["floor"]["tokens"] and small["floor"]["gflop"] < whole["floor"]["gflop"]


def test_a_shape_is_handed_to_the_runtime_as_a_whole_model(run, tiny_qwen3, monkeypatch):
    class Encoder:
        """A runtime that reads what it is given with sentence-transformers."""

        backend, precision = "onnxruntime", "fp32"

        def __init__(self, model):
            self.encode = lambda texts: model.encode(texts, prompt_name="query")

        @classmethod
        def from_pretrained(cls, folder, *, backend, precision, device):
            assert (backend, precision, device) == ("onnxruntime", "auto", "cpu")
            return cls(load_encoder(folder, device=device))

    monkeypatch.setattr(hlm_systems, "query_encoder_class", lambda: Encoder)
    shape = {"shape": tiny_qwen3, "layers": 2, "prompt": "Query:"}
    hlm = shape | {"backend": "hlm", "engine": "onnxruntime"}
    report = run(systems={"plain": shape, "online": hlm}, random_weights=True)["systems"]
    assert report["online"]["agreement"]["with"] == "plain"
    assert report["online"]["agreement"]["min_cosine"] == pytest.approx(1, abs=1e-5)
    assert report["online"]["floor"]["tokens"] == report["plain"]["floor"]["tokens"]
    assert (report["online"]["backend"], report["online"]["engine"]) == ("hlm", "onnxruntime")


def test_a_shape_is_served_under_torch_without_going_over_the_disk(run, tiny_qwen3, monkeypatch):
    monkeypatch.setattr(random_weights, "load_system", None)
    shape = {"shape": tiny_qwen3, "layers": 2, "prompt": "Query:", "dtype": "bfloat16"}
    hlm = shape | {"backend": "hlm", "engine": "torch"}
    report = run(systems={"eager": shape, "online": hlm}, random_weights=True)["systems"]
    assert report["online"]["agreement"]["with"] == "eager" and report["online"]["agreement"]["min_cosine"] > 0.99
    assert (report["online"]["engine"], report["online"]["precision"]) == ("torch", "bf16")
    assert report["online"]["floor"]["weight_mib"] == report["eager"]["floor"]["weight_mib"]
    with pytest.raises(HlmError, match="precision: under engine 'torch' a shape computes in `dtype`"):
        run(systems={"online": hlm | {"precision": "fp16"}}, random_weights=True)


def test_without_tokenizer_and_data_it_says_so(run, tiny_qwen3, monkeypatch):
    monkeypatch.setattr(benchmark_entries, "find_tokenizer", lambda path: None)
    shape = {"shape": tiny_qwen3, "layers": 2}
    report = run(systems={"a": shape, "b": shape}, random_weights=True, data=None)
    assert report["data"] == "the sample catalogue" and len(report["lengths"]) > 1
    assert "random token ids, one for every 4 bytes" in report["systems"]["a"]["input"]
    assert "agreement" not in report["systems"]["b"]  # vectors of random ids are not to be compared
    with pytest.raises(HlmError, match="backend 'hlm' reads a whole model with a tokenizer, found no tokenizer"):
        run(systems={"a": shape | {"backend": "hlm"}}, random_weights=True)
