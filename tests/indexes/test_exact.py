"""Exact search from the disk finds what it finds in memory."""

import numpy as np
from stores import clustered, make_store

from hlm.evaluation.metrics import dense_run
from hlm.indexes import exact, recall
from hlm.indexes.exact import StoreSearch, exact_search
from hlm.indexes.faiss_index import AdIndex


def test_a_store_too_large_for_memory_is_searched_from_the_disk(tmp_path, monkeypatch):
    store, queries = make_store(tmp_path / "s", clustered(2000, 32)), clustered(2050, 16)[2000:]
    whole = exact_search(store, 16)
    assert isinstance(whole, AdIndex) and whole.dim == 16
    monkeypatch.setattr(exact, "MOST_BYTES", 4 * 2000 * 16 - 1)
    monkeypatch.setattr(recall, "ROWS_PER_BLOCK", 512)
    blocks = exact_search(store, 16)
    assert isinstance(blocks, StoreSearch)
    (scores, ids), (others, expected) = blocks.search(queries, 100), whole.search(queries, 100)
    assert ids == expected
    np.testing.assert_allclose(scores, others, rtol=1e-6)
    names = [f"q{row}" for row in range(50)]
    one, other = (dense_run(queries, index, names, 10) for index in (blocks, whole))
    assert {query: list(found) for query, found in one.items()} == {
        query: list(found) for query, found in other.items()
    }
    assert blocks.search(queries, 5000)[0].shape == (50, 2000)
