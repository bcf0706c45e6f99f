import gzip
import json
import logging
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hlm.artefacts import HlmError
from hlm.data.contract import load

CORPUS = '{"_id": "d1", "title": "Lamp"}\n'
QUERIES = '{"_id": "q1", "text": "lamp"}\n'
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t1\n"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(CORPUS)
    (folder / "queries.jsonl").write_text(QUERIES)
    return folder


@pytest.fixture
def read(tmp_path):
    return lambda folder, **options: load(str(folder), cache_dir=tmp_path / "cache", **options)


def lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


# ---------------------------------------------------------------- shards


def test_shards_of_every_kind_in_nested_folders(folder, read, caplog):
    caplog.set_level(logging.INFO)
    shards = folder / "unlabelled"
    (shards / "day=2026-01-02" / "hour=07").mkdir(parents=True)
    (shards / "part-0.jsonl").write_text(lines(["a"]))
    (shards / "part-1.jsonl.gz").write_bytes(gzip.compress(lines(["b"]).encode()))
    (shards / "part-2.json").write_text(lines(["c"]))
    (shards / "part-3.csv").write_text("text\nnull\n007\n")
    (shards / "part[4]::x.tsv").write_text('text\n"e\n')
    pq.write_table(pa.table({"text": ["f"]}), shards / "day=2026-01-02" / "part-0.parquet")
    (shards / "day=2026-01-02" / "hour=07" / "part-0.csv.gz").write_bytes(gzip.compress(b"text\ng\n"))
    for name in ("_SUCCESS", ".part-0.jsonl.crc", "README.md"):
        (shards / name).write_text("")
    (shards / "_temporary").mkdir()
    (shards / "_temporary" / "part-9.jsonl").write_text(lines(["unfinished"]))
    data = read(folder)
    assert dict(zip(data.unlabelled["text"], data.unlabelled["day"], strict=True)) == dict.fromkeys(
        ["a", "b", "c", "null", "007", '"e'], None
    ) | {"f": "2026-01-02", "g": "2026-01-02"}
    assert data.unlabelled["hour"][:2] == ["07", None]
    assert "left out, being no shards by their names: .part-0.jsonl.crc, README.md, _SUCCESS, _temporary" in caplog.text


@pytest.mark.parametrize("name", ["a.xlsx", "a.parquet.gz", "b/c.orc", "notes", "a.jsonl.lz4", "a.jsonl.bak"])
def test_a_shard_that_is_not_read_stops_the_load(folder, read, name):
    path = folder / "unlabelled" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    (folder / "unlabelled" / "part-0.jsonl").write_text(lines(["a"]))
    with pytest.raises(HlmError, match=rf"unlabelled: expected shards .* found {name}"):
        read(folder)


def test_shards_behind_links(folder, read, tmp_path):
    (tmp_path / "day").mkdir()
    (tmp_path / "day" / "a.jsonl").write_text(lines(["a"]))
    (folder / "unlabelled").mkdir()
    for name in ("day", "again"):
        (folder / "unlabelled" / name).symlink_to(tmp_path / "day")
    (tmp_path / "day" / "back").symlink_to(folder / "unlabelled")  # a circle
    assert read(folder).unlabelled["text"] == ["a", "a"]


def test_a_delta_table_is_no_folder_of_shards(folder, read):
    (folder / "unlabelled" / "_delta_log").mkdir(parents=True)
    (folder / "unlabelled" / "a.jsonl").write_text(lines(["deleted"]))
    with pytest.raises(HlmError, match="Delta table"):
        read(folder)


# ---------------------------------------------------------------- one file


