"""recipes/evaluate.py end to end on a small catalogue with real, tiny encoders."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import children
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import hlm
from hlm.artefacts import HlmError, write_manifest
from hlm.data.contract import document_text, load
from hlm.encoders.loading import encode, fingerprint, load_encoder
from hlm.evaluation.inputs import find_inputs
from hlm.evaluation.metrics import dense_run
from hlm.indexes.faiss_index import AdIndex
from hlm.steps import System
from hlm.vectors.store import VectorStore, write_store
from recipes import evaluate

COLOURS, THINGS = ("red", "blue", "green", "black", "white"), ("shoe", "phone", "kettle", "lamp", "chair", "bag")


def make_encoder(folder, *, seed, hidden=32):
    """An untrained two-layer BERT: mean pooling makes it a bag of random word vectors, enough to rank by words."""
    words = ["[PAD]", "[UNK]", *COLOURS, *THINGS, "a", "good", "for", "sale"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    body = folder.with_name(f"{folder.name}-body")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(body)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(body)
    modules = [Transformer(str(body), max_seq_length=32), Pooling(hidden), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))


def make_student(folder, source, teacher):
    shutil.copytree(source, folder)
    write_manifest(folder, "student", inputs={"teacher": teacher}, config={})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Data, encoders, the teacher's store and students: `good` is the teacher itself, `poor` another model."""
    root = tmp_path_factory.mktemp("evaluate")
    data = root / "data"
    (data / "qrels").mkdir(parents=True)
    ads = [(colour, thing) for colour in COLOURS for thing in THINGS]
    with open(data / "corpus.jsonl", "w") as file:
        for number, (colour, thing) in enumerate(ads):
            row = {"_id": f"ad{number}", "title": f"{colour} {thing}", "text": f"a good {thing} for sale"}
            file.write(json.dumps(row) + "\n")
    with open(data / "queries.jsonl", "w") as file:
        for number, (colour, thing) in enumerate(ads[:20]):
            row = {"_id": f"q{number}", "text": f"{thing} {colour}", "kind": "head" if number % 3 else None}
            file.write(json.dumps(row) + "\n")
    with open(data / "qrels" / "test.tsv", "w") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for number, (colour, thing) in enumerate(ads[:20]):
            for ad, other in enumerate(ads):
                grade = 2 * (thing == other[1]) + (colour == other[0])
                file.write(f"q{number}\tad{ad}\t{grade}\n")

    for name, seed in (("backbone", 0), ("teacher", 1)):
        make_encoder(root / name, seed=seed)
    model = load_encoder(str(root / "teacher"), dtype="float32")
    rows = load(str(data), splits=("test",))
    write_store(
        root / "store",
        [(row["_id"], document_text(row)) for row in rows.corpus],
        lambda texts: encode(model, texts, prompt_name="document"),
        dim=32,
        encoder=fingerprint(model),
        source=rows.fingerprint("corpus"),
        n_rows=len(ads),
    )
    make_student(root / "good", root / "teacher", fingerprint(model))
    make_student(root / "poor", root / "backbone", fingerprint(model))
    make_student(root / "foreign", root / "teacher", "0123456789abcdef")
    return root


def run(inputs, output, systems, /, **settings):
    config = {"data": str(inputs / "data"), "output": str(output), "bootstrap_samples": 200, "systems": systems}
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(config | settings))
    evaluate.main(["--config", str(output / "config.yaml")])
    return json.loads((output / "report.json").read_text())


def all_systems(inputs):
    return {
        "student": str(inputs / "good"),
        "contrastive_only": str(inputs / "poor"),
        "teacher": {"model": str(inputs / "teacher"), "corpus": str(inputs / "store")},
        "backbone": str(inputs / "backbone"),
        "bm25": None,
    }


def test_called_in_python_it_names_the_command_that_makes_it_again(inputs, tmp_path, capsys):
    systems = {"teacher": {"model": inputs / "teacher", "corpus": inputs / "store"}, "student": inputs / "good"}
    report = hlm.evaluate(inputs / "data", systems, output=tmp_path / "one", bootstrap_samples=200, incomplete=True)
    assert report == json.loads((tmp_path / "one/report.json").read_text()) and capsys.readouterr().out == ""
    script, *words = shlex.split(report["environment"]["command"])
    assert script == "recipes/evaluate.py"
    evaluate.main([*words, "--output", str(tmp_path / "two")])
    again = json.loads((tmp_path / "two/report.json").read_text())
    assert {**again, "environment": None} == {**report, "environment": None}


