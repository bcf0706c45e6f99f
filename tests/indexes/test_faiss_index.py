"""FAISS as the ad index: exact and approximate, what is refused, and a saved index is the one that was built."""

import multiprocessing
import os
import pickle
import subprocess
import sys

import faiss
import numpy as np
import pytest
from stores import clustered, make_store

from hlm.artefacts import HlmError
from hlm.indexes.faiss_index import AdIndex
from hlm.vectors.store import VectorStore


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
        (np.ones(31, np.float32), r"32 wide.*\(31,\)"),
        (np.ones((1, 2, 32), np.float32), r"\(n, 32\) or \(32,\), found \(1, 2, 32\); give one vector"),
        (np.float32(1), r"found \(\); give one vector"),
        (np.ones(32, np.complex64), "complex64"),
        (["red shoe"], "values of type <U8"),
        ([[1.0], [1.0, 2.0]], "expected query vectors"),
        (None, "values of type object"),
        (np.full(32, 1e300), "norm inf"),
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


def test_one_query_is_a_vector_and_its_answer_a_list(store, queries):
    for factory in ("Flat", "IVF32,Flat"):
        index = AdIndex.build(store, factory)
        scores, ids = index.search(queries[:3], 7)
        for row in range(3):
            one_scores, one_ids = index.search(queries[row], 7)
            assert one_scores.shape == (7,) and one_scores.dtype == np.float32 and one_ids == ids[row]
            np.testing.assert_allclose(one_scores, scores[row], atol=1e-6)
    assert index.search(queries[0].tolist(), 2)[1] == index.search(queries[:1], 2)[1][0]


def test_one_query_takes_one_thread(queries, monkeypatch):
    index, seen = AdIndex.from_vectors(queries, [str(row) for row in range(len(queries))]), []
    search = faiss.IndexFlatIP.search
    monkeypatch.setattr(
        faiss.IndexFlatIP,
        "search",
        lambda *args, **more: seen.append(faiss.omp_get_max_threads()) or search(*args, **more),
    )
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(3)
    try:
        for vectors in (queries[0], queries[:1], queries[:2]):
            index.search(vectors, 3)
        assert seen == [1, 1, 3] and faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({"k": k}, "k: expected 1 or more, a whole number") for k in (True, 1.5, "3", None, 0, -1, float("nan"))],
        *[({"nprobe": n}, "nprobe: expected 1 or more") for n in (1.5, float("nan"), float("inf"), True, "2", 0)],
        *[({"k_factor": f}, "k_factor: expected 1 or more") for f in (float("nan"), float("inf"), True, "2", 0.5, 1j)],
    ],
    ids=str,
)
def test_search_refuses_what_is_no_number(store, queries, options, message):
    index = AdIndex.build(store, "IVF8,SQ8,RFlat")
    with pytest.raises(HlmError, match=message):
        index.search(queries, **{"k": 3, **options})


def test_numbers_beyond_the_index_mean_all_of_it(store, queries):
    exact = AdIndex.build(store)
    everything = exact.search(queries[0], 3000)
    for k in (np.int64(3000), 2**31, 2**70):
        assert exact.search(queries[0], k)[1] == everything[1]
    index = AdIndex.build(store, "IVF8,SQ8,RFlat")
    for options in (
        {"nprobe": np.int64(8), "k_factor": np.float32(1e9)},
        {"nprobe": 2**70, "k_factor": 1e300},
        {"nprobe": 2**31, "k_factor": 2**70},
    ):
        assert index.search(queries, 5, **options)[1] == exact.search(queries, 5)[1]
    graph = AdIndex.build(store, "HNSW8")
    assert recall(graph, exact, queries, ef_search=2**70) > 0.98


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("dim", (0, 33, 1.5, True, "8", float("nan"))),
        ("train_rows", (0, 1.5, float("inf"))),
        ("rows_per_block", (0, 1.5, None, True)),
        ("seed", (-1, 1.5, None)),
        ("factory", (None, 7, "", b"Flat", "Flat\x00", "IVF4(" * 50 + "Flat", "ü")),
        ("nprobe", (0, 1.5, float("nan"))),
    ],
)
def test_build_refuses_what_is_no_number_or_text(store, name, values):
    for value in values:
        with pytest.raises(HlmError, match=name):
            AdIndex.build(store, **{"factory": "IVF8,Flat", name: value})


