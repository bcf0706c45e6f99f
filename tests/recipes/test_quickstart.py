"""The script that runs all steps: their order, what is skipped, what is not, and how a failure ends it. The steps here
are real processes of a few lines; the recipes themselves run in test_recipes.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hlm.artefacts import HlmError
from hlm.machine import peak_memory_mib
from hlm.step_table import STEPS
from recipes import quickstart

ROOT = Path(__file__).resolve().parents[2]
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
name, facts = {
    "make_catalogue": ("hlm.json", {"kind": "catalogue"}),
    "teacher": ("hlm.json", {"kind": "teacher"}),
    "evaluate": ("report.json", dict.fromkeys(["dataset", "split", "k", "systems", "recovery"])),
    "benchmark": ("latency.json", dict.fromkeys(["data", "reference", "settings", "systems", "blocks"])),
}.get(pathlib.Path(sys.argv[0]).stem, ("hlm.json", {"kind": "student"}))
(output / name).write_text(json.dumps(facts | values))
"""
IMPORTS = "if False:\n    from hlm.losses import x\n"
# Starts a process of its own, says who both are, and works until it is told to end, or until a file is there.
LONG = """
import os, pathlib, subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
rank = os.environ.get("RANK", "0")
pathlib.Path(f"pids-{rank}.new").write_text(f"{os.getpid()} {other.pid}")
os.rename(f"pids-{rank}.new", f"pids-{rank}")
while not pathlib.Path("go on").exists():
    time.sleep(0.02)
    pathlib.Path("beat").write_text(str(time.monotonic()))
other.kill()
"""
SETTINGS = {
    "make_catalogue": "output: runs/x/data\n",
    "teacher": "data: runs/x/data\nbackbone: base.txt\noutput: runs/x/teacher\n",
    "align": "data: runs/x/data\nstudent: runs/x/teacher\noutput: runs/x/aligned\n",
    "evaluate": "data: runs/x/data\noutput: runs/x\n",
    "benchmark": "data: runs/x/data\noutput: runs/x\n",
}
CHECK_TRAINED = quickstart.check_trained
ALL = list(SETTINGS)
LAST = ALL[-3:]


@pytest.fixture
def house(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "RECIPES", tmp_path / "recipes")
    monkeypatch.setattr(quickstart, "LIBRARY", tmp_path / "hlm")
    monkeypatch.setattr(quickstart, "check_trained", lambda *_: 0)  # it takes seconds
    monkeypatch.setattr(quickstart, "print_reports", lambda home, names: print(f"tables of {home}: {names}"))
    for folder in ("recipes", "hlm", "configs"):
        (tmp_path / folder).mkdir()
    for name, text in {"losses": "from hlm.batches import y\n", "batches": "y = 1\n", "cards": "z = 1\n"}.items():
        (tmp_path / f"hlm/{name}.py").write_text(text)
    (tmp_path / "base.txt").write_text("weights")
    for name, text in SETTINGS.items():
        (tmp_path / f"recipes/{name}.py").write_text(RECIPE + (IMPORTS if name == "align" else ""))
        (tmp_path / f"configs/{name}.yaml").write_text(text)
    return tmp_path


def run(*words: str) -> tuple[int, list[str]]:
    """Exit status and the steps that ran."""
    Path("log").write_text("")
    status = quickstart.main(["--configs", "configs", *words])
    return status, Path("log").read_text().split()


