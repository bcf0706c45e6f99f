"""The README says nothing that does not run: its table, its commands, its file tree, its code."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from recipes import render_readme

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines() if line]


def test_the_table_is_rendered_from_the_results():
    assert render_readme.rendered(README) == README, "run python recipes/render_readme.py"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_what_exists(command):
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).is_file()
    for flag in ("--config", "--configs"):
        if flag in words:
            assert (ROOT / words[words.index(flag) + 1]).exists()


def test_the_tree_names_what_exists():
    tree = README.split("## Where things are")[1]
    names = re.findall(r"\b([a-z_]+\.py)\b", tree)
    assert names and all((ROOT / "hlm" / name).is_file() for name in names)
    assert {path.name for path in (ROOT / "hlm").glob("*.py")} - set(names) <= {"__init__.py", "sample_vocabulary.py"}


def test_the_code_runs(tiny_bert, catalogue_200, tmp_path, monkeypatch):
    from recipes import embed

    monkeypatch.chdir(tmp_path)
    Path("runs/quickstart").mkdir(parents=True)
    Path("runs/quickstart/student").symlink_to(tiny_bert)
    embed.main(["--model", tiny_bert, "--data", catalogue_200, "--output", "runs/quickstart/vectors"])
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    found: dict = {}
    exec(code, found)
    assert len(found["ids"]) == 1 and len(found["ids"][0]) == 10


def test_every_config_parses_for_its_recipe():
    import importlib

    from hlm.config import parse
    from hlm.training import TrainingArguments
    from recipes.quickstart import STEPS

    scripts = dict(STEPS) | {"esci": "prepare_esci"}
    paths = sorted((ROOT / "recipes/configs").glob("*/*.yaml"))
    assert len(paths) > 10
    for path in paths:
        script = scripts[path.stem]
        if path.parent.name.startswith("qwen3") and path.stem == "prepare":
            script = "prepare_esci"
        module = importlib.import_module(f"recipes.{script}")
        own = next(v for n, v in vars(module).items() if n.endswith("Config") and hasattr(v, "__dataclass_fields__")
                   and v.__module__ == module.__name__)  # fmt: skip
        types = [own] + ([TrainingArguments] if hasattr(module, "TrainingArguments") else [])
        assert parse(*types, argv=["--config", str(path)])[0] is not None
        assert yaml.safe_load(path.read_text())


def test_results_are_reports_of_the_agreed_shape():
    for path in (ROOT / "results").glob("*.json"):
        report = json.loads(path.read_text())["report"]
        assert {"dataset", "split", "k", "systems", "recovery", "overlap@10", "slices", "environment"} <= set(report)
