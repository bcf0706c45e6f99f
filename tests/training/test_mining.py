"""Exact ranking and positive-aware hard negatives, on stores whose scores can be read off."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from hlm.artefacts import HlmError
from hlm.training import mining
from hlm.training.mining import mine_hard_negatives, positive_scores, select_hard_negatives, top_k_documents
from hlm.vectors.store import VectorStore, write_store


@pytest.fixture
def make_store(tmp_path):
    """A store of the given vectors in shards of 4 rows."""

    def make(vectors, name="store"):
        vectors = np.asarray(vectors, dtype=np.float32)
        records = [(f"d{row}", str(row)) for row in range(len(vectors))]
        write_store(
            tmp_path / name,
            records,
            lambda texts: vectors[[int(text) for text in texts]],
            dim=vectors.shape[1],
            encoder="0" * 16,
            source="1" * 16,
            n_rows=len(vectors),
            shard_rows=4,
        )
        return VectorStore.open(tmp_path / name)

    return make


def at(*cosines):
    """Unit vectors of the plane whose cosine to the first axis is as given."""
    return np.array([[c, math.sqrt(1 - c * c)] for c in cosines], dtype=np.float32)


QUERY = np.array([[1.0, 0.0]], dtype=np.float32)


def test_top_k_of_one_hot_vectors(make_store):
    store = make_store(np.eye(6))
    queries = np.eye(6, dtype=np.float32)[[4, 1]] * 0.5
    scores, rows = top_k_documents(queries, store, 3)
    # The own axis first, then the zeros in row order.
    assert rows.tolist() == [[4, 0, 1], [1, 0, 2]]
    assert scores.tolist() == [[0.5, 0, 0], [0.5, 0, 0]]
    assert rows.dtype == np.int64 and scores.dtype == np.float32


@pytest.mark.parametrize("rows_per_block", [1, 2, 3, 5, 100])
def test_top_k_equals_a_full_stable_sort_whatever_the_blocks(make_store, rows_per_block):
    random = np.random.default_rng(0)
    # Few distinct directions: nearly every place is tied.
    corners = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], dtype=np.float32)
    vectors = corners[random.integers(0, 4, size=23)]
    queries = np.array([[0.5, 0.25], [-0.5, 0.0], [0.25, 0.25]], dtype=np.float32)
    wanted = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")
    for k in (1, 4, 23):
        scores, rows = top_k_documents(queries, make_store(vectors, f"s{k}"), k, rows_per_block=rows_per_block)
        assert rows.tolist() == wanted[:, :k].tolist()
        assert np.array_equal(scores, np.take_along_axis(queries @ vectors.T, rows, axis=1))


def test_top_k_of_more_queries_than_are_scored_at_once(make_store):
    queries = np.tile(np.eye(3, dtype=np.float32), (700, 1))
    _, rows = top_k_documents(queries, make_store(np.eye(3)), 1)
    assert rows[:, 0].tolist() == [0, 1, 2] * 700


def test_a_narrower_student_meets_slices_of_length_one(make_store):
    vectors = np.random.default_rng(0).standard_normal((9, 6)).astype(np.float32)
    store = make_store(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    queries = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    heads = vectors[:, :3] / np.linalg.norm(vectors[:, :3], axis=1, keepdims=True)
    _scores, rows = top_k_documents(queries, store, 9)
    np.testing.assert_array_equal(rows, np.argsort(-(queries @ heads.T), axis=1))
    np.testing.assert_allclose(positive_scores(queries, [[2]] * 4, store), queries @ heads[2], atol=2e-3)


def test_negatives_lie_below_95_percent_of_the_positive(make_store):
    #                   0     1    2     3     4    5     limit 0.95 x 0.8 = 0.76
    store = make_store(at(0.9, 0.8, 0.77, 0.75, 0.5, 0.1))
    assert mine_hard_negatives(QUERY, [{1}], store, 2).tolist() == [[3, 4]]
    assert mine_hard_negatives(QUERY, [{1}], store, 5).tolist() == [[3, 4, 5, -1, -1]]
    assert mine_hard_negatives(QUERY, [{1}], store, 2, max_ratio=0.99).tolist() == [[2, 3]]
    assert mine_hard_negatives(QUERY, [{1}], store, 2, max_ratio=math.inf).tolist() == [[0, 2]]
    assert mine_hard_negatives(QUERY, [{1}], store, 2, exclude=[{3}]).tolist() == [[4, 5]]
    # 0, 2 and 3 are the best that are no positives
    assert mine_hard_negatives(QUERY, [{1}], store, 2, skip_top=3).tolist() == [[4, 5]]
    assert mine_hard_negatives(QUERY, [{1}], store, 2, depth=4).tolist() == [[3, -1]]
    assert mine_hard_negatives(QUERY, [{1}], store, 2, rows_per_block=2).tolist() == [[3, 4]]
    assert mine_hard_negatives(QUERY, [{0}], store, 1).tolist() == [[1]]  # limit 0.855


def test_the_lowest_positive_sets_the_limit(make_store):
    store = make_store(at(0.9, 0.8, 0.6, 0.58, 0.5))
    np.testing.assert_allclose(positive_scores(QUERY, [[2, 0]], store), [0.6], atol=1e-3)
    assert mine_hard_negatives(QUERY, [{0, 2}], store, 3).tolist() == [[4, -1, -1]]  # limit 0.57
    # The same query for its other pair: its positive alone sets the limit, the other is only kept out.
    assert mine_hard_negatives(QUERY, [{0}], store, 3, exclude=[{2}]).tolist() == [[1, 3, 4]]


def test_a_positive_of_negative_score_still_bounds_from_above(make_store):
    # 0.95 x -0.4 = -0.38 would let -0.39 in, above the positive; the limit is -0.42.
    store = make_store(at(-0.4, -0.39, -0.41, -0.43, 0.0))
    assert mine_hard_negatives(QUERY, [{0}], store, 3).tolist() == [[3, -1, -1]]


def test_every_query_has_its_own_limit_and_sets(make_store):
    store = make_store(np.concatenate([at(0.9, 0.5), np.array([[0.0, 1.0]])]))
    queries = np.array([[1, 0], [0, 1]], dtype=np.float32)
    # Row 1 is at 0.5 to the first query and 0.87 to the second, whose positive is row 2 at 1.
    assert mine_hard_negatives(queries, [{0}, {2}], store, 2).tolist() == [[1, 2], [1, 0]]
    np.testing.assert_allclose(positive_scores(queries, [{0, 1}, {0}], store), [0.5, 0.436], atol=1e-3)


def test_selection_from_a_ranking():
    scores = np.array([[0.9, 0.5, 0.4], [0.3, 0.2, 0.1]], dtype=np.float32)
    rows = np.array([[7, 3, 5], [2, 9, 4]])
    taken = select_hard_negatives(scores, rows, np.array([0.9, 0.25], dtype=np.float32), [{7}, set()], 2)
    assert taken.tolist() == [[3, 5], [9, 4]]
    level = np.array([0.5, 0.2], dtype=np.float32)  # a document level with the positive (its duplicate) is not taken
    assert select_hard_negatives(scores, rows, level, [{7}, {2}], 1, max_ratio=1.0).tolist() == [[5], [4]]
    with pytest.raises(HlmError, match=r"\(2, 3\).*\(2, 2\)"):
        select_hard_negatives(scores, rows[:, :2], np.zeros(2, dtype=np.float32), [{7}, set()], 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_vectors": np.ones((1, 3), dtype=np.float32)}, r"\(n, 2\).*\(1, 3\)"),
        ({"query_vectors": np.array([[np.nan, 0.0]])}, "finite"),
        ({"positives": [{0}, {1}]}, "each of 1 queries, found 2"),
        ({"positives": [set()]}, "1 queries without"),
        ({"positives": [{99}]}, "99"),
        ({"exclude": []}, "each of 1 queries, found 0"),
        ({"k": 0}, "found 0"),
        ({"k": 3, "depth": 4, "skip_top": 2}, r"4 - 2.*found 3"),
        ({"max_ratio": 0.0}, "max_ratio"),
        ({"skip_top": -1}, "skip_top"),
    ],
)
def test_bad_input(make_store, change, message):
    arguments = {"query_vectors": QUERY, "positives": [{0}], "store": make_store(at(0.9, 0.1)), "k": 1}
    with pytest.raises(HlmError, match=message):
        mine_hard_negatives(**{**arguments, **change})


def test_k_beyond_the_store(make_store):
    with pytest.raises(HlmError, match=r"1\.\.2.*found 3"):
        top_k_documents(QUERY, make_store(at(0.9, 0.1)), 3)


def test_processes_share_the_queries_in_whole_parts(monkeypatch):
    state = SimpleNamespace(process_index=0, num_processes=1)
    monkeypatch.setattr(mining, "PartialState", lambda: state)
    monkeypatch.setattr(mining, "_QUERIES", 4)
    np.testing.assert_array_equal(mining.shared_rows(10), np.arange(10))
    state.num_processes, shares = 3, []
    for state.process_index in range(3):
        shares.append(mining.shared_rows(10))
    assert [share.tolist() for share in shares] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    state.process_index = 2
    assert mining.shared_rows(8).tolist() == []
    found = [(share, share[:, None] * [1, 10]) for share in shares]
    monkeypatch.setattr(mining, "gather_object", lambda mine: found)
    np.testing.assert_array_equal(mining.gather_rows(*found[0], 10), np.arange(10)[:, None] * [1, 10])