@pytest.mark.parametrize("name", ["corpus.jsonl.gz", "corpus.json", "corpus.JSONL", "corpus.csv.gz"])
def test_one_file_of_every_kind(folder, read, name):
    (folder / "corpus.jsonl").unlink()
    raw = (CORPUS if "json" in name.lower() else "_id,title\nd1,Lamp\n").encode()
    (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert read(folder).corpus["title"] == ["Lamp"]
    (folder / "corpus.parquet").write_bytes(b"")
    with pytest.raises(HlmError, match=rf"{name}.*keep one"):
        read(folder)


@pytest.mark.parametrize("name", ["corpus.xlsx", "corpus.jsonl.xz", "corpus.v2.jsonl", "corpus.txt"])
def test_one_file_that_is_not_read(folder, read, name):
    (folder / "corpus.jsonl").rename(folder / name)
    with pytest.raises(HlmError, match=rf"expected 'corpus' as one of .*found {name}, which is not read"):
        read(folder)


def test_tables_beside_the_one_that_is_read_are_named(folder, read, caplog):
    (folder / "corpus-2.jsonl").write_text(CORPUS)
    (folder / "unlabelled-00000-of-00002.jsonl").write_text(lines(["a"]))
    assert read(folder).unlabelled is None
    assert "not read: corpus-2.jsonl, unlabelled-00000-of-00002.jsonl" in caplog.text


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_dev_under_its_other_names(folder, read, name):
    (folder / "qrels" / f"{name}.tsv").write_text(QRELS)
    assert read(folder).qrels["dev"] == {"q1": {"d1": 1}}
    (folder / "qrels" / "validation.csv").write_text(QRELS)
    with pytest.raises(HlmError, match="expected one 'qrels/dev'.*keep one"):
        read(folder)


def test_trec_judgements_in_a_folder(folder, read):
    (folder / "qrels" / "test.trec").write_text("q1 0 d1 2\n")
    assert read(folder).qrels["test"] == {"q1": {"d1": 2}}


# ---------------------------------------------------------------- addresses


def test_addresses_are_read_as_files_are(folder, read, tmp_path):
    wanted = ["null", "NA", "007", "2026-01-02", '"open']
    (tmp_path / "a.csv").write_text("text\nnull\nNA\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(["007", "2026-01-02"]).encode()))
    (tmp_path / "c.tsv").write_text('text\n"open\n')
    listed = "".join(f"file://{tmp_path}/{name}\n" for name in ("*.csv", "b.jsonl.gz", "c.tsv"))
    (folder / "unlabelled.urls").write_text("\ufeff# the log\n" + listed, encoding="utf-8")
    assert read(folder).unlabelled["text"] == wanted


@pytest.mark.parametrize("address", ["nothing.jsonl", "nothing-*.jsonl", "a.xml"])
def test_an_address_without_a_file_that_is_read_is_named(folder, read, tmp_path, address):
    (tmp_path / "a.jsonl").write_text(lines(["a"]))
    (tmp_path / "a.xml").write_text("<a/>")
    (folder / "unlabelled.urls").write_text(f"file://{tmp_path}/a.jsonl\nfile://{tmp_path}/{address}\n")
    with pytest.raises(HlmError, match=rf"unlabelled.urls: expected files.*{address.replace('*', '.')}"):
        read(folder)


@pytest.mark.parametrize("way", ["folder", "urls"])
def test_a_corpus_in_parquet_shards(folder, read, tmp_path, way):
    titles = [f"lamp {number}" for number in range(5)]
    rows = [{"_id": f"d{number}", "title": title} for number, title in enumerate(titles)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = read(folder)
    shards = folder / "corpus" if way == "folder" else tmp_path / "elsewhere"
    shards.mkdir()
    for number, part in enumerate((rows[:2], rows[2:4], rows[4:])):
        pq.write_table(pa.Table.from_pylist(part), shards / f"part-{number}.parquet")
    if way == "urls":
        (folder / "corpus.urls").write_text(f"file://{shards}/*.parquet\n")
    with pytest.raises(HlmError, match="expected one 'corpus' in"):
        read(folder)
    (folder / "corpus.jsonl").unlink()
    many = read(folder)
    assert many.corpus["title"][:] == titles and many.fingerprint("corpus") == one.fingerprint("corpus")
    pq.write_table(pa.table({"_id": ["d6", "d1"], "title": ["a", "b"]}), shards / "part-2.parquet")
    with pytest.raises(HlmError, match="part-2.parquet, row 2: expected unique ids, found 'd1' here and on part-0"):
        read(folder)


# ---------------------------------------------------------------- a repository


def repository(tmp_path, files, configs):
    repo = tmp_path / "repo"
    for name, content in files.items():
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (repo / "README.md").write_text("---\n" + json.dumps({"configs": configs}) + "\n---\n")
    return str(repo)


def config(name, path, split=None, **more):
    return {"config_name": name, "data_files": [{"split": split or name, "path": path}], **more}


def test_text_stays_text_in_a_repository(tmp_path):
    from hlm.data.sources import hub_tables

    repo = repository(
        tmp_path,
        {
            "corpus.csv.gz": gzip.compress(b"_id,title\n007,null\n1e3,2026-01-02 10:00:00\n"),
            "queries.jsonl": '{"_id": "q1", "text": "2026-01-02"}\n{"_id": "q2", "text": "NA"}\n',
            "log.csv": "text;n\nNA;1\n",
            "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq1\t007\t1\n",
        },
        [
            config("corpus", "corpus.csv.gz"),
            config("queries", "queries.jsonl"),
            config("unlabelled", "log.csv", sep=";"),
            config("default", "qrels/test.tsv", "test"),
        ],
    )
    tables = hub_tables(repo, None, ("train", "test"))
    found = {part: [tuple(row.values()) for _, row in table.rows()] for part, table in tables.items()}
    assert found == {
        "corpus": [("007", "null"), ("1e3", "2026-01-02 10:00:00")],
        "queries": [("q1", "2026-01-02"), ("q2", "NA")],
        "unlabelled": [("NA", "1")],
        "qrels/test": [("q1", "007", "1")],
    }


def test_options_of_a_repository_that_are_not_followed_are_named(tmp_path):
    from hlm.data.sources import hub_tables

    repo = repository(
        tmp_path, {"corpus.csv": "d1,Lamp\n"}, [config("corpus", "corpus.csv", column_names=["_id", "title"])]
    )
    with pytest.raises(HlmError, match="config 'corpus'.*options names"):
        hub_tables(repo, None, ())


# ---------------------------------------------------------------- rows that are left out


def test_rows_without_text_and_judgements_of_nothing_are_left_out_on_request(folder, read, caplog):
    (folder / "corpus.jsonl").write_text(
        CORPUS + '{"_id": "d2", "title": "", "text": ""}\n{"_id": "d3", "text": "x"}\n'
    )
    (folder / "queries.jsonl").write_text(QUERIES + '{"_id": "q2", "text": " "}\n{"_id": "q3", "text": "x"}\n')
    (folder / "unlabelled.jsonl").write_text(lines(["a", "", "\u200b"]))
    (folder / "qrels" / "test.tsv").write_text(QRELS + "q1\td2\t1\nq1\tgone\t0\nq2\td1\t1\nq3\td2\t1\nq9\tgone\t1\n")
    with pytest.raises(HlmError, match="line 2.*skip_bad_rows"):
        read(folder)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        data = read(folder, skip_bad_rows=True)
        assert data.corpus["_id"] == ["d1", "d3"] and data.queries["_id"] == ["q1", "q3"]
        assert data.unlabelled["text"] == ["a"] and data.qrels["test"] == {"q1": {"d1": 1}}
        said = [record.getMessage().partition(": ")[2] for record in caplog.records]
        assert said == [
            "left out 1 documents without title and text",
            "left out 1 queries without text",
            "left out 2 queries without text",
            "left out 2 judgements of queries that are not in queries, 3 of documents that are not in corpus; 1 of 4 "
            "queries are left",
        ]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tgone\t1\n")
    with pytest.raises(HlmError, match="judgements of this data, found none"):
        read(folder, skip_bad_rows=True)
    (folder / "corpus.jsonl").write_text('{"_id": "d1", "title": ""}\n')
    with pytest.raises(HlmError, match="at least one row, found 1 without text"):
        read(folder, skip_bad_rows=True)


def test_either_title_or_text_is_enough(folder, read):
    (folder / "corpus.jsonl").write_text('{"_id": "d1", "title": "", "text": "x"}\n{"_id": "d2", "title": "y"}\n')
    assert read(folder).corpus["_id"] == ["d1", "d2"]


def test_ids_and_missing_values_as_pandas_writes_them(folder, read):
    (folder / "corpus.jsonl").unlink()
    pq.write_table(pa.table({"_id": [1.0, 2.0], "title": ["Lamp", "Tent"]}), folder / "corpus.parquet")
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "lamp", "oracle": NaN}\n')
    pq.write_table(
        pa.table({"query-id": [b"q1"], "corpus-id": [2.0], "score": [1.0]}), folder / "qrels" / "test.parquet"
    )
    data = read(folder)
    assert data.corpus["_id"] == ["1", "2"] and data.qrels["test"] == {"q1": {"2": 1}}


# ---------------------------------------------------------------- the cache


def test_what_killed_builds_left_is_removed_and_a_living_one_kept(folder, read, tmp_path):
    import subprocess
    import sys

    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / ".corpus-0123.arrow.77.partial").write_text("left by a kill")
    script = (
        "import sys, pathlib\n"
        "from hlm.outputs import make_once\n"
        "path = pathlib.Path(sys.argv[1]) / 'living.arrow'\n"
        "def make(aside):\n"
        "    aside.write_text('half'); print('ready', flush=True); sys.stdin.read()\n"
        "    aside.write_text('whole')\n"
        "make_once(path, make, path.is_file)\n"
    )
    living = subprocess.Popen(
        [sys.executable, "-c", script, str(cache)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert living.stdout.readline() == "ready\n"
    read(folder)
    left = sorted(path.name for path in cache.glob(".*"))
    assert len(left) == 2 and left[1] == ".living.arrow.lock" and left[0].endswith(".partial")
    living.communicate("")
    assert living.returncode == 0 and (cache / "living.arrow").read_text() == "whole"
    assert not list(cache.glob(".*"))


def test_a_cache_that_cannot_be_written_says_what_to_set(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HlmError, match=r"file/hlm: expected a folder.*can be written.*set HF_HOME.*cache_dir"):
        load(str(folder), cache_dir=tmp_path / "file" / "hlm")


def test_stored_tables_are_readable_by_others(folder, read, tmp_path):
    mask = os.umask(0o022)
    try:
        read(folder)
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "cache").glob("*.arrow")} == {0o644}


def test_a_hub_that_does_not_answer_is_named(tmp_path, monkeypatch):
    from huggingface_hub.errors import HTTPError

    from hlm.data import sources

    def ask(source, **_):
        raise HTTPError("connection refused")

    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(HlmError, match="found 'acme/nowhere'.*HTTPError: connection refused.*check the connection"):
        sources._hub("acme/nowhere", None, ask)


HUB = """
import json, os, sys, tempfile
from hlm.artefacts import HlmError
from hlm.data.contract import load
if sys.argv[1] == "publish":
    from huggingface_hub import CommitOperationAdd, HfApi
    HfApi().create_repo("acme/texts", repo_type="dataset", private=True)
    files = json.loads(sys.argv[2])
    adds = [CommitOperationAdd(path, content.encode()) for path, content in files.items()]
    HfApi().create_commit("acme/texts", adds, repo_type="dataset", commit_message="one")
try:
    data = load("acme/texts", cache_dir=tempfile.mkdtemp())
    print(json.dumps([data.corpus["_id"][:], data.corpus["title"][:], data.queries["text"][:], data.qrels["dev"]]))
except HlmError as error:
    print(json.dumps(str(error)))
"""


def test_a_hub_dataset_in_csv_is_text_and_loads_offline_from_the_cache(tmp_path):
    import subprocess
    import sys

    from hub_server import HubServer

    files = {
        "corpus.csv": "_id,title\n007,null\n1e3,2026-01-02 10:00:00\n",
        "queries.csv": "_id,text\nq1,NA\nq2,4711\n",
        "qrels/validation.csv": "query-id,corpus-id,score\nq1,007,1\n",
        "vectors/large.bin": "not of a table",
    }
    configs = [config("corpus", "corpus.csv"), config("queries", "queries.csv")]
    configs.append(config("default", "qrels/validation.csv", "validation"))
    files["README.md"] = "---\n" + json.dumps({"configs": configs}) + "\n---\n"
    with HubServer(tmp_path / "hub") as hub:
        own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        own |= hub.environment("acme", home=tmp_path / "home", xet=False)

        def run(*words, **more):
            done = subprocess.run(
                [sys.executable, "-c", HUB, *words], env=own | more, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[-3000:]
            return json.loads(done.stdout)

        wanted = [["007", "1e3"], ["null", "2026-01-02 10:00:00"], ["NA", "4711"], {"q1": {"007": 1}}]
        assert run("publish", json.dumps(files)) == wanted
        assert not any("large.bin" in path and status == 200 for _, method, path, status in hub.log if method == "GET")
        assert run("load", HF_HUB_OFFLINE="1") == wanted
    assert "found 'acme/texts'" in run("load", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "other"))
