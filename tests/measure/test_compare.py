"""The comparison with the sentence-transformers scripts: both sides do their work, and the JSON says what it cost."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import children
import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer

from hlm.artefacts import HlmError
from hlm.encoders.loading import fingerprint, load_encoder, save_encoder

PATH = Path(__file__).resolve().parents[2] / "results/measure/compare.py"
spec = importlib.util.spec_from_file_location("compare_recipe", PATH)
compare = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
spec.loader.exec_module(compare)


@pytest.fixture(scope="module")
def given(tiny_bert, catalogue_200, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    compare.recipe("embed", ["--model", tiny_bert, "--data", catalogue_200, "--output", str(folder / "vectors")])
    model = load_encoder(tiny_bert)
    save_encoder(model, folder / "student", "student", inputs={"teacher": fingerprint(model)}, config={})
    return {"student": str(folder / "student"), "data": catalogue_200, "vectors": str(folder / "vectors")}


@pytest.fixture
def in_one_process(monkeypatch):
    """Each job is a fresh process in earnest; its hooks into the trainer are taken out again here."""
    hooks = [(Trainer, "training_step"), (Trainer, "get_batch_samples"), (Accelerator, "backward")]
    hooks.append((torch.optim.AdamW, "step"))

    def run_job(job):
        shutil.rmtree(job["work"], ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in hooks:
                patch.setattr(owner, name, getattr(owner, name))
            return compare.do_job(job) | {"other_load": 0.0}

    monkeypatch.setattr(compare, "run_job", run_job)


def test_every_job_is_done_by_both_sides(given, tmp_path, in_one_process, capsys):
    sizes = {"rows": 160, "align_batch": 16, "refine_batch": 16, "steps": 5, "refine_steps": 5, "repeats": 1}
    settings = given | sizes | {"min_score": 1, "output": str(tmp_path / "out"), "refine_config": refine(tmp_path)}
    compare.main(compare.flags(settings))
    report = json.loads((tmp_path / "out" / "compare.json").read_text())
    names = ["align, 40 rows", "align, 160 rows", "embed", "embed, online encoder", "refine"]
    assert list(report["comparisons"]) == [*names, "refine, their ads with as many hard negatives"]
    for name, found in report["comparisons"].items():
        ours, theirs = (found[side]["rows_per_s"] for side in ("ours", "theirs"))
        assert found["ratio"] == pytest.approx(ours / theirs) and ours > 0
        if "embed" not in name:
            for side in ("ours", "theirs"):
                (run,) = found[side]["repeats"]
                assert sum(run["parts_ms"].values()) == pytest.approx(run["step_ms"])
                assert run["parts_ms"]["optimizer"] > 0 and run["parts_ms"]["backward"] > 0
    assert set(report["memory_a_row"]) == {"ours", "theirs"}
    assert report["settings"]["rows"] == 160
    assert report["environment"]["command"].startswith("results/measure/compare.py --student")
    assert "embed, online encoder" in capsys.readouterr().out
    assert not (tmp_path / "out" / "compare.work").exists()


def refine(tmp_path):
    path = tmp_path / "refine.yaml"
    path.write_text("hard_negatives: 2\npool: 100000\n")
    return str(path)


def test_what_cannot_be_measured_is_refused(given, tmp_path):
    with pytest.raises(HlmError, match="8 batches of rows"):
        compare.main(compare.flags(given | {"rows": 100, "output": str(tmp_path)}))
    with pytest.raises(HlmError, match="at most 400"):
        compare.main(compare.flags(given | {"rows": 100_000, "output": str(tmp_path)}))


def test_a_job_that_fails_says_why(given, tmp_path, monkeypatch):
    monkeypatch.setattr(compare.subprocess, "run", children.run)
    job = {"kind": "embed", "side": "theirs", "work": str(tmp_path / "job"), "model": "./none", "data": given["data"]}
    with pytest.raises(HlmError, match="(?s)embed, theirs: the process failed.*found none"):
        compare.run_job(job)
