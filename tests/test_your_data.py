"""docs/your-data.md: every command in it runs, on raw files as a shop has them."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from test_readme import commands_of

import hlm
from hlm import cli
from hlm.data.log_columns import NEEDED
from hlm.log_settings import PrepareLogsConfig
from hlm.planning.run_file import one_step
from recipes import prepare_logs, quickstart
from results.measure import raw_logs

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/your-data.md").read_text()
NOTEBOOK = ROOT / "recipes/your_data.ipynb"
COMMANDS = commands_of(PAGE)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the three raw files, and events of UBI."""
    folder = tmp_path_factory.mktemp("home")
    raw_logs.make(folder, total=20_000, ads=300, planted=100)
    raw_logs.make_ubi(folder, total=8_000, ads=300, planted=100)
    return folder


def test_the_way_from_three_files_to_a_student(home, tiny_bert, monkeypatch, capsys):
    monkeypatch.chdir(home)
    (settings,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    Path("prepare_logs.yaml").write_text(settings)
    ran = []
    for words in map(shlex.split, COMMANDS):
        if words[:2] == ["hlm", "prepare"]:
            prepare_logs.main(words[2:])
            assert "What was dropped" in capsys.readouterr().out
        elif words[:2] in (["hlm", "init"], ["hlm", "plan"]):
            assert cli.main(words[1:]) == 0, capsys.readouterr().err
            if words[1:3] == ["init", "mine"]:
                assert "What was dropped" in capsys.readouterr().out and Path("runs/mine/data/report.html").is_file()
        elif words[0] == "sed":
            subprocess.run(words, check=True)
        elif words[:2] == ["hlm", "run"]:
            ran_with = words[2:]
        else:
            assert words[0] == "pip" or words[:2] == ["hlm", "search"]
            continue
        ran.append(words[1])
    assert ran.count("prepare") == 4 and ran.count("init") == 2 and "plan" in ran
    assert Path("runs/shop/data/report.html").is_file() and Path("runs/ubi/data/report.html").is_file()
    # The steps run in tests/test_readme.py and, whole, in tests/recipes; here the first of them reads what was made.
    assert ran_with == ["mine", "--publish", "your-name", "--dry-run"]
    jobs = {job.name: job for job in quickstart.read_jobs(Path("mine"))}
    assert next(iter(jobs)) == "teacher" and yaml.safe_load(jobs["teacher"].config.read_text())["min_score"] == 1
    (search,) = [shlex.split(command) for command in COMMANDS if command.startswith("hlm search")]
    assert search[search.index("--student") + 1] in {str(job.output) for job in jobs.values()}
    hlm.train_teacher(
        tiny_bert,
        "runs/mine/data",
        "runs/mine/teacher",
        min_score=1,
        hard_negatives=0,
        lora_rank=2,
        max_steps=1,
        per_device_train_batch_size=8,
        eval_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    assert Path("runs/mine/teacher/hlm.json").is_file()


def test_the_python_runs(home, monkeypatch):
    monkeypatch.chdir(home)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    shutil.rmtree("runs/shop/data", ignore_errors=True)
    exec(code, {})
    assert Path("runs/shop/data/qrels/test.parquet").is_file()


def test_the_notebook_goes_from_three_files_to_a_dry_run(home, tiny_bert, tmp_path, monkeypatch, capsys):
    for name in ("ads.csv", "queries.csv", "clicks.csv"):
        shutil.copy(home / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    known: dict = {"HTML": str, "Image": Path}  # of IPython, which Colab brings
    ran = []
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        lines = "".join(cell["source"]).splitlines() if cell["cell_type"] == "code" else []
        assert len(lines) < 10
        if "install" in cell["metadata"].get("tags", ()):
            continue
        for words in (shlex.split(line[1:]) for line in lines if line.startswith("!")):
            ran.append(words[1])
            if words[1] == "doctor":
                continue
            if words[1] in ("run", "publish"):
                shrink_run(Path("mine/run.yaml"), tiny_bert)
                run_all(Path("mine")) if words[1] == "run" else publish_as_said(words)
            else:
                assert cli.main(words[1:]) == 0, capsys.readouterr().err
        exec("\n".join(line for line in lines if not line.startswith(("!", "from IPython"))), known)
    assert ran == ["doctor", "init", "run", "publish"]
    assert len(known["ids"]) == 10


def shrink_run(path, backbone):
    """The same run in seconds: a tiny backbone, which is not cut, two steps of each training, nothing beside it."""
    short = {"max_steps": 2, "per_device_train_batch_size": 8, "eval_strategy": "no", "save_strategy": "no"}
    short |= {"load_best_model_at_end": False, "disable_tqdm": True, "learning_rate": 1e-7}  # stays its teacher's
    teacher = {"lora_rank": 2, "merge_weight": 1.0, "bf16": False}
    left_out = dict.fromkeys(["contrastive_only", "static_cut", "static", "benchmark"])
    systems = {"bm25": None, "student": "runs/mine/student"}
    systems["teacher"] = {"model": "runs/mine/teacher", "corpus": "runs/mine/vectors/corpus"}
    left_out["evaluate"] = {"systems": systems, "fusions": {}, "slices": {}, "bootstrap_samples": 100}
    align = {"cascade": [], "also": {}, "learning_rate_mapping": {}}
    left_out["prune"] = {"layers": [0], "ffn": None}
    steps = {"teacher": short | teacher, "align": short | align, "refine": short, **left_out}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"backbone": backbone, "steps": steps}))


def run_all(folder):
    for job in quickstart.read_jobs(folder):
        importlib.import_module(f"recipes.{job.step.script}").main(["--config", str(job.config)])


def publish_as_said(words):
    assert words[2] == "mine"
    importlib.import_module("recipes.publish").main(["--config", one_step("mine", "publish"), *words[3:]])


def test_the_flags_and_columns_are_those_that_are_known():
    known = PrepareLogsConfig.__dataclass_fields__
    assert set(re.findall(r"`--(\w+)", PAGE)) <= known.keys() and len(re.findall(r"`--(\w+)", PAGE)) > 8
    for table, groups in NEEDED.items():
        (row,) = re.findall(rf"^\| `--{table}` \| (.*?) \|", PAGE, re.M)
        assert set(re.findall(r"`(\w+)`", row)) == {role for group in groups for role in group}
