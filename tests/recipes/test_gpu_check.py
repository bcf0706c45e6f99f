"""recipes/gpu_check.py runs every stage tiny on the CPU, and a stage that fails or hangs takes no other along."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import children
import pytest

from hlm.artefacts import HlmError

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "gpu_check.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]


def test_every_stage_runs_tiny_on_the_cpu(tmp_path):
    output = tmp_path / "results" / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--minutes", "9", "--output", str(output)]
    done = children.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(output.read_text())
    assert result["environment"]["command"].startswith("recipes/gpu_check.py --tiny")
    assert result["environment"]["versions"]["hlm"] and "cores" in result["environment"]
    status = {name: entry["status"] for name, entry in result["stages"].items()}
    assert status == dict.fromkeys(status, "done") | {"tests": "skipped", "faiss": "skipped"}
    assert result["stages"]["parity"]["measured"]["agrees"] is True
    for name in ("online_190m", "online_8b"):
        assert result["stages"][name]["measured"]["best_queries_per_s"] > 0
    for name in ("online_190m", "online_8b", "teacher_step_8b", "embed_8b", "align_190m", "refine_190m"):
        assert result["stages"][name]["predicted"].keys() == {"H100", "H200"}
    assert [row["figure"] for row in result["asked"]][:2] == [
        "190M p50, tokenisation included, ms",
        "8B p50 / 190M p50, both as HLM serves",
    ]
    assert all(name in done.stdout for name in status)


def test_the_tests_that_need_a_gpu_are_where_the_script_looks_for_them(script):
    """A GPU is rare: a path that went stale would be seen there first."""
    assert "skipif(not torch.cuda.is_available()" in (script.HOME / script.GPU_TESTS).read_text()


STAGES = """
import multiprocessing, os, subprocess, sys, time
sys.path.insert(0, {recipes!r})
import gpu_check

spawn = multiprocessing.get_context("spawn")
if sys.argv[1] == "spawn":
    gpu_check.multiprocessing.get_context = lambda name: spawn

def fails(setting, seconds, note):
    note({{"measured": {{"p50_ms": 1.5}}}})
    raise gpu_check.HlmError("no kernel")

def hangs(setting, seconds, note):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    note({{"child": child.pid}})
    time.sleep(60)

def dies(setting, seconds, note):
    os._exit(9)

stages = {{"machine": lambda *given: {{"measured": {{"agrees": True}}}}, "fails": fails, "hangs": hangs, "dies": dies}}
gpu_check.STAGES = {{name: (stage, 2 if name == "hangs" else 99) for name, stage in stages.items()}}
if __name__ == "__main__":
    gpu_check.main(["--tiny", "--minutes", "5", "--output", {output!r}, *sys.argv[2:]])
"""


def test_stages_that_fail_or_hang_leave_the_others_alone(tmp_path):
    output = tmp_path / "gpu.json"
    (tmp_path / "stages.py").write_text(STAGES.format(recipes=str(SCRIPT.parent), output=str(output)))
    command = [sys.executable, str(tmp_path / "stages.py")]
    done = children.run([*command, "fork"], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    found = json.loads(output.read_text())["stages"]
    status = {"machine": "done", "fails": "failed", "hangs": "stopped", "dies": "failed"}
    assert {name: entry["status"] for name, entry in found.items()} == status
    assert found["fails"]["measured"] == {"p50_ms": 1.5} and "no kernel" in found["fails"]["error"]
    assert "ended with 9" in found["dies"]["error"]
    with pytest.raises(ProcessLookupError):  # what the stage started is gone with it
        for _ in range(100):
            os.kill(found["hangs"]["child"], 0)
            time.sleep(0.05)
    # As on a GPU, where a process cannot be forked.
    children.run([*command, "spawn", "--only", "fails"], capture_output=True, check=False)
    found = json.loads(output.read_text())["stages"]
    assert {name: entry["status"] for name, entry in found.items()} == {"machine": "done", "fails": "failed"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "online"], "only: expected stages of machine, parity.*found 'online'"),
        (["--output", "{foreign}"], "output: expected a file of this script"),
    ],
)
def test_bad_settings_are_refused(script, tmp_path, flags, message):
    foreign = tmp_path / "notes.json"
    foreign.write_text('{"mine": 1}')
    with pytest.raises(HlmError, match=message):
        script.main(["--tiny", *(flag.format(foreign=foreign) for flag in flags)])
    assert foreign.read_text() == '{"mine": 1}'


@pytest.mark.parametrize(("measured", "reached"), [(0.4, True), (0.6, False)])
def test_figures_are_held_against_what_is_asked(script, measured, reached):
    stages = {
        "online_190m": {"measured": {"p50_ms": measured}},
        "align_190m": {"measured_over_planned": {"step_seconds": 1.31}},
    }
    rows = script.asked({"stages": stages, "ratios": {}})
    assert [(row["measured"], row["reached"]) for row in rows] == [(measured, reached), (1.31, False)]
