"""Versions of stores and indexes: a kill at any moment leaves the old one or the new, and a reader sees one whole."""

import json
import os
import pathlib
import pickle
import shutil
import sys
import threading

import children
import numpy as np
import pytest
from killed import killed_at_each
from small_store import DIM, encode
from stores import make_store

from hlm import cli, outputs
from hlm.artefacts import HlmError, fingerprint_texts
from hlm.indexes.faiss_index import AdIndex
from hlm.indexes.index import create_index, open_index
from hlm.indexes.rollback import roll_back
from hlm.vectors import shard_files, store_versions, versions
from hlm.vectors.store import VectorStore
from hlm.vectors.store_versions import Target, compact

OLD = {f"ad-{row}": f"text {row}" for row in range(9)}
NEW = {name: OLD[name] for name in list(OLD)[2:]} | {"ad-5": "text 50", "ad-20": "text 20", "ad-21": "text 21"}
NEW |= {f"ad-{row}": f"text {row}" for row in range(30, 34)}
MOMENTS = [
    (os, "replace"), (os, "rename"), (os, "link"), (shutil, "rmtree"), (outputs, "_exchanged"),
    (pathlib.Path, "unlink"),
]  # fmt: skip


def change(folder, texts, keep=3):
    """Brings a store to these texts."""
    items = list(texts.items())
    plan = {"dim": DIM, "encoder": "teacher-a", "source": fingerprint_texts([*texts, *texts.values()])}
    plan |= {"n_rows": len(texts), "shard_rows": 4}
    target = Target.of(folder, lambda start, stop: items[start:stop], plan)
    target.write(encode)
    target.commit(keep=keep)


