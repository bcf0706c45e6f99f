"""The vector store: bytes that no kill and no number of processes changes, refusals, reading through memory maps."""

import contextlib
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from hlm.artefacts import HlmError, write_manifest
from hlm.vectors.store import VectorStore, pending_shards, write_store

ROWS, DIM, SHARD = 23, 8, 9  # three shards: 9, 9 and 5 rows
PLAN = {"dim": DIM, "encoder": "teacher-a", "source": "texts-a", "n_rows": ROWS, "shard_rows": SHARD}


def vector(text):
    values = np.random.default_rng(int(text.removeprefix("text "))).normal(size=DIM)
    return values / np.linalg.norm(values)


def encode(texts):
    return np.array([vector(text) for text in texts], dtype=np.float32)


def records(start, stop):
    return ((f"ad-{row:03d}", f"text {row}") for row in range(start, stop))


def vectors():
    return encode([f"text {row}" for row in range(ROWS)])


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(tmp_path):
    write_store(tmp_path / "whole", records, encode, **PLAN)
    return tmp_path / "whole"


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


def test_one_shard_at_a_time(tmp_path):
    asked, seen = [], []

    def ask(start, stop):
        asked.append((start, stop))
        return records(start, stop)

    def look(texts):
        seen.append(len(texts))
        assert len(asked) == len(seen), "rows of a later shard were read before this one was encoded"
        return encode(texts)

    write_store(tmp_path / "s", ask, look, **PLAN)
    assert asked == [(0, 9), (9, 18), (18, 23)] and seen == [9, 9, 5]
    write_store(tmp_path / "s", ask, look, **PLAN)  # whole: nothing is read, encoded or written
    assert len(asked) == 3


def test_goes_on_after_an_error_with_the_same_bytes(tmp_path, whole):
    folder, calls = tmp_path / "s", []

    def failing(texts):
        calls.append(texts[0])
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return encode(texts)

    with pytest.raises(RuntimeError):
        write_store(folder, records, failing, **PLAN)
    assert pending_shards(folder, **PLAN) == [1, 2]
    with pytest.raises(HlmError, match=r"unfinished one \(1 whole shards.*goes on where it stopped"):
        VectorStore.open(folder)
    write_store(folder, records, failing, **PLAN)
    assert calls == ["text 0", "text 9", "text 9", "text 18"]  # the finished shard was kept
    assert content(folder) == content(whole)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_store import PLAN, encode, records
from hlm.vectors.store import write_store

moment, count = sys.argv[2], int(sys.argv[3])
def killer(name, function):
    def call(*args, **kwargs):
        global count
        if moment == name:
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            count -= 1
        return function(*args, **kwargs)
    return call
