"""Memory for codes is allocated once, at its final size, and what is built is the same."""

import faiss
import numpy as np
import pytest
from stores import clustered, make_store

from hlm.indexes import faiss_parts
from hlm.indexes.faiss_index import AdIndex
from hlm.indexes.faiss_parts import parts, reserve


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "HNSW8", "PCA16,Flat", "IVF16,PQ8x4fs,Refine(SQ8)"])
def test_flat_codes_are_allocated_once(factory):
    """Ten million vectors would be copied again and again as they come, and be in memory twice."""
    vectors = clustered(3000)
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    reserve(index, len(vectors))
    whole = [part.storage if isinstance(part, faiss.IndexHNSW) else part for part in parts(index, storing=True)]
    flat = [part for part in map(faiss.downcast_index, whole) if isinstance(part, faiss.IndexFlatCodes)]
    index.add(vectors[:8])
    places = [int(part.codes.data()) for part in flat]
    for start in range(8, 3000, 8):
        index.add(vectors[start : start + 8])
    assert flat and [int(part.codes.data()) for part in flat] == places
    assert [part.codes.size() for part in flat] == [3000 * part.code_size for part in flat]


@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,SQ6", "IVF16,PQ8", "IVF64_HNSW32,SQ8"])
def test_cells_that_are_allocated_at_once_hold_what_they_would(tmp_path, factory, monkeypatch):
    vectors = clustered(3064)
    store, queries = make_store(tmp_path / "store", vectors[:3000]), vectors[3000:]
    assert type(faiss.index_factory(16, factory)) in faiss_parts.COUNTED
    scores, found = AdIndex.build(store, factory, rows_per_block=999).search(queries, 5, nprobe=4)
    monkeypatch.setattr(faiss_parts, "COUNTED", ())
    expected_scores, expected = AdIndex.build(store, factory, rows_per_block=999).search(queries, 5, nprobe=4)
    assert found == expected
    np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize(
    "factory", ["HNSW16", "HNSW16,SQfp16", "PCA8,HNSW16", "IVF16_HNSW16,SQ8", "HNSW16,Refine(SQ8)"]
)
def test_graphs_are_built_with_more_candidates_than_faiss_takes(tmp_path, factory):
    store = make_store(tmp_path / "store", clustered(2000))
    AdIndex.build(store, factory).save(tmp_path / "index")
    index = faiss_parts.read_index(tmp_path / "index" / "index.faiss")
    graphs = [part for part in parts(index) if isinstance(part, faiss.IndexHNSW)]
    assert [graph.hnsw.efConstruction for graph in graphs] == [200]
