"""The vector store: bytes that no kill and no number of processes changes, refusals, reading through memory maps."""

import contextlib
import json
import os
import pickle
import resource
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from small_store import DIM, PLAN, ROWS, SHARD, content, encode, records, vectors

from hlm.artefacts import HlmError, write_manifest
from hlm.vectors.store import VectorStore, pending_shards, write_store


def test_written_and_read_back(whole):
    assert sorted(content(whole)) == [
        "hlm.json",
        *(f"ids-0000{shard}.parquet" for shard in range(3)),
        *(f"vectors-0000{shard}.safetensors" for shard in range(3)),
    ]
    store = VectorStore.open(whole)
    assert (len(store), store.dim, store.encoder, store.source) == (ROWS, DIM, "teacher-a", "texts-a")
    assert store.ids.to_pylist() == [f"ad-{row:03d}" for row in range(ROWS)]
    assert [shard["rows"] for shard in store.manifest["shards"]] == [9, 9, 5]
    store.verify()


def test_shards_are_plain_safetensors(whole):
    shard = safetensors.numpy.load_file(whole / "vectors-00002.safetensors")
    assert list(shard) == ["vectors"]
    np.testing.assert_array_equal(shard["vectors"], vectors()[18:].astype(np.float16))
    with safetensors.safe_open(whole / "vectors-00000.safetensors", "np") as file:
        assert file.get_slice("vectors").get_shape() == [SHARD, DIM]


def test_gather_in_any_order_with_repeats(whole):
    store, truth = VectorStore.open(whole), vectors()
    rows = np.array([22, 0, 8, 9, 9, 17, 18, 3, 22])
    got = store.gather(rows)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, truth[rows].astype(np.float16))
    np.testing.assert_array_equal(store.gather([5]), truth[[5]].astype(np.float16))
    assert store.gather([]).shape == (0, DIM)
    assert store.ids_of(rows) == [f"ad-{row:03d}" for row in rows]


def test_rounding_stays_below_the_documented_bound(tmp_path):
    truth = np.random.default_rng(0).normal(size=(500, 1024)).astype(np.float32)
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    pairs = [(str(row), str(row)) for row in range(500)]
    plan = PLAN | {"dim": 1024, "n_rows": 500, "shard_rows": 128}
    write_store(tmp_path / "s", pairs, lambda texts: truth[[int(text) for text in texts]], **plan)
    got = VectorStore.open(tmp_path / "s").gather(np.arange(500))
    assert np.linalg.norm(got - truth, axis=1).max() < 5e-4
    assert np.abs(got @ truth.T - truth @ truth.T).max() < 5e-4
    assert np.abs(np.linalg.norm(got, axis=1) - 1).max() < 5e-4


@pytest.mark.parametrize("rows_per_block", [1, 4, 9, 10, 23, 100])
def test_blocks_cross_shards_and_cover_every_row_once(whole, rows_per_block):
    blocks = list(VectorStore.open(whole).iter_blocks(rows_per_block))
    assert [start for start, _ in blocks] == list(range(0, ROWS, rows_per_block))
    assert {len(block) for _, block in blocks[:-1]} <= {rows_per_block}
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), vectors().astype(np.float16))


def test_rows_of(whole):
    store = VectorStore.open(whole)
    rows = store.rows_of(["ad-022", "ad-000", "ad-009", "ad-022"])
    assert rows.dtype == np.int64 and rows.tolist() == [22, 0, 9, 22]
    assert store.rows_of([]).tolist() == []
    with pytest.raises(HlmError, match=r"2 unknown ones \('ad-23', 'x'\)"):
        store.rows_of(["ad-001", "ad-23", "x", "x"])


@pytest.mark.parametrize("rows", [[0, ROWS], [-1], np.array([0.5]), np.array([[0]]), np.array([True])])
def test_gather_refuses_rows(whole, rows):
    with pytest.raises(HlmError, match="expected .*row"):
        VectorStore.open(whole).gather(rows)


