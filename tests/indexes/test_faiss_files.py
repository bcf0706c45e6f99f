"""A saved index: replaced whole, loaded as it was, refused where it was damaged."""

import json
import struct
import subprocess
import sys
import threading

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import clustered, make_store, rewrite

from hlm.artefacts import HlmError
from hlm.indexes.faiss_index import AdIndex
from hlm.indexes.index_parts import read_ads, write_ads


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("index") / "store", clustered(3000))


def test_load_refuses_a_foreign_encoder(store, tmp_path):
    AdIndex.build(store).save(tmp_path / "index")
    assert len(AdIndex.load(tmp_path / "index", expect_encoder="teacher-a")) == 3000
    with pytest.raises(HlmError, match="teacher-b.*teacher-a"):
        AdIndex.load(tmp_path / "index", expect_encoder="teacher-b")


def test_load_refuses_what_was_tampered_with(store, tmp_path):
    folder = tmp_path / "index"
    AdIndex.build(store).save(folder)
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(good) == ["ads.arrow", "hlm.json", "index.faiss"]

    def expect(message):
        with pytest.raises(HlmError, match=message):
            AdIndex.load(folder)
        for name, content in good.items():
            (folder / name).write_bytes(content)

    (folder / "index.faiss").write_bytes(good["index.faiss"][:-100])
    expect("index.faiss.*cut short")
    flipped = bytearray(good["index.faiss"])
    flipped[5000] ^= 1
    (folder / "index.faiss").write_bytes(bytes(flipped))
    expect("index.faiss.*changed")
    shorter = pa.array([f"ad-{row}" for row in range(2999)], pa.large_string())
    write_ads(folder / "ads.arrow", pa.table({"_id": shorter}))
    expect("ads.arrow.*changed")
    (folder / "ads.arrow").unlink()
    expect("found no file")
    manifest = json.loads(good["hlm.json"])
    (folder / "hlm.json").write_text(json.dumps(manifest | {"count": 2999}))
    expect("expected 2999 vectors")
    (folder / "hlm.json").write_text(json.dumps(manifest | {"dim": 16}))
    expect("width 16")
    (folder / "hlm.json").write_text(json.dumps(manifest | {"kind": "vectors"}))
    expect("kind 'index'")
    del manifest["files"]
    (folder / "hlm.json").write_text(json.dumps(manifest))
    expect("a mapping as 'files', found nothing")
    AdIndex.load(folder)


def test_load_refuses_a_folder_without_index(tmp_path):
    with pytest.raises(HlmError, match="kind 'index'"):
        AdIndex.load(tmp_path)


def test_saving_replaces_the_older_index_whole(store, tmp_path):
    AdIndex.build(store).save(tmp_path / "index")
    AdIndex.build(make_store(tmp_path / "small", np.eye(3), encoder="teacher-b")).save(tmp_path / "index")
    assert len(AdIndex.load(tmp_path / "index", expect_encoder="teacher-b")) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "small"]


@pytest.fixture
def saved(store, tmp_path):
    AdIndex.build(store, "IVF8,SQ8,RFlat").save(tmp_path / "index")
    return tmp_path / "index"


PLACES = (
    "inputs inputs.encoder inputs.source config.factory config.nprobe config.k_factor config.ef_search canaries dim "
    "count files files.index.faiss"
).split()


@pytest.mark.parametrize("place", PLACES)
def test_a_damaged_manifest_ends_in_one_error(saved, place):
    first, _, rest = place.partition(".")
    good = (saved / "hlm.json").read_text()
    for value in (7.5, True, [], [1], -1, 10**30, float("nan"), {"a": 1}):
        if (place == "config.k_factor" and value == 7.5) or (place in ("canaries", "files") and value == {"a": 1}):
            continue

        def change(manifest, value=value):
            if rest:
                manifest[first][rest] = value
            else:
                manifest[first] = value

        rewrite(saved, change)
        with pytest.raises(HlmError, match="expected|has no"):
            AdIndex.load(saved)
        (saved / "hlm.json").write_text(good)
    AdIndex.load(saved)


