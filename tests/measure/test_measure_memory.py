"""The measurement of alignment's memory: what it reports, and that its limit is one."""

import json

import pytest

from hlm.artefacts import HlmError
from results.measure import measure_memory


def measured(path, student, *more: str) -> dict:
    words = [
        "--student",
        student,
        "--dim",
        "32",
        "--steps",
        "4",
        "--batch",
        "16",
        "--output",
        str(path / "memory.json"),
    ]
    measure_memory.main([*words, "--work", str(path), *more])
    return json.loads((path / "memory.json").read_text())


def test_two_sizes_within_the_limit(tiny_bert, tmp_path, capsys):
    report = measured(tmp_path, tiny_bert, "--rows", "1000", "3000", "--limit_mib", "4096")
    first, second = report["runs"]
    assert first["passed"] and second["passed"] and (first["rows"], second["rows"]) == (1000, 3000)
    assert 50 < first["anonymous_end_mib"] <= first["anonymous_peak_mib"] < 4096 and first["file_backed_peak_mib"] > 10
    difference = second["anonymous_peak_mib"] - first["anonymous_peak_mib"]
    assert report["bytes_a_row"] == pytest.approx(2**20 * difference / 2000)
    assert second["disk_mib"] > first["disk_mib"] and first["limit"] in ("memory cgroup", "RLIMIT_DATA")
    assert "work" not in report["settings"] and str(tmp_path) not in json.dumps(report["settings"]["rows"])
    assert [path.name for path in tmp_path.iterdir()] == ["memory.json"]
    assert "yes, 4,096 MiB" in capsys.readouterr().out


def test_a_limit_that_is_too_small_fails(tiny_bert, tmp_path):
    with pytest.raises(HlmError, match="expected alignment to end within 60 MiB"):
        measured(tmp_path, tiny_bert, "--rows", "1000", "--limit_mib", "60")
    (run,) = json.loads((tmp_path / "memory.json").read_text())["runs"]
    assert not run["passed"] and run["status"] != 0


def test_a_disk_that_is_too_small_is_refused(tiny_bert, tmp_path):
    with pytest.raises(HlmError, match="GiB free for the data.*--rows"):
        measured(tmp_path, tiny_bert, "--rows", "10000000000000")


def test_queries_are_distinct_and_the_same_each_time():
    found = measure_memory.queries(500, 900)
    assert len(set(found)) == 400 and found == measure_memory.queries(500, 900)