def test_only_the_wanted_rows_are_read(tmp_path):
    """A sparse shard of 4 GiB opens and gives three rows without its content passing through memory."""
    rows, dim = 1 << 22, 512
    header = json.dumps({"vectors": {"dtype": "F16", "shape": [rows, dim], "data_offsets": [0, 2 * rows * dim]}})
    entries = {"vectors": {"bytes": 8 + len(header) + 2 * rows * dim, "sha256": ""}, "ids": {"bytes": 0, "sha256": ""}}
    facts = {"dim": dim, "rows": rows, "shard_rows": rows, "shards": [{"rows": rows, **entries}]}
    # Before the files are there: it would hash them.
    write_manifest(tmp_path, "vectors", inputs={"encoder": "e", "source": "s"}, config={}, **facts)
    with open(tmp_path / "vectors-00000.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.seek(2 * (rows - 1) * dim, 1)
        file.write(np.full(dim, 0.5, dtype="<f2").tobytes())
    (tmp_path / "ids-00000.parquet").touch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    got = VectorStore.open(tmp_path).gather([rows - 1, 0, rows // 2])
    assert got[:, 0].tolist() == [0.5, 0, 0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


def test_pickle_opens_the_folder_again(whole):
    store = VectorStore.open(whole)
    store.gather([0])
    copied = pickle.dumps(store)
    assert len(copied) < 1000
    np.testing.assert_array_equal(pickle.loads(copied).gather([20]), store.gather([20]))


def test_check_names_both_sides(whole):
    store = VectorStore.open(whole)
    store.check(encoder="teacher-a", source="texts-a")
    store.check()
    with pytest.raises(HlmError, match="encoder teacher-b.*found.*encoder teacher-a; embed again"):
        store.check(encoder="teacher-b")
    with pytest.raises(HlmError, match="texts texts-b.*found.*texts texts-a; embed again"):
        store.check(encoder="teacher-a", source="texts-b")


@pytest.mark.parametrize("name", ["vectors-00001.safetensors", "ids-00001.parquet"])
@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_a_broken_shard_is_found_and_written_again(whole, name, damage):
    before, path = content(whole), whole / name
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        path.unlink()
    found = f"{path.stat().st_size} bytes" if path.exists() else "no such file"
    with pytest.raises(HlmError, match=f"{name}: expected .*, found {found}; run the command"):
        VectorStore.open(whole)
    assert pending_shards(whole, **PLAN) == [1]
    write_store(whole, records, encode, **PLAN)
    assert content(whole) == before


def test_verify_finds_changed_bytes(whole):
    before, path = content(whole), whole / "vectors-00002.safetensors"
    changed = bytearray(before[path.name])
    changed[-1] ^= 1
    path.write_bytes(changed)
    store = VectorStore.open(whole)  # same size: opening cannot see it
    with pytest.raises(HlmError, match=r"vectors-00002.safetensors: expected SHA-256 .* delete that file"):
        store.verify()
    path.unlink()
    write_store(whole, records, encode, **PLAN)
    assert content(whole) == before


def test_a_shard_with_another_header_is_refused(whole):
    path = whole / "vectors-00000.safetensors"
    path.write_bytes(path.read_bytes().replace(b"[9,8]", b"[8,9]"))
    with pytest.raises(HlmError, match=r"fp16 vectors of shape \(9, 8\), found F16 of shape \(8, 9\)"):
        VectorStore.open(whole)
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(HlmError, match="vectors-00000.safetensors: expected a safetensors header"):
        VectorStore.open(whole)


def edited(folder, change):
    manifest = json.loads((folder / "hlm.json").read_text())
    change(manifest)
    (folder / "hlm.json").write_text(json.dumps(manifest))


FIELDS = [
    ("inputs",),
    ("inputs", "encoder"),
    ("dim",),
    ("rows",),
    ("shards",),
    ("shards", 0),
    ("shards", 0, "rows"),
    ("shards", 0, "vectors"),
    ("shards", 0, "vectors", "bytes"),
    ("shards", 0, "ids", "sha256"),
]


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_a_damaged_manifest_ends_in_one_error(whole, path):
    good = (whole / "hlm.json").read_text()
    for value in ("delete", None, [], {}, 7.5, True, -1, 10**30, float("nan")):

        def change(manifest, value=value):
            for step in path[:-1]:
                manifest = manifest[step]
            if value == "delete":
                del manifest[path[-1]]
            else:
                manifest[path[-1]] = value

        edited(whole, change)
        with pytest.raises(HlmError, match="expected"):
            VectorStore.open(whole)
        (whole / "hlm.json").write_text(good)
    VectorStore.open(whole)


@pytest.mark.parametrize(
    "entry",
    [
        7,
        {},
        {"dtype": "F16", "shape": [9, 8], "data_offsets": ["a", "b"]},
        {"dtype": "F16", "shape": [9, 8], "data_offsets": [-144, 0]},
        {"dtype": "F16", "shape": [9, 8], "data_offsets": [2**40, 2**40 + 144]},
        {"dtype": "F16", "shape": "x", "data_offsets": [0, 144]},
        {"dtype": None, "shape": [9, 8], "data_offsets": [0]},
    ],
    ids=str,
)
def test_a_damaged_header_ends_in_one_error(whole, entry):
    header = json.dumps({"vectors": entry}).encode()
    path = whole / "vectors-00000.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(144))
    edited(whole, lambda manifest: manifest["shards"][0]["vectors"].update(bytes=path.stat().st_size))
    with pytest.raises(HlmError, match="vectors-00000.safetensors: expected"):
        VectorStore.open(whole)


def test_damaged_ids_end_in_one_error(whole):
    path, good = whole / "ids-00001.parquet", (whole / "ids-00001.parquet").read_bytes()

    def refused(message):
        edited(whole, lambda manifest: manifest["shards"][1]["ids"].update(bytes=path.stat().st_size))
        with pytest.raises(HlmError, match=f"ids-00001.parquet.*{message}"):
            _ = VectorStore.open(whole).ids

    for table, message in (
        ({"_id": pa.array(range(9))}, "column '_id' of texts"),
        ({"id": pa.array(["a"] * 9)}, "column '_id' of texts"),
        ({"_id": pa.array(["a"] * 8)}, "expected 9 ids, found 8"),
        ({"_id": pa.array(["a"] * 8 + [None])}, "expected 9 ids, found 8"),
        ({"_id": pa.array([b"\xff"] * 9).view(pa.string())}, "not readable"),
        ({"_id": pa.array(["a" * 2**24 + str(row) for row in range(9)])}, "bytes packed into a small file"),
    ):
        pq.write_table(pa.table(table), path, compression="zstd", use_dictionary=False)
        refused(message)
    for place in range(0, len(good), 7):  # what passes unseen here is found by `verify`
        path.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
        edited(whole, lambda manifest: manifest["shards"][1]["ids"].update(bytes=path.stat().st_size))
        with contextlib.suppress(HlmError):
            assert len(VectorStore.open(whole).ids) == ROWS
    path.write_bytes(b"")
    refused("not readable")
    path.unlink()
    os.mkfifo(path)  # would be waited for
    with pytest.raises(HlmError, match="found no such file"):
        VectorStore.open(whole)


def test_a_store_replaced_after_it_was_opened_is_refused_not_read(tmp_path, whole):
    def written(folder, turn):
        write_store(folder, records, lambda texts: np.roll(encode(texts), turn, axis=1), **PLAN)
        return folder

    store = VectorStore.open(whole)
    first = store.gather([0])  # the first shard is open, the others are not
    copied = pickle.dumps(store)
    other = written(tmp_path / "other", 1)
    for path in other.iterdir():
        os.replace(path, whole / path.name)
    np.testing.assert_array_equal(store.gather([0]), first)
    with pytest.raises(HlmError, match="vectors-00001.*replaced or changed after it was opened; open it again"):
        store.gather([ROWS // 2])
    with pytest.raises(HlmError, match="it was replaced"):
        pickle.loads(copied)
    assert not np.array_equal(VectorStore.open(whole).gather([0]), first)


def test_a_store_of_equal_content_in_other_files_is_read_on(tmp_path, whole):
    store, expected = VectorStore.open(whole), VectorStore.open(whole).gather(range(ROWS))
    shutil.copytree(whole, tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        os.replace(path, whole / path.name)
    np.testing.assert_array_equal(store.gather(range(ROWS)), expected)
    assert len(store.ids) == ROWS


def test_not_a_store(tmp_path):
    with pytest.raises(HlmError, match="kind 'vectors'"):
        VectorStore.open(tmp_path / "nothing")
