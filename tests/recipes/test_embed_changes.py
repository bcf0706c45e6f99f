"""recipes/embed.py on a catalogue that changes: what is encoded, what readers see, and the way back."""

import json

import numpy as np
import pytest

from hlm.artefacts import HlmError
from hlm.data.contract import document_text, load
from hlm.encoders import loading
from hlm.encoders.loading import encode, load_encoder
from hlm.publishing.files import release_files
from hlm.publishing.staging import link_current
from hlm.vectors import embed as embed_module
from hlm.vectors import embed_index, versions
from hlm.vectors.index import open_index
from hlm.vectors.rollback import roll_back
from hlm.vectors.store import VectorStore
from recipes import embed

ADS = [
    ("a1", "red kettle", "boils one litre"),
    ("a2", "blue kettle", "boils two litres"),
    ("a3", "steel pan", ""),
    ("a4", "copper pan", "28 cm"),
    ("a5", "glass lid", "fits 28 cm pans"),
]
QUERIES = [("q1", "red kettle"), ("q2", "pan 28cm")]
CHANGED = [*ADS[1:4], ("a5", "glass lid", "fits 30 cm pans"), ("a6", "tea cosy", "wool"), ("a7", "whisk", "")]


def write(folder, ads, queries=QUERIES):
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    tables = {
        "corpus": [{"_id": name, "title": title, "text": text} for name, title, text in ads],
        "queries": [{"_id": name, "text": text} for name, text in queries],
        "unlabelled": [{"text": "kettle for tea"}, {"text": "big pan"}],
    }
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\ta1\t3\n")
    return folder


@pytest.fixture
def encoded(monkeypatch):
    """The texts that were encoded, in order, canaries left out."""
    texts = []

    def counted(model, some, **how):
        texts.extend(some)
        return encode(model, some, **how)

    monkeypatch.setattr(embed_module, "encode", counted)
    return texts


def run(model, data, output, *more):
    embed.main(["--model", str(model), "--data", str(data), "--output", str(output), *more])


@pytest.mark.parametrize("index", ["Flat", "lance:IVF_FLAT"])
def test_only_what_changed_is_encoded_and_the_version_before_stays(tiny_bert, tmp_path, encoded, index):
    shop, output = write(tmp_path / "shop", ADS), tmp_path / "out"
    run(tiny_bert, shop, output, "--index", index, "--shard_rows", "3")
    old, was = open_index(output / "index"), VectorStore.open(output / "corpus")
    del encoded[:]
    write(shop, CHANGED, [*QUERIES, ("q4", "whisk")])
    run(tiny_bert, shop, output, "--index", index, "--shard_rows", "3")
    texts = [document_text({"title": title, "text": text}) for _, title, text in CHANGED]
    assert [text for text in encoded if text in {*texts, "whisk"}] == [*texts[3:], "whisk"]
    store, data = VectorStore.open(output / "corpus"), load(str(shop), splits=())
    store.verify()
    store.check(source=data.fingerprint("corpus"))
    assert len(store) == 6 and set(store.ids.to_pylist()) == {name for name, *_ in CHANGED}
    model = load_encoder(str(tiny_bert), device="cpu", dtype="float32")
    expected = encode(model, texts, prompt_name="document")
    rows = store.rows_of([name for name, *_ in CHANGED])
    np.testing.assert_allclose(store.gather(rows), expected, atol=1e-3)
    assert [start for start, _ in store.iter_blocks(4)] == [0, 4]
    np.testing.assert_array_equal(np.concatenate([block for _, block in store.iter_blocks(4)]), store.gather(range(6)))
    new = open_index(output / "index", expect_encoder=store.encoder)
    assert new.search(expected, 1)[1] == [[name] for name, *_ in CHANGED] and new.made_of == store.parts
    assert new.source == store.source and new.measured == (None if index == "Flat" else new.measured)
    assert old.search(expected, 5)[1][0] and len(old) == 5 and len(was) == 5
    assert was.gather(was.rows_of(["a1"])).shape == (1, store.dim)
    link_current(output / "corpus", tmp_path / "view/vectors/corpus")
    VectorStore.open(tmp_path / "view/vectors/corpus").verify()
    if index == "Flat":
        link_current(output / "index", tmp_path / "view/index")
        assert open_index(tmp_path / "view/index").search(expected, 1)[1] == new.search(expected, 1)[1]
    files = release_files(tmp_path / "view", "dataset", sources=[output])
    assert {name for name in files if name.endswith("gone.parquet")} == {"vectors/corpus/gone.parquet"}
    del encoded[:]
    run(tiny_bert, shop, output, "--index", index, "--shard_rows", "3")
    assert not encoded and list(versions.listed(output / "corpus", "vectors")) == [1, 2]


