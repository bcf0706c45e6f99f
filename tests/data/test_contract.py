import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hlm.artefacts import HlmError, fingerprint_texts
from hlm.data.contract import document_text, load, query_text, titles, training_pairs

CORPUS = [
    {"_id": "d1", "title": "Laser printer", "text": "Prints in colour", "attrs": {"colour": "black"}, "price": 10},
    {"_id": "d2", "title": "Tripod", "text": None, "attrs": {}, "price": 10.5},
    {"_id": "d3", "title": "", "text": "A \t bag\nfor laptops", "attrs": {"size": 15}, "price": None},
]
QUERIES = [{"_id": "q1", "text": "printer", "kind": "head"}, {"_id": "q2", "text": "camera bag", "kind": None}]
QRELS = [("q1", "d1", 3), ("q1", "d2", 0), ("q2", "d3", 2)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_qrels(folder, rows=QRELS, split="test"):
    (folder / "qrels").mkdir(exist_ok=True)
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in rows)]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "corpus.jsonl", CORPUS)
    write_jsonl(folder / "queries.jsonl", QUERIES)
    write_qrels(folder)
    return folder


@pytest.fixture
def read(tmp_path):
    return lambda folder, **options: load(str(folder), cache_dir=tmp_path / "cache", **options)


def test_a_folder_loads(folder, read):
    write_jsonl(folder / "unlabelled.jsonl", [{"text": "usb hub"}])
    data = read(folder)
    assert data.corpus["_id"] == ["d1", "d2", "d3"]
    assert data.corpus["text"][1] is None  # nothing missing becomes ""
    assert json.loads(data.corpus[2]["attrs"]) == {"size": 15}
    assert data.corpus["price"] == [10.0, 10.5, None]
    assert data.qrels == {"test": {"q1": {"d1": 3, "d2": 0}, "q2": {"d3": 2}}}
    assert data.unlabelled["text"] == ["usb hub"]
    assert data.queries["kind"] == ["head", None]
    assert data.split_queries("test") == [("q1", "printer"), ("q2", "camera bag")]
    assert training_pairs(data, "test") == [("q1", "d1", 3), ("q2", "d3", 2)]


def test_split_queries_keeps_file_order_and_only_judged_ones(folder, read):
    write_qrels(folder, [("q2", "d3", 1)], split="train")
    assert read(folder).split_queries("train") == [("q2", "camera bag")]


def test_texts():
    assert [document_text(row) for row in CORPUS] == [
        "Laser printer. Prints in colour",
        "Tripod",
        "A bag for laptops",
    ]
    row = {"title": "What is it?", "text": "A fan.", "oracle": "cooler"}
    assert document_text(row) == "What is it? A fan."
    assert document_text(row, oracle=True) == "What is it? A fan. cooler"
    assert query_text({"text": "fan", "oracle": "cpu cooler"}) == "fan"
    assert query_text({"text": "fan", "oracle": "cpu cooler"}, oracle=True) == "fan. cpu cooler"
    assert query_text({"text": "fan"}, oracle=True) == "fan"


def test_every_format_gives_the_same_data_and_fingerprint(folder, read, tmp_path):
    expected = read(folder)
    for suffix in ("tsv", "csv", "parquet"):
        other = tmp_path / suffix
        other.mkdir()
        (other / "qrels").mkdir()
        if suffix == "parquet":
            pq.write_table(
                pa.Table.from_pylist([{k: r[k] for k in ("_id", "title", "text")} for r in CORPUS]),
                other / "corpus.parquet",
            )
            pq.write_table(pa.Table.from_pylist(QUERIES), other / "queries.parquet")
            rows = [dict(zip(("query-id", "corpus-id", "score"), row, strict=True)) for row in QRELS]
            pq.write_table(pa.Table.from_pylist(rows), other / "qrels" / "test.parquet")
        else:
            tab = "\t" if suffix == "tsv" else ","
            (other / f"corpus.{suffix}").write_text(
                tab.join(("_id", "title", "text"))
                + "\n"
                + tab.join(("d1", "Laser printer", "Prints in colour"))
                + "\r\n"
                + tab.join(("d2", "Tripod", ""))
                + "\n"
                + tab.join(("d3", "", '"A   bag\nfor laptops"'))
                + "\n"
            )
            (other / f"queries.{suffix}").write_text(f"_id{tab}text\nq1{tab}printer\nq2{tab}camera bag\n")
            (other / "qrels" / f"test.{suffix}").write_text(
                "\n".join(tab.join(map(str, row)) for row in [("query-id", "corpus-id", "score"), *QRELS])
            )
        data = read(other)
        assert data.qrels == expected.qrels
        for part in ("corpus", "queries", "qrels/test"):
            assert data.fingerprint(part) == expected.fingerprint(part), (suffix, part)


