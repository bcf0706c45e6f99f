"""The index of a catalogue that changes: what it finds, how it changes, and what a reader of it sees."""

import os
import pickle
import re
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from stores import clustered, make_store

from hlm.artefacts import HlmError
from hlm.indexes import lance_index, lance_table
from hlm.indexes.faiss_index import AdIndex
from hlm.indexes.index import create_index, open_index
from hlm.indexes.recall import exact_neighbours, recalls

ROWS, DIM = 3000, 32
COUNTRIES = ["de" if row % 100 == 0 else "fr" if row % 2 else "it's" for row in range(ROWS)]
COLUMNS = pa.table({"_id": [f"ad-{row}" for row in range(ROWS)], "country": COUNTRIES, "price": range(ROWS)})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("lance") / "store", clustered(ROWS, DIM))


@pytest.fixture(scope="module")
def queries():
    return clustered(ROWS + 40, DIM)[ROWS:]


@pytest.fixture(scope="module")
def made(store, tmp_path_factory):
    """Of 30 cells."""
    folder = tmp_path_factory.mktemp("lance") / "index"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lance_table, "ROWS_A_CELL", 100)
        create_index(folder, store, "lance:IVF_RQ", columns=COLUMNS)
        yield folder


@pytest.fixture
def small(tmp_path):
    """An exact index of six unit vectors."""
    store = make_store(tmp_path / "six", np.eye(6), ids=list("abcdef"))
    return create_index(tmp_path / "index", store, "lance:FLAT")


def test_an_exact_one_answers_as_faiss_does(store, queries, tmp_path):
    ours, theirs = create_index(tmp_path / "index", store, "lance:FLAT", dim=16), AdIndex.build(store, "Flat", dim=16)
    narrow = queries[:, :16] / np.linalg.norm(queries[:, :16], axis=1, keepdims=True)
    (mine, ids), (other, expected) = ours.search(narrow, 20), theirs.search(narrow, 20)
    assert ids == expected
    np.testing.assert_allclose(mine, other, atol=1e-5)
    assert mine.dtype == np.float32 and np.all(np.diff(mine, axis=1) <= 0)
    assert ours.search(narrow[0], 3)[1] == expected[0][:3] and ours.search(narrow[0], 3)[0].shape == (3,)
    assert [len(found) for found in ours.search(narrow[:1], ROWS + 5)[1]] == [ROWS]
    assert ours.search(narrow[:0], 5)[0].shape == (0, 5)
    assert (ours.encoder, ours.source, ours.made_of) == (theirs.encoder, theirs.source, theirs.made_of)


def test_refinement_keeps_what_codes_lose(made, store, queries):
    index, exact = open_index(made, expect_encoder="teacher-a"), exact_neighbours(store, queries, 20)
    coarse = recalls(index.search(queries, 20, refine_factor=1)[1], exact).mean()
    recall = recalls(index.search(queries, 20)[1], exact).mean()
    assert coarse < 0.8 and recall > 0.95  # the codes' rotation is drawn anew for each index


def test_searching_harder_finds_more_and_is_kept(store, queries, tmp_path, monkeypatch):
    exact, found = exact_neighbours(store, queries, 20), []

    def check(index):
        found.append(recalls(index.search(queries, 20)[1], exact).mean())
        while index.search_harder():
            found.append(recalls(index.search(queries, 20)[1], exact).mean())

    monkeypatch.setattr(lance_table, "REFINE_FACTOR", 1)
    create_index(tmp_path / "index", store, "lance:IVF_PQ", check=check)
    assert len(found) == 5 and found[0] < 0.7 < 0.98 < found[-1] and found == sorted(found)
    assert recalls(open_index(tmp_path / "index").search(queries, 20)[1], exact).mean() == found[-1]


