"""The index is chosen on a student's own queries: fast enough, small enough, and what it finds is what was said."""

import json

import numpy as np
import pytest
from stores import clustered, make_store

import hlm
from hlm.artefacts import HlmError
from hlm.embedding.embed import embed
from hlm.encoders.loading import encode, fingerprint, load_encoder, save_encoder
from hlm.indexes import faiss_parts, tuning
from hlm.indexes.faiss_index import AdIndex
from hlm.indexes.recall import exact_neighbours, measured, recalls, sample_of
from hlm.vectors.store import VectorStore

CANDIDATES = ["Flat", "HNSW8", "IVF8,SQ8", "IVF4,PQ16x4fs,Refine(SQfp16)"]


@pytest.fixture(scope="module")
def home(tiny_bert, catalogue_200, tmp_path_factory):
    """A teacher's stores and a student, which is the teacher."""
    root = tmp_path_factory.mktemp("tuning")
    embed(model=tiny_bert, data=catalogue_200, output=str(root / "vectors"), parts=["corpus", "queries"])
    teacher = load_encoder(tiny_bert)
    save_encoder(teacher, root / "student", "student", inputs={"teacher": fingerprint(teacher)}, config={})
    return root


def tune(home, catalogue_200, output, **settings):
    given = {"vectors": str(home / "vectors"), "student": str(home / "student"), "data": catalogue_200}
    hlm.tune_index(**given | {"output": str(output), "k": 5, "queries": 60, "candidates": CANDIDATES} | settings)
    return json.loads((output / "hlm.json").read_text())


def test_the_choice_is_written_and_finds_what_it_says(home, catalogue_200, tmp_path, capsys):
    manifest = tune(home, catalogue_200, tmp_path / "index", columns=["brand", "price"], target_recall=0.9)
    said, index = manifest["measured"], hlm.open_index(tmp_path / "index")
    texts = hlm.load_data(catalogue_200, splits=()).unlabelled["text"]
    drawn = np.random.default_rng(0).permutation(len(texts))[:60]
    queries = encode(load_encoder(str(home / "student")), [texts[row] for row in drawn[30:]], prompt_name="query")
    store = VectorStore.open(home / "vectors/corpus")
    found = index.search(queries, 5)[1]
    assert said["recall"] == pytest.approx(recalls(found, exact_neighbours(store, queries, 5)).mean())
    assert (said["k"], said["queries"], said["of"]) == (5, 30, "queries of the student")
    chosen, trials = said["chosen"], said["trials"]
    assert {trial["factory"] for trial in trials} == set(CANDIDATES)
    assert index.factory == chosen["factory"] and index.options == chosen["options"] | {
        name: value for name, value in index.options.items() if name not in chosen["options"]
    }
    good = [trial for trial in trials if trial["recall"] - 1.64 * trial["error"] >= 0.9]
    assert chosen["p50_ms"] == min(trial["p50_ms"] for trial in good)
    out = capsys.readouterr().out
    assert len(out.splitlines()) == len(trials) + 1 and out.count("*") == 1
    assert (tmp_path / "index/tuning.png").read_bytes().startswith(b"\x89PNG")
    assert index.search(queries, 3, where={"price": {"<": 50}})[1][0]
    assert index.columns == ["_id", "brand", "price"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]  # no candidates are left


def test_it_goes_on_with_what_was_built_and_leaves_alone_what_is_up_to_date(
    home, catalogue_200, tmp_path, caplog, monkeypatch
):
    built, build = [], AdIndex.build.__func__
    monkeypatch.setattr(
        AdIndex, "build", classmethod(lambda cls, *args, **more: built.append(args[1]) or build(cls, *args, **more))
    )
    with pytest.raises(HlmError, match="expected an index of recall 0.98, p99 1e-06 ms, found none.*kept"):
        tune(home, catalogue_200, tmp_path / "index", p99_ms=1e-6)
    assert built == CANDIDATES and not (tmp_path / "index").exists()
    tune(home, catalogue_200, tmp_path / "index")
    assert built == CANDIDATES
    before = (tmp_path / "index/hlm.json").stat().st_mtime_ns
    tune(home, catalogue_200, tmp_path / "index")
    assert built == CANDIDATES and (tmp_path / "index/hlm.json").stat().st_mtime_ns == before
    tune(home, catalogue_200, tmp_path / "index", target_recall=1.0, candidates=["Flat"])
    assert built == [*CANDIDATES, "Flat"]


