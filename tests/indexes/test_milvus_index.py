"""The index in Milvus, against Milvus Lite, which stands in for the protocol: it keeps all rows in one process and does
not know IVF_RABITQ and DISKANN. These tests prove the calls and what they mean, not the settings of a cluster.
"""

import json
import pickle
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from stores import clustered, make_store

from hlm import cli
from hlm.artefacts import HlmError
from hlm.indexes.faiss_index import AdIndex
from hlm.indexes.index import create_index, open_index

pytest.importorskip("milvus_lite", reason="pip install 'hlm[test]' brings it")
from hlm.indexes import milvus_import, milvus_index, milvus_table
from hlm.indexes.milvus_filters import expression_of
from hlm.indexes.milvus_table import Address

ROWS, DIM = 600, 16
WHERE = {"country": "de"}
NAMES = ["de", "fr", "it's", '"\\', None]
COLUMNS = pa.table(
    {
        "_id": [f"ad-{row}" for row in range(ROWS)],
        "country": [NAMES[row % 5] for row in range(ROWS)],
        "price": [None if row == 7 else row for row in range(ROWS)],
        "score": [row / 2 for row in range(ROWS)],
        "new": [row % 3 == 0 for row in range(ROWS)],
    }
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("milvus") / "store", clustered(ROWS, DIM), shard_rows=250)


@pytest.fixture(scope="module")
def queries():
    return clustered(ROWS + 70, DIM)[ROWS:]


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"milvus://{tmp_path_factory.mktemp('milvus')}/lite.db/ads"


@pytest.fixture(scope="module")
def made(store, uri):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(milvus_table, "MESSAGE_BYTES", 100 * (4 * DIM + 1024))  # a block is sent in several messages
        return create_index(uri, store, "milvus:HNSW", columns=COLUMNS)


@pytest.fixture
def small(tmp_path):
    """An exact index of six unit vectors, and its URI."""
    uri = f"milvus://{tmp_path}/lite.db/six"
    return create_index(uri, make_store(tmp_path / "six", np.eye(6), ids=list("abcdef")), "milvus:FLAT"), uri


@pytest.fixture(scope="module")
def flat(store):
    return AdIndex.build(store, "Flat", columns=COLUMNS)


def test_it_answers_as_an_exact_index_does(made, flat, uri, queries, store):
    index = open_index(uri, expect_encoder="teacher-a")
    (scores, ids), (others, expected) = index.search(queries, 20), flat.search(queries, 20)
    assert ids == expected and scores.dtype == np.float32
    np.testing.assert_allclose(scores, others, atol=1e-5)
    assert index.search(queries[0], 3)[1] == expected[0][:3] and index.search(queries[0], 3)[0].shape == (3,)
    assert [len(found) for found in index.search(queries[:1], ROWS + 5)[1]] == [ROWS]
    assert index.search(queries[:0], 5)[0].shape == (0, 5)
    assert (len(index), index.dim, index.columns) == (ROWS, DIM, COLUMNS.column_names)
    assert (index.encoder, index.source, index.factory) == ("teacher-a", "catalogue-a", "HNSW")
    assert index.made_of == store.parts and index.canaries is None
    assert pickle.loads(pickle.dumps(index)).search(queries, 20)[1] == expected
    with pytest.raises(
        HlmError, match="expected an index of vectors made by encoder other, found one of encoder teach"
    ):
        open_index(uri, expect_encoder="other")
    for bad, message in ((queries[:, :4], "expected query vectors 16 wide"), (2 * queries, "found norm 2")):
        with pytest.raises(HlmError, match=message):
            index.search(bad, 3)