def test_the_student_on_the_shipped_index_has_a_line_of_its_own(inputs, tmp_path):
    AdIndex.build(VectorStore.open(inputs / "store"), "IVF8,Flat", nprobe=1).save(tmp_path / "index")
    shipped = {"model": str(inputs / "good"), "index": str(tmp_path / "index")}
    systems = {name: all_systems(inputs)[name] for name in ("teacher", "student")} | {"student_on_index": shipped}
    report = run(inputs, tmp_path / "one", systems)
    exact, found = (report["systems"][name] for name in ("student", "student_on_index"))
    assert 0 < found["recall@100"] < exact["recall@100"] and found["overlap@10"] < exact["overlap@10"] == 1
    assert 0 < report["recovery_by_system"]["student_on_index"]["ndcg@10"]["value"] < 1
    AdIndex.build(VectorStore.open(inputs / "store"), "IVF8,Flat", nprobe=8).save(tmp_path / "index")
    again = run(inputs, tmp_path / "one", systems)  # kept runs are not of this index
    assert again["systems"]["student_on_index"]["recall@100"] == exact["recall@100"]
    for wrong, message in (
        ({"model": str(inputs / "good")}, "student_on_index.*give it as `index`"),
        (shipped | {"index": str(tmp_path / "none")}, "kind 'index' at .*none"),
    ):
        with pytest.raises(HlmError, match=message):
            run(inputs, tmp_path / "two", systems | {"student_on_index": wrong})
    store = VectorStore.open(inputs / "store")
    AdIndex.from_vectors(store.gather(range(9)), list("abcdefghi"), encoder=store.encoder).save(tmp_path / "index")
    with pytest.raises(HlmError, match="an index of the 30 ads of .*found one of 9 other ads"):
        run(inputs, tmp_path / "two", systems)


def test_report_end_to_end(inputs, tmp_path, capsys):
    report = run(inputs, tmp_path, all_systems(inputs))
    printed = capsys.readouterr().out
    assert list(report["systems"]) == ["bm25", "backbone", "teacher", "student", "contrastive_only"]
    assert [line.split()[0] for line in printed.splitlines()[4:9]] == list(report["systems"])
    # This student is its teacher.
    assert report["overlap@10"] == 1
    assert report["recovery"]["ndcg@10"] == {"value": 1, "ci95": [1, 1]}
    assert report["systems"]["student"]["ndcg@10"] == report["systems"]["teacher"]["ndcg@10"] > 0.5
    # A model that never saw the teacher's space finds next to nothing in it.
    assert report["recovery_by_system"]["contrastive_only"]["ndcg@10"]["ci95"][1] < 1
    assert report["systems"]["bm25"]["params_total"] == 0
    values = report["systems"]["teacher"]
    assert values["params_total"] - values["params_non_embedding"] == (17 + 32 + 2) * 32
    assert set(report["slices"]["kind"]) == {"head", "(none)"} and set(report["slices"]["length"]) == {"2"}
    assert report["environment"]["encoders"]["teacher"] == report["environment"]["encoders"]["student"]
    assert (report["k"], report["split"], report["queries"], report["relevance_level"]) == (10, "test", 20, 2)
    scores = pq.read_table(tmp_path / "per_query.parquet")
    assert scores.num_rows == 5 * 20
    with Image.open(tmp_path / "report.png") as image:
        assert image.format == "PNG"


