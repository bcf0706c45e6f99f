"""recipes/embed.py: a teacher's vectors on disk, for every part, resumable, the same from one process or two."""

import json
import os
import shutil
import sys
from pathlib import Path

import children
import numpy as np
import pytest

from hlm.artefacts import HlmError
from hlm.config import parse
from hlm.data.contract import document_text, load, query_text
from hlm.embedding.embed import check, processes
from hlm.embedding.ray_workers import ShardWriter
from hlm.encoders.loading import encode, fingerprint, load_encoder
from hlm.indexes.faiss_index import AdIndex
from hlm.steps import EmbedConfig
from hlm.vectors.store import VectorStore
from recipes import embed

ADS = [
    ("a1", "red kettle", "boils one litre", "for tea"),
    ("a2", "blue kettle", "boils two litres", None),
    ("a3", "steel pan", "", "for eggs"),
    ("a4", "copper pan", "28 cm", "for induction"),
    ("a5", "glass lid", "fits 28 cm pans", "see-through"),
]
QUERIES = [("q1", "red kettle", "water boiler"), ("q2", "pan 28cm", None), ("q3", "lid", "cover for pans")]
UNLABELLED = ["kettle for tea", "big pan", "lid glass", "cheap kettle"]


@pytest.fixture
def shop(tmp_path):
    """A dataset of five ads with oracle texts."""
    folder = tmp_path / "shop"
    (folder / "qrels").mkdir(parents=True)
    tables = {
        "corpus": [{"_id": i, "title": title, "text": text, "oracle": more} for i, title, text, more in ADS],
        "queries": [{"_id": i, "text": text, "oracle": more} for i, text, more in QUERIES],
        "unlabelled": [{"text": text} for text in UNLABELLED],
    }
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\ta1\t3\n")
    return folder


def run(model, data, output, *more):
    embed.main(["--model", str(model), "--data", str(data), "--output", str(output), *more])


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def close(vectors, expected):
    return np.testing.assert_allclose(vectors, expected, atol=1e-3)