def test_fingerprint_follows_what_encoders_read(folder, read):
    before = read(folder).fingerprint("corpus")
    write_jsonl(folder / "corpus.jsonl", [row | {"price": 1} for row in CORPUS])
    assert read(folder).fingerprint("corpus") == before
    write_jsonl(folder / "corpus.jsonl", [row | {"oracle": "landing page"} for row in CORPUS])
    with_oracle = read(folder).fingerprint("corpus")
    write_jsonl(folder / "corpus.jsonl", [CORPUS[0] | {"title": "Ink printer"}, *CORPUS[1:]])
    assert len({before, with_oracle, read(folder).fingerprint("corpus")}) == 3
    with pytest.raises(HlmError, match="no 'unlabelled' table"):
        read(folder).fingerprint("unlabelled")


def test_a_table_is_read_once_for_its_fingerprint(folder, read, monkeypatch):
    given, asked = read(folder, splits=("test",)), []
    taken = "hlm.data.contract.fingerprint_texts"
    monkeypatch.setattr(taken, lambda texts: asked.append(1) or fingerprint_texts(texts))
    parts = ("corpus", "queries", "qrels/test")
    assert [[given.fingerprint(part) for part in parts] for _ in range(3)] == [
        ["4c1236eca2d65712", "aa9e525ffcb0e79c", "9060c550cb9da04a"]
    ] * 3
    assert len(asked) == 2 + 3  # judgements can change: theirs is taken anew
    given.qrels["test"]["q1"]["d1"] = 9
    assert given.fingerprint("qrels/test") != "9060c550cb9da04a"
    again = read(folder, splits=("test",))  # as another process would: a corpus of tens of millions takes minutes
    assert again.fingerprint("corpus") == "4c1236eca2d65712" and len(asked) == 2 + 3 + 1
    changed = dataclasses.replace(again, corpus=again.corpus.select([0]))
    assert changed.fingerprint("corpus") != "4c1236eca2d65712"


def test_second_load_maps_the_cached_file(folder, read, monkeypatch):
    read(folder)
    monkeypatch.setattr("hlm.data.tables._check_rows", lambda *_: pytest.fail("checked again"))
    data = read(folder)
    assert data.corpus.cache_files[0]["filename"].endswith(".arrow")
    assert len(data.corpus) == 3


def test_titles_come_from_the_same_cached_file(folder, read, tmp_path, monkeypatch):
    read(folder, skip_bad_rows=True)
    monkeypatch.setattr("hlm.data.tables._check_rows", lambda *_: pytest.fail("checked again"))
    cache = tmp_path / "cache"
    assert titles(str(folder), ["d3", "d1"], cache_dir=cache) == ["A \t bag\nfor laptops", "Laser printer"]
    with pytest.raises(HlmError, match=f"the ads of the index in {folder}, found no 'd9'"):
        titles(str(folder), ["d1", "d9"], cache_dir=cache)


def test_checked_tables_lie_beside_those_of_datasets(tmp_path):
    code = (
        "import datasets, pathlib; from hlm.data.contract import _cache; "
        "assert _cache(None) == pathlib.Path(datasets.config.HF_DATASETS_CACHE) / 'hlm'"
    )
    home = {"HF_HOME": str(tmp_path / "home")}
    for variables in (home, home | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}):
        subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | variables)


def test_a_failed_check_leaves_no_cache(folder, read, tmp_path):
    write_jsonl(folder / "corpus.jsonl", [*CORPUS, CORPUS[0]])
    with pytest.raises(HlmError):
        read(folder)
    assert not list((tmp_path / "cache").iterdir())