def test_rerun_encodes_nothing_and_a_changed_input_does(inputs, tmp_path, monkeypatch):
    first = run(inputs, tmp_path, all_systems(inputs))
    encoded = []
    noted = lambda *args, **kwargs: encoded.append(1) or encode(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr("hlm.evaluation.evaluate.encode", noted)
    second = run(inputs, tmp_path, all_systems(inputs))
    assert encoded == []
    assert second["systems"] == first["systems"] and second["recovery"] == first["recovery"]
    changed = all_systems(inputs) | {"student": str(inputs / "poor")}
    third = run(inputs, tmp_path, changed)
    assert len(encoded) == 1
    assert third["systems"]["student"]["ndcg@10"] == first["systems"]["contrastive_only"]["ndcg@10"]


def test_a_kill_loses_one_system_at_most(inputs, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def die(*args, **kwargs):
        raise Killed

    real = dense_run
    calls = []
    monkeypatch.setattr(
        "hlm.evaluation.evaluate.dense_run", lambda *args: real(*args) if calls.append(1) or len(calls) < 3 else die()
    )
    with pytest.raises(Killed):
        run(inputs, tmp_path, all_systems(inputs))
    assert not (tmp_path / "report.json").exists()
    kept = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert kept == ["backbone.parquet", "bm25.parquet", "teacher.parquet"]
    calls.clear()
    run(inputs, tmp_path, all_systems(inputs))
    assert len(calls) == 2  # the two students


def test_runs_as_a_script(inputs, tmp_path):
    # The script's own name is that of a library, and Python puts its folder first on the path.
    config = {"data": str(inputs / "data"), "output": str(tmp_path), "systems": {"bm25": None}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = [sys.executable, evaluate.__file__, "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run([*arguments, "--k", "5"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[4].startswith("bm25") and "DEBUG" not in done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert "precision@5" in report["systems"]["bm25"] and report["environment"]["command"].endswith("--k 5")
    refused = children.run([*arguments, "--split", "dev"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith("error: ")


def test_only_the_first_process_works(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(FileNotFoundError):
        run(inputs, tmp_path, all_systems(inputs))
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda root: {"student": str(root / "foreign")}, {}, "student of teacher 0123456789abcdef"),
        (lambda root: {"student": str(root / "teacher")}, {}, "kind 'student'"),
        (lambda root: {"backbone": {"model": str(root / "backbone"), "corpus": str(root / "store")}}, {}, "encoder"),
        (lambda root: {"studnet": "x"}, {}, "did you mean 'student'"),
        (lambda root: {"student": None}, {}, "expected a model for 'student'"),
        (lambda root: {"student": {"model": "x", "corpsu": "y"}}, {}, "unknown key 'corpsu'; did you mean 'corpus'"),
        (lambda root: {"student": {"model": "x", "dtype": "fp8"}}, {}, "'student': dtype: expected one of 'float32'"),
        (lambda root: {"student": {"model": "x", "oracle": "no"}}, {}, "'student': oracle: expected true or false"),
        (lambda root: {"student": str(root / "nowhere")}, {}, "'student': expected a model folder at .*nowhere"),
        (lambda root: {"student": "nobody/nothing"}, {}, "'student': .*found no modules.json of 'nobody/nothing'"),
        (lambda root: {"student": str(root / "backbone-body")}, {}, "'student': .*found no modules.json"),
        (lambda root: {"contrastive_only": str(root / "backbone")}, {}, "'contrastive_only': .*kind 'student'"),
        (lambda root: {"backbone": "package:no_such/model"}, {}, "'backbone': expected an installed package"),
        (
            lambda root: {"student": {"model": str(root / "good"), "corpus": str(root / "x")}},
            {},
            "'student': .*hlm.json",
        ),
        (
            lambda root: {"teacher": {"model": str(root / "teacher"), "corpus": str(root / "data")}},
            {},
            "'teacher': exp",
        ),
        (lambda root: {}, {"systems": {}}, "systems: expected some of bm25"),
        (lambda root: {}, {"k": 0}, "k: expected 1 or more, found 0"),
        (lambda root: {}, {"bootstrap_samples": 0}, "bootstrap_samples: expected 1 or more"),
        (lambda root: {}, {"device": "cuda:99"}, "device: expected cuda:99"),
        (lambda root: {}, {"device": "gpu"}, "device: expected cpu, cuda"),
        (lambda root: {"bm25": "x"}, {}, "bm25 takes nothing"),
        (lambda root: {}, {"depth": 50}, "depth: expected 100"),
        (lambda root: {}, {"split": "dev"}, "split 'dev'"),
        (lambda root: {}, {"relevance_level": 9}, "judged 9 or more"),
    ],
)
def test_refuses_before_anything_is_searched(inputs, tmp_path, monkeypatch, change, settings, message):
    monkeypatch.setattr("hlm.evaluation.evaluate.bm25", lambda *_: pytest.fail("searched"))
    if message != "encoder":  # known of a model without a manifest once it is loaded
        monkeypatch.setattr("hlm.evaluation.evaluate.load_encoder", lambda *_, **__: pytest.fail("loaded"))
    else:
        monkeypatch.setattr("hlm.evaluation.evaluate.bm25", lambda *_: {})
    with pytest.raises(HlmError, match=message):
        run(inputs, tmp_path, all_systems(inputs) | change(inputs), **settings)
    assert not (tmp_path / "report.json").exists()


def test_what_is_on_record_is_compared_before_anything_is_searched(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("hlm.evaluation.evaluate.bm25", lambda *_: pytest.fail("searched"))
    recorded = shutil.copytree(inputs / "backbone", tmp_path / "recorded")
    write_manifest(recorded, "teacher", inputs={}, config={}, encoder="0123456789abcdef")
    other = {"model": str(recorded), "corpus": str(inputs / "store")}
    with pytest.raises(HlmError, match="'teacher': .*0123456789abcdef"):
        run(inputs, tmp_path / "a", all_systems(inputs) | {"teacher": other})
    # Read in another dtype it is another encoder than the one on record.
    halved = {"model": str(recorded), "dtype": "bfloat16", "corpus": str(inputs / "store")}
    assert find_inputs({"teacher": System(**halved)})["teacher"].dim == 32
    # Without vectors of its own the teacher's record says whose the students are to be.
    with pytest.raises(HlmError, match="'student': .*0123456789abcdef"):
        run(inputs, tmp_path / "b", all_systems(inputs) | {"teacher": str(recorded)})
    data = shutil.copytree(inputs / "data", tmp_path / "data")
    with open(data / "corpus.jsonl", "a") as file:
        file.write(json.dumps({"_id": "one more", "title": "red shoe", "text": ""}) + "\n")
    with pytest.raises(HlmError, match="source"):
        run(inputs, tmp_path / "c", all_systems(inputs), data=str(data))


@pytest.mark.parametrize("name", ["report.json", "report.png", "per_query.parquet", "runs/bm25.parquet"])
def test_somebody_elses_file_is_not_overwritten(inputs, tmp_path, name):
    (tmp_path / "runs").mkdir()
    (tmp_path / name).write_text('{"systems": "mine"}')
    with pytest.raises(HlmError, match=f"found .*HLM did not write|{name}, found a file that HLM did not write"):
        run(inputs, tmp_path, {"bm25": None})
    assert (tmp_path / name).read_text() == '{"systems": "mine"}'


def test_a_home_of_other_files_and_an_older_report_are_fine(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "letter.txt").write_text("dear")
    for _ in range(2):
        run(inputs, tmp_path, {"bm25": None}, output="~")
    assert (tmp_path / "letter.txt").read_text() == "dear"
    kept = json.loads((tmp_path / "report.json").read_text())
    assert list(kept["systems"]) == ["bm25"] and sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml",
        "letter.txt",
        "per_query.parquet",
        "report.json",
        "report.png",
        "runs",
    ]


def test_a_second_evaluation_of_one_output_is_told_who_runs(inputs, tmp_path):
    hold = "import sys; from hlm.report_files import claimed_report\n"
    hold += "with claimed_report(sys.argv[1], 'report.json'): print('held', flush=True); sys.stdin.read()"
    variables = os.environ | {"PYTHONPATH": str(Path(evaluate.__file__).parents[2])}
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(HlmError, match=f"process {other.pid} "):
            run(inputs, tmp_path, {"bm25": None})
        other.stdin.close()
    run(inputs, tmp_path, {"bm25": None})


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_an_output_that_cannot_be_is_refused_first(inputs, tmp_path, monkeypatch, output):
    (tmp_path / "file").touch()
    monkeypatch.setattr("hlm.evaluation.evaluate.load", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(HlmError, match="found a file at .*/file"):
        run(inputs, tmp_path / "x", {"bm25": None}, output=str(tmp_path / output))


def test_a_student_needs_the_teachers_vectors(inputs, tmp_path):
    with pytest.raises(HlmError, match="add `teacher`"):
        run(inputs, tmp_path, {"student": str(inputs / "good")})
    alone = run(inputs, tmp_path, {"student": {"model": str(inputs / "good"), "corpus": str(inputs / "store")}})
    assert alone["recovery"] == {} and alone["systems"]["student"]["ndcg@10"] > 0.5


def test_the_teacher_can_encode_the_corpus_itself(inputs, tmp_path):
    stored = run(inputs, tmp_path / "stored", all_systems(inputs))
    live = run(inputs, tmp_path / "live", all_systems(inputs) | {"teacher": str(inputs / "teacher")})
    assert live["systems"]["teacher"] == pytest.approx(stored["systems"]["teacher"])


def test_queries_weigh_their_counts_beside(inputs, tmp_path, capsys):
    """A log's counts are in `queries`; the figures by query stay as they are."""
    data = shutil.copytree(inputs / "data", tmp_path / "data")
    rows = [json.loads(line) for line in (data / "queries.jsonl").read_text().splitlines()]
    rows = [row | {"count": 50 if number == 0 else 0} for number, row in enumerate(rows)]
    (data / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = {"model": str(inputs / "teacher"), "corpus": str(inputs / "store")}
    systems = {"teacher": teacher, "student": str(inputs / "poor")}
    report = run(inputs, tmp_path / "out", systems, data=str(data), by_count=True)
    plain = run(inputs, tmp_path / "plain", systems)
    assert report["systems"] == plain["systems"] and "by_count" not in plain
    (first,) = [
        s
        for s in pq.read_table(tmp_path / "out/per_query.parquet").to_pylist()
        if s["query_id"] == "q0" and s["system"] == "teacher"
    ]
    others = 20 * plain["systems"]["teacher"]["ndcg@10"] - first["ndcg@10"]
    assert report["by_count"]["searches"] == 69
    want = (50 * first["ndcg@10"] + others) / 69
    assert report["by_count"]["systems"]["teacher"]["ndcg@10"] == pytest.approx(want)
    assert "each query weighed by its count, 69 searches" in capsys.readouterr().out
    with pytest.raises(HlmError, match="queries: expected the column 'count'"):
        run(inputs, tmp_path / "none", systems, by_count=True)
