"""Outputs: what is refused before the work, who may write, what a reader and a killed writer leave and find."""

import contextlib
import ctypes
import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from safetensors.numpy import save_file

from hlm import outputs
from hlm.artefacts import HlmError, atomic_file, atomic_folder, check_output, claimed, read_manifest, write_manifest


def put(folder, text, kind="student", more=()):
    with atomic_folder(folder, kind) as aside:
        (aside / "weights").write_text(text)
        for name in more:
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).write_text(text)
        write_manifest(aside, kind, inputs={}, config={"by": text})


def text_of(folder):
    return (folder / "weights").read_text(), read_manifest(folder, "student")["config"]["by"]


def names(folder):
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("kind", ["student", None])
def test_a_folder_with_other_files_is_refused_and_kept(tmp_path, kind):
    (tmp_path / "home/thesis").mkdir(parents=True)
    (tmp_path / "home/thesis/notes.txt").write_text("years")
    for door in (lambda: check_output(tmp_path / "home", kind), lambda: put(tmp_path / "home", "x")):
        with pytest.raises(HlmError, match="found a folder with other files .thesis.*nothing there was touched"):
            door()
    assert (tmp_path / "home/thesis/notes.txt").read_text() == "years"
    assert names(tmp_path) == ["home"]


def test_another_kind_and_files_that_others_added_are_refused(tmp_path):
    put(tmp_path / "out", "old", "teacher")
    with pytest.raises(HlmError, match="kind 'student'.*found an artefact of kind 'teacher'"):
        check_output(tmp_path / "out", "student")
    put(tmp_path / "out", "new", "teacher", more=["deep/er"])
    (tmp_path / "out/deep/notes.txt").write_text("mine")
    with pytest.raises(HlmError, match=r"found deep/notes.txt, which replacing the folder would delete"):
        put(tmp_path / "out", "newer", "teacher")
    assert (tmp_path / "out/deep/notes.txt").read_text() == "mine"
    (tmp_path / "out/deep/notes.txt").rename(tmp_path / "out/.DS_Store")  # the system's own may go
    put(tmp_path / "out", "newer", "teacher")


def test_the_kind_that_was_written_counts_where_none_was_named(tmp_path):
    put(tmp_path / "out", "old", "teacher")
    with pytest.raises(HlmError, match="found an artefact of kind 'teacher'"):
        with atomic_folder(tmp_path / "out") as aside:
            write_manifest(aside, "student", inputs={}, config={})
    assert (tmp_path / "out/weights").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_folder_whose_manifest_is_broken_is_nobodys(tmp_path):
    (tmp_path / "out").mkdir()
    for text in ("{", "[1]", '{"kind": 3}', ""):
        (tmp_path / "out/hlm.json").write_text(text)
        with pytest.raises(HlmError, match="other files .hlm.json"):
            check_output(tmp_path / "out", "student")


def test_files_in_the_way_and_empty_or_circular_paths_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path, said in (
        (tmp_path / "file", "found a file"),
        (tmp_path / "file/under", "found a file"),
        ("", "found an empty one"),
        (tmp_path / "circle", "circle"),
        (tmp_path / "nul\0", "correct it"),
    ):
        with pytest.raises(HlmError, match=said):
            check_output(path, "student")


def test_links_home_and_slashes_are_resolved_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big")
    for text in ("first", "second"):
        put(tmp_path / "out", text)
        assert text_of(tmp_path / "big") == (text, text)
        assert (tmp_path / "out").is_symlink()
    assert names(tmp_path) == ["big", "out"]
    (tmp_path / "later").symlink_to(tmp_path / "deep/er")  # what it names is made
    put(tmp_path / "later", "third")
    assert text_of(tmp_path / "deep/er") == ("third", "third")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    put("~/run/student/", "fourth")
    assert text_of(tmp_path / "home/run/student") == ("fourth", "fourth")


