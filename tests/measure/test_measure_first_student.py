"""Every command of the measurement is run and timed; the steps themselves are tested in tests/test_your_data.py."""

import json
import subprocess
from pathlib import Path

import yaml

from results.measure import measure_first_student, tables

REPORT = {
    "queries": 40,
    "systems": {name: {"ndcg@10": value} for name, value in {"bm25": 0.5, "student": 0.6}.items()},
    "recovery_by_system": {"student": {"ndcg@10": {"value": 0.98, "ci95": [0.95, 1.01]}}},
}


def test_every_command_is_timed(tmp_path, monkeypatch):
    ran = []

    def run(command, *, cwd, env, **_):
        ran.append(command[3:])
        if command[3] == "init":
            (cwd / "mine").mkdir()
            (cwd / "mine/run.yaml").write_text("{like: esci_mini, steps: {}}")
        if command[3] == "run":
            assert yaml.safe_load((cwd / "mine/run.yaml").read_text())["steps"] == {"static": None}
            (cwd / "runs/mine").mkdir(parents=True)
            (cwd / "runs/mine/report.json").write_text(json.dumps(REPORT))
            timings = {"seconds": {"align": 3.04}, "peak_memory_gib": 1.5}
            (cwd / "runs/mine/timings.json").write_text(json.dumps(timings))
        assert Path(cwd, "ads.csv").is_file() and Path(cwd, "clicks.csv").is_file()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(measure_first_student.subprocess, "run", run)
    output = tmp_path / "first-student.json"
    words = ["--lines", "2000", "--ads", "60", "--steps", '{"static": null}', "--output", str(output)]
    measure_first_student.main(words)
    assert [words[0] for words in ran] == ["prepare", "init", "run", "publish"] and ran[-1][-1] == "--dry-run"
    found = json.loads(output.read_text())
    (one,) = found["runs"]
    assert one["steps"] == {"align": 3.0} and one["ndcg@10"] == {"bm25": 0.5, "student": 0.6}
    assert "| 2,000 | 60 |" in tables.first_students(found) and "98.0% (95.0% to 101.0%)" in tables.first_students(
        found
    )