def held(folder):
    """Id -> text of what a store holds, by its vectors."""
    store = VectorStore.open(folder)
    store.verify()
    vectors, texts = store.gather(range(len(store))), sorted({*OLD.values(), *NEW.values()})
    nearest = (vectors @ encode(texts).T).argmax(axis=1)
    return {name: texts[place] for name, place in zip(store.ids.to_pylist(), nearest, strict=True)}


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """A kill loses nothing that was written: only the machine's own end would."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("versions") / "store"
    change(folder, OLD)
    return folder


def copied(source, tmp_path):
    def prepare(number):
        shutil.copytree(source, tmp_path / f"{number}" / "it")
        return tmp_path / f"{number}" / "it"

    return prepare


def test_a_changed_store_is_the_old_or_the_new_one_wherever_it_is_killed(first, tmp_path):
    states = []

    def check(folder):
        states.append(held(folder))
        assert states[-1] in (OLD, NEW)
        change(folder, NEW)  # goes on from whatever is there
        assert held(folder) == NEW and sorted(path.name for path in folder.parent.iterdir()) == ["it"]

    kills = killed_at_each(MOMENTS, copied(first, tmp_path), lambda folder: change(folder, NEW), check)
    assert kills > 15 and states[0] == OLD and states[-1] == NEW


def test_a_compacted_store_holds_the_same_wherever_it_is_killed(first, tmp_path):
    shutil.copytree(first, tmp_path / "base")
    change(tmp_path / "base", NEW)
    whole = []

    def check(folder):
        assert held(folder) == NEW
        whole.append(not len(VectorStore.open(folder).gone))
        compact(folder)
        assert held(folder) == NEW and not len(VectorStore.open(folder).gone)

    kills = killed_at_each(MOMENTS, copied(tmp_path / "base", tmp_path), compact, check)
    assert kills > 10 and not whole[0] and whole[-1]


def faiss_version(folder, number, rows=12):
    """An index whose ids all begin with its number."""
    index = AdIndex.from_vectors(np.eye(rows, 16), [f"{number}-{row}" for row in range(rows)], encoder="teacher-a")
    index.save(folder, keep=3)


def version_of(index, rows=12):
    """The one version that all of an answer is of."""
    ids = index.search(np.full(index.dim, index.dim**-0.5, np.float32), rows)[1]
    assert len(ids) == rows
    (number,) = {name.partition("-")[0] for name in ids}
    return int(number)


@pytest.mark.parametrize("back", [False, True], ids=["save", "roll back"])
def test_an_index_is_the_old_or_the_new_one_wherever_it_is_killed(tmp_path, back):
    for number in (1, 2):
        faiss_version(tmp_path / "base", number)
    found = []

    def work(folder):
        roll_back(folder) if back else faiss_version(folder, 3)

    def check(folder):
        found.append(version_of(open_index(folder)))
        assert found[-1] in (2, 1 if back else 3)
        faiss_version(folder, 4)
        assert version_of(open_index(folder)) == 4

    kills = killed_at_each(MOMENTS, copied(tmp_path / "base", tmp_path), work, check)
    assert kills >= 3 and found[0] == 2 and found[-1] == (1 if back else 3)


def swapped(folder, swap, swaps, readers=3):
    """Swaps while threads open and search: each answer must be whole and of one version."""
    ended, failed, answers = threading.Event(), [], [0]

    def read():
        try:
            kept = open_index(folder)
            was = version_of(kept)
            while not ended.is_set():
                version_of(open_index(folder))
                assert version_of(kept) == was
                answers[0] += 1
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(readers)]
    for thread in threads:
        thread.start()
    for number in range(swaps):
        swap(number)
    ended.set()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    assert answers[0] > readers


def test_readers_of_an_index_that_is_swapped_see_whole_versions(tmp_path):
    folder = tmp_path / "index"
    for number in (1, 2):
        faiss_version(folder, number)

    def swap(number):
        if number % 5:
            roll_back(folder, to=[one for one in versions.listed(folder, "index") if one != current()][-1])
        else:
            faiss_version(folder, number + 3)

    def current():
        return versions.number_of(versions.read_manifest(folder, "index"))

    # A reader's own version is dropped when others have come: it has its files open.
    swapped(folder, swap, 200)


def test_readers_of_lancedb_see_whole_commits(tmp_path):
    names = [f"0-{row}" for row in range(12)]
    index = create_index(tmp_path / "index", make_store(tmp_path / "store", np.eye(12), ids=names), "lance:FLAT")

    def swap(number):
        index.delete([f"{number}-{row}" for row in range(12)])
        index.put([f"{number + 1}-{row}" for row in range(12)], np.eye(12))
        index.commit()

    swapped(tmp_path / "index", swap, 30)
    assert list(versions.listed(tmp_path / "index", "index")) == [29, 30, 31]


def test_one_command_goes_back_and_lists_what_there_is(first, tmp_path, capsys):
    folder = tmp_path / "store"
    shutil.copytree(first, folder)
    with pytest.raises(HlmError, match="expected a version before 1 at .*, found none"):
        roll_back(folder)
    change(folder, NEW)
    reader = VectorStore.open(folder)
    assert cli.main(["rollback", str(folder)]) == 0
    assert held(folder) == OLD and len(reader) == len(NEW)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [["*", "1", "9"], ["2", "13", "rows"]]
    for wrong in ("1", "7"):
        assert cli.main(["rollback", str(folder), "--to", wrong]) == 2
        assert f"found 2, not {wrong}" in capsys.readouterr().err
    assert cli.main(["rollback", str(folder), "--to", "2"]) == 0 and held(folder) == NEW
    (folder / "vectors-00001.safetensors").write_bytes(b"")
    assert cli.main(["rollback", str(folder)]) == 2 and "vectors-00001" in (refusal := capsys.readouterr().err)
    assert "go back by `hlm rollback`" in refusal
    roll_back_list = cli.main(["rollback", str(folder), "--list"])
    assert roll_back_list == 0 and "*    2" in capsys.readouterr().out


def test_a_store_goes_on_from_the_version_that_it_went_back_to(first, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(first, folder)
    change(folder, NEW)
    roll_back(folder)
    other = OLD | {"ad-8": "text 30"}
    change(folder, other)
    assert held(folder) == other and list(versions.listed(folder, "vectors")) == [1, 2, 3]
    roll_back(folder, to=2)
    assert held(folder) == NEW
    change(folder, OLD, keep=1)
    assert held(folder) == OLD and len(versions.listed(folder, "vectors")) == 1


def test_several_processes_share_what_is_added(first, tmp_path):
    shutil.copytree(first, tmp_path / "store")
    items = list(NEW.items())
    plan = {"dim": DIM, "encoder": "teacher-a", "source": "new", "n_rows": len(NEW), "shard_rows": 4}
    one, other = (Target.of(tmp_path / "store", lambda start, stop: items[start:stop], plan) for _ in range(2))
    one.write(encode, process_index=0, num_processes=2)
    assert not one.is_whole and other.pending() == [1]
    other.write(encode, process_index=1, num_processes=2)
    assert one.is_whole and held(tmp_path / "store") == OLD
    one.commit()
    other.commit()
    assert held(tmp_path / "store") == NEW and list(versions.listed(tmp_path / "store", "vectors")) == [1, 2]


def test_a_store_that_was_changed_since_it_was_compared_is_not_changed_again(first, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(first, folder)
    items = list(NEW.items())
    plan = {"dim": DIM, "encoder": "teacher-a", "source": "new", "n_rows": len(NEW), "shard_rows": 4}
    late = Target.of(folder, lambda start, stop: items[start:stop], plan)
    late.write(encode)
    change(folder, OLD | {"ad-8": "text 30"})
    with pytest.raises(HlmError, match="expected version 1 of .*, which was compared with the texts, found 2"):
        late.commit()
    assert held(folder) == OLD | {"ad-8": "text 30"}


def test_an_open_store_is_sent_to_a_worker_after_it_has_changed(first, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(first, folder)
    reader = VectorStore.open(folder)
    change(folder, NEW)
    again = pickle.loads(pickle.dumps(reader))
    assert again.ids.to_pylist() == list(OLD) and again.fingerprint == reader.fingerprint
    changed = VectorStore.open(folder)
    assert pickle.loads(pickle.dumps(changed)).ids.to_pylist() == changed.ids.to_pylist()


def test_what_a_version_lost_is_told(first, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(first, folder)
    change(folder, NEW)
    gone = folder / "versions/000002" / shard_files.GONE
    content = gone.read_bytes()
    gone.write_bytes(content[:40])
    with pytest.raises(HlmError, match="gone.parquet is not readable"):
        VectorStore.open(folder)
    gone.write_bytes(content)
    store = VectorStore.open(folder)
    assert store_versions.since(store, store.parts)[0].tolist() == []
    assert store_versions.since(store, {"shards": ["0" * 16], "gone": None}) is None
    fresh, lost = store_versions.since(store, VectorStore.open(first).parts)
    assert set(store.ids_of(fresh)) == {"ad-5", "ad-20", "ad-21", *(f"ad-{row}" for row in range(30, 34))}
    assert sorted(lost) == ["ad-0", "ad-1"]


LANCE_KILLED = """
import sys, shutil, json
from pathlib import Path
sys.path.insert(0, {tests!r})
import numpy as np
from killed import killed_at_each, forked
from hlm.indexes import lance_index, lance_table
from hlm.vectors import versions
from lancedb.merge import LanceMergeInsertBuilder
from lancedb.table import LanceTable, Tags
import os
os.fsync = lambda descriptor: None
base, work = map(Path, sys.argv[1:])
MOMENTS = [(LanceMergeInsertBuilder, "execute"), (LanceTable, "delete"), (LanceTable, "optimize"), (Tags, "create"),
           (Tags, "update"), (Tags, "delete"), (os, "replace"), (shutil, "rmtree"), (LanceTable, "restore")]
