"""What an install without extras takes and how fast it starts: size, packages, and commands from cold.

    python results/measure/measure_install.py --output results/install.json

Builds a wheel of this checkout and installs it into fresh environments, at the versions of constraints.txt, once for
each entry of `extras`. Commands run in the last of them; their median is reported.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from hlm.artefacts import HlmError, write_json
from hlm.config import parse, run_recipe
from hlm.evaluation.report import command_line, environment
from hlm.machine import facts, other_load, read_counters

ROOT = Path(__file__).resolve().parents[2]
OWN = {"pip", "setuptools", "wheel", "hlm"}  # of every environment, and the wheel itself
INSTALLED = """
import json, pathlib, sys
from importlib import metadata
found = {}
for one in metadata.distributions():
    files = {pathlib.Path(one.locate_file(file)) for file in one.files or []}
    found[one.metadata["Name"]] = sum(path.stat().st_size for path in files if path.is_file())
print(json.dumps(found))
"""


@dataclass
class MeasureInstallConfig:
    student: str = field(default="runs/quickstart/online", metadata={"help": "an exported student"})
    index: str = field(default="runs/quickstart/vectors/index", metadata={"help": "the ads' index, of its teacher"})
    data: str = field(default="runs/quickstart/data", metadata={"help": "the dataset, for the ads' titles"})
    query: str = "wool baby blanket"
    extras: list[str] = field(default_factory=lambda: ["", "index"], metadata={"help": 'of each environment; "": none'})
    repeats: int = field(default=9, metadata={"help": "runs of each command"})
    output: str = "results/install.json"


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse(MeasureInstallConfig, argv=argv)
    for folder in (config.student, config.index, config.data):
        if not Path(folder).is_dir():
            raise HlmError(f"expected a folder at {folder}, found none; run the quickstart, or name another")
    if config.repeats < 1 or not config.extras:
        raise HlmError(f"expected repeats from 1 and at least one entry in extras, found {config.repeats}")
    found: dict[str, Any] = {"environments": {}}
    with tempfile.TemporaryDirectory() as made:
        wheel = built(Path(made))
        for extras in config.extras:
            python = installed(Path(made) / f"venv-{extras}", wheel, extras)
            found["environments"][f"hlm[{extras}]" if extras else "hlm"] = sizes(python)
        found["commands"] = {name: timed(words, config.repeats) for name, words in commands(python, config).items()}
    here = environment(command_line("results/measure/measure_install.py", argv)) | facts()
    write_json(config.output, found | {"settings": asdict(config), "environment": here})
    print(json.dumps(found, indent=2))


def commands(python: Path, config: MeasureInstallConfig) -> dict[str, list[str]]:
    load = "import sys, hlm; hlm.QueryEncoder.from_pretrained(sys.argv[1]).encode(sys.argv[2])"
    search = [str(python.with_name("hlm")), "search", config.query, "--student", config.student]
    search += ["--index", config.index, "--corpus", config.data]
    return {
        "python -c pass": [str(python), "-c", "pass"],
        "import hlm": [str(python), "-c", "import hlm"],
        "hlm --help": [str(python.with_name("hlm")), "--help"],
        "QueryEncoder.from_pretrained and a query": [str(python), "-c", load, config.student, config.query],
        "hlm search": search,
    }


def built(folder: Path) -> Path:
    # A copy: setuptools leaves its build folder beside what it builds.
    copy = folder / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, files.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(copy)])
    (wheel,) = folder.glob("hlm-*.whl")
    return wheel


def installed(folder: Path, wheel: Path, extras: str) -> Path:
    """The Python of a fresh environment with the wheel and these extras."""
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    asked = f"hlm[{extras}] @ {wheel.as_uri()}" if extras else str(wheel)
    run([str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), asked])
    return python


def run(words: list[str]) -> None:
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise HlmError(f"expected '{' '.join(words)}' to succeed, found {done.stdout[-2000:]}")


def sizes(python: Path) -> dict[str, Any]:
    """Bytes of what was installed with hlm, package by package."""
    done = subprocess.run([str(python), "-c", INSTALLED], capture_output=True, text=True, check=True)
    packages = {name: size for name, size in json.loads(done.stdout).items() if name.lower() not in OWN}
    return {"mib": sum(packages.values()) / 2**20, "torch": "torch" in packages, "packages": packages}


def timed(words: list[str], repeats: int) -> dict[str, float | None]:
    """Medians over runs of a command, after one that fills the disk's cache: seconds of wall time, CPU seconds of the
    process, and the share of the machine's CPUs that others took meanwhile, None where it cannot be read."""
    walls, cpus, others = [], [], []
    for number in range(repeats + 1):
        counters, before = read_counters(), resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        variables = os.environ | {"HF_HUB_OFFLINE": "1"}
        variables.pop("PYTHONPATH", None)  # the wheel, not this checkout
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=variables)
        wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode != 0:
            raise HlmError(f"expected '{' '.join(words)}' to succeed, found {done.stderr[-2000:]}")
        if number:
            walls.append(wall)
            cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            others.append(other_load(counters, read_counters(), children_s=cpus[-1]))
    load = None if None in others else median(others)
    return {"wall_s": median(walls), "cpu_s": median(cpus), "others": load}


if __name__ == "__main__":
    run_recipe(main)
