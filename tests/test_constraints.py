"""constraints.txt: the versions of what is installed, for CI, the quickstart and the container alike."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UNTESTED = {"gpu"}  # no GPU was at hand: there is no version of it to name


def lines_of(path):
    """The lines of a requirements file, less its comments."""
    return [line for line in path.read_text().splitlines() if not line.startswith("#")]


LINES = lines_of(ROOT / "constraints.txt")


def pins(lines):
    """Name -> version of `name==version` lines; a line of another form is an error."""
    found = [re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)", line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    return {canonicalize_name(match[1]): match[2] for match in found}


def required():
    extras = {name: given for name, given in PROJECT["optional-dependencies"].items() if name not in UNTESTED}
    lines = [line for given in (PROJECT["dependencies"], *extras.values()) for line in given]
    return [Requirement(line) for line in lines if not line.startswith("hlm[")]


def test_every_package_of_the_project_is_named_and_fits_its_bound():
    constraints, asked = pins(LINES), required()
    assert len(constraints) == len(LINES)
    absent = [one.name for one in asked if canonicalize_name(one.name) not in constraints]
    assert not absent
    assert not [str(one) for one in asked if constraints[canonicalize_name(one.name)] not in one.specifier]
    assert not [line for line in LINES if Version(line.split("==")[1]).local]  # +cpu is of one index alone


def test_the_oldest_versions_are_the_lower_bounds():
    oldest = pins(lines_of(ROOT / "constraints-lowest.txt"))
    for one in required():
        (bound,) = [each.version for each in one.specifier if each.operator in (">=", "==")]
        assert Version(oldest[canonicalize_name(one.name)]) == Version(bound), one


def test_the_spaces_requirements_are_those_versions():
    required, constraints = pins(lines_of(ROOT / "spaces/query_to_ad/requirements.txt")), pins(LINES)
    assert required.items() <= constraints.items()
    (sdk,) = re.findall(r"^sdk_version: (.+)$", (ROOT / "spaces/query_to_ad/README.md").read_text(), re.M)
    assert sdk == constraints["gradio"]
    container = (ROOT / "spaces/query_to_ad/Dockerfile").read_text()
    assert re.search(r"^COPY constraints.txt ", container, re.M) and "-c constraints.txt -r requirements" in container


@pytest.mark.parametrize(
    ("folder", "file", "given", "torch"),
    [
        (".venv", "constraints.txt", [], f"torch=={pins(LINES)['torch']}"),
        (".venv", "constraints.txt", ["TORCH=torch"], "torch"),
        (".venv-lowest", "constraints-lowest.txt", [], "torch==2.8.0"),
    ],
)
def test_make_installs_by_them_and_the_build_of_torch_is_the_users(tmp_path, folder, file, given, torch):
    for name in ("Makefile", "constraints.txt", "constraints-lowest.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    made = subprocess.run(
        ["make", "--dry-run", f"{folder}/.installed", *given], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    filtered, *installed = [line for line in made.stdout.splitlines() if "constraints" in line]
    assert len(installed) == 2 and all(f" -c {folder}/constraints.txt " in line for line in installed)
    assert installed[0].endswith(f" '{torch}'") and installed[1].endswith("-e '.[quickstart,test]'")
    (tmp_path / folder).mkdir()
    subprocess.run(filtered, shell=True, cwd=tmp_path, check=True)
    kept = pins(lines_of(tmp_path / folder / "constraints.txt"))
    assert kept == {name: version for name, version in pins(lines_of(ROOT / file)).items() if name != "torch"}
