"""The measurement of two writers and of kills: what it reports, and that it would see a fault."""

import json

import pytest

from hlm import outputs
from hlm.artefacts import HlmError
from results.measure import measure_reliability

SMALL = ["--rounds", "3", "--kills", "3", "--steps", "3"]


@pytest.fixture(autouse=True)
def offline_tokenizer(tiny_bert):
    SMALL[6:] = ["--tokenizer", tiny_bert]


def test_all_kinds_and_steps_are_counted(tmp_path, capsys):
    measure_reliability.main([*SMALL, "--output", str(tmp_path / "r.json")])
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report["writers"]) == set(measure_reliability.KINDS)
    for found in report["writers"].values():
        assert found["rounds"] == 3
        assert not found["mixed"] + found["unloadable"] + found["other"]
    assert {name: found["kills"] for name, found in report["kills"].items()} == {
        "make_catalogue": 1,
        "teacher": 1,
        "embed": 1,
    }
    assert "two writers of" in capsys.readouterr().out


def test_a_mixture_would_be_seen(tmp_path, monkeypatch):
    def half(aside, target):
        for path in list(aside.iterdir()):
            if path.name != "queries.jsonl" or not target.exists():
                target.mkdir(exist_ok=True)
                path.rename(target / path.name)

    monkeypatch.setattr(outputs, "_swap", half)
    monkeypatch.setattr(measure_reliability, "KINDS", {"dataset": measure_reliability.KINDS["dataset"]})
    with pytest.raises(HlmError, match="expected whole folders and equal bits"):
        measure_reliability.main([*SMALL, "--steps", "1", "--rounds", "30", "--output", str(tmp_path / "r.json")])
    assert json.loads((tmp_path / "r.json").read_text())["writers"]["dataset"]["mixed"] > 0
