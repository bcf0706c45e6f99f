"""Ready vectors in Parquet, NumPy, FAISS, LanceDB: found by id or text, in any order, and refused by name."""

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import clustered

from hlm.artefacts import HlmError
from hlm.embedding import ready as module
from hlm.embedding.ready import open_ready
from hlm.teacher_settings import ReadySettings

NAMES = [f"{number:03d}" for number in range(50)]
VECTORS = 3 * clustered(50, 16)
ORDER = np.random.default_rng(1).permutation(50)
WANTED = ["007", "049", "000", "031"]


def expected(names, dim=16):
    vectors = VECTORS[[NAMES.index(name) for name in names], :dim]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=7)
    return str(path)


def lists(vectors, kind=None):
    return pa.array(list(vectors.astype(np.float32).tolist()), type=kind or pa.list_(pa.float32()))


def taken(settings, folder, names=tuple(WANTED), dim=16, has_ids=True):
    ready = open_ready("corpus", ReadySettings(**settings), has_ids=has_ids)
    found, places = ready.in_order(pa.array(names), dim, folder)
    assert ready.width == VECTORS.shape[1] and found.dtype == np.float16
    return found[places].astype(np.float32)


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float16(), 16)], ids=str
)
def test_parquet_of_any_order_type_and_number_of_files(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(module, "ROWS_A_BLOCK", 9)
    values = VECTORS[ORDER].astype(np.float16) if "half" in str(kind) else VECTORS[ORDER]
    for number, part in enumerate((slice(0, 20), slice(20, 50))):
        ids = [NAMES[row] for row in ORDER[part]]
        parquet(tmp_path / f"{number}.parquet", id=ids, price=[1.0] * len(ids), emb=pa.array(list(values[part]), kind))
    for path in (tmp_path, tmp_path / "*.parquet"):
        np.testing.assert_allclose(taken({"path": str(path)}, tmp_path), expected(WANTED), atol=2e-3)
    np.testing.assert_allclose(taken({"path": str(tmp_path)}, tmp_path, dim=4), expected(WANTED, 4), atol=2e-3)


def test_ids_as_numbers_and_texts_in_place_of_ids(tmp_path):
    path = parquet(tmp_path / "n.parquet", _id=list(range(50)), vector=lists(VECTORS))
    np.testing.assert_allclose(taken({"path": path}, tmp_path, ["7", "49"]), expected(["007", "049"]), atol=1e-3)
    path = parquet(tmp_path / "t.parquet", text=[f" pan  {name}" for name in NAMES], vector=lists(VECTORS))
    for has_ids in (True, False):  # a part with ids may be told apart by texts as well, and these may come twice
        found = taken({"path": path}, tmp_path, ["pan 007", "pan 031", "pan 007"], has_ids=has_ids)
        np.testing.assert_allclose(found, expected(["007", "031", "007"]), atol=1e-3)


def test_numpy_with_a_file_of_ids(tmp_path):
    np.save(tmp_path / "v.npy", VECTORS[ORDER])
    (tmp_path / "ids.txt").write_text("\n".join(NAMES[row] for row in ORDER) + "\n")
    settings = {"path": str(tmp_path / "v.npy"), "ids": str(tmp_path / "ids.txt")}
    np.testing.assert_allclose(taken(settings, tmp_path), expected(WANTED), atol=1e-3)
    texts = [f"pan\u2028{name}" for name in NAMES]  # a separator of lines that Python knows, and editors do not
    (tmp_path / "texts.txt").write_text("\r\n".join(texts[row] for row in ORDER))
    found = taken(settings | {"ids": str(tmp_path / "texts.txt")}, tmp_path, ["pan 007"], has_ids=False)
    np.testing.assert_allclose(found, expected(["007"]), atol=1e-3)
    (tmp_path / "ids.txt").write_text("one\n")
    with pytest.raises(HlmError, match=r"expected 50 ids in .*ids.txt, one a vector, found 1 lines"):
        taken(settings, tmp_path)
    with pytest.raises(HlmError, match="expected a file of ids beside"):
        taken({"path": settings["path"]}, tmp_path)
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(HlmError, match=r"expected a \.npy file of numbers"):
        taken({"path": str(tmp_path / "o.npy")}, tmp_path)
    np.save(tmp_path / "i.npy", np.zeros((5, 5), dtype=np.int64))
    with pytest.raises(HlmError, match="expected floating-point vectors, one a row, found int64"):
        taken({"path": str(tmp_path / "i.npy")}, tmp_path)


@pytest.mark.parametrize("factory, atol", [("Flat", 1e-3), ("IVF4,Flat", 1e-3), ("HNSW8", 1e-3), ("SQ8", 0.02)])
def test_faiss_gives_its_vectors_back(tmp_path, factory, atol, caplog):
    index = faiss.index_factory(16, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(VECTORS)
    index.add(VECTORS[ORDER])
    faiss.write_index(index, str(tmp_path / "ads.faiss"))
    (tmp_path / "ids.txt").write_text("\n".join(NAMES[row] for row in ORDER))
    settings = {"path": str(tmp_path / "ads.faiss"), "ids": str(tmp_path / "ids.txt")}
    np.testing.assert_allclose(taken(settings, tmp_path), expected(WANTED), atol=atol)
    assert ("may keep less than the vectors" in caplog.text) == (factory != "Flat")


def test_faiss_with_ids_of_its_own(tmp_path):
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(16))
    index.add_with_ids(VECTORS[ORDER], ORDER.astype(np.int64))
    faiss.write_index(index, str(tmp_path / "ads.index"))
    found = taken({"path": str(tmp_path / "ads.index")}, tmp_path, ["7", "49"])
    np.testing.assert_allclose(found, expected(["007", "049"]), atol=1e-3)
    (tmp_path / "bad.faiss").write_bytes(b"\x80\x04not an index")
    with pytest.raises(HlmError, match=r"cannot read .*bad\.faiss"):
        taken({"path": str(tmp_path / "bad.faiss")}, tmp_path)


def test_lancedb(tmp_path):
    lancedb = pytest.importorskip("lancedb")
    flat = pa.array(VECTORS[ORDER].ravel().astype(np.float32))
    rows = pa.table(
        {"sku": [NAMES[row] for row in ORDER], "vector": pa.FixedSizeListArray.from_arrays(flat, VECTORS.shape[1])}
    )
    lancedb.connect(str(tmp_path / "db")).create_table("ads", rows)
    settings = {"path": str(tmp_path / "db"), "table": "ads"}
    np.testing.assert_allclose(taken(settings, tmp_path), expected(WANTED), atol=1e-3)
    with pytest.raises(HlmError, match="expected table 'none' in"):
        taken(settings | {"table": "none"}, tmp_path)


@pytest.mark.parametrize(
    "columns, settings, message",
    [
        ({"id": NAMES, "price": [1.0] * 50}, {}, "expected one column of lists of numbers in .* found none among id"),
        ({"id": NAMES, "a": "v", "b": "v"}, {}, "found a, b among id, a, b; name it as `vectors`"),
        ({"id": NAMES, "a": "v"}, {"vectors": "c"}, "expected a column 'c' in .*, found id, a"),
        ({"key": NAMES, "a": "v"}, {}, "expected a column _id in .*, found key, a; name it as `ids`"),
        ({"id": [0.5] * 50, "a": "v"}, {}, "expected ids that are texts or whole numbers in 'id', found double"),
        ({"id": [None, *NAMES[1:]], "a": "v"}, {}, "expected filled columns 'id' and 'a', found an empty cell"),
        ({"id": NAMES, "a": [[1.0], *[[1.0, 2.0]] * 49]}, {}, "expected vectors of one width in 'a', found several"),
        ({"id": NAMES, "a": [[1.0, None]] * 50}, {}, "expected numbers in 'a', found an empty value"),
        ({"id": NAMES[:40], "a": "v"}, {}, r"expected a vector of each of 50 ids .*found none of 10 \(first '040'\)"),
        ({"id": ["000", *NAMES[:-1]], "a": "v"}, {}, "expected one vector of each id, found two of '000'; keep one"),
        ({"id": NAMES, "a": [[float("nan")]] * 50}, {}, r"'000': expected a finite vector .* found NaN or infinity"),
        ({"id": NAMES, "a": [[0.0, 0.0]] * 50}, {}, "found zeros alone"),
        ({"id": [], "a": []}, {}, "column of lists of numbers"),
    ],
)
def test_what_cannot_be_right_is_named(tmp_path, columns, settings, message):
    rows = len(next(iter(columns.values())))
    table = {name: lists(VECTORS[:rows]) if value == "v" else value for name, value in columns.items()}
    path = parquet(tmp_path / "x.parquet", **table)
    with pytest.raises(HlmError, match=message):
        ready = open_ready("corpus", ReadySettings(path, **settings), has_ids=True)
        ready.in_order(pa.array(NAMES), ready.width, tmp_path)


def test_paths_that_are_nothing(tmp_path):
    (tmp_path / "v.csv").write_text("id,v\n")
    for name, found in (("none.parquet", "nothing"), ("v.csv", "none of them"), ("empty", "nothing")):
        with pytest.raises(HlmError, match=f"expected Parquet, .npy, FAISS .*found {found} at"):
            open_ready("corpus", ReadySettings(str(tmp_path / name)), has_ids=True)
    with pytest.raises(HlmError, match="ready: queries: expected a file at"):
        open_ready("queries", ReadySettings(str(tmp_path / "v.npy")), has_ids=True)


def test_another_file_has_another_stamp(tmp_path):
    one = parquet(tmp_path / "one.parquet", id=NAMES, a=lists(VECTORS))
    two = parquet(tmp_path / "two.parquet", id=NAMES, a=lists(-VECTORS))
    stamps = [open_ready("corpus", ReadySettings(path), has_ids=True).stamp for path in (one, one, two)]
    assert stamps[0] == stamps[1] != stamps[2]