@pytest.mark.parametrize(
    "where",
    [
        {"country": "de"}, {"country": "it's"}, {"country": '"\\'}, {"country": ["de", "fr"], "price": {"<": 40}},
        {"price": {">=": 3, "<=": 7}}, {"price": {"!=": 5}}, {"price": {"<": 7.5}}, {"price": {"<=": 7.5}},
        {"price": {">": 7.5}}, {"price": {">=": 7.5}}, {"price": {"==": 7.5}}, {"price": {"!=": 7.5}}, {"price": 8.0},
        {"price": [3.0, 4.5]}, {"score": {"<": 3}}, {"score": 2.5}, {"new": True}, {"new": False, "price": {"<": 9}},
        {}, {"country": []}, ["ad-3", "ad-9", "nothing"], {"ad-5"}, [], pa.array(["ad-1"]), {"_id": "ad-2"},
    ],
    ids=str,
)  # fmt: skip
def test_filters_let_through_what_those_of_faiss_do(made, flat, queries, where):
    scores, ids = made.search(queries[:2], 30, where=where)
    others, expected = flat.search(queries[:2], 30, where=where)
    assert ids == expected and scores.shape == others.shape


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"brand": "x"}, "expected columns among _id, country, price, score, new, found str 'brand'"),
        ({"price": {"~": 3}}, "price: expected one of == !="),
        ({"price": "3"}, "price: expected a value of type int64, found str '3'"),
        ({"score": float("inf")}, "expected a text, a finite number"),
        ("ad-1", "expected ids or conditions"),
        (np.ones(ROWS, bool), "rows have no fixed order"),
        ([3], "expected ids as texts"),
        (3, "expected ids or conditions"),
    ],
)
def test_filters_that_are_refused(made, queries, where, message):
    with pytest.raises(HlmError, match=message):
        made.search(queries[0], 3, where=where)


def test_a_short_list_behind_a_filter_is_searched_again_with_all(made, queries, monkeypatch):
    asked = []
    search = made._client.search

    def lossy(*args, search_params, **options):
        asked.append(search_params["params"])
        found = search(*args, search_params=search_params, **options)
        return found if search_params["params"]["ef"] == 16_384 else [list(one)[:2] for one in found]

    monkeypatch.setattr(made._client, "search", lossy)
    assert [len(found) for found in made.search(queries[:2], 10, where={"country": ["de", "fr"]})[1]] == [10, 10]
    assert asked == [{"ef": 1280}] + [{"ef": 16_384}] * 2
    assert [len(found) for found in made.search(queries[:2], 10)[1]] == [2, 2]  # without a filter it may be short


def test_what_is_searched_grows_with_what_a_filter_leaves_out():
    params = milvus_index.search_params
    assert params("IVF_RABITQ", 100, 1.0) == {"nprobe": 64, "refine_k": 4} and params("FLAT", 100, 0.1) == {}
    assert params("HNSW", 100, 1.0) == {"ef": 200} and params("HNSW", 10, 0.5) == {"ef": 1024}
    assert params("DISKANN", 100, 0) == {"search_list": 16_384}


def test_a_commit_is_seen_and_nothing_before_it(small):
    index, uri = small
    reader = open_index(uri)
    index.put(["b", "g"], np.eye(6)[[5, 1]])
    index.delete(["a", "z"])
    assert len(index) == 6 and reader.search(np.eye(6)[0], 1)[1] == ["a"]
    index.commit()
    assert len(index) == 6 and len(open_index(uri)) == 6
    assert sorted(open_index(uri).search(np.eye(6)[0], 6)[1]) == ["b", "c", "d", "e", "f", "g"]
    assert sorted(index.search(np.eye(6)[5], 2)[1]) == ["b", "f"] and index.search(np.eye(6)[1], 1)[1] == ["g"]
    for ids, vectors, message in (
        (["x"], np.eye(6)[:2], "expected a vector for each id"),
        (["x", "x"], np.eye(6)[:2], "found 'x' twice"),
        (["x"], np.zeros((1, 6)), "found norm 0"),
    ):
        with pytest.raises(HlmError, match=message):
            index.put(ids, vectors)
    index.delete(["b"])
    index.put(["b"], np.eye(6)[:1])  # what was said last counts
    index.commit()
    assert index.search(np.eye(6)[0], 1)[1] == ["b"]


def test_a_commit_equals_its_store_or_says_so(small, tmp_path):
    index, uri = small
    store = make_store(tmp_path / "seven", np.eye(7, 6) + np.eye(7, 6, -6), ids=list("abcdefg"))
    with pytest.raises(HlmError, match="expected the 7 ads of .*seven, found 6 in six_v1"):
        index.commit(store)
    index.put(["g"], store.gather([6]))  # the last ad is where the first is
    index.commit(store)
    assert open_index(uri).made_of == store.parts and open_index(uri).source == "catalogue-a"


