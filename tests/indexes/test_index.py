"""What an ad index is: a second engine goes wherever FAISS goes, and the manifest says which one it is."""

import json
import sys

import numpy as np
import pyarrow as pa
import pytest
from stores import clustered, make_store, rewrite

from hlm.artefacts import HlmError, atomic_folder
from hlm.evaluation.metrics import dense_run
from hlm.indexes import index_parts
from hlm.indexes.faiss_index import AdIndex
from hlm.indexes.filters import mask_of
from hlm.indexes.index import ENGINES, Engine, Index, create_index, open_index
from hlm.indexes.lineage import open_fitting
from hlm.publishing.files import release_files


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("index") / "store", clustered(3000))


@pytest.fixture(scope="module")
def queries():
    return clustered(3064)[3000:]


@pytest.fixture
def saved(store, tmp_path):
    AdIndex.build(store).save(tmp_path / "index")
    return tmp_path / "index"


class ArrayIndex(Index):
    """A second engine: all vectors in one NumPy array."""

    engine = "array"
    factory = "float32"

    def __init__(self, vectors, ads, *, encoder, source, canaries=None):
        self.vectors, self.ads, self.ids = vectors, ads, ads["_id"].combine_chunks()
        self.encoder, self.source, self.canaries = encoder, source, canaries

    @property
    def dim(self):
        return self.vectors.shape[1]

    def __len__(self):
        return len(self.vectors)

    @classmethod
    def build(cls, store, factory="float32", *, dim=None):
        width = dim or store.dim
        blocks = [index_parts.normalised(block, width, first_row=row) for row, block in store.iter_blocks()]
        ads = index_parts.joined(index_parts.checked_ids(store.ids), None)
        return cls(np.concatenate(blocks), ads, encoder=store.encoder, source=store.source, canaries=store.canaries)

    @classmethod
    def create(cls, place, store, factory="float32", **options):
        cls.build(store, factory, **options).save(place)
        return cls.load(place)

    def search(self, queries, k, *, where=None):
        products = index_parts.checked_queries(queries, self.dim) @ self.vectors.T
        if where is not None:
            mask = mask_of(where, self.ads)
            products[:, ~mask], k = -np.inf, min(k, mask.sum())
        rows = np.argsort(-products, axis=1, kind="stable")[:, :k]
        scores = np.take_along_axis(products, rows, 1)
        ids = [self.ids.take(pa.array(row)).to_pylist() for row in rows]
        return (scores, ids) if np.ndim(queries) == 2 else (scores[0], ids[0])

    def save(self, folder):
        with atomic_folder(folder, "index") as aside:
            np.save(aside / "vectors.npy", self.vectors)
            index_parts.write_ads(aside / "ads.arrow", self.ads)
            index_parts.write_facts(aside, self)

    @classmethod
    def load(cls, folder, *, expect_encoder=None):
        facts = index_parts.read_facts(folder, cls.engine, expect_encoder)
        ads = index_parts.read_ads(folder / "ads.arrow", facts.count)
        vectors = np.load(folder / "vectors.npy", allow_pickle=False)
        return cls(vectors, ads, encoder=facts.encoder, source=facts.source, canaries=facts.canaries)


@pytest.fixture
def second_engine(monkeypatch):
    files = ("vectors.npy", "ads.arrow")
    monkeypatch.setitem(ENGINES, "array", Engine(__name__, ArrayIndex.__name__, files))