def test_damaged_files_end_in_one_error_though_their_hashes_fit(saved):
    path, good = saved / "index.faiss", (saved / "index.faiss").read_bytes()
    for place in range(0, 260, 4):
        for value in (2**60, 2**38 - 1, -1):
            path.write_bytes(good[:place] + struct.pack("<q", value) + good[place + 8 :])
            rewrite(saved)
            try:
                AdIndex.load(saved)
            except HlmError:
                continue
    for raw in (good[: len(good) // 2], b"", b"no index at all", good[:60]):
        path.write_bytes(raw)
        rewrite(saved)
        with pytest.raises(HlmError, match="cannot read"):
            AdIndex.load(saved)
    index = faiss.IndexFlatL2(32)
    index.add(np.zeros((3000, 32), np.float32))
    faiss.write_index(index, str(path))
    rewrite(saved)
    with pytest.raises(HlmError, match="for inner products"):
        AdIndex.load(saved)
    path.write_bytes(good)
    ads = (saved / "ads.arrow").read_bytes()
    for ids in (pa.array(range(3000)), pa.array(["a"] * 2999), pa.array(["a"] * 2999 + [None])):
        ids = ids if ids.type == pa.int64() else ids.cast(pa.large_string())
        write_ads(saved / "ads.arrow", pa.table({"_id": ids}))
        rewrite(saved)
        with pytest.raises(HlmError, match="ads.arrow: expected"):
            AdIndex.load(saved)
    for place in range(0, len(ads) - 8, len(ads) // 60 // 8 * 8):
        (saved / "ads.arrow").write_bytes(ads[:place] + struct.pack("<q", 2**38 - 1) + ads[place + 8 :])
        rewrite(saved)
        try:
            found = AdIndex.load(saved).search(clustered(3001)[3000], 3000)[1]
        except HlmError:
            continue
        assert len(found) == 3000
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    table = pa.table({"_id": pa.array(["a" * 999] * 3000, pa.large_string())})
    with pa.ipc.new_file(saved / "ads.arrow", table.schema, options=options) as writer:
        writer.write_table(table)
    rewrite(saved)
    with pytest.raises(HlmError, match="expected no compression"):
        AdIndex.load(saved)


def test_an_index_with_its_ids_in_parquet_is_still_read(saved):
    queries, index = clustered(3004)[3000:], AdIndex.load(saved)
    pq.write_table(pa.table({"_id": read_ads(saved / "ads.arrow", 3000)["_id"]}), saved / "ids.parquet")
    (saved / "ads.arrow").unlink()
    rewrite(saved)
    assert AdIndex.load(saved).search(queries, 5)[1] == index.search(queries, 5)[1]
    pq.write_table(pa.table({"_id": ["a"] * 2999}), saved / "ids.parquet")
    rewrite(saved)
    with pytest.raises(HlmError, match="ids.parquet: expected 3000"):
        AdIndex.load(saved)


MEMORY = """
import sys
import numpy as np
from hlm.machine import anonymous_mib
from hlm.indexes.faiss_index import AdIndex

query = np.eye(256, dtype=np.float32)[0]
AdIndex.load(sys.argv[1]).search(query, 10)  # what FAISS and Arrow themselves take
for folder in sys.argv[1:]:
    before = anonymous_mib()
    index = AdIndex.load(folder)
    index.search(query, 10)
    print((anonymous_mib() - before) * 2**20 / len(index))
"""


def test_a_loaded_index_takes_hardly_any_memory_of_its_own(tmp_path):
    """The vectors, of 1024 and 264 bytes, are mapped."""
    if not hasattr(faiss, "IO_FLAG_MMAP_IFC"):
        pytest.skip("this FAISS reads indexes into memory")
    store = make_store(tmp_path / "store", clustered(20_000, 256), shard_rows=20_000)
    for factory in ("Flat", "IVF16,SQ8"):
        AdIndex.build(store, factory).save(tmp_path / factory)
    words = [sys.executable, "-c", MEMORY, *(str(tmp_path / name) for name in ("Flat", "Flat", "IVF16,SQ8"))]
    ran = subprocess.run(words, capture_output=True, text=True, check=True)
    assert all(float(word) < 60 for word in ran.stdout.split()[1:]), ran.stdout


def test_an_index_replaced_while_it_is_loaded_is_one_of_the_two(tmp_path):
    """Equal sizes, other order: only what is read tells the two apart."""
    vectors = clustered(4000)
    ids = {name: [f"{name}{row}" for row in range(4000)] for name in "ab"}
    indexes = [
        AdIndex.from_vectors(vectors[:: 1 if name == "a" else -1], ids[name][:: 1 if name == "a" else -1], encoder=name)
        for name in "ab"
    ]
    indexes[0].save(tmp_path / "index")
    ended = threading.Event()

    def write():
        while not ended.is_set():
            for index in indexes:
                index.save(tmp_path / "index")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(60):
            index = AdIndex.load(tmp_path / "index")
            assert index.search(vectors[:20], 1)[1] == [[f"{index.encoder}{row}"] for row in range(20)]
    finally:
        ended.set()
        writer.join()