def test_steps_run_in_order_and_once(house, capfd, monkeypatch):
    assert run() == (0, ALL)
    assert "tables of runs/x: []" in capfd.readouterr().out  # the steps print their own
    monkeypatch.setattr(quickstart, "run_step", lambda *_: pytest.fail("a process was started"))
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
        (lambda: Path("hlm/batches.py").write_text("y = 2\n"), LAST),
        (lambda: Path("hlm/cards.py").write_text("z = 2\n"), []),
        (lambda: Path("base.txt").write_text("other weights"), ["teacher", *LAST]),
        # As it was before: no more to do.
        (lambda: Path("runs/x/aligned/hlm.json").write_text('{"kind": "student", "by": "hand"}'), ["align"]),
        (lambda: Path("runs/x/teacher/hlm.json").unlink(), ["teacher"]),
        (lambda: Path("runs/x/report.json").unlink(), ["evaluate"]),
        (lambda: Path("runs/x/.steps/align.json").write_text("{"), ["align"]),
    ],
    ids="yaml,last,script,library,another room,outside,by hand,artefact gone,report gone,record broken".split(","),
)
def test_what_changed_runs_again(house, change, again):
    run()
    change()
    assert run() == (0, again)
    assert run() == (0, [])


def test_what_was_run_can_be_published_after_it(house, capfd):
    publish = ("--publish", "somebody", "--dry-run")
    for words, refusal in ((publish, "publish.yaml, found none"), (publish[2:], "expected --publish NAME")):
        with pytest.raises(HlmError, match=refusal):
            run(*words)
        assert Path("log").read_text() == ""  # before any step
    Path("configs/publish.yaml").write_text("student: runs/x/aligned\n")
    script = "import sys; print(*sys.argv[1:]); open('log', 'a').write('publish'); sys.exit(5 * ('nobody' in sys.argv))"
    Path("recipes/publish.py").write_text(script)
    assert run() == (0, ALL)
    assert run(*publish) == (0, ["publish"])
    assert "--config configs/publish.yaml --namespace somebody --dry-run" in capfd.readouterr().out
    assert run("--publish", "nobody") == (5, ["publish"])
    Path("configs/align.yaml").write_text(SETTINGS["align"] + "fail: 3\n")
    assert run(*publish) == (3, ["align"])


def test_a_failed_step_ends_the_run_and_the_next_goes_on_there(house, capfd):
    (house / "configs/align.yaml").write_text(SETTINGS["align"] + "fail: 3\n")
    assert run() == (3, ["make_catalogue", "teacher", "align"])
    error = capfd.readouterr().err
    assert "error: step align ended with status 3" in error and "recipes/align.py --config configs/align.yaml" in error
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
        "import sys; from pathlib import Path; from recipes import quickstart\n"
        "for size in (300, 0):\n"
        "    quickstart.command = lambda *_: [sys.executable, '-c', f'x = bytearray({size} * 2**20)']\n"
        "    job = quickstart.Job('align', quickstart.STEPS['align'], Path('align.yaml'), Path('out'))\n"
        "    print(*quickstart.run_step(quickstart.Supervisor(), job, 1)[1].values())"
    )
    root = Path(quickstart.__file__).parent.parent
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    large, small = (float(line.split()[1]) for line in shown.stdout.splitlines() if line[0].isdigit())
    assert 0.29 < large < 0.5 and small < 0.1


def test_bad_configs_are_refused_by_name(house):
    with pytest.raises(HlmError, match="expected YAML files of steps in nowhere"):
        quickstart.main(["--configs", "nowhere"])
    for text in ("data: x\n", "- a\n", "output: [\n"):
        (house / "configs/align.yaml").write_text(text)
        with pytest.raises(HlmError, match=r"align\.yaml"):
            quickstart.main(["--configs", "configs"])
    (house / "configs/align.yaml").write_text(SETTINGS["align"])
    (house / "configs/evaluate.yaml").write_text(SETTINGS["evaluate"] + "dept: 200\n")
    with pytest.raises(HlmError, match=r"evaluate\.yaml, line 3: unknown key 'dept'; did you mean 'depth'"):
        quickstart.main(["--configs", "configs"])
    assert not Path("log").exists()  # before any step
    (house / "configs/evaluate.yaml").write_text(SETTINGS["evaluate"])
    (house / "recipes/align.py").write_text("")
    with pytest.raises(HlmError, match="step align: expected hlm.json"):
        quickstart.main(["--configs", "configs"])


