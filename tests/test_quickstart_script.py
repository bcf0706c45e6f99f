"""The script that runs all steps: their order, what is skipped, what is not, and how a failure ends it.

The steps here are real processes of a few lines; the recipes themselves run in test_recipes.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hlm.artefacts import HlmError
from hlm.machine import peak_memory_mib
from recipes import quickstart

RECIPE = """
import json, os, pathlib, signal, sys, yaml
values = yaml.safe_load(open(sys.argv[2]))
with open("log", "a") as log:
    log.write(pathlib.Path(sys.argv[2]).stem + "\\n")
if values.get("fail"):
    sys.exit(values["fail"])
if values.get("kill"):
    os.kill(os.getpid(), signal.SIGKILL)
output = pathlib.Path(values["output"])
output.mkdir(parents=True, exist_ok=True)
names = {"evaluate": "report.json", "benchmark": "latency.json"}
name = names.get(pathlib.Path(sys.argv[0]).stem, "hlm.json")
(output / name).write_text(json.dumps(values))
"""
SETTINGS = {
    "make_catalogue": "output: runs/x/data\n",
    "teacher": "data: runs/x/data\nbackbone: base.txt\noutput: runs/x/teacher\n",
    "align": "data: runs/x/data\nstudent: runs/x/teacher\noutput: runs/x/aligned\n",
    "evaluate": "data: runs/x/data\noutput: runs/x\n",
    "benchmark": "data: runs/x/data\noutput: runs/x\n",
}
ALL = list(SETTINGS)
LAST = ALL[-3:]


@pytest.fixture
def house(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "RECIPES", tmp_path / "recipes")
    monkeypatch.setattr(quickstart, "print_reports", lambda home, names: print(f"tables of {home}: {names}"))
    for folder in ("recipes", "hlm", "configs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "hlm/losses.py").write_text("x = 1\n")
    (tmp_path / "base.txt").write_text("weights")
    for name, text in SETTINGS.items():
        (tmp_path / f"recipes/{name}.py").write_text(RECIPE)
        (tmp_path / f"configs/{name}.yaml").write_text(text)
    return tmp_path


def run() -> tuple[int, list[str]]:
    """Exit status and the steps that ran."""
    Path("log").write_text("")
    status = quickstart.main(["--configs", "configs"])
    return status, Path("log").read_text().split()


def test_steps_run_in_order_and_once(house, capfd, monkeypatch):
    assert run() == (0, ALL)
    assert "tables of runs/x: []" in capfd.readouterr().out  # the steps print their own
    monkeypatch.setattr(quickstart, "run", lambda words: pytest.fail("a process was started"))
    assert run() == (0, [])
    out = capfd.readouterr().out
    assert all(f"{name}: up to date" in out for name in ALL)
    assert "tables of runs/x: ['evaluate', 'benchmark']" in out and "nothing had changed" in out


@pytest.mark.parametrize(
    "change, again",
    [
        (lambda: Path("configs/align.yaml").write_text(SETTINGS["align"] + "seed: 1\n"), LAST),
        (lambda: Path("configs/evaluate.yaml").write_text(SETTINGS["evaluate"] + "k: 5\n"), ["evaluate", "benchmark"]),
        (lambda: Path("recipes/align.py").write_text(RECIPE + "\n"), LAST),
        (lambda: Path("hlm/losses.py").write_text("x = 2\n"), ALL),
        (lambda: Path("base.txt").write_text("other weights"), ["teacher", *LAST]),
        (lambda: Path("runs/x/aligned/hlm.json").write_text('{"by": "hand"}'), ["align"]),  # as it was: no more to do
        (lambda: Path("runs/x/teacher/hlm.json").unlink(), ["teacher"]),
        (lambda: Path("runs/x/report.json").unlink(), ["evaluate"]),
    ],
    ids=["yaml", "last", "script", "library", "outside", "by hand", "artefact gone", "report gone"],
)
def test_what_changed_runs_again(house, change, again):
    run()
    change()
    assert run() == (0, again)
    assert run() == (0, [])


def test_a_failed_step_ends_the_run_and_the_next_goes_on_there(house, capfd):
    (house / "configs/align.yaml").write_text(SETTINGS["align"] + "fail: 3\n")
    assert run() == (3, ["make_catalogue", "teacher", "align"])
    out = capfd.readouterr().out
    assert "error: step align ended with status 3" in out and "recipes/align.py --config configs/align.yaml" in out
    (house / "configs/align.yaml").write_text(SETTINGS["align"] + "kill: true\n")
    assert run() == (128 + 9, ["align"])
    (house / "configs/align.yaml").write_text(SETTINGS["align"])
    assert run() == (0, LAST)


def test_timings_cover_all_steps_and_say_whether_they_are_of_one_run(house):
    run()
    timings = json.loads(Path("runs/x/timings.json").read_text())
    assert list(timings["seconds"]) == ALL and timings["in_one_run"]
    assert timings["total_seconds"] == pytest.approx(sum(timings["seconds"].values()), abs=0.1)
    # A child's peak begins at the size of the process that started it, here this one.
    assert 0 < timings["peak_memory_gib"] < peak_memory_mib() / 2**10 + 1 and timings["cores"] >= 1
    (house / "configs/evaluate.yaml").write_text(SETTINGS["evaluate"] + "k: 5\n")
    run()
    timings = json.loads(Path("runs/x/timings.json").read_text())
    assert list(timings["seconds"]) == ALL and not timings["in_one_run"]


def test_peak_memory_is_the_steps_own():
    # From a small process, as the script is one: Linux counts what the starting process held as the child's own.
    code = (
        "import sys; from recipes.quickstart import run\n"
        "for size in (300, 0):\n"
        "    print(*run([sys.executable, '-c', f'x = bytearray({size} * 2**20)'])[1].values())"
    )
    root = Path(quickstart.__file__).parent.parent
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    large, small = (float(line.split()[1]) for line in shown.stdout.splitlines())
    assert 0.29 < large < 0.5 and small < 0.1


def test_bad_configs_are_refused_by_name(house):
    with pytest.raises(HlmError, match="expected YAML files of steps in nowhere"):
        quickstart.main(["--configs", "nowhere"])
    for text in ("data: x\n", "- a\n", "output: [\n"):
        (house / "configs/align.yaml").write_text(text)
        with pytest.raises(HlmError, match=r"align\.yaml"):
            quickstart.main(["--configs", "configs"])
    (house / "configs/align.yaml").write_text(SETTINGS["align"])
    (house / "recipes/align.py").write_text("")
    with pytest.raises(HlmError, match="step align: expected hlm.json"):
        quickstart.main(["--configs", "configs"])


def test_several_processes_launch_the_training_steps_only():
    words = quickstart.command("align", Path("a.yaml"), 2)
    assert words[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for script, processes in (("align", 1), ("evaluate", 2), ("prune", 2)):
        words = quickstart.command(script, Path("a.yaml"), processes)
        assert words == [sys.executable, os.path.relpath(quickstart.RECIPES / f"{script}.py"), "--config", "a.yaml"]


def test_skipping_loads_nothing_heavy():
    code = "import sys; import recipes.quickstart; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    root = Path(quickstart.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_every_step_has_its_script():
    assert all((quickstart.RECIPES / f"{script}.py").is_file() for _, script in quickstart.STEPS)
    assert len(dict(quickstart.STEPS)) == len(quickstart.STEPS)
