"""Scripts and configs as an installed HLM has them: commands for the steps, and a user's own set of configs."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hlm import cli
from hlm.recipe_files import recipes, sets
from hlm.step_table import STEPS
from recipes.quickstart import named_in

SETS = sorted(sets())


@pytest.mark.parametrize("like", SETS)
def test_init_writes_a_set_of_ones_own(tmp_path, monkeypatch, capsys, like):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "my shop", "--like", like]) == 0
    assert "hlm run my shop" in capsys.readouterr().out
    theirs = recipes() / "configs" / like
    assert {path.name for path in Path("my shop").glob("*.yaml")} == {path.name for path in theirs.glob("*.yaml")}
    assert len(list(Path("my shop/accelerate").glob("*.yaml"))) == 4
    for path in Path("my shop").rglob("*.yaml"):
        text, values = path.read_text(), yaml.safe_load(path.read_text())
        assert f"runs/{like}" not in text and "recipes/configs" not in text and "python recipes/" not in text, path
        for named in re.findall(r"my shop/[\w/-]+\.yaml", text):
            assert Path(named).is_file(), (path, named)
        if path.parent.name != "accelerate":
            before = yaml.safe_load((theirs / path.name).read_text())
            assert set(before) - set(values) <= {"space"}
            ours = [text for text in named_in(values) if text.startswith("runs/my-shop")]
            assert len(ours) == sum(text.startswith(f"runs/{like}") for text in named_in(before)), path


def test_init_overwrites_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/align.yaml").write_text("mine")
    assert cli.main(["init", "mine", "--like", "quickstart"]) == 2
    assert "found align.yaml in" in capsys.readouterr().err
    assert Path("mine/align.yaml").read_text() == "mine" and len(list(Path("mine").rglob("*"))) == 1
    assert cli.main(["init", "other", "--like", "quikstart"]) == 2
    assert "did you mean 'quickstart'" in capsys.readouterr().err and not Path("other").exists()
    Path("file").touch()
    assert cli.main(["init", "file/below", "--like", "quickstart"]) != 0


def test_every_step_is_a_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    for step in STEPS.values():
        assert re.search(rf"^    {step.script}\b", out, re.M), step.script


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        (["make_catalogue", "--adds", "3"], 2, "error: command line: unknown argument '--adds'; did you mean '--ads'"),
        (["quickstart", "--configs", "none"], 2, "error: expected YAML files of steps in none, found none"),
    ],
)
def test_a_step_ends_as_its_script_does(tmp_path, words, status, line):
    done = subprocess.run(
        [sys.executable, "-m", "hlm.cli", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == status and done.stderr.startswith(line), done.stderr


def test_every_step_has_its_script():
    for name, step in STEPS.items():
        text = (recipes() / f"{step.script}.py").read_text()
        assert step.trains == ("TrainingArguments" in text), name
        if step.settings:
            known = {item.name for item in dataclasses.fields(step.settings)}
            assert set(step.reads) <= known and ("output" in known or step.by_name), name