BAD = [
    ("corpus.jsonl", '{"_id": "d1", "title": "a"}\n{"title": "b"}\n', ["line 2", "_id", "title"]),
    ("corpus.jsonl", '{"_id": "", "title": "a"}\n', ["line 1", "an id", "''"]),
    ("corpus.jsonl", '{"_id": null, "title": "a"}\n', ["line 1", "an id", "None"]),
    (
        "corpus.jsonl",
        '{"_id": "d1", "title": "a"}\n{"_id": "x", "title": "a"}\n{"_id": "d1", "title": "b"}\n',
        ["line 3", "'d1'", "line 1"],
    ),
    ("corpus.jsonl", '{"_id": "d1", "title": " ", "text": ""}\n', ["line 1", "title or text", "empty"]),
    ("corpus.jsonl", '{"_id": "d1", "title": 7}\n', ["line 1", "text", "7"]),
    ("corpus.jsonl", '{"id": "d1", "name": "a"}\n', ["line 1", "_id", "id, name", "rename"]),
    ("corpus.jsonl", '{"_id": "d1", "title": "a"\n', ["line 1", "JSON"]),
    ("corpus.jsonl", '{"_id": "d1", "title": "\\ud83d"}\n', ["line 1", "surrogate"]),
    ("corpus.jsonl", '["d1"]\n', ["line 1", "list"]),
    ("corpus.jsonl", b'{"_id": "d1", "title": "a"}\n{"_id": "d2", "title": "\xff"}\n', ["line 2", "UTF-8", "0xff"]),
    ("corpus.jsonl", "", ["at least one row"]),
    ("queries.jsonl", '{"_id": "q1", "text": ""}\n', ["line 1", "text", "empty"]),
    ("queries.jsonl", '{"_id": "q1", "title": "a"}\n', ["line 1", "text", "_id, title"]),
    ("unlabelled.jsonl", '{"text": "a"}\n{"text": null}\n', ["line 2", "empty"]),
    ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", ["empty split"]),
    ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t1\nq9\td1\t1\n", ["line 3", "query-id", "'q9'"]),
    ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td9\t1\n", ["line 2", "corpus-id", "'d9'"]),
    ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\thigh\n", ["line 2", "score", "'high'"]),
    ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\tnan\n", ["line 2", "score", "'nan'"]),
    ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t-1\n", ["line 2", "score", "'-1'"]),
    ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t0.5\n", ["line 2", "score", "'0.5'"]),
    ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\n", ["line 2", "3 cells", "found 2"]),
    ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td1\t2\n", ["line 3", "one grade"]),
    ("qrels/test.tsv", "one\ttwo\tscore\nq1\td1\t1\n", ["query-id", "one, two, score", "header"]),
    ("qrels/test.tsv", "qid\tquery-id\tdid\tscore\nq1\tq2\td1\t1\n", ["query-id", "qid, query-id, did, score"]),
    ("qrels/test.tsv", 'query-id\tcorpus-id\tscore\n"q1"x\td1\t1\n', ["line 2", "'\"q1\"x'", "'q1', 'q2'"]),
    ("qrels/test.tsv", "q1\t0\td1\t1\nq1\td2\t1\n", ["line 2", "expected 4 cells", "found 3"]),
    ("qrels/test.tsv", "q1\td1\thigh\nq1\td2\tlow\n", ["query-id", "q1, d1, high", "header"]),
    ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1 \t1\n", ["'d1 '", "'d1' is"]),
    ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td\u200b1\t1\n", ["'d\\u200b1'", "'d1' is"]),
    ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\tD1\t1\n", ["'D1'", "'d1' is"]),
    ("queries.jsonl", '{"_id": "q1", "text": "\\u200b\\u00a0"}\n', ["line 1", "text", "empty", "skip_bad_rows"]),
    ("corpus.jsonl", '[{"_id": "d1", "title": "a"}]\n', ["line 1", "one object a line"]),
    ("corpus.jsonl", '[\n{"_id": "d1", "title": "a"}\n]\n', ["line 1", "one object a line"]),
    ("corpus.jsonl", '{"_id": 1.5, "title": "a"}\n', ["line 1", "an id", "1.5"]),
    ("corpus.jsonl", "_id,title\n".encode("utf-16"), ["line 1", "UTF-16"]),
]


@pytest.mark.parametrize(("name", "content", "words"), BAD)
def test_bad_input_is_named(folder, read, name, content, words):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(HlmError) as error:
        read(folder)
    for word in (name, *words):
        assert word in str(error.value)


def test_bad_parquet_rows_have_numbers(folder, read):
    (folder / "corpus.jsonl").unlink()
    pq.write_table(pa.table({"_id": ["d1", "d1"], "title": ["a", "b"]}), folder / "corpus.parquet")
    with pytest.raises(HlmError, match="row 2.*'d1'.*row 1"):
        read(folder)
    (folder / "corpus.parquet").write_bytes(b"no parquet")
    with pytest.raises(HlmError, match="not readable as Parquet"):
        read(folder)