@pytest.mark.parametrize("few", [lance_index.FEW, 0], ids=["scored one by one", "through the cells"])
@pytest.mark.parametrize("far", [False, True], ids=["random", "far from the query"])
def test_filtered_lists_are_full_and_right(made, store, queries, monkeypatch, few, far):
    monkeypatch.setattr(lance_index, "FEW", few)
    index, vectors = open_index(made), store.gather(range(ROWS))
    for query in queries[:8]:
        scores = vectors @ query
        rows = np.argsort(scores)[: ROWS // 100] if far else np.arange(0, ROWS, 100)
        where = [f"ad-{row}" for row in rows] if far else {"country": "de"}
        best = [f"ad-{row}" for row in rows[np.argsort(-scores[rows])][:10]]
        found = index.search(query, 10, where=where)[1]
        assert len(found) == 10 and len(set(found) & set(best)) >= (10 if few else 9)


def test_filters_take_what_faiss_takes(made, store, queries):
    ours, theirs = open_index(made), AdIndex.build(store, columns=COLUMNS)
    for where in (
        {"country": "it's", "price": {">=": 100, "<": 900.5}},
        {"country": ["de", "fr"], "price": {"!=": 3}},
        {"price": [1, 2, 3]},
        {"country": "nowhere"},
        {},
        {"ad-1", "ad-2", "unknown"},
        [],
    ):
        assert ours.search(queries[0], 5, where=where)[1] == theirs.search(queries[0], 5, where=where)[1], where
    for where, message in (
        ({"colour": "red"}, "expected columns among _id, country, price, found str 'colour'"),
        ({"price": "cheap"}, "price: expected a value of type int64"),
        ({"price": {"~": 3}}, "expected one of == != < <= > >=, found str '~'"),
        (np.ones(ROWS, bool), "rows have no fixed order"),
        ("ad-1", "expected ids or conditions"),
        ([1, 2], "expected ids as texts"),
    ):
        with pytest.raises(HlmError, match=message):
            ours.search(queries[0], 5, where=where)


def test_put_and_delete_are_seen_from_the_commit_on_and_by_who_opens_it_then(small, tmp_path):
    reader, fresh = open_index(tmp_path / "index"), open_index(tmp_path / "index")
    assert not fresh.refresh()
    small.put(["g", "a"], np.eye(6)[[0, 5]] * 3)
    small.delete(["b", "unknown", "it's"])
    for index in (reader, small, open_index(tmp_path / "index")):
        assert index.search(np.eye(6)[0], 1)[1] == ["a"] and len(index) == 6
    small.commit()
    assert fresh.refresh() and not fresh.refresh()
    for index in (small, fresh, open_index(tmp_path / "index")):
        assert index.search(np.eye(6)[0], 1)[1] == ["g"] and len(index) == 6
        assert set(index.search(np.eye(6)[5], 6)[1][:2]) == {"a", "f"}
        assert "b" not in index.search(np.eye(6)[1], 6)[1] and index.version == 2
    assert reader.search(np.eye(6)[0], 1)[1] == ["a"] and reader.version == 1
    with pytest.raises(HlmError, match="expected version 1 of .*, which was opened, found 2.*open the index again"):
        reader.delete(["a"])


def test_one_writer_at_a_time_and_what_it_left_is_dropped(small, tmp_path):
    small.put(["g"], np.eye(6)[:1])
    other = open_index(tmp_path / "index")
    refused = []

    def write():
        with pytest.raises(HlmError, match="expected to be the only one who writes") as caught:
            other.delete(["a"])
        refused.append(caught)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert refused
    small.discard()
    other.put(["h"], np.eye(6)[:1])
    other.commit()
    assert sorted(open_index(tmp_path / "index").search(np.eye(6)[0], 9)[1]) == list("abcdefh")


def test_a_check_that_fails_leaves_the_version_in_place(small, tmp_path):
    def refuse(index):
        assert index.search(np.eye(6)[0], 9)[1] == ["b", "c", "d", "e", "f"] and len(index) == 5
        raise HlmError("recall is too low")

    small.delete(["a"])
    with pytest.raises(HlmError, match="recall is too low"):
        small.commit(check=refuse)
    assert len(open_index(tmp_path / "index")) == 6
    with pytest.raises(HlmError, match="expected the 6 ads of .*, found 5"):
        small.commit(make_store(tmp_path / "other", np.eye(6)))
    small.commit()
    assert len(open_index(tmp_path / "index")) == 5


def test_rows_that_were_put_are_found_before_and_after_they_are_indexed(store, queries, tmp_path, monkeypatch):
    half = make_store(tmp_path / "half", store.gather(range(ROWS // 2)))
    index = create_index(tmp_path / "index", half, "lance:IVF_SQ")
    exact = exact_neighbours(store, queries, 20)
    index.put([f"ad-{row}" for row in range(ROWS // 2, ROWS)], store.gather(range(ROWS // 2, ROWS)))
    index.commit(store)
    assert lance_table.not_indexed(index._open[1]) == ROWS // 2 and index.made_of == store.parts
    assert recalls(index.search(queries, 20)[1], exact).mean() > 0.95
    index.put(["ad-0"], store.gather([0]))
    monkeypatch.setattr(lance_index, "NOT_INDEXED", 100)
    index.commit(store)
    assert lance_table.not_indexed(index._open[1]) == 0
    assert recalls(index.search(queries, 20)[1], exact).mean() > 0.95


def test_built_again_it_is_a_further_version_and_a_reader_keeps_the_former(small, tmp_path):
    reader = open_index(tmp_path / "index")
    again = create_index(tmp_path / "index", make_store(tmp_path / "two", np.eye(6)[:2]), "lance:FLAT")
    assert (len(again), again.version) == (2, 2) and len(open_index(tmp_path / "index")) == 2
    assert reader.search(np.eye(6)[5], 1)[1] == ["f"]


def test_bad_input_is_refused_and_nothing_is_put(made, small, store, tmp_path):
    for factory in ("Flat", "IVF_XX", "IVF16_RQ", 7):
        with pytest.raises(HlmError, match="expected one of FLAT, IVF_RQ"):
            lance_index.LanceIndex.create(tmp_path / "other", store, factory)
    with pytest.raises(HlmError, match="columns: expected a name without"):
        create_index(tmp_path / "other", store, "lance:FLAT", columns=COLUMNS.rename_columns(["_id", "a.b", "price"]))
    assert not (tmp_path / "other").exists()
    for ids, vectors, columns, message in (
        (["x", "x"], np.eye(6)[:2], None, "found 'x' twice"),
        (["x"], np.eye(5)[:1], None, r"of shape \(1, 6 or more\), found \(1, 5\)"),
        (["x"], np.zeros((1, 6)), None, "finite vectors other than zero"),
        (["x"], np.eye(6)[:1], pa.table({"_id": ["x"], "price": [3]}), "columns: expected _id, as the index was built"),
    ):
        with pytest.raises(HlmError, match=message):
            small.put(ids, vectors, columns)
    with pytest.raises(HlmError, match="expected _id, country, price"):
        open_index(made).put(["x"], np.ones((1, DIM)))
    assert len(small) == 6


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = make_store(tmp_path / "store", np.eye(4), ids=["ad-1", "ad-2", "ad-3", "ad-17"])
    create_index("runs/mine/vectors/index", store, "lance:FLAT")
    page = Path(__file__).resolve().parents[2] / "docs/living-catalogue.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    exec(code, {"vectors": np.eye(4)[:2]})
    index = open_index("runs/mine/vectors/index")
    assert set(index.search(np.eye(4)[0], 9)[1]) == {"ad-1", "ad-2", "ad-17", "ad-18"}
    assert set(index.search(np.eye(4)[0], 2)[1]) == {"ad-1", "ad-17"}


def test_it_is_sent_by_pickle_and_refuses_a_fork(small, tmp_path):
    assert pickle.loads(pickle.dumps(small)).search(np.eye(6)[2], 1)[1] == ["c"]
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            small.search(np.eye(6)[0], 1)
        except HlmError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.wait()
    assert "does not work in a forked process" in os.read(read, 1000).decode()
    os.close(read)
    os.close(write)
