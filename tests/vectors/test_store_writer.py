"""Writing a store: bytes that no kill and no number of processes changes, and what is refused."""

import multiprocessing
import re
import signal
import sys
from pathlib import Path

import children
import numpy as np
import pytest
from small_store import DIM, PLAN, SHARD, content, encode, records

from hlm.artefacts import HlmError
from hlm.vectors.store import VectorStore, pending_shards, write_store
from hlm.vectors.store_writer import write_shard


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
from small_store import PLAN, encode, records
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
    script = KILLED.format(tests=str(Path(__file__).parents[1]))
    done = children.run([sys.executable, "-c", script, str(folder), moment, str(count)], check=False)
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

    import hlm.vectors.shard_files as writer

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
            folder,
            [(f"{encoder}{n}", "t") for n in range(8)],
            lambda texts: vectors[: len(texts)],
            dim=4,
            encoder=encoder,
            source="s",
            n_rows=8,
            shard_rows=2,
            process_index=index,
            num_processes=processes,
        )
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
            tmp_path / "home",
            [("a", "t")],
            lambda texts: np.ones((1, 1), np.float32),
            dim=1,
            encoder="e",
            source="s",
            n_rows=1,
        )
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["notes.txt"]


def test_a_store_behind_a_link_is_written_through_it(tmp_path):
    (tmp_path / "store").symlink_to(tmp_path / "big/disk")
    write_store(
        tmp_path / "store",
        [("a", "t")],
        lambda texts: np.ones((1, 1), np.float32),
        dim=1,
        encoder="e",
        source="s",
        n_rows=1,
    )
    assert (tmp_path / "store").is_symlink()
    assert len(VectorStore.open(tmp_path / "big/disk")) == 1


def test_an_id_in_two_shards_is_found_when_they_are_joined(tmp_path):
    def twice(start, stop):
        return [(f"ad-{row % 20:03d}", f"text {row}") for row in range(start, stop)]

    folder = tmp_path / "s"
    write_store(folder, twice, encode, **PLAN, process_index=0, num_processes=2)  # the others know nothing of it
    with pytest.raises(HlmError, match="expected distinct ids over all shards, found 'ad-000' twice"):
        write_store(folder, twice, encode, **PLAN, process_index=1, num_processes=2)
    assert not (folder / "hlm.json").exists()


def test_a_shard_that_is_handed_out(tmp_path, whole):
    folder, asked = tmp_path / "s", []
    for shard in (2, 0, 2, 1):
        write_shard(folder, shard, lambda start, stop: asked.append(start) or records(start, stop), encode, **PLAN)
    assert asked == [18, 0, 9] and not (folder / "hlm.json").exists()
    with pytest.raises(HlmError, match="another run .encoder"):
        write_shard(folder, 0, records, encode, **(PLAN | {"encoder": "teacher-b"}))
    write_store(folder, records, None, **PLAN)  # joins them: nothing is encoded
    assert content(folder) == content(whole)
    write_shard(folder, 1, None, None, **PLAN)  # whole
    assert content(folder) == content(whole)