def test_bounds_leave_out_what_is_too_large(home, catalogue_200, tmp_path):
    small = tuning.bytes_a_vector("IVF8,SQ8", 32) * 200 / 1e9
    with pytest.raises(HlmError, match="memory_gb: expected room for an index of 200 ads"):
        tune(home, catalogue_200, tmp_path / "index", memory_gb=small / 2)
    manifest = tune(home, catalogue_200, tmp_path / "index", memory_gb=1)
    assert {trial["factory"] for trial in manifest["measured"]["trials"]} == set(CANDIDATES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_recall": 1.5}, "target_recall: expected more than 0"),
        ({"memory_gb": 0.0}, "memory_gb: expected more than 0"),
        ({"k": 0}, "k: expected 1"),
        ({"columns": ["colour"]}, "columns: expected some of .*found 'colour'"),
        ({"candidates": ["IVF4096,Flat"]}, "4096"),
    ],
    ids=str,
)
def test_settings_that_do_not_work_are_refused(home, catalogue_200, tmp_path, settings, message):
    with pytest.raises(HlmError, match=message):
        tune(home, catalogue_200, tmp_path / "index", **settings)


def test_an_index_by_hand_says_what_it_finds(home, tiny_bert, catalogue_200, tmp_path, caplog):
    caplog.set_level("INFO")
    for factory, part in (("IVF8,PQ4x4", "queries"), ("Flat", None)):
        settings = {"model": tiny_bert, "data": catalogue_200, "parts": ["corpus", "queries"], "index": factory}
        embed(output=str(home / "vectors"), **settings)
        manifest = json.loads((home / "vectors/index/hlm.json").read_text())
        assert (manifest.get("measured") or {}).get("of") == (part and f"vectors of {part}")
        if part:
            assert 0 < manifest["measured"]["recall"] < 1 and "IVF8,PQ4x4 finds 0." in caplog.text
            assert hlm.open_index(home / "vectors/index").measured == manifest["measured"]


def test_exact_neighbours_are_those_of_the_flat_index(tmp_path):
    store, queries = make_store(tmp_path / "store", clustered(900)), clustered(920)[900:]
    assert exact_neighbours(store, queries, 7) == AdIndex.build(store).search(queries, 7)[1]
    narrow = queries[:, :16] / np.linalg.norm(queries[:, :16], axis=1, keepdims=True)
    index = AdIndex.build(store, dim=16)
    assert exact_neighbours(store, narrow, 7) == index.search(narrow, 7)[1]
    assert measured(index, store, narrow, 7, "queries")["recall"] == 1
    assert recalls([["a", "b"], ["c"]], [["b", "d"], ["c", "e"]]).tolist() == [0.5, 0.5]
    assert sample_of(store, 0, rows=40, dim=16).shape == (40, 16)


def test_candidates_grow_with_the_catalogue():
    assert tuning.candidates(300, 384) == ["Flat", "HNSW32,SQfp16"]
    found = tuning.candidates(200_000, 384)
    assert found[:4] == ["Flat", "HNSW32,SQfp16", "IVF1024,SQ8", "IVF1024,PQ192x4fs,Refine(SQfp16)"]
    assert any(name.startswith("IVF16384_HNSW32,") for name in tuning.candidates(47_000_000, 1024, tight=True))
    assert [tuning.bytes_a_vector(name, 384) for name in found[:4]] == [1536, 1024, 392, 872]
    assert faiss_parts.rows_to_train("IVF1024,PQ48") == 131_072
    assert faiss_parts.rows_to_train("IVF65536_HNSW32,SQ8") == 2_621_440
