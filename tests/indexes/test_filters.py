"""A filtered search answers with full lists of the right ads, however few match and however far from the query."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from stores import clustered, make_store

from hlm.artefacts import HlmError
from hlm.indexes import faiss_filters
from hlm.indexes.faiss_index import AdIndex

ROWS, K = 3000, 10
FACTORIES = (
    "Flat HNSW16 IVF32,Flat IVF32,SQ8 IVF16,PQ32x4fs,RFlat IVF16_HNSW8,SQ8 PCA24,IVF16,Flat SQ8,RFlat "
    "PQ16x4fs,Refine(SQfp16) HNSW16_SQ8"
).split()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("filters") / "store", clustered(ROWS))


@pytest.fixture(scope="module")
def queries():
    return clustered(ROWS + 24)[ROWS:]


@pytest.fixture(scope="module")
def columns():
    rows = np.arange(ROWS)
    table = {
        "_id": [f"ad-{row}" for row in rows],
        "country": pa.array([None if row == 5 else ("de", "at", "fr")[row % 3] for row in rows]),
        "price": rows / 10,
        "stock": rows % 7,
        "new": rows % 2 == 0,
    }
    return pa.table(table).take(pa.array(rows[::-1]))


@pytest.fixture(scope="module")
def built(store):
    return {factory: AdIndex.build(store, factory) for factory in FACTORIES}


@pytest.fixture(scope="module")
def flat(store, columns):
    return AdIndex.build(store, columns=columns)


def right(index, queries, mask):
    """The best of the index's own ranking of all rows that a filter lets through."""
    everything = {name: 10**6 for name, default in index._defaults.items() if default}
    found = index.search(queries, ROWS, **everything)[1]
    return [[name for name in names if mask[int(name[3:])]][:K] for names in found]


def far(store, query, share):
    """The rows that are the least like a query."""
    scores = store.gather(np.arange(ROWS)) @ query
    return scores <= np.quantile(scores, share)


def choose(monkeypatch, scored):
    """Whether all selected rows are scored one by one, or as few as can be."""
    monkeypatch.setattr(faiss_filters, "ROWS_PASSED", 1 if scored else 10**6)
    monkeypatch.setattr(faiss_filters, "ROWS_FETCHED", 10**6 if scored else 0)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("scored", [True, False], ids=["scored", "searched"])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.6])
def test_lists_are_full_and_right_where_the_filter_is_far_from_the_query(
    store, built, queries, monkeypatch, factory, scored, share
):
    choose(monkeypatch, scored)
    index, recalls = built[factory], []
    for query in queries[:12]:
        mask = far(store, query, share)
        scores, found = index.search(query, K, where=mask)
        assert len(found) == K and len(set(found)) == K and np.isfinite(scores).all() and (np.diff(scores) <= 0).all()
        assert all(mask[int(name[3:])] for name in found)
        recalls.append(len(set(found) & set(right(index, query[None], mask)[0])) / K)
    assert np.mean(recalls) >= 0.98


@pytest.mark.parametrize("factory", FACTORIES)
def test_many_queries_share_a_filter(store, built, queries, monkeypatch, factory):
    choose(monkeypatch, False)
    index, mask = built[factory], np.random.default_rng(0).random(ROWS) < 0.1
    chosen = index.select(mask)
    found = index.search(queries, K, where=chosen)[1]
    assert all(len(set(names)) == K and all(mask[int(name[3:])] for name in names) for names in found)
    share = np.mean([len(set(a) & set(b)) / K for a, b in zip(found, right(index, queries, mask), strict=True)])
    assert share >= 0.98
    again = index.search(queries[:2], K, where=chosen)[1]
    assert again == index.search(queries[:2], K, where=mask)[1]


