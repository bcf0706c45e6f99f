"""Every command of the measurement is run and timed; the steps themselves are tested in tests/test_your_data.py."""

import json

import yaml

from results.measure import measure_first_student, tables

REPORT = {
    "queries": 40,
    "systems": {name: {"ndcg@10": value} for name, value in {"bm25": 0.5, "student": 0.6}.items()},
    "recovery_by_system": {"student": {"ndcg@10": {"value": 0.98, "ci95": [0.95, 1.01]}}},
}


def test_every_command_is_timed(tmp_path, monkeypatch):
    ran = []

    def hlm(words, folder):
        ran.append(words)
        if words[0] == "init":
            (folder / "mine").mkdir()
            (folder / "mine/run.yaml").write_text("{like: esci_mini, steps: {}}")
        if words[0] == "run":
            assert yaml.safe_load((folder / "mine/run.yaml").read_text())["steps"] == {"static": None}
            (folder / "runs/mine").mkdir(parents=True)
            (folder / "runs/mine/report.json").write_text(json.dumps(REPORT))
            timings = {"seconds": {"align": 30.04, "refine": 60, "export": 30}, "peak_memory_gib": 1.5}
            (folder / "runs/mine/timings.json").write_text(json.dumps(timings))
        log = words[words.index("--log") + 1] if words[0] == "init" else "ads.csv"
        assert (folder / log).stat().st_size > 1000
        return 0

    monkeypatch.setattr(measure_first_student, "hlm", hlm)
    output = tmp_path / "first-student.json"
    words = [
        "--lines",
        "2000",
        "3000",
        "--ads",
        "60",
        "70",
        "--files",
        "csv",
        "ubi",
        "--steps",
        '{"static": null}',
        "--output",
        str(output),
    ]
    measure_first_student.main(words)
    assert [words[0] for words in ran] == ["init", "run"] * 2 and ran[-1][-1] == "--dry-run"
    found = json.loads(output.read_text())
    one, other = found["runs"]
    assert one["steps"] == {"align": 30.0, "refine": 60, "export": 30}
    assert one["ndcg@10"] == {"bm25": 0.5, "student": 0.6} and other["files"] == "ubi"
    table = tables.first_students(found)
    assert "| 2,000 | 60 | 0.0 | 1.5 | 2.0 | 0.0 | 40 |" in table and "| 3,000 of UBI | 70 |" in table
    assert "98.0% (95.0% to 101.0%)" in table