def test_another_engine_is_opened_by_its_manifest_and_answers_as_faiss_does(second_engine, store, queries, tmp_path):
    create_index(tmp_path / "array", store, "array:float32")
    create_index(tmp_path / "faiss", store, "Flat")
    ours, theirs = open_index(tmp_path / "array", expect_encoder="teacher-a"), open_index(tmp_path / "faiss")
    assert (type(ours).__name__, type(theirs)) == ("ArrayIndex", AdIndex)
    names = [str(row) for row in range(len(queries))]
    mine, other = (dense_run(queries, index, names, 10) for index in (ours, theirs))
    assert {name: list(found) for name, found in mine.items()} == {name: list(found) for name, found in other.items()}
    assert ours.search(queries[0], 3)[1] == theirs.search(queries[0], 3)[1]
    where = [f"ad-{row}" for row in range(5)]
    assert ours.search(queries[0], 9, where=where)[1] == theirs.search(queries[0], 9, where=where)[1]
    student = {"inputs": {"teacher": "teacher-a"}, "dim": 32}
    assert len(open_fitting(tmp_path / "array", student)) == 3000
    with pytest.raises(HlmError, match="teacher-b.*teacher-a"):
        open_index(tmp_path / "array", expect_encoder="teacher-b")
    with pytest.raises(HlmError, match="expected an index of the engine 'faiss'.*'array'; use open_index"):
        AdIndex.load(tmp_path / "array")
    (tmp_path / "array/vectors.npy").write_bytes(b"")
    with pytest.raises(HlmError, match="vectors.npy.*cut short"):
        open_index(tmp_path / "array")


def test_the_files_of_an_engine_are_published_and_no_others(store, tmp_path):
    (tmp_path / "dataset").mkdir()
    AdIndex.build(store).save(tmp_path / "dataset/index")
    files = {f"index/{name}" for name in ("hlm.json", "index.faiss", "ads.arrow")}
    assert set(release_files(tmp_path / "dataset", "dataset")) == files
    (tmp_path / "dataset/index/vectors.npy").touch()
    with pytest.raises(HlmError, match="only the documented files of a dataset, found 'index/vectors.npy'"):
        release_files(tmp_path / "dataset", "dataset")


def test_an_unknown_engine_is_refused_and_an_older_index_is_of_faiss(saved):
    assert json.loads((saved / "hlm.json").read_text())["engine"] == "faiss"
    rewrite(saved, lambda manifest: manifest.pop("engine"))
    assert type(open_index(saved)) is AdIndex
    for name in ("glow", "FAISS"):
        rewrite(saved, lambda manifest, name=name: manifest.update(engine=name))
        with pytest.raises(HlmError, match=f"expected an index of the engine faiss.*, found one of '{name}'; use the"):
            open_index(saved)
    rewrite(saved, lambda manifest: manifest.update(engine=7))
    with pytest.raises(HlmError, match="a text as 'engine', found int 7"):
        open_index(saved)


def test_a_uri_opens_the_engine_of_its_scheme(second_engine, store, tmp_path, monkeypatch):
    ArrayIndex.build(store).save(tmp_path / "array")
    found = []
    monkeypatch.setitem(ENGINES, "array", ENGINES["array"]._replace(scheme="array"))
    monkeypatch.setattr(ArrayIndex, "load", classmethod(lambda cls, place, **kwargs: found.append((place, kwargs))))
    open_index("array://host:1/ads", expect_encoder="teacher-a")
    assert found == [("array://host:1/ads", {"expect_encoder": "teacher-a"})]
    with pytest.raises(HlmError, match=r"begins with one of .*array://.*, found 'ftp://host/ads'"):
        open_index("ftp://host/ads")
    with pytest.raises(HlmError, match="expected an index of the engine faiss.*found 'glow:Flat'"):
        create_index(tmp_path / "other", store, "glow:Flat")


def test_a_frozen_index_says_how_a_catalogue_changes(saved):
    index = open_index(saved)
    for change in (lambda: index.put(["a"], np.eye(1, 32)), lambda: index.delete(["a"]), index.commit):
        with pytest.raises(HlmError, match="living engine.*found one of 'faiss'"):
            change()


def test_an_engine_that_is_not_installed_is_named_with_its_extra(saved, monkeypatch):
    monkeypatch.delitem(sys.modules, "hlm.indexes.faiss_index")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(HlmError, match=r"'faiss' for an index of the engine faiss.*pip install 'hlm\[index\]'"):
        open_index(saved)