def test_a_bad_training_setting_is_found_before_any_step_runs(house, capfd, monkeypatch):
    monkeypatch.setattr(quickstart, "check_trained", CHECK_TRAINED)
    (house / "configs/align.yaml").write_text(SETTINGS["align"] + "learnin_rate: 1e-3\n")
    assert run() == (2, [])
    assert "align.yaml, line 4: unknown key 'learnin_rate'; did you mean 'learning_rate'" in capfd.readouterr().err


def test_several_processes_launch_the_training_steps_only():
    words = quickstart.command(STEPS["align"], Path("a.yaml"), 2)
    assert words[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for script, processes in (("align", 1), ("evaluate", 2), ("prune", 2)):
        words = quickstart.command(STEPS[script], Path("a.yaml"), processes)
        assert words == [sys.executable, os.path.relpath(quickstart.RECIPES / f"{script}.py"), "--config", "a.yaml"]


def test_skipping_loads_nothing_heavy():
    code = "import sys; import recipes.quickstart; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    root = Path(quickstart.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


# Ends


def started(house, *flags, **more):
    """The script itself, as a process of its own, over the house's recipes."""
    copy = house / "recipes/quickstart.py"
    copy.write_text(Path(quickstart.__file__).read_text())
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    # Where the tests run under nohup, what they start would ignore the signal as well.
    more.setdefault("preexec_fn", lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    return subprocess.Popen(
        [sys.executable, str(copy), "--configs", "configs", *flags], cwd=house, env=variables, text=True, **more
    )


def pids_of(house, ranks=1):
    """Whoever a long step says that it started; waits for them."""
    paths = [house / f"pids-{rank}" for rank in range(ranks)]
    wait_until(lambda: all(path.exists() for path in paths))
    return [int(pid) for path in paths for pid in path.read_text().split()]


def wait_until(done, seconds=240):  # a launcher takes a minute on a crowded machine
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def runs(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and only Linux ends a child with its parent")


@pytest.fixture
def long_step(house):
    (house / "recipes/teacher.py").write_text(LONG + RECIPE)
    yield house
    for path in house.glob("pids-*"):
        for pid in map(int, path.read_text().split()):
            if runs(pid):
                os.kill(pid, signal.SIGKILL)


@linux
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"])
def test_a_signal_ends_the_step_and_what_it_started(long_step, name):
    process = started(long_step, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    pids = pids_of(long_step)
    process.send_signal(getattr(signal, name))
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name)
    assert not any(map(runs, pids)), "left running"
    assert f"{name}: step teacher has ended as well; the same command goes on" in error
    assert not (long_step / "runs/x/teacher").exists() and not (long_step / "runs/x/.steps/.lock").exists()
    (long_step / "go on").touch()
    (long_step / "log").write_text("")
    assert started(long_step, stdout=subprocess.DEVNULL).wait(60) == 0
    assert (long_step / "log").read_text().split() == ["teacher", *LAST]


@linux
def test_a_killed_run_takes_its_step_with_it(long_step):
    process = started(long_step, stdout=subprocess.DEVNULL)
    step, _ = pids_of(long_step)
    process.kill()
    process.wait()
    wait_until(lambda: not runs(step))


@linux
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_step_under_the_launcher_ends_with_all_its_processes(long_step, name):
    process = started(long_step, "--processes", "2", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first, _, second, _ = pids_of(long_step, ranks=2)
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == (143 if name == "SIGTERM" else -9)
    wait_until(lambda: not runs(first) and not runs(second))


@linux
def test_a_stopped_run_stops_its_step_and_goes_on_with_it(long_step):
    process = started(long_step, stdout=subprocess.DEVNULL)
    step, _ = pids_of(long_step)
    beat = long_step / "beat"
    wait_until(beat.exists)
    process.send_signal(signal.SIGTSTP)
    wait_until(lambda: Path(f"/proc/{step}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T")
    seen = beat.read_text()
    time.sleep(0.2)
    assert beat.read_text() == seen
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: beat.read_text() not in ("", seen))
    (long_step / "go on").touch()
    assert process.wait(60) == 0


@linux
def test_a_signal_that_was_ignored_stays_ignored(long_step):
    deaf = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process = started(long_step, stdout=subprocess.DEVNULL, **deaf)
    pids_of(long_step)
    process.send_signal(signal.SIGHUP)  # as nohup has it
    (long_step / "go on").touch()
    assert process.wait(60) == 0


@linux
def test_what_a_failed_step_left_running_is_ended(long_step, capfd):
    fails = LONG.replace('while not pathlib.Path("go on").exists():', "sys.exit(5)\nif 0:")
    (long_step / "recipes/teacher.py").write_text(fails)
    assert run()[0] == 5
    assert not runs(pids_of(long_step)[1])


@linux
def test_a_second_run_is_told_who_runs(long_step):
    first = started(long_step, stdout=subprocess.DEVNULL)
    pids_of(long_step)
    second = started(long_step, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, error = second.communicate(timeout=60)
    assert second.returncode == 2 and error.startswith("error: ") and len(error.splitlines()) == 1
    assert f"process {first.pid} " in error and "the steps of" in error
    (long_step / "go on").touch()
    assert first.wait(60) == 0 and json.loads((long_step / "runs/x/timings.json").read_text())["in_one_run"]


def test_a_reader_that_went_away_ends_it_quietly(house):
    reader, writer = os.pipe()
    process = started(house, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    os.close(reader)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 141 and error == ""


def test_an_output_that_is_anothers_is_refused_before_any_step(house):
    for folder, file, step in (("aligned", "thesis.txt", "align"), (".", "report.png", "evaluate")):
        Path("runs/x", folder).mkdir(parents=True)
        Path("runs/x", folder, file).write_text("somebody's")
        with pytest.raises(HlmError, match=rf"step {step} \(configs/{step}.yaml\): .*{file}"):
            run()
        assert Path("log").read_text() == "" and Path("runs/x", folder, file).read_text() == "somebody's"
        shutil.rmtree("runs")
    Path("runs").touch()
    with pytest.raises(HlmError, match="records of the steps at runs/x/.steps, found Not a directory"):
        run()
    Path("runs").unlink()
    (house / "configs/embed.yaml").write_text("output: runs/x/vectors\n")
    for part in ("corpus", "index"):
        Path("runs/x/vectors", part).mkdir(parents=True)
        Path("runs/x/vectors", part, "thesis.txt").touch()
        with pytest.raises(HlmError, match=f"step embed .*vectors/{part}.*thesis.txt"):
            run()
        shutil.rmtree("runs")
    (house / "configs/embed.yaml").unlink()
    Path("runs/x/teacher").mkdir(parents=True)
    Path("runs/x/teacher/hlm.json").write_text('{"kind": "student"}')
    with pytest.raises(HlmError, match="step teacher.*'teacher'.*'student'"):
        run()


def test_a_home_or_a_long_text_in_a_yaml_is_read_as_such(house, monkeypatch):
    monkeypatch.setenv("HOME", str(house))
    text = f"backbone: ~/base.txt\nprompt: {'long ' * 200}\noutput: ~/runs/t\n"
    (house / "configs/teacher.yaml").write_text(text)
    for name in ("align", "evaluate", "benchmark"):
        (house / f"configs/{name}.yaml").unlink()
    script = RECIPE.replace('(values["output"])', '(os.path.expanduser(values["output"]))')
    (house / "recipes/teacher.py").write_text("import os\n" + script)
    assert run() == (0, ["make_catalogue", "teacher"]) and run() == (0, [])
    (house / "base.txt").write_text("other weights")
    assert run() == (0, ["teacher"])