os.replace = killer("rename", os.replace)
Path.unlink = killer("unlink", Path.unlink)
write_store(sys.argv[1], records, killer("encode", encode), **PLAN)
"""


@pytest.mark.parametrize(
    ("moment", "count", "kept"),
    [
        ("encode", 2, [0, 1]),  # inside the third shard
        ("rename", 3, [0]),  # the second shard's vectors written, nothing renamed
        ("rename", 4, [0]),  # its vectors in place, not its ids
        ("rename", 5, [0]),  # both in place, not the record
        ("rename", 9, [0, 1, 2]),  # all shards whole, hlm.json not yet in place
        ("unlink", 1, [0, 1, 2]),  # hlm.json in place, records not all removed
    ],
)
def test_goes_on_after_sigkill_with_the_same_bytes(tmp_path, whole, moment, count, kept):
    folder = tmp_path / "s"
    script = KILLED.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script, str(folder), moment, str(count)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [shard for shard in range(3) if shard not in pending_shards(folder, **PLAN)] == kept
    asked = []
    write_store(folder, lambda start, stop: asked.append(start) or records(start, stop), encode, **PLAN)
    assert asked == [SHARD * shard for shard in range(3) if shard not in kept]
    assert content(folder) == content(whole)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_processes_write_the_same_bytes_as_one(tmp_path, whole, order):
    folder = tmp_path / "s"
    for done, index in enumerate(order):
        assert not (folder / "hlm.json").exists()
        write_store(folder, records, encode, **PLAN, process_index=index, num_processes=2)
        assert len(pending_shards(folder, **PLAN)) == ((1, 2)[index] if done == 0 else 0)
    assert content(folder) == content(whole)


def test_a_finisher_overtaken_by_another_is_content(tmp_path, whole, monkeypatch):
    """Both processes find all shards whole; the other one writes hlm.json and sweeps our half-written one away."""
    folder = tmp_path / "s"
    write_store(folder, records, encode, **PLAN, process_index=0, num_processes=2)
    import hlm.vectors.store_writer as writer

    real = writer.write_manifest

    def overtaken(*args, **kwargs):
        monkeypatch.setattr(writer, "write_manifest", real)
        write_store(folder, records, encode, **PLAN)
        raise FileNotFoundError("swept away")

    monkeypatch.setattr(writer, "write_manifest", overtaken)
    write_store(folder, records, encode, **PLAN, process_index=1, num_processes=2)
    assert content(folder) == content(whole)


def test_a_second_run_of_the_same_store_is_told(tmp_path, whole):
    """Two runs that know nothing of each other: one stops with a clear word, and nothing wrong is left."""
    folder = tmp_path / "s"

    import hlm.vectors.store_writer as writer

    real = writer._write_vectors

    def written_by_the_other(path, vectors):
        digest = real(path, vectors)
        path.unlink()
        return digest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_write_vectors", written_by_the_other)
        with pytest.raises(HlmError, match="vectors-00000.* went away .* another run writes the same store"):
            write_store(folder, records, encode, **PLAN)
    write_store(folder, records, encode, **PLAN)
    assert content(folder) == content(whole)


def test_more_processes_than_shards(tmp_path, whole):
    for index in range(5):
        write_store(tmp_path / "s", records, encode, **PLAN, process_index=index, num_processes=5)
    assert content(tmp_path / "s") == content(whole)
    with pytest.raises(HlmError, match=r"process index in \[0, 2\), found 2"):
        write_store(tmp_path / "t", records, encode, **PLAN, process_index=2, num_processes=2)


OTHERS = [
    {"encoder": "teacher-b"},
    {"source": "texts-b"},
    {"dim": 4},
    {"shard_rows": 10},
    {"n_rows": 22},
    {"facts": {"dtype": "bfloat16"}},
]


@pytest.mark.parametrize("state", ["whole", "unfinished"])
@pytest.mark.parametrize("other", OTHERS, ids=lambda other: next(iter(other)))
def test_refuses_to_go_on_with_something_else(tmp_path, other, state):
    folder = tmp_path / "s"
    processes = 1 if state == "whole" else 2
    write_store(folder, records, encode, **PLAN, num_processes=processes)
    assert (folder / "hlm.json").exists() == (state == "whole")
    before = content(folder)
    (name, value), found = next(iter(other.items())), (PLAN | {"facts": {}})[next(iter(other))]
    expected = re.escape(f"{name}: this run has {value!r}, the folder {found!r}")
    with pytest.raises(HlmError, match=f"{expected}.*delete the folder"):
        write_store(folder, records, encode, **(PLAN | other))
    with pytest.raises(HlmError, match=expected):
        pending_shards(folder, **(PLAN | other))
    assert content(folder) == before


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


FIELDS = [("inputs",), ("inputs", "encoder"), ("dim",), ("rows",), ("shards",), ("shards", 0), ("shards", 0, "rows"),
          ("shards", 0, "vectors"), ("shards", 0, "vectors", "bytes"), ("shards", 0, "ids", "sha256")]  # fmt: skip


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
    [7, {}, {"dtype": "F16", "shape": [9, 8], "data_offsets": ["a", "b"]},
     {"dtype": "F16", "shape": [9, 8], "data_offsets": [-144, 0]},
     {"dtype": "F16", "shape": [9, 8], "data_offsets": [2**40, 2**40 + 144]},
     {"dtype": "F16", "shape": "x", "data_offsets": [0, 144]}, {"dtype": None, "shape": [9, 8], "data_offsets": [0]}],
    ids=str,
)  # fmt: skip
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


def spoilt(value):
    def spoil(texts):
        out = encode(texts)
        out[2] = out[2] * 3 if value == "norm" else value
        return out

    return spoil


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (spoilt(np.nan), r"rows 0 to 8: expected finite vectors, found NaN or infinity in row 2"),
        (spoilt(np.inf), "expected finite vectors"),
        (spoilt(0), "expected L2-normalised vectors, found norm 0 in row 2"),
        (spoilt("norm"), "expected L2-normalised vectors, found norm 3 in row 2"),
        (lambda texts: encode(texts)[:, :4], r"shape \(9, 8\).*found float32 of shape \(9, 4\)"),
        (lambda texts: encode(texts)[1:], r"shape \(9, 8\).*found float32 of shape \(8, 8\)"),
        (lambda texts: np.ones((len(texts), DIM), dtype=int), "floating-point vectors"),
    ],
)
def test_bad_vectors_leave_nothing(tmp_path, bad, message):
    with pytest.raises(HlmError, match=message):
        write_store(tmp_path / "s", records, bad, **PLAN)
    assert content(tmp_path / "s") == {}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda start, stop: records(start, stop - 1), "expected 9 records, found 8"),
        (lambda start, stop: [("a", "text 1")] * (stop - start), "distinct ids, found 'a' twice"),
        (lambda start, stop: [(str(i) if i else "", "text 1") for i in range(start, stop)], "non-empty text, found ''"),
        (lambda start, stop: [(i, "text 1") for i in range(start, stop)], "non-empty text, found 0"),
        (iter([("a", "text 1")]), "sequence of .* or a function"),
    ],
)
def test_bad_records_leave_nothing(tmp_path, bad, message):
    with pytest.raises(HlmError, match=message):
        write_store(tmp_path / "s", bad, encode, **PLAN)
    assert not (tmp_path / "s").exists() or content(tmp_path / "s") == {}


@pytest.mark.parametrize("name", ["dim", "n_rows", "shard_rows"])
def test_numbers_below_one(tmp_path, name):
    with pytest.raises(HlmError, match=f"{name}: expected at least 1, found 0"):
        write_store(tmp_path / "s", records, encode, **(PLAN | {name: 0}))


def other_run(folder, encoder, index, processes, go, said):
    vectors = unit_rows(np.random.default_rng(len(encoder)), 8, 4)
    go.wait()
    try:
        write_store(
            folder, [(f"{encoder}{n}", "t") for n in range(8)], lambda texts: vectors[: len(texts)], dim=4,
            encoder=encoder, source="s", n_rows=8, shard_rows=2, process_index=index, num_processes=processes,
        )  # fmt: skip
        said.put((encoder, "written"))
    except HlmError as error:
        said.put((encoder, "told" if "another run" in str(error) or "the only one" in str(error) else str(error)))
    except Exception as error:
        said.put((encoder, repr(error)))


def unit_rows(rng, rows, dim):
    vectors = rng.normal(size=(rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("other", ["b", "aa"], ids=["another-index", "the-same-index"])
def test_two_runs_into_one_folder_never_mix_their_shards(tmp_path, other):
    context = multiprocessing.get_context("fork")
    for number in range(30):
        folder, go, said = tmp_path / str(number), context.Barrier(2), context.Queue()
        runs = [("a", 0, 1), (other, 1, 2) if other == "b" else (other, 0, 1)]
        workers = [context.Process(target=other_run, args=(folder, *run, go, said)) for run in runs]
        for worker in workers:
            worker.start()
        results = dict(said.get(timeout=60) for _ in workers)
        for worker in workers:
            worker.join()
        assert set(results.values()) <= {"written", "told"}, results
        winner = "a" if results["a"] == "written" else other
        if winner == "b" or "written" not in results.values():
            continue  # half a store, the other process's half of it missing
        store = VectorStore.open(folder)
        store.verify()
        assert store.encoder == winner
        assert store.ids.to_pylist() == [f"{winner}{n}" for n in range(8)]
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".") or path.name == "plan.json"]


def test_a_folder_with_other_files_is_no_place_for_a_store(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/notes.txt").write_text("years")
    with pytest.raises(HlmError, match="found a folder with other files .notes.txt."):
        write_store(
            tmp_path / "home", [("a", "t")], lambda texts: np.ones((1, 1), np.float32), dim=1, encoder="e", source="s",
            n_rows=1,
        )  # fmt: skip
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["notes.txt"]


def test_a_store_behind_a_link_is_written_through_it(tmp_path):
    (tmp_path / "store").symlink_to(tmp_path / "big/disk")
    write_store(
        tmp_path / "store", [("a", "t")], lambda texts: np.ones((1, 1), np.float32), dim=1, encoder="e", source="s",
        n_rows=1,
    )  # fmt: skip
    assert (tmp_path / "store").is_symlink()
    assert len(VectorStore.open(tmp_path / "big/disk")) == 1
