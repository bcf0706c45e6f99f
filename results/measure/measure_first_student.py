"""From three raw files to a student and a dry run of its publication: how long each command takes.

    python results/measure/measure_first_student.py --output results/first-student.json

The files are those of `raw_logs.py`: a catalogue, and with every kind of dirt a query log and clicks, or one file of
OpenSearch's UBI in their place. The two commands are those of docs/your-data.md, with the defaults for a CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hlm.artefacts import write_json
from hlm.config import parse, run_recipe
from hlm.fields import read_json
from hlm.machine import facts

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from results.measure import raw_logs

ROOT = Path(__file__).resolve().parents[2]
FILES = {"csv": "--log queries.csv --clicks clicks.csv", "ubi": "--log ubi.ndjson --clicks ubi.ndjson"}
# What is typed, in order.
COMMANDS = {
    "init": "init mine --catalogue ads.csv {files} --hardware cpu --p99-ms 15",
    "run": "run mine --publish somebody --dry-run",
}


@dataclass
class MeasureFirstStudentConfig:
    output: str = field(default="results/first-student.json", metadata={"help": "file for the figures"})
    lines: list[int] = field(
        default_factory=lambda: [50_000, 2_000_000, 2_000_000], metadata={"help": "of each query log"}
    )
    ads: list[int] = field(default_factory=lambda: [500, 20_000, 20_000], metadata={"help": "in each catalogue"})
    files: list[str] = field(
        default_factory=lambda: ["csv", "csv", "ubi"], metadata={"help": f"each log's: {' or '.join(FILES)}"}
    )
    steps: dict[str, Any] = field(default_factory=dict, metadata={"help": "of run.yaml: other settings than the set's"})
    backbone: str | None = field(default=None, metadata={"help": "of run.yaml: another teacher than the set's"})


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse(MeasureFirstStudentConfig, argv=argv)
    runs = []
    for lines, ads, files in zip(config.lines, config.ads, config.files, strict=True):
        with tempfile.TemporaryDirectory(prefix="hlm-first-") as folder:
            runs.append(measured(Path(folder), lines, ads, files, config))
            print(runs[-1], flush=True)
    from hlm.evaluation.report import command_line, environment  # torch comes with it: not beside what is timed

    about = {"environment": environment(command_line("results/measure/measure_first_student.py", argv)) | facts()}
    write_json(config.output, about | {"config": asdict(config), "runs": runs})


def measured(folder: Path, lines: int, ads: int, files: str, config: MeasureFirstStudentConfig) -> dict[str, Any]:
    """One catalogue and log, made, and taken through all commands."""
    make = raw_logs.make_ubi if files == "ubi" else raw_logs.make
    make(folder, total=lines, ads=ads, planted=min(1000, lines // 10))
    seconds = {}
    for name, words in COMMANDS.items():
        if name == "run" and (config.steps or config.backbone):
            own = {"steps": config.steps, "backbone": config.backbone}
            (folder / "mine/run.yaml").write_text(changed((folder / "mine/run.yaml").read_text(), own))
        started = time.monotonic()
        typed = words.format(files=FILES[files])
        if status := hlm(typed.split(), folder):
            raise RuntimeError(f"hlm {typed} ended with {status}")
        seconds[name] = round(time.monotonic() - started, 1)
    report = read_json(folder / "runs/mine/report.json")
    timings = read_json(folder / "runs/mine/timings.json")
    return {
        "lines": lines,
        "ads": ads,
        "files": files,
        "seconds": seconds,
        "steps": {name: round(took, 1) for name, took in timings["seconds"].items()},
        "peak_memory_gib": timings["peak_memory_gib"],
        "queries": report["queries"],
        "ndcg@10": {name: found["ndcg@10"] for name, found in report["systems"].items()},
        "recovery": {name: found["ndcg@10"] for name, found in report["recovery_by_system"].items()},
    }


def hlm(words: list[str], folder: Path) -> int:
    """The exit status of `hlm` with these words, run in this folder."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "hlm.cli", *words]
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=False).returncode


def changed(text: str, own: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(yaml.safe_load(text) | {name: value for name, value in own.items() if value}))


if __name__ == "__main__":
    run_recipe(main)
