"""The measurement of a catalogue that changes runs whole, with threads for processes, and its figures are of both."""

import importlib.util
import json
import multiprocessing
import queue
import sys
import threading
import types
from pathlib import Path

import pytest

from results.measure import tables

PATH = Path(__file__).resolve().parents[2] / "results/measure/measure_living.py"
spec = importlib.util.spec_from_file_location("measure_living", PATH)
measure_living = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
spec.loader.exec_module(measure_living)


def test_it_runs_whole(tmp_path, monkeypatch):
    threads = types.SimpleNamespace(
        Barrier=threading.Barrier, Event=threading.Event, Queue=queue.Queue, Process=threading.Thread
    )
    monkeypatch.setattr(multiprocessing, "get_context", lambda way: threads)
    monkeypatch.setattr(measure_living, "KEPT_COMMITS", 1)
    words = ["--work", str(tmp_path), "--output", str(tmp_path / "living.json"), "--minutes", "0.05", "--rows", "500"]
    words += ["--dim", "16", "--kind", "lance:IVF_SQ", "--k", "10", "--swaps", "12", "--changes_per_minute", "1800"]
    measure_living.main(words)
    report = json.loads((tmp_path / "living.json").read_text())
    for found in (report["quiet"], report["changing"], report["swaps"]):
        assert not found["errors"]
    for found in (report["quiet"], report["changing"]):
        assert found["searches"] > 20 and not found["not_of_the_version_that_was_open"] and not found["short_lists"]
    changing = report["changing"]
    assert changing["commits"] == 3 and changing["deletes"] == 20 and changing["puts"] + changing["deletes"] == 90
    assert "| ads change | " in tables.living(report) and "swapped 12 times under four threads" in tables.living(report)
    assert report["swaps"]["torn"] == 0 and report["swaps"]["answers"] > 0
    assert report["p99_times_the_quiet_one"] == pytest.approx(changing["p99_ms"] / report["quiet"]["p99_ms"])


@pytest.mark.parametrize(
    ("name", "version", "is_there"),
    [("0-7", 1, True), ("3-1", 3, False), ("3-1", 4, True), ("3-1", 13, True), ("3-1", 14, False)],
)
def test_an_id_tells_of_which_versions_it_is(name, version, is_there):
    assert measure_living.is_of(name, version) == is_there