def test_missing_files_say_what_was_tried(folder, read, tmp_path):
    with pytest.raises(HlmError, match=r"split 'train'.*qrels/test.*qrels/train"):
        read(folder).qrels["train"]
    (folder / "queries.jsonl").unlink()
    with pytest.raises(HlmError, match="queries.jsonl, queries.json, queries.parquet, .*, found c"):
        read(folder)
    with pytest.raises(HlmError, match="expected a folder"):
        read(tmp_path / "nowhere")
    (folder / "corpus.csv").write_text("_id,title\nd1,a\n")
    with pytest.raises(HlmError, match="corpus.csv, corpus.jsonl; keep one"):
        read(folder)


@pytest.mark.parametrize(("known", "judged"), [("cafe\u0301", "caf\u00e9"), ("7", "007"), ("7", "7.0"), ("Ａ1", "a1")])
def test_ids_that_look_alike_are_told_apart(folder, read, known, judged):
    write_jsonl(folder / "corpus.jsonl", [{"_id": known, "title": "a"}])
    write_qrels(folder, [("q1", judged, 1)])
    with pytest.raises(HlmError) as error:
        read(folder)
    assert f"found {judged!a}, which is not there, but {known!a} is" in str(error.value)


def test_whole_number_ids_become_text(folder, read):
    write_jsonl(folder / "corpus.jsonl", [{"_id": 7, "title": "a"}])
    write_qrels(folder, [("q1", 7, "1.0")])
    data = read(folder)
    assert data.corpus["_id"] == ["7"] and data.qrels["test"] == {"q1": {"7": 1}}


def test_the_hub_layout(tmp_path):
    """The datasets library reads a local repository exactly as one on the Hub."""
    from hlm.data.sources import hub_tables
    from hlm.data.tables import TEXTS, checked_dataset

    repo = tmp_path / "repo"
    (repo / "qrels").mkdir(parents=True)
    write_jsonl(repo / "corpus.jsonl", [{"_id": r["_id"], "title": r["title"], "text": r["text"]} for r in CORPUS])
    write_jsonl(repo / "queries.jsonl", QUERIES)
    write_jsonl(repo / "qrels" / "valid.jsonl", [{"query-id": "q1", "corpus-id": "d1", "score": 1.0}])
    (repo / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: validation\n    path: qrels/valid.jsonl\n"
        "- config_name: corpus\n  data_files:\n  - split: corpus\n    path: corpus.jsonl\n"
        "- config_name: queries\n  data_files:\n  - split: queries\n    path: queries.jsonl\n---\n"
    )
    tables = hub_tables(str(repo), None, ("train", "dev", "test"))
    assert set(tables) == {"corpus", "queries", "qrels/dev"}
    loaded = {part: checked_dataset(tables[part], part, tmp_path / "c") for part in TEXTS if part in tables}
    assert loaded["corpus"]["_id"] == ["d1", "d2", "d3"]
    assert [row for _, row in tables["qrels/dev"].rows()] == [{"query-id": "q1", "corpus-id": "d1", "score": 1.0}]


@pytest.mark.parametrize("way", ["folder", "urls"])
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_unlabelled_queries_in_shards(catalogue_200, tmp_path, way, suffix):
    folder, cache = tmp_path / "data", tmp_path / "cache"
    shutil.copytree(catalogue_200, folder)
    (folder / "unlabelled.jsonl").unlink()
    shards = folder / "unlabelled" if way == "folder" else tmp_path / "elsewhere"
    shards.mkdir()
    texts = [f"query {number}" for number in range(7)]
    for number, start in enumerate(range(0, 7, 3)):
        rows = [{"text": text} for text in texts[start : start + 3]]
        path = shards / f"{number:05}{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if way == "urls":
        (folder / "unlabelled.urls").write_text(f"# the log\nfile://{shards}/*{suffix}\n")
    data = load(str(folder), cache_dir=cache)
    assert data.unlabelled["text"][:] == texts
    before = data.fingerprint("unlabelled")
    (folder / "unlabelled.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(HlmError, match="expected one 'unlabelled'"):
        load(str(folder), cache_dir=cache)
    (folder / "unlabelled.jsonl").unlink()
    (shards / f"00001{suffix}").unlink()
    assert load(str(folder), cache_dir=cache).fingerprint("unlabelled") != before
    for path in shards.glob("*"):
        path.unlink()
    with pytest.raises(HlmError, match="expected (shards|files at file:)"):
        load(str(folder), cache_dir=cache)