def test_conditions_on_columns(store, flat, columns, queries):
    rows = np.arange(ROWS)
    country, price = np.where(rows == 5, "", np.array(["de", "at", "fr"])[rows % 3]), rows / 10
    for where, mask in (
        ({"country": "fr"}, country == "fr"),
        ({"country": ["de", "at"]}, np.isin(country, ["de", "at"])),
        ({"country": []}, np.zeros(ROWS, bool)),
        ({"price": {"<": 10, ">=": 2}}, (price < 10) & (price >= 2)),
        ({"country": "de", "new": True, "stock": {"!=": 3}}, (country == "de") & (rows % 2 == 0) & (rows % 7 != 3)),
        ({"stock": {">": 5.5}}, rows % 7 == 6),
        ({}, rows >= 0),
        ((pc.field("price") < 5) | (pc.field("country") == "fr"), (price < 5) | (country == "fr")),
        (~pc.field("new"), rows % 2 == 1),
        ({f"ad-{row}" for row in range(30)} | {"ad-gone"}, rows < 30),
        (pa.array(["ad-7", "ad-9"]), np.isin(rows, [7, 9])),
        (["ad-7"], rows == 7),
        ((rows % 5 == 0).tolist(), rows % 5 == 0),
    ):
        chosen = flat.select(where)
        assert chosen.count == mask.sum() and (chosen.mask == mask).all(), where
        assert list(map(set, flat.search(queries, K, where=where)[1])) == list(map(set, right(flat, queries, mask)))


def test_a_filter_that_few_or_none_pass(flat, built, queries):
    for index in (flat, built["HNSW16"], built["IVF32,SQ8"]):
        scores, found = index.search(queries, K, where=["ad-3", "ad-4"])
        assert scores.shape == (24, 2) and all(sorted(names) == ["ad-3", "ad-4"] for names in found)
        scores, found = index.search(queries[0], K, where=["gone"])
        assert scores.shape == (0,) and found == []


def test_columns_are_saved_mapped_and_pickled(flat, queries, tmp_path):
    flat.save(tmp_path / "index")
    expected = flat.search(queries, K, where={"country": "at"})[1]
    for again in (AdIndex.load(tmp_path / "index"), pickle.loads(pickle.dumps(flat))):
        assert again.search(queries, K, where={"country": "at"})[1] == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"colour": "red"}, "columns among _id, country, price, stock, new, found str 'colour'"),
        ({"price": {"~": 1}}, "price: expected one of == != < <= > >=, found str '~'"),
        ({"price": "ten"}, "price: expected a value of type double, found str 'ten'"),
        ({"country": 7}, "country: expected a value of type string, found int 7"),
        ({"country": ["de", None]}, "found NoneType None"),
        ({"new": []}, None),
        (pc.field("colour") == 1, "a condition on the columns"),
        (pc.field("price"), "it gives double"),
        ("ad-7", r"write \['ad-7'\] for one id"),
        ([True, False], r"a mask of shape \(3000,\), a bool a row, found \(2,\)"),
        ([7, 9], "ids as texts"),
        (7, "ids as texts"),
    ],
    ids=str,
)
def test_filters_that_do_not_fit_are_refused(flat, queries, where, message):
    if message is None:
        assert flat.search(queries[0], K, where=where)[1] == []
        return
    with pytest.raises(HlmError, match=message):
        flat.search(queries[0], K, where=where)


def test_a_selection_belongs_to_its_index(flat, built, queries):
    with pytest.raises(HlmError, match="expected a selection of this index"):
        built["HNSW16"].search(queries, K, where=flat.select(["ad-1"]))


def test_columns_that_do_not_fit_are_refused(store, columns):
    for wrong, message in (
        (columns.drop_columns(["_id"]), "a table with a column '_id', found country, price"),
        (columns.slice(1), "a row for each ad, found none for 'ad-2999'"),
        (pa.concat_tables([columns, columns.slice(0, 1)]), "'ad-2999' twice"),
        (columns.append_column("tags", pa.array([["a"]] * ROWS)), "in 'tags', found list"),
    ):
        with pytest.raises(HlmError, match=message):
            AdIndex.build(store, columns=wrong)


@pytest.mark.parametrize("factory", ["SQ8", "HNSW16,SQfp16", "PQ16x4fs,Refine(SQ6)"])
def test_rows_of_a_narrow_filter_are_scored_as_those_of_a_wide_one(tmp_path, factory, monkeypatch):
    """Up to a tenth of the rows are scored apart from the others, in blocks."""
    vectors = clustered(1020)
    store, queries = make_store(tmp_path / "store", vectors[:1000]), vectors[1000:]
    index = AdIndex.build(store, factory)
    mask = np.random.default_rng(0).random(1000) < 0.09
    monkeypatch.setattr(faiss_filters, "ROWS_AT_ONCE", 7)
    scores, found = index.search(queries, 20, where=mask)
    monkeypatch.setattr(faiss_filters, "ROWS_ASKED", 1000)
    expected_scores, expected = index.search(queries, 20, where=mask)
    assert found == expected
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-6)
