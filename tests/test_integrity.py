"""What is read is what the manifest tells of, and of one version."""

import json
import os
import time

import pytest

from hlm import integrity
from hlm.artefacts import HlmError, atomic_folder, file_records, read_manifest, write_manifest
from hlm.integrity import check_files, fingerprint_file, known_fingerprint, read_steadily


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(integrity, "_known", {})
    monkeypatch.setattr(integrity, "LARGE_BYTES", 1000)
    (tmp_path / "a/onnx").mkdir(parents=True)
    (tmp_path / "a/config.json").write_text("{}")
    (tmp_path / "a/onnx/model.onnx").write_bytes(b"weights" * 1000)
    return tmp_path / "a"


def reads(monkeypatch):
    seen = []
    monkeypatch.setattr(integrity, "fingerprint_file", lambda path: (seen.append(path), fingerprint_file(path))[1])
    return seen


def test_files_as_recorded_pass_and_others_are_refused(folder):
    records = file_records(folder)
    check_files(folder, records, list(records))
    (folder / "config.json").write_text("{ }")
    with pytest.raises(HlmError, match=r"config.json: expected content \w{16} .*, found \w{16}; it was changed"):
        check_files(folder, records, ["config.json"])
    (folder / "config.json").unlink()
    with pytest.raises(HlmError, match=r"config.json: expected content \w{16} .*, found no file"):
        check_files(folder, records, ["config.json"])
    check_files(folder, records, ["prompts.json"])  # neither there nor recorded
    (folder / "prompts.json").write_text("{}")
    with pytest.raises(HlmError, match="expected no such file"):
        check_files(folder, records, ["prompts.json"])


@pytest.mark.parametrize("wrong", [None, 3, {}, "", ["x"]])
def test_a_record_that_is_no_fingerprint_is_refused(folder, wrong):
    with pytest.raises(HlmError, match="config.json"):
        check_files(folder, {"config.json": wrong}, ["config.json"])


def test_a_large_file_is_hashed_once_and_again_when_it_changed(folder, monkeypatch):
    seen, graph = reads(monkeypatch), folder / "onnx/model.onnx"
    assert known_fingerprint(graph) == known_fingerprint(graph) == fingerprint_file(graph)
    monkeypatch.setattr(integrity, "_known", {})  # as in the next process
    known_fingerprint(graph)
    assert len(seen) == 1
    status = graph.stat()
    with open(graph, "r+b") as file:  # in place, of the same size, with its old times
        file.write(b"W")
    os.utime(graph, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert known_fingerprint(graph) == fingerprint_file(graph)
    assert len(seen) == 2


def test_small_files_are_hashed_at_every_load(folder, monkeypatch):
    seen = reads(monkeypatch)
    for _ in range(3):
        known_fingerprint(folder / "config.json")
    assert len(seen) == 3


def test_a_damaged_or_unwritable_cache_costs_a_hash_and_nothing_else(folder, monkeypatch, tmp_path):
    graph = folder / "onnx/model.onnx"
    known_fingerprint(graph)
    (note,) = (tmp_path / "cache/hashed").glob("*.json")
    for text in ("", "[]", '{"path": 3}', json.dumps(json.loads(note.read_text()) | {"state": "x", "fingerprint": 4})):
        note.write_text(text)
        monkeypatch.setattr(integrity, "_known", {})
        assert known_fingerprint(graph) == fingerprint_file(graph)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HLM_CACHE", str(tmp_path / "file/within"))
    monkeypatch.setattr(integrity, "_known", {})
    assert known_fingerprint(graph) == fingerprint_file(graph)


def put(folder, text):
    with atomic_folder(folder, "student") as aside:
        (aside / "weights").write_text(text)
        write_manifest(aside, "student", inputs={}, config={"by": text})


def test_a_folder_replaced_while_it_is_read_is_read_again(tmp_path):
    put(tmp_path / "out", "a")
    versions = iter("bc")

    def read():
        manifest = read_manifest(tmp_path / "out", "student")["config"]["by"]
        if (later := next(versions, None)) is not None:
            put(tmp_path / "out", later)
        return manifest + (tmp_path / "out/weights").read_text()

    assert read_steadily(tmp_path / "out", read) == "cc"


def test_errors_of_a_folder_that_stands_still_and_of_none_are_its_own(tmp_path):
    put(tmp_path / "out", "a")
    calls = []

    def read():
        calls.append(1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        read_steadily(tmp_path / "out", read)
    assert len(calls) == 1
    with pytest.raises(HlmError, match="found no hlm.json"):
        read_steadily(tmp_path / "none", lambda: read_manifest(tmp_path / "none", "student"))


def test_a_folder_that_never_stands_still_is_refused(tmp_path):
    put(tmp_path / "out", "a")
    started = time.monotonic()
    with pytest.raises(HlmError, match="was replaced 10 times"):
        read_steadily(tmp_path / "out", lambda: put(tmp_path / "out", "b"))
    assert time.monotonic() - started < 30