def test_the_working_directory_is_written_inside_itself(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    put(".", "first", more=["onnx/graph", "old"])
    put(".", "second", more=["onnx/graph"])
    assert names(".") == ["hlm.json", "onnx", "weights"]  # the shell that stands here sees them
    assert names(tmp_path) == ["here"]
    assert text_of(tmp_path / "here") == ("second", "second")


def test_a_kill_while_a_folder_is_written_inside_itself_leaves_nothing_to_read(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    put(".", "first", more=["a", "b"])
    moves = iter(range(100))
    with monkeypatch.context() as patch:
        rename = os.rename
        patch.setattr(os, "rename", lambda *a: os._exit(9) if next(moves) == 2 else rename(*a))
        process = multiprocessing.get_context("fork").Process(target=put, args=(".", "second", "student", ["a", "c"]))
        process.start()
        process.join()
    assert process.exitcode == 9
    with pytest.raises(HlmError, match=r"found no hlm.json"):
        read_manifest(".", "student")
    put(".", "third", more=["c"])
    assert names(".") == ["c", "hlm.json", "weights"]
    assert text_of(tmp_path / "here") == ("third", "third")


@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="mounting needs root")
def test_a_mount_point_and_a_read_only_or_full_disk(tmp_path):
    script = tmp_path / "case.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys
        from hlm.artefacts import HlmError, atomic_folder, check_output, write_manifest
        def put(folder, text, size=1):
            with atomic_folder(folder, "student") as aside:
                (aside / "weights").write_text(text * size)
                write_manifest(aside, "student", inputs={}, config={})
        put("volume", "first"); put("volume", "second")
        assert open("volume/weights").read() == "second" and sorted(os.listdir("volume")) == ["hlm.json", "weights"]
        for folder in ("ro", "ro/out", "ro/a/b"):
            try: check_output(folder, "student"); print("accepted", folder)
            except HlmError as error: print(error)
        for call in (lambda: put("small/out", "x", 4_000_000), lambda: put("small/out", "y")):
            try: call(); print("written")
            except HlmError as error: print(error)
        print(sorted(os.listdir("small")))
    """)
    )
    mounts = "mount -t tmpfs none volume && mount -t tmpfs -o ro none ro && mount -t tmpfs -o size=1m none small"
    for name in ("volume", "ro", "small"):
        (tmp_path / name).mkdir()
    run = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"({mounts} || exit 77) && exec {sys.executable} case.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    if run.returncode == 77:
        pytest.skip("no mounts here")
    assert run.returncode == 0, run.stderr
    said = run.stdout.splitlines()
    assert all("cannot write to" in line and str(tmp_path / "ro") in line for line in said[:3])
    assert "No space left" in said[3] and "free some space" in said[3]
    assert said[4:] == ["written", "['out']"]


def hold(path, ready, go):
    with claimed(path, "student"):
        ready.set()
        go.wait()


def started(target, *args, method="spawn"):
    context = multiprocessing.get_context(method)
    ready, go = context.Event(), context.Event()
    process = context.Process(target=target, args=(*args, ready, go))
    process.start()
    assert ready.wait(30)
    return process, go


def test_a_second_writer_is_told_who_writes_and_the_lock_dies_with_its_process(tmp_path):
    process, _ = started(hold, tmp_path / "out")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "out")
    for path in (tmp_path / "out", link, f"{tmp_path}/x/../out/"):
        with pytest.raises(HlmError, match=f"only one who writes {tmp_path}/out, found that process {process.pid} on"):
            put(path, "mine")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    put(tmp_path / "out", "mine")
    assert text_of(tmp_path / "out") == ("mine", "mine")
    assert names(tmp_path) == ["link", "out"]  # the killed process' lock is swept


def test_a_claim_holds_for_its_thread_and_its_saves_and_for_no_other_thread(tmp_path):
    said = []

    def other():
        with contextlib.suppress(HlmError):
            put(tmp_path / "out", "other")
            said.append("written")

    with claimed(tmp_path / "out", "student") as target:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        put(target, "mine")
    assert not said
    assert text_of(tmp_path / "out") == ("mine", "mine")
    other()
    assert said == ["written"]


def test_a_forked_child_does_not_inherit_the_claim(tmp_path):
    with claimed(tmp_path / "out", "student"):
        pid = os.fork()
        if not pid:
            try:
                put(tmp_path / "out", "child")
            except HlmError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def race(folder, text, rounds, said):
    for _ in range(rounds):
        try:
            put(folder, text)
            said.put("written")
        except HlmError as error:
            said.put("told" if "only one who writes" in str(error) else str(error))
        except Exception as error:
            said.put(repr(error))
        time.sleep(0)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
def test_of_two_writers_each_round_leaves_one_versions_files_and_readers_never_mix(tmp_path, monkeypatch, exchange):
    from hlm.integrity import read_steadily

    if not exchange:
        monkeypatch.setattr(outputs, "_exchanged", lambda *folders: False)
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    put(tmp_path / "out", "a")
    writers = [context.Process(target=race, args=(tmp_path / "out", text, 100, said)) for text in "ab"]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(read_steadily(tmp_path / "out", lambda: text_of(tmp_path / "out")))
    for writer in writers:
        writer.join()
    assert {said.get() for _ in range(200)} <= {"written", "told"}
    assert seen <= {("a", "a"), ("b", "b")}
    assert names(tmp_path) == ["out"]


def test_an_error_leaves_the_old_version_and_nothing_beside_it(tmp_path):
    put(tmp_path / "out", "old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            with atomic_folder(tmp_path / "out", "student") as aside:
                (aside / "weights").write_text("half")
                raise error
    assert text_of(tmp_path / "out") == ("old", "old")
    assert names(tmp_path) == ["out"]


def test_a_kill_between_two_renames_is_put_right_by_whoever_reads_next(tmp_path, monkeypatch):
    put(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.retired")  # what such a kill leaves
    (tmp_path / ".out.1234.1.abcd.partial").mkdir()
    assert text_of_recovered(tmp_path / "out") == "old"
    assert names(tmp_path) == ["out"]


def text_of_recovered(folder):
    return read_manifest(folder, "student")["config"]["by"]


def test_a_result_that_cannot_take_its_place_is_kept_and_named(tmp_path, monkeypatch):
    put(tmp_path / "out", "old")

    def refused(aside, target):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(outputs, "_swap", refused)
    with pytest.raises(HlmError, match=r"the result is whole at (\S+): move it") as error:
        put(tmp_path / "out", "hours of work")
    kept = tmp_path / str(error.value).split("whole at ")[1].split(":")[0]
    monkeypatch.undo()
    put(tmp_path / "out", "next")  # whose sweeping leaves it alone
    assert text_of(kept) == ("hours of work", "hours of work")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_modes_follow_the_umask_whatever_a_library_gives_its_files(tmp_path, umask, mode):
    import numpy as np

    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "out", "student") as aside:
            save_file({"x": np.zeros(3, np.float32)}, aside / "model.safetensors")
            (aside / "model.safetensors").chmod(0o600)
            (aside / "onnx").mkdir()
            (aside / "onnx/secret").touch(0o600)
            write_manifest(aside, "student", inputs={}, config={})
        with atomic_file(tmp_path / "file") as aside:
            aside.unlink()
            aside.touch(0o600)
    finally:
        os.umask(before)
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(paths) == 4
    assert {path.stat().st_mode & 0o777 for path in paths} == {mode}


def test_half_written_files_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for process in (dead.pid, os.getppid()):
        (tmp_path / f".r.json.{outputs._HOST}.{process}.00.partial").touch()
    (tmp_path / f".r.json.00000000.{dead.pid}.00.partial").touch()  # of another machine
    with atomic_file(tmp_path / "r.json") as aside:
        aside.write_text("{}")
    left = [f".r.json.00000000.{dead.pid}.00.partial", f".r.json.{outputs._HOST}.{os.getppid()}.00.partial", "r.json"]
    assert names(tmp_path) == sorted(left)


def test_the_manifest_records_every_file(tmp_path):
    put(tmp_path / "out", "text", more=["onnx/graph", "onnx/deep/er"])
    manifest = json.loads((tmp_path / "out/hlm.json").read_text())
    assert sorted(manifest["files"]) == ["onnx/deep/er", "onnx/graph", "weights"]
    assert set(manifest["files"].values()) == {"982d9e3eb996f559"}  # sha256 of "text"


def test_two_folders_are_exchanged_in_one_step_here(tmp_path):
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("no renameat2")
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if outputs._exchanged(tmp_path / "a", tmp_path / "b"):
        assert (names(tmp_path / "a"), names(tmp_path / "b")) == (["b"], ["a"])