def test_every_part_of_the_catalogue(tiny_bert, catalogue_200, tmp_path, caplog):
    run(tiny_bert, catalogue_200, tmp_path / "out", "--shard_rows", "64")
    data, model = load(str(catalogue_200)), load_encoder(str(tiny_bert), device="cpu", dtype="float32")
    texts = {
        "corpus": [document_text(row) for row in data.corpus],
        "unlabelled": [query_text(row) for row in data.unlabelled],
        "queries": [query_text(row) for row in data.queries],
    }
    for part, expected in texts.items():
        store = VectorStore.open(tmp_path / "out" / part)
        store.check(encoder=fingerprint(model), source=data.fingerprint(part))
        store.verify()
        prompt = "document" if part == "corpus" else "query"
        assert store.manifest["config"] == {"prompt": prompt, "oracle": False, "dtype": "float32"}
        assert len(store.manifest["shards"]) == -(-len(expected) // 64)
        close(store.gather(np.arange(len(store))), encode(model, expected, prompt_name=prompt))
    assert VectorStore.open(tmp_path / "out/corpus").ids.to_pylist() == data.corpus["_id"][:]

    before = content(tmp_path / "out")
    caplog.clear()
    with caplog.at_level("INFO", logger="hlm.embedding.embed"):
        run(tiny_bert, catalogue_200, tmp_path / "out", "--shard_rows", "64")
    assert [record.message.split(": ")[1] for record in caplog.records] == ["up to date"] * 3
    assert content(tmp_path / "out") == before


def test_goes_on_after_a_kill_with_the_same_bytes(tiny_bert, shop, tmp_path, monkeypatch):
    run(tiny_bert, shop, tmp_path / "whole", "--shard_rows", "2")
    done = []

    def failing(model, texts, **options):
        done.append(texts)
        if len(done) == 3:
            raise KeyboardInterrupt
        return encode(model, texts, **options)

    monkeypatch.setattr("hlm.embedding.embed.encode", failing)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_bert, shop, tmp_path / "killed", "--shard_rows", "2")
    run(tiny_bert, shop, tmp_path / "killed", "--shard_rows", "2")
    assert len(done) == 3 + 1 + 2 + 2  # the corpus' last shard again, then two of each of the others
    assert done[2] == done[3] == ["glass lid. fits 28 cm pans"]
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_ids_of_unlabelled_queries(tiny_bert, shop, tmp_path):
    run(tiny_bert, shop, tmp_path / "rows", "--parts", "unlabelled", "--shard_rows", "3")
    assert VectorStore.open(tmp_path / "rows/unlabelled").ids.to_pylist() == ["u0", "u1", "u2", "u3"]
    assert not (tmp_path / "rows/corpus").exists()
    rows = [{"_id": f"log-{number}", "text": text} for number, text in enumerate(UNLABELLED)]
    (shop / "unlabelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tiny_bert, shop, tmp_path / "own", "--parts", "unlabelled", "--shard_rows", "3")
    assert VectorStore.open(tmp_path / "own/unlabelled").ids.to_pylist() == ["log-0", "log-1", "log-2", "log-3"]


def test_long_shards_are_encoded_in_steps(tiny_bert, shop, tmp_path, monkeypatch):
    run(tiny_bert, shop, tmp_path / "one", "--parts", "corpus")
    monkeypatch.setattr("hlm.embedding.embed.TEXTS_PER_STEP", 2)
    run(tiny_bert, shop, tmp_path / "steps", "--parts", "corpus")
    one, steps = (VectorStore.open(tmp_path / name / "corpus") for name in ("one", "steps"))
    close(steps.gather(range(5)), one.gather(range(5)))


def test_dim_is_the_slice_normalised_again(tiny_bert, shop, tmp_path):
    run(tiny_bert, shop, tmp_path / "all", "--parts", "corpus")
    run(tiny_bert, shop, tmp_path / "cut", "--parts", "corpus", "--dim", "8")
    whole, cut = (VectorStore.open(tmp_path / name / "corpus") for name in ("all", "cut"))
    assert cut.dim == 8 < whole.dim
    sliced = whole.gather(range(5))[:, :8]
    close(cut.gather(range(5)), sliced / np.linalg.norm(sliced, axis=1, keepdims=True))
    assert cut.encoder == whole.encoder  # the same teacher: only the width differs


def test_the_index_goes_with_the_vectors(tiny_bert, shop, tmp_path, caplog):
    caplog.set_level("INFO")
    arguments = (tiny_bert, shop, tmp_path / "out", "--index", "HNSW8", "--index_dim", "8")
    run(*arguments)
    store, index = VectorStore.open(tmp_path / "out/corpus"), AdIndex.load(tmp_path / "out/index")
    assert (index.dim, len(index), index.encoder, index.source) == (8, 5, store.encoder, store.source)
    head = store.gather(np.array([3]))[:, :8]
    assert index.search(head / np.linalg.norm(head), k=1)[1] == [["a4"]]
    before = content(tmp_path / "out")
    run(*arguments)
    assert content(tmp_path / "out") == before and "index: up to date" in caplog.text
    run(tiny_bert, shop, tmp_path / "out", "--index", "Flat")
    assert AdIndex.load(tmp_path / "out/index").dim == store.dim
    with pytest.raises(HlmError, match="index: expected 'corpus' among the parts"):
        run(tiny_bert, shop, tmp_path / "out", "--index", "Flat", "--parts", "queries")


def test_oracle_reaches_ads_and_queries(tiny_bert, shop, tmp_path):
    run(tiny_bert, shop, tmp_path / "plain")
    run(tiny_bert, shop, tmp_path / "oracle", "--oracle", "true")
    for part, with_oracle in (("corpus", [0, 2, 3, 4]), ("queries", [0, 2]), ("unlabelled", [])):
        plain, oracle = (VectorStore.open(tmp_path / name / part) for name in ("plain", "oracle"))
        moved = np.abs(plain.gather(range(len(plain))) - oracle.gather(range(len(plain)))).max(axis=1) > 1e-3
        assert np.flatnonzero(moved).tolist() == with_oracle, part
        assert oracle.manifest["config"]["oracle"] is True
    with pytest.raises(HlmError, match="another run.*facts.*'oracle': True.*the folder.*'oracle': False"):
        run(tiny_bert, shop, tmp_path / "plain", "--oracle", "true")


def test_ads_that_lose_their_end_are_said_once(tiny_bert, shop, tmp_path, caplog):
    for told in (["100% of 5 ads looked at", "67% of 3 queries looked at"], []):
        caplog.clear()
        run(tiny_bert, shop, tmp_path / "out", "--max_seq_length", "4", "--parts", "corpus", "queries")
        said = [record.getMessage() for record in caplog.records if "their ends are not read" in record.getMessage()]
        assert [text.split(" have more")[0] for text in said] == told  # nothing is encoded the second time


def test_oracle_without_a_column(tiny_bert, shop, tmp_path):
    with pytest.raises(HlmError, match="oracle: expected an 'oracle' column"):
        run(tiny_bert, shop, tmp_path / "out", "--parts", "unlabelled", "--oracle", "true")


def test_refuses_another_teacher_and_other_texts(tiny_bert, shop, tmp_path):
    run(tiny_bert, shop, tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(HlmError, match="another run .encoder: this run has"):
        run(tiny_bert, shop, tmp_path / "out", "--max_seq_length", "5")  # truncation is part of the encoder
    corpus = (shop / "corpus.jsonl").read_text()
    (shop / "corpus.jsonl").write_text(corpus.replace('"title": "', '"title": "new '))  # no text is left
    with pytest.raises(HlmError, match="another run .source: this run has"):
        run(tiny_bert, shop, tmp_path / "out")
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "corpus", "query"], "parts: expected some of corpus, unlabelled, queries"),
        (["--parts", "corpus", "corpus"], "each once"),
        (["--shard_rows", "0"], "shard_rows: expected at least 1, found 0"),
        (["--dim", "-1"], "dim: expected at least 1, found -1"),
        (["--dtype", "int8"], "dtype"),
        (["--index", "milvus:HNSW"], "index: expected a kind of FAISS's or LanceDB's"),
        (["--index", "glow:Flat"], "expected an index of the engine faiss or"),
        (["--index_columns", "price"], "index_columns: expected an index"),
        (["--keep_versions", "0"], "keep_versions: expected at least 1"),
        (["--shards_rows", "3"], "did you mean '--shard_rows'"),
    ],
)
def test_bad_settings_stop_before_anything_is_loaded(tmp_path, arguments, message):
    with pytest.raises(HlmError, match=message):
        run(tmp_path / "no-model", tmp_path / "no-data", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_dim_beyond_the_model(tiny_bert, shop, tmp_path):
    with pytest.raises(HlmError, match="100000"):
        run(tiny_bert, shop, tmp_path / "out", "--dim", "100000")


def test_a_part_that_the_dataset_lacks(tiny_bert, shop, tmp_path):
    (shop / "unlabelled.jsonl").unlink()
    with pytest.raises(HlmError, match="no 'unlabelled' table"):
        run(tiny_bert, shop, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quickstart_config_is_valid():
    config = "recipes/configs/quickstart/embed.yaml"
    (parsed,) = parse(EmbedConfig, argv=["--config", str(Path(embed.__file__).parents[1] / config)])
    check(parsed)


def test_processes_that_do_not_work_together_are_refused(tiny_bert, shop, tmp_path, monkeypatch):
    processes()  # makes accelerate's state of one process, which stays for the life of this one
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HlmError, match="expected 2 processes .WORLD_SIZE., found 1 working together"):
        run(tiny_bert, shop, tmp_path / "out")


def test_two_processes_write_the_same_bytes_as_one(tiny_bert, shop, tmp_path):
    run(tiny_bert, shop, tmp_path / "one", "--shard_rows", "2")
    # `accelerate launch --cpu --num_processes 2` silently runs one process; torchrun runs two.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    recipe = [embed.__file__, "--model", tiny_bert, "--data", shop, "--output", tmp_path / "two", "--shard_rows", "2"]
    root = Path(embed.__file__).parents[1]
    settings = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = children.run(
        [*command, *map(str, recipe)],
        cwd=root,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
        forks=True,
    )
    assert done.returncode == 0, done.stderr
    assert "3 of 5 vectors written by the first process" in done.stderr  # shards 0 and 2; shard 1 is the other's
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_ads_without_text_are_left_out_on_request(tiny_bert, catalogue_200, tmp_path):
    shutil.copytree(catalogue_200, tmp_path / "data")
    corpus = next((tmp_path / "data").glob("corpus.*"))
    with open(corpus, "a") as file:
        file.write('{"_id": "empty", "title": "", "text": ""}\n')
    argv = ["--model", str(tiny_bert), "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    argv += ["--parts", "corpus"]
    with pytest.raises(HlmError, match="line 201: .*skip_bad_rows"):
        embed.main(argv)
    embed.main([*argv, "--skip_bad_rows", "true"])
    assert len(VectorStore.open(tmp_path / "out/corpus")) == 200


def test_tasks_of_an_array_write_the_store_of_one_process(tiny_bert, shop, tmp_path, caplog):
    """No task waits for another: whoever finds all shards whole joins them."""
    more = ("--shard_rows", "2", "--index", "Flat")
    run(tiny_bert, shop, tmp_path / "one", *more)
    caplog.set_level("INFO")
    for task in (2, 0, 0):  # the second task was killed before it wrote anything; the first is run again
        run(tiny_bert, shop, tmp_path / "array", *more, "--shard", f"{task}/3")
    assert (
        not (tmp_path / "array/index").exists()
        and "shards of corpus, unlabelled, queries are still with other" in caplog.text
    )
    run(tiny_bert, shop, tmp_path / "array", *more, "--shard", "1/2")  # what is left, whatever it was shared by before
    assert content(tmp_path / "array") == content(tmp_path / "one")


@pytest.mark.parametrize("shard", ["3/3", "1", "-1/3", "a/b", "0/0"])
def test_a_share_that_is_none(tiny_bert, shop, tmp_path, shard):
    with pytest.raises(HlmError, match="shard: expected i/n with i from 0 to n - 1"):
        run(tiny_bert, shop, tmp_path / "out", f"--shard={shard}")


def test_a_worker_writes_the_shards_that_it_is_given(tiny_bert, shop, tmp_path):
    """As Ray gives them; here without a cluster."""
    run(tiny_bert, shop, tmp_path / "one", "--shard_rows", "2")
    settings = {"model": tiny_bert, "data": str(shop), "output": str(tmp_path / "given"), "shard_rows": 2}
    worker = ShardWriter(settings)
    for part, shard in (("corpus", 2), ("queries", 0), ("corpus", 0), ("corpus", 2)):
        assert worker({"part": np.array([part]), "shard": np.array([shard])}) == {"refused": [""]}
    assert not (tmp_path / "given/corpus/hlm.json").exists()
    other = ShardWriter(settings | {"max_seq_length": 5})
    (message,) = other({"part": np.array(["corpus"]), "shard": np.array([1])})["refused"]
    assert "another run (encoder: this run has" in message
    run(tiny_bert, shop, tmp_path / "given", "--shard_rows", "2")  # joins, and writes what nobody was given
    assert content(tmp_path / "given") == content(tmp_path / "one")


def test_ray_writes_the_store_of_one_process(tiny_bert, shop, tmp_path):
    ray = pytest.importorskip("ray", reason="a Ray cluster, 80 MB, is not in what `make test` installs")
    run(tiny_bert, shop, tmp_path / "one", "--shard_rows", "2")
    with ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False):
        run(tiny_bert, shop, tmp_path / "ray", "--shard_rows", "2", "--ray_workers", "2")
        assert content(tmp_path / "ray") == content(tmp_path / "one")
        with pytest.raises(HlmError, match="holds vectors of another run .shard_rows"):
            run(tiny_bert, shop, tmp_path / "ray", "--shard_rows", "3", "--ray_workers", "1")


def test_workers_and_a_share_are_two_ways(tiny_bert, shop, tmp_path):
    with pytest.raises(HlmError, match="expected ray_workers or shard, found both"):
        run(tiny_bert, shop, tmp_path / "out", "--ray_workers", "2", "--shard", "0/2")
