"""The ad index: exactness, approximate indexes, what is refused, and that a saved index is the one that was built."""

import json

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

from hlm.artefacts import HlmError
from hlm.index import AdIndex
from hlm.store import VectorStore, write_store


def make_store(folder, vectors, *, ids=None, encoder="teacher-a", shard_rows=700):
    vectors = np.asarray(vectors, dtype=np.float32)
    ids = ids or [f"ad-{row}" for row in range(len(vectors))]
    records = [(name, str(row)) for row, name in enumerate(ids)]
    write_store(
        folder,
        records,
        lambda texts: vectors[[int(text) for text in texts]],
        dim=vectors.shape[1],
        encoder=encoder,
        source="catalogue-a",
        n_rows=len(vectors),
        shard_rows=shard_rows,
    )
    return VectorStore.open(folder)


def clustered(rows, dim=32, *, clusters=40, seed=0):
    """Unit vectors around unit centres: like embeddings, unlike pure noise, they have near neighbours."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, dim))
    vectors = centres[rng.integers(clusters, size=rows)] + 0.9 * rng.normal(size=(rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("index") / "store", clustered(3000))


@pytest.fixture(scope="module")
def queries():
    return clustered(3064)[3000:]


def recall(index, exact, queries, k=10, **options):
    truth = exact.search(queries, k)[1]
    found = index.search(queries, k, **options)[1]
    return np.mean([len(set(a) & set(b)) / k for a, b in zip(truth, found, strict=True)])


def test_flat_is_the_inner_product_by_hand(tmp_path):
    ids = ["7", "null", "ä b", "001"]
    index = AdIndex.build(make_store(tmp_path / "store", np.eye(4), ids=ids, shard_rows=3))
    scores, found = index.search(np.array([[0.8, 0.6, 0, 0], [0, 0, 0, 1]], np.float32), 2)
    assert found[0] == ["7", "null"] and found[1][0] == "001"
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [[0.8, 0.6], [1, 0]], atol=1e-6)
    assert (len(index), index.dim, index.encoder, index.source) == (4, 4, "teacher-a", "catalogue-a")


def test_built_in_blocks_is_the_whole_store(store, queries):
    whole = np.concatenate([block for _, block in store.iter_blocks()])
    whole /= np.linalg.norm(whole, axis=1, keepdims=True)
    index = AdIndex.build(store, rows_per_block=999)
    scores, found = index.search(queries, 5)
    expected = queries @ whole.T
    best = np.argsort(-expected, axis=1)[:, :5]
    assert found == [[f"ad-{row}" for row in rows] for rows in best]
    np.testing.assert_allclose(scores, np.take_along_axis(expected, best, 1), atol=1e-5)


@pytest.mark.parametrize(
    ("factory", "floor"),
    [
        ("HNSW32", 0.98),
        ("IVF32,Flat", 0.95),
        ("IVF32,SQ8", 0.93),
        ("IVF16_HNSW16,Flat", 0.95),
        ("SQ8,RFlat", 0.99),
        ("IVF16,PQ8x4fs,RFlat", 0.9),
        ("PCA24,IVF16,SQ8", 0.5),
    ],
)
def test_factories_keep_recall_through_saving(store, queries, tmp_path, factory, floor):
    exact = AdIndex.build(store)
    index = AdIndex.build(store, factory)
    assert recall(index, exact, queries) >= floor
    index.save(tmp_path / "index")
    again = AdIndex.load(tmp_path / "index")
    first, second = index.search(queries, 10), again.search(queries, 10)
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1] == second[1]
    assert again.factory == factory


def test_refinement_refines_by_default(store, queries):
    exact = AdIndex.build(store)
    index = AdIndex.build(store, "PQ8x4fs,RFlat")
    unrefined = recall(index, exact, queries, k_factor=1)
    assert recall(index, exact, queries) > unrefined + 0.2
    assert recall(index, exact, queries, k_factor=100) >= 0.99


def test_search_options_act_and_do_not_stick(store, queries):
    exact = AdIndex.build(store)
    index = AdIndex.build(store, "IVF32,Flat", nprobe=4)
    default = recall(index, exact, queries)
    assert recall(index, exact, queries, nprobe=1) < default < recall(index, exact, queries, nprobe=32) == 1
    assert recall(index, exact, queries) == default
    graph = AdIndex.build(store, "HNSW4")
    assert recall(graph, exact, queries, ef_search=10) < recall(graph, exact, queries, ef_search=500)


def test_search_options_are_saved(store, queries, tmp_path):
    AdIndex.build(store, "IVF32,Flat", nprobe=1).save(tmp_path / "narrow")
    exact = AdIndex.build(store)
    narrow = AdIndex.load(tmp_path / "narrow")
    assert recall(narrow, exact, queries) == recall(narrow, exact, queries, nprobe=1) < 1


def test_fewer_documents_than_k(tmp_path, store, queries):
    tiny = AdIndex.build(make_store(tmp_path / "store", np.eye(3)))
    scores, ids = tiny.search(np.eye(3, dtype=np.float32), 10)
    assert scores.shape == (3, 3)
    assert [sorted(found) for found in ids] == [["ad-0", "ad-1", "ad-2"]] * 3
    # One cell of an IVF holds fewer than k: the rest is missing, not row -1 (the last ad).
    index = AdIndex.build(store, "IVF32,Flat", nprobe=1)
    scores, ids = index.search(queries, 2000)
    for row, found in zip(scores, ids, strict=True):
        assert 0 < len(found) < 2000 and len(set(found)) == len(found)
        assert np.isfinite(row[: len(found)]).all() and np.isneginf(row[len(found) :]).all()


def test_no_queries(store):
    scores, ids = AdIndex.build(store).search(np.zeros((0, 32), np.float32), 5)
    assert scores.shape == (0, 5) and ids == []


def test_matryoshka_slice(tmp_path):
    vectors = np.array([[0.6, 0, 0.8], [0, 1, 0]], np.float32)
    index = AdIndex.build(make_store(tmp_path / "store", vectors), dim=2)
    scores, ids = index.search(np.array([[1, 0]], np.float32), 2)
    assert ids == [["ad-0", "ad-1"]]
    np.testing.assert_allclose(scores, [[1, 0]], atol=1e-6)
    with pytest.raises(HlmError, match="1 to 3"):
        AdIndex.build(VectorStore.open(tmp_path / "store"), dim=4)


def test_training_sample_is_bounded(store, monkeypatch):
    asked = []
    gather = VectorStore.gather
    monkeypatch.setattr(VectorStore, "gather", lambda self, rows: asked.append(len(rows)) or gather(self, rows))
    AdIndex.build(store, "IVF8,Flat", train_rows=500)
    AdIndex.build(store, "Flat", train_rows=500)
    assert asked == [500]


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("Nonsense", {}, "cannot build 'Nonsense'.*another factory"),
        ("IVF4096,Flat", {}, "4096"),
        ("IDMap,Flat", {}, "leave IDMap out"),
        ("Flat", {"nprobe": 4}, "has no IVF"),
        ("IVF8,Flat", {"ef_search": 4}, "has no HNSW"),
        ("HNSW8", {"k_factor": 4}, "has no refinement"),
        ("IVF8,Flat", {"nprobe": 0}, "1 or more"),
        ("Flat", {"gpu": True}, "GPU build"),
    ],
)
def test_build_refuses(store, factory, options, message):
    if options.get("gpu") and faiss.get_num_gpus():
        pytest.skip("this machine has a GPU build")
    with pytest.raises(HlmError, match=message):
        AdIndex.build(store, factory, **options)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.ones((2, 31), np.float32), r"\(n, 32\).*\(2, 31\)"),
        (np.ones(32, np.float32), r"\(n, 32\)"),
        (np.ones((2, 32), np.float32), "norm 5.657 in row 0"),
        (np.full((1, 32), np.nan, np.float32), "finite"),
        (np.zeros((1, 32), np.float32), "norm 0"),
    ],
)
def test_search_refuses_vectors(store, bad, message):
    with pytest.raises(HlmError, match=message):
        AdIndex.build(store).search(bad, 3)


def test_search_refuses_k_and_foreign_options(store, queries):
    index = AdIndex.build(store)
    with pytest.raises(HlmError, match="k: expected 1"):
        index.search(queries, 0)
    with pytest.raises(HlmError, match="has no IVF"):
        index.search(queries, 3, nprobe=2)


def test_load_refuses_a_foreign_encoder(store, tmp_path):
    AdIndex.build(store).save(tmp_path / "index")
    assert len(AdIndex.load(tmp_path / "index", expect_encoder="teacher-a")) == 3000
    with pytest.raises(HlmError, match="teacher-b.*teacher-a"):
        AdIndex.load(tmp_path / "index", expect_encoder="teacher-b")


def test_load_refuses_what_was_tampered_with(store, tmp_path):
    folder = tmp_path / "index"
    AdIndex.build(store).save(folder)
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(good) == ["hlm.json", "ids.parquet", "index.faiss"]

    def expect(message):
        with pytest.raises(HlmError, match=message):
            AdIndex.load(folder)
        for name, content in good.items():
            (folder / name).write_bytes(content)

    (folder / "index.faiss").write_bytes(good["index.faiss"][:-100])
    expect("index.faiss.*cut short")
    flipped = bytearray(good["index.faiss"])
    flipped[5000] ^= 1
    (folder / "index.faiss").write_bytes(bytes(flipped))
    expect("index.faiss.*changed")
    pq.write_table(pq.read_table(folder / "ids.parquet").slice(1), folder / "ids.parquet")
    expect("ids.parquet.*changed")
    (folder / "ids.parquet").unlink()
    expect("found no file")
    manifest = json.loads(good["hlm.json"])
    (folder / "hlm.json").write_text(json.dumps(manifest | {"count": 2999}))
    expect("expected 2999 vectors")
    (folder / "hlm.json").write_text(json.dumps(manifest | {"dim": 16}))
    expect("width 16")
    (folder / "hlm.json").write_text(json.dumps(manifest | {"kind": "vectors"}))
    expect("kind 'index'")
    del manifest["files"]
    (folder / "hlm.json").write_text(json.dumps(manifest))
    expect("lacks 'files'")
    AdIndex.load(folder)


def test_load_refuses_a_folder_without_index(tmp_path):
    with pytest.raises(HlmError, match="kind 'index'"):
        AdIndex.load(tmp_path)


def test_saving_replaces_the_older_index_whole(store, tmp_path):
    AdIndex.build(store).save(tmp_path / "index")
    AdIndex.build(make_store(tmp_path / "small", np.eye(3), encoder="teacher-b")).save(tmp_path / "index")
    assert len(AdIndex.load(tmp_path / "index", expect_encoder="teacher-b")) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "small"]