lance_index.NOT_INDEXED = 0

def change(folder):
    index = lance_index.LanceIndex.load(folder)
    index.delete(["old-%d" % row for row in range(300)])
    index.put(["new-%d" % row for row in range(300)], np.eye(300, 300))
    index.commit(keep=1)

def held(folder, wanted):
    index = lance_index.LanceIndex.load(folder)
    ids = index.search(np.full(300, 300**-0.5, np.float32), 300)[1]
    assert len(ids) == 300
    (kind,) = {{name.partition("-")[0] for name in ids}}
    assert kind in wanted, kind
    (folder.parent / "kind").write_text(kind)

def prepare(number):
    shutil.copytree(base, work / str(number) / "it")
    return work / str(number) / "it"

kinds = []
def check(folder):
    assert forked(lambda: held(folder, ("old", "new")))
    kinds.append((folder.parent / "kind").read_text())
    if len(kinds) % 3 == 0:
        assert forked(lambda: change(folder))
        assert forked(lambda: held(folder, ("new",)))

kills = killed_at_each(MOMENTS, prepare, change, check)
print(json.dumps([kills, kinds]))
"""


def test_an_index_in_lancedb_is_the_old_or_the_new_one_wherever_it_is_killed(tmp_path):
    """In a program that has not used LanceDB before it forks."""
    names = [f"old-{row}" for row in range(300)]
    create_index(tmp_path / "base", make_store(tmp_path / "store", np.eye(300), ids=names), "lance:IVF_FLAT")
    script = LANCE_KILLED.format(tests=str(pathlib.Path(__file__).parents[1]))
    words = [sys.executable, "-c", script, str(tmp_path / "base"), str(tmp_path / "work")]
    done = children.run(words, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    kills, kinds = json.loads(done.stdout)
    assert kills > 8 and kinds[0] == "old" and kinds[-1] == "new"