# Each of these ended the process, never ended itself, or asked for memory without end.
DEADLY = """
HNSW0 HNSW99999999 HNSW-1 IVF0,Flat IVF0_HNSW8,Flat IVF4_HNSW0,Flat IVF3001,Flat IVF99999999999,Flat PQ0 PQ4x0
PQ4x31 PQ4x4fs_0 IVF4,PQ4x0 OPQ4_0,Flat PCA0,Flat PCAR0,Flat RR0,Flat Pad999999999,Flat RQ0x4 RQ4x0 RQ4x25
RQ1000x16 LSQ0x4 LSQ1x0 PRQ2x0x4 PRQ2x1x0 PLSQ2x1x0 IVF4,RQ0x4 IMI2x16,Flat NSG0 NSG2 NSG5 NSG1600 RaBitQfs_0
IVF4,FlatPanorama0 ZnLattice0x10_6 SQ8,Refine(IVF4,Flat) SQ8,Refine(PCA8,IVF4,Flat)
""".split()


@pytest.mark.parametrize("factory", DEADLY)
def test_factories_that_end_the_process_are_refused(store, factory):
    with pytest.raises(HlmError, match="FAISS cannot build|one by an IVF"):
        AdIndex.build(store, factory)


@pytest.mark.parametrize(
    ("factory", "built"),
    [
        ("HNSW1", "HNSW2"),
        ("HNSW1_SQ8", "HNSW2_SQ8"),
        ("IVF4_HNSW1,Flat", "IVF4_HNSW2,Flat"),
        ("HNSW16", "HNSW16"),
        ("SQ8,Refine(HNSW1)", "SQ8,Refine(HNSW2)"),
    ],
)
def test_a_graph_of_degree_1_is_built_as_the_next_that_faiss_can_build(store, queries, caplog, factory, built):
    index = AdIndex.build(store, factory)
    assert index.factory == built and len(index.search(queries[0], 3)[1]) == 3
    assert ("is built as" in caplog.text) == (factory != built)


def test_from_vectors_refuses(store):
    vectors = np.eye(3, dtype=np.float32)
    for bad, ids, message in (
        (vectors[:0], [], "expected vectors"),
        (vectors[0], ["a"], "expected vectors"),
        (np.zeros((3, 0), np.float32), list("abc"), "expected vectors"),
        (vectors.astype(object), list("abc"), "expected vectors"),
        (vectors, list("ab"), "expected an id for each"),
        (vectors, [1, 2, 3], "ids that are texts, found int 1"),
        (vectors, ["a", None, "b"], "ids that are texts, found NoneType"),
        (vectors, ["a", "b", "a"], "found 'a' twice"),
        (vectors * [[1], [0], [1]], list("abc"), "found norm 0"),
    ):
        with pytest.raises(HlmError, match=message):
            AdIndex.from_vectors(bad, ids)


FORK = """
import multiprocessing, sys, threading
import numpy as np
from hlm.indexes.faiss_index import AdIndex
from hlm.vectors.store import VectorStore

store = VectorStore.open(sys.argv[1])
vectors = store.gather(range(200))
indexes = [AdIndex.build(store, factory) for factory in ("Flat", "IVF32,Flat", "HNSW16", "IVF16,PQ8x4fs,RFlat")]

def answers():
    return [(index.search(vectors, 5)[1], index.search(vectors[0], 5)[1]) for index in indexes]

def child(pipe):
    found = [answers()]
    thread = threading.Thread(target=lambda: found.append(answers()))
    thread.start()
    thread.join()
    AdIndex.build(store, "IVF16,Flat").search(vectors, 3)
    pipe.send(found)

expected = answers()  # starts the threads of OpenMP, which a forked process lacks
for _ in range(2):
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(there,), daemon=True)
    process.start()
    if not here.poll(60):
        process.kill()
        sys.exit("the forked process does not answer")
    assert here.recv() == [expected, expected]
    assert answers() == expected
"""


def test_a_forked_process_searches_and_builds(store):
    """As under gunicorn --preload; in a process of its own, whose OpenMP has two threads."""
    ran = subprocess.run(
        [sys.executable, "-c", FORK, str(store.folder)],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        timeout=200,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("factory", ["Flat", "IVF16,PQ8x4fs,RFlat"])
def test_a_pickled_index_is_the_index(store, queries, factory):
    index = AdIndex.build(store, factory)
    again = pickle.loads(pickle.dumps(index))
    assert vars(again).keys() == vars(index).keys()
    assert [vars(again)[name] for name in ("encoder", "source", "factory", "_defaults")] == [
        vars(index)[name] for name in ("encoder", "source", "factory", "_defaults")
    ]
    for one, other in zip(index.search(queries, 10), again.search(queries, 10), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_pickled_index_searches_in_a_spawned_process(store, queries):
    index = AdIndex.build(store)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(index.search, (queries, 4))[1] == index.search(queries, 4)[1]