@pytest.mark.parametrize("index", ["Flat", "lance:IVF_SQ"])
def test_an_index_follows_columns_that_change_without_encoding(tiny_bert, tmp_path, encoded, caplog, index):
    shop, output = write(tmp_path / "shop", ADS), tmp_path / "out"

    def price(prices):
        rows = [json.loads(line) for line in (shop / "corpus.jsonl").read_text().splitlines()]
        rows = [row | {"price": price, "country": "de"} for row, price in zip(rows, prices, strict=True)]
        (shop / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run(tiny_bert, shop, output, "--index", index, "--index_columns", "price", "country")

    def below(most):
        index = open_index(output / "index")
        return set(index.search(np.full(index.dim, index.dim**-0.5, np.float32), 9, where={"price": {"<": most}})[1])

    price(["1", "2", "3", "4", "5"])
    assert below("3") == {"a1", "a2"}
    del encoded[:]
    price(["1", "9", "3", "0", "5"])
    assert below("3") == {"a1", "a4"} and not encoded and len(open_index(output / "index")) == 5
    versions_then = list(versions.listed(output / "index", "index"))
    price(["1", "9", "3", "0", "5"])
    assert list(versions.listed(output / "index", "index")) == versions_then == [1, 2]
    with pytest.raises(HlmError, match="index_columns: expected some of .*, found 'colour'"):
        run(tiny_bert, shop, output, "--index", index, "--index_columns", "colour")


@pytest.mark.parametrize("index", ["IVF1,SQ8", "lance:IVF_FLAT"])
def test_an_index_that_finds_less_is_not_taken(tiny_bert, tmp_path, monkeypatch, index):
    shop, output = write(tmp_path / "shop", ADS), tmp_path / "out"
    run(tiny_bert, shop, output, "--index", index)
    before = open_index(output / "index")
    assert before.measured["recall"] > 0
    write(shop, CHANGED)
    monkeypatch.setattr(embed_index, "LOST_RECALL", -2)
    with pytest.raises(HlmError, match=r"expected an index that finds .* of the exact neighbours.*the old one stays"):
        run(tiny_bert, shop, output, "--index", index)
    assert len(open_index(output / "index")) == 5 and len(VectorStore.open(output / "corpus")) == 6
    run(tiny_bert, shop, output, "--index", "HNSW32")  # another kind is not compared
    assert open_index(output / "index").factory == "HNSW32" and len(before.search(np.eye(1, before.dim)[0], 9)[1]) == 5
    monkeypatch.undo()
    run(tiny_bert, shop, output, "--index", index)
    assert len(open_index(output / "index")) == 6 and open_index(output / "index").factory == before.factory
    roll_back(output / "index")
    assert open_index(output / "index").factory == "HNSW32"
    roll_back(output / "index")
    assert len(open_index(output / "index")) == 5 and open_index(output / "index").factory == before.factory


def test_an_index_that_somebody_else_changed_is_built_anew(tiny_bert, tmp_path):
    shop, output = write(tmp_path / "shop", ADS), tmp_path / "out"
    run(tiny_bert, shop, output, "--index", "lance:FLAT")
    index = open_index(output / "index")
    index.put(["x"], np.ones((1, index.dim)))
    index.commit()
    write(shop, CHANGED)
    run(tiny_bert, shop, output, "--index", "lance:FLAT")
    index = open_index(output / "index")
    assert set(index.ads()["_id"].to_pylist()) == {name for name, *_ in CHANGED} and index.version == 3


def test_a_store_that_goes_back_and_on_keeps_no_more_than_it_is_told(tiny_bert, tmp_path, encoded):
    shop, output = write(tmp_path / "shop", ADS), tmp_path / "out"
    wanted = ("--parts", "corpus", "--keep_versions", "2", "--shard_rows", "2")
    for number in range(4):
        write(shop, [*ADS, ("n", f"new {number}", "")])
        run(tiny_bert, shop, output, *wanted)
        assert len(VectorStore.open(output / "corpus")) == 6
    assert list(versions.listed(output / "corpus", "vectors")) == [3, 4]
    assert sorted(path.name for path in output.iterdir()) == ["corpus"]
    assert len(encoded) == 6 + 3 + len(embed_module.canaries.QUERIES) * 3
    names = {path.name for path in (output / "corpus").glob("vectors-*")}
    assert names == {f"vectors-0000{number}.safetensors" for number in (0, 1, 2, 4, 5)}


def test_what_mostly_went_is_written_anew(tiny_bert, tmp_path, encoded):
    shop, output = write(tmp_path / "shop", ADS), tmp_path / "out"
    run(tiny_bert, shop, output, "--parts", "corpus")
    was = VectorStore.open(output / "corpus")
    vectors = was.gather(was.rows_of(["a4", "a5"]))
    write(shop, ADS[3:])
    del encoded[:]
    run(tiny_bert, shop, output, "--parts", "corpus")
    store = VectorStore.open(output / "corpus")
    assert store.ids.to_pylist() == ["a4", "a5"] and not len(store.gone) and len(store.manifest["shards"]) == 1
    np.testing.assert_array_equal(store.gather([0, 1]), vectors)
    assert set(encoded) <= set(embed_module.canaries.QUERIES)
    np.testing.assert_array_equal(was.gather(was.rows_of(["a4", "a5"])), vectors)
    write(shop, ADS[2:])
    del encoded[:]
    run(tiny_bert, shop, output, "--parts", "corpus")
    assert set(encoded) - set(embed_module.canaries.QUERIES) == {document_text({"title": "steel pan", "text": ""})}


def test_a_model_that_has_moved_is_refused_and_the_old_version_stays(tiny_bert, tmp_path, monkeypatch):
    shop, output = write(tmp_path / "shop", ADS), tmp_path / "out"
    run(tiny_bert, shop, output, "--parts", "corpus")
    write(shop, CHANGED)

    def moved(model, texts, **how):
        vectors = loading.encode(model, texts, **how) + 0.3
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    monkeypatch.setattr(embed_module, "encode", moved)
    with pytest.raises(HlmError, match="canary quer"):
        run(tiny_bert, shop, output, "--parts", "corpus")
    assert len(VectorStore.open(output / "corpus")) == 5 and not versions.are_kept(output / "index")


def test_unlabelled_queries_are_never_changed(tiny_bert, tmp_path):
    shop, output = write(tmp_path / "shop", ADS), tmp_path / "out"
    run(tiny_bert, shop, output)
    (shop / "unlabelled.jsonl").write_text('{"text": "another"}\n')
    with pytest.raises(HlmError, match="holds vectors of another run"):
        run(tiny_bert, shop, output)
