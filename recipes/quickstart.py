"""All steps in order, from a catalogue to a measured student; steps whose inputs and configuration are as before are
skipped.

    python recipes/quickstart.py --configs recipes/configs/quickstart

Each step is a recipe with a YAML in the folder given; a step without one is left out. What a step depends on is its
YAML, its script, the library's sources, the files its YAML names that no step makes, and the step before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from hlm.artefacts import HlmError, write_json

# (step, script); the step's YAML has its name
STEPS = [
    ("make_catalogue", "make_catalogue"),
    ("prepare", "prepare_catalogue_queries"),
    ("teacher", "teacher"),
    ("embed", "embed"),
    ("prune", "prune"),
    ("align", "align"),
    ("refine", "refine"),
    ("contrastive_only", "refine"),
    ("evaluate", "evaluate"),
]
RECIPES = Path(__file__).resolve().parent


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--configs", default="recipes/configs/quickstart", help="folder with one YAML a step")
    parser.add_argument("--processes", type=int, default=1, help="processes to launch each training step on")
    options = parser.parse_args(argv)
    configs = Path(options.configs)
    found = [(name, script, configs / f"{name}.yaml") for name, script in STEPS]
    steps = [(*step, yaml.safe_load(step[2].read_text())) for step in found if step[2].is_file()]
    if not steps:
        print(f"error: expected YAML files of steps in {configs}, found none; name a folder under recipes/configs")
        return 2
    made = [Path(values["output"]) for *_, values in steps]
    output = made[-1]
    begun, before, seconds = time.monotonic(), "", {}
    for name, script, config, values in steps:
        stamp_path = output / ".steps" / f"{name}.json"
        stamp = fingerprint(RECIPES / f"{script}.py", config, values, made, before)
        if Path(values["output"]).exists() and stamp_path.is_file():
            if json.loads(stamp_path.read_text())["stamp"] == stamp:
                print(f"{name}: up to date", flush=True)
                before = stamp
                continue
        print(f"{name}: {config}", flush=True)
        started = time.monotonic()
        status = subprocess.run(command(script, config, options.processes)).returncode
        if status:
            print(f"error: step {name} ended with status {status}; mend its cause and run this command again")
            return status
        seconds[name] = round(time.monotonic() - started, 1)
        write_json(stamp_path, {"stamp": stamp})
        before = stamp
    print_report(output)
    if seconds:
        peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # Linux: KiB of the largest step
        total = round(time.monotonic() - begun, 1)
        timings = {"seconds": seconds, "total_seconds": total, "peak_memory_gib": round(peak_gib, 2)}
        write_json(output / "timings.json", timings | {"cores": len(os.sched_getaffinity(0))})
        print(f"\n{total / 60:.1f} minutes, at most {peak_gib:.1f} GiB")
    else:
        print("\nnothing had changed")
    return 0


def command(script: str, config: Path, processes: int) -> list[str]:
    path = str(RECIPES / f"{script}.py")
    if processes > 1 and script in ("teacher", "embed", "align", "refine"):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return [sys.executable, *launch, path, "--config", str(config)]
    return [sys.executable, path, "--config", str(config)]


def fingerprint(script: Path, config: Path, values: dict[str, Any], made: list[Path], before: str) -> str:
    """What the step's result follows from; sizes and times stand for the content of files that no step makes."""
    digest = hashlib.sha256(before.encode())
    sources = sorted((RECIPES.parent / "hlm").glob("*.py"))
    for path in (script, config, *sources):
        digest.update(path.read_bytes())
    for value in values.values():
        if not isinstance(value, str) or not Path(value).exists():
            continue
        if any(Path(value) == output or output in Path(value).parents for output in made):
            continue  # an earlier step's: `before` stands for it
        for path in [Path(value)] if Path(value).is_file() else sorted(Path(value).rglob("*")):
            status = path.stat()
            digest.update(f"{path} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def print_report(output: Path) -> None:
    from hlm.report import format_table

    path = output / "report.json"
    if path.is_file():
        print(format_table(json.loads(path.read_text())))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HlmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