def test_a_new_build_takes_the_alias_and_readers_keep_theirs(small, tmp_path):
    index, uri = small
    canaries = {"texts": ["é" * 9000] * 2, "vectors": "x" * 40_000}  # facts in several rows
    store = make_store(tmp_path / "new", np.eye(6)[::-1], ids=list("abcdef"))
    store.canaries = canaries
    create_index(uri, store, "milvus:HNSW", dim=6)
    assert index.search(np.eye(6)[0], 1)[1] == ["a"] and open_index(uri).search(np.eye(6)[0], 1)[1] == ["f"]
    assert open_index(uri).canaries == canaries
    client = Address.of(uri).connected()
    milvus_table.make(client, "six_v7", pa.schema([]), 6)  # a build was killed
    create_index(uri, store, "milvus:FLAT")
    assert sorted(client.list_collections()) == ["six_hlm", "six_v2", "six_v8"]  # the oldest is gone
    with pytest.raises(HlmError, match="search six_v1"):
        index.search(np.eye(6)[0], 1)


def test_a_build_that_fails_leaves_what_was_there(small, tmp_path, monkeypatch):
    _, uri = small
    store = make_store(tmp_path / "new", np.eye(6)[::-1], ids=list("abcdef"))
    monkeypatch.setattr(milvus_index, "_index", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        create_index(uri, store, "milvus:FLAT")
    assert open_index(uri).search(np.eye(6)[0], 1)[1] == ["a"]
    assert sorted(Address.of(uri).connected().list_collections()) == ["six_hlm", "six_v1"]


class Importer(BaseHTTPRequestHandler):
    """Milvus's REST calls of an import as its documentation has them: files of a bucket go into a collection."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path.rpartition("/")[2], self.headers["Authorization"]))
        if self.path == "/v2/vectordb/jobs/import/create":
            for (path,) in body["files"]:
                self.server.client.insert(body["collectionName"], pq.read_table(self.server.bucket / path).to_pylist())
            self.answer({"jobId": "7"})
        else:
            assert self.path == "/v2/vectordb/jobs/import/get_progress" and body == {"jobId": "7"}
            self.answer(self.server.states.pop(0))

    def answer(self, data):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"code": 0, "data": data} if data else {"code": 1100, "message": "no"}).encode())

    def log_message(self, *_):
        pass


def test_a_collection_is_filled_from_files(store, flat, queries, tmp_path, monkeypatch):
    monkeypatch.setattr(milvus_import, "ROWS_PER_FILE", 250)
    monkeypatch.setattr(milvus_import, "ROWS_PER_GROUP", 100)
    monkeypatch.setattr(milvus_import, "POLL_S", 0)
    monkeypatch.setenv("MILVUS_TOKEN", "secret")
    files = milvus_import.write_files(store, tmp_path / "bucket/ads", columns=COLUMNS)
    uri = f"milvus://{tmp_path}/lite.db/ads"
    with ThreadingHTTPServer(("127.0.0.1", 0), Importer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.asked, server.bucket, server.client = [], tmp_path / "bucket", Address.of(uri).connected()
        server.states = [{"state": "Importing", "progress": 40}, {"state": "Completed", "progress": 100}]
        fill = partial(
            milvus_import.import_files,
            f"http://127.0.0.1:{server.server_port}",
            [f"ads/{path.name}" for path in files],
        )
        index = create_index(uri, store, "milvus:FLAT", columns=COLUMNS, fill=fill)
        assert index.search(queries, 20)[1] == flat.search(queries, 20)[1]
        assert index.search(queries[0], 5, where=WHERE)[1] == flat.search(queries[0], 5, where=WHERE)[1]
        assert server.asked == [(what, "Bearer secret") for what in ("create", "get_progress", "get_progress")]
        for state, message in (({"state": "Failed", "reason": "bad"}, "into .*, found: bad"), ({}, "found: no")):
            server.states = [state]
            with pytest.raises(HlmError, match=message):
                create_index(uri, store, "milvus:FLAT", columns=COLUMNS, fill=fill)
        server.shutdown()
    with pytest.raises(HlmError, match="expected an answer of Milvus at"):
        fill("ads_v1")
    with pytest.raises(HlmError, match="expected 600 ads in ads_v2, found 0"):
        create_index(uri, store, "milvus:FLAT", columns=COLUMNS, fill=lambda name: None)
    assert len(open_index(uri)) == ROWS


@pytest.mark.parametrize("factory", ["IVF_RABITQ", "DISKANN"])
def test_what_milvus_lite_lacks_is_asked_for_as_the_documentation_says(tmp_path, factory):
    store = make_store(tmp_path / "six", np.eye(6), ids=list("abcdef"))
    uri = f"milvus://{tmp_path}/lite.db/six"
    with pytest.raises(HlmError, match=f"expected to build .*, found unknown index_type: '{factory}'"):
        create_index(uri, store, f"milvus:{factory}")
    assert Address.of(uri).connected().list_collections() == []


@pytest.mark.parametrize(
    ("kind", "columns", "message"),
    [
        ("milvus:IVF_FOO", None, "expected an index of Milvus of FLAT, HNSW, IVF_RABITQ, DISKANN"),
        ("milvus:FLAT", {"a b": [1] * 6}, "expected names of letters, digits and _"),
        ("milvus:FLAT", {"day": pa.array([0] * 6, pa.date32())}, "expected numbers, texts or truth values in 'day'"),
    ],
)
def test_what_cannot_be_built(tmp_path, kind, columns, message):
    store = make_store(tmp_path / "six", np.eye(6), ids=list("abcdef"))
    table = None if columns is None else pa.table({"_id": list("abcdef"), **columns})
    with pytest.raises(HlmError, match=message):
        create_index(f"milvus://{tmp_path}/lite.db/six", store, kind, columns=table)


def test_the_command_line_searches_by_a_uri(online_bert, tmp_path, capsys):
    uri = f"milvus://{tmp_path}/lite.db/ads"
    create_index(uri, make_store(tmp_path / "s", clustered(9, 32), encoder="t" * 16), "milvus:FLAT")
    assert cli.main(["search", "red lamp", "-k", "2", "--student", str(online_bert), "--index", uri]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert cli.main(["verify", str(online_bert), "lake://host/ads"]) == 2
    assert "expected a folder, or a URI that begins with one of milvus://" in capsys.readouterr().err


def test_addresses(tmp_path):
    assert Address.of("milvus://host:19530/ads") == Address("http://host:19530", "ads")
    assert Address.of("milvus://host:19530/ads?tls=true").server == "https://host:19530"
    for bad in ("milvus://host:19530", "milvus:///ads", "milvus://host/a-b", "milvus://me:secret@host:1/ads"):
        with pytest.raises(HlmError, match="expected milvus://host:port/name") as caught:
            Address.of(bad)
        assert "secret" not in str(caught.value)
    with pytest.raises(HlmError, match="found no alias 'ads'"):
        open_index(f"milvus://{tmp_path}/lite.db/ads")


def test_an_expression_is_what_milvus_reads():
    schema = COLUMNS.schema
    assert expression_of({"country": ["de"], "price": {">": 2, "<": 7.5}}, schema) == (
        'country in ["de"] and price > 2 and price < 8'
    )


@pytest.mark.parametrize(("ads", "file", "kept"), [(47e6, "values-47m", 0), (1e9, "values-1b", 4500)])
def test_the_sizes_of_the_charts_settings_hold_two_collections(ads, file, kept):
    """As docs/large-catalogues.md computes them, with a tenth to spare."""
    node = yaml.safe_load((Path(__file__).parents[2] / f"docs/milvus/{file}.yaml").read_text())["queryNode"]
    memory = 128 + 1024 + 80 if not kept else 512 + 80
    limits = {name: int(text.removesuffix("Gi")) * 2**30 for name, text in node["resources"]["limits"].items()}
    assert node["replicas"] * limits["memory"] > 1.1 * 2 * ads * memory
    assert node["replicas"] * limits.get("ephemeral-storage", 0) >= 1.1 * 2 * ads * kept
    assert (node["replicas"] - 1) * limits["memory"] < 1.5 * 2 * ads * memory  # nor twice as much


def test_the_compose_file_is_one_and_opens_nothing_to_the_network():
    services = yaml.safe_load((Path(__file__).parents[2] / "docs/milvus/compose.yaml").read_text())["services"]
    assert services["milvus"]["ports"] == ["127.0.0.1:19530:19530"]
    assert not any("ports" in services[name] for name in ("etcd", "minio"))
