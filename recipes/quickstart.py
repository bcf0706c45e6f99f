"""All steps in order, from a catalogue to a measured student; steps whose inputs and configuration are as before are
skipped.

    python recipes/quickstart.py --configs recipes/configs/quickstart

Each step is a recipe with a YAML in the folder given; a step without one is left out. What a step depends on is its
YAML, its script, the library's sources, the files its YAML names that no step makes, and the steps before with the
manifests they left. A step that is started for nothing sees that by itself and ends at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from hlm.artefacts import MANIFEST, HlmError, write_json

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
    ("export", "export"),
    ("benchmark", "benchmark"),
]
REPORTS = {"evaluate": "report.json", "benchmark": "latency.json"}  # these steps write files, not artefacts
RECIPES = Path(__file__).resolve().parent


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--configs", default="recipes/configs/quickstart", help="folder with one YAML a step")
    parser.add_argument("--processes", type=int, default=1, help="processes to launch each training step on")
    options = parser.parse_args(argv)
    configs = Path(options.configs)
    steps = [(name, script, configs / f"{name}.yaml") for name, script in STEPS if (configs / f"{name}.yaml").is_file()]
    if not steps:
        raise HlmError(f"expected YAML files of steps in {configs}, found none; name a folder under recipes/configs")
    outputs = [Path(settings(config)["output"]) for _, _, config in steps]
    home = outputs[-1] if steps[-1][0] in REPORTS else outputs[-1].parent  # beside what the steps make
    before, skipped, records = "", [], {}
    for (name, script, config), output in zip(steps, outputs, strict=True):
        stamp = fingerprint(RECIPES / f"{script}.py", config, outputs, before)
        path = home / ".steps" / f"{name}.json"
        record = json.loads(path.read_text()) if path.is_file() else {}
        if record.get("stamp") == stamp and record.get("result") == result(name, output):
            print(f"{name}: up to date", flush=True)
            skipped.append(name)
        else:
            print(f"{name}: {config}", flush=True)
            status, used = run(command(script, config, options.processes))
            if status:
                print(f"error: step {name} ended with status {status}; mend its cause and run this command again")
                print(f"the step alone: {shlex.join(command(script, config, options.processes))}")
                return status if status > 0 else 128 - status
            record = {"stamp": stamp, "result": result(name, output), **used}
            if record["result"] is None:
                raise HlmError(f"step {name}: expected {REPORTS.get(name, MANIFEST)} under {output}, found none")
            write_json(path, record)
            print(f"{name}: {used['seconds']:.1f} s, at most {used['peak_memory_gib']:.2f} GiB", flush=True)
        before, records[name] = f"{stamp} {record['result']}", record
    print_reports(home, [name for name in REPORTS if name in skipped])  # the others have just printed their tables
    if len(skipped) < len(steps):
        write_timings(home, records, whole=not skipped)
    else:
        print("\nnothing had changed")
    return 0


def settings(config: Path) -> dict[str, Any]:
    """The YAML as it stands; the recipe itself checks every key."""
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise HlmError(f"cannot read {config}: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("output"), str):
        raise HlmError(f"{config}: expected `output: FOLDER`, found none; say where the step writes")
    return values


def command(script: str, config: Path, processes: int) -> list[str]:
    path = os.path.relpath(RECIPES / f"{script}.py")
    if processes > 1 and script in ("teacher", "embed", "align", "refine"):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return [sys.executable, *launch, path, "--config", str(config)]
    return [sys.executable, path, "--config", str(config)]


def run(words: list[str]) -> tuple[int, dict[str, float]]:
    """Exit status (negative: the signal), wall seconds and the peak memory of the largest process that was started."""
    started = time.monotonic()
    process = subprocess.Popen(words)
    _, status, usage = os.wait4(process.pid, 0)  # unlike Popen.wait, it tells this child's peak from the others'
    process.returncode = os.waitstatus_to_exitcode(status)
    kib = 2**10 if sys.platform == "darwin" else 1  # macOS counts bytes
    used = {"seconds": time.monotonic() - started, "peak_memory_gib": usage.ru_maxrss / kib / 2**20}
    return process.returncode, {what: round(value, 2) for what, value in used.items()}


def fingerprint(script: Path, config: Path, outputs: list[Path], before: str) -> str:
    """What the step's result follows from; sizes and times stand for the content of files that no step makes."""
    digest = hashlib.sha256(before.encode())
    sources = sorted((RECIPES.parent / "hlm").glob("*.py"))
    for path in (script, config, *sources):
        digest.update(path.read_bytes())
    for value in settings(config).values():
        if not isinstance(value, str) or not Path(value).exists():
            continue
        if any(Path(value) == output or output in Path(value).parents for output in outputs):
            continue  # an earlier step's: `before` stands for it
        for path in [Path(value)] if Path(value).is_file() else sorted(Path(value).rglob("*")):
            status = path.stat()
            digest.update(f"{path} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def result(name: str, output: Path) -> str | None:
    """16 hex digits over the manifests that the step left: other ones where a step was run by hand with other
    settings. None where there is nothing."""
    paths = [output / REPORTS[name]] if name in REPORTS else sorted(output.rglob(MANIFEST))
    paths = [path for path in paths if path.is_file()]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths))
    return digest.hexdigest()[:16] if paths else None


def write_timings(home: Path, records: dict[str, dict[str, Any]], *, whole: bool) -> None:
    """Writes timings.json: each step's time when it last ran, their sum, and the largest step's peak memory."""
    seconds = {name: record["seconds"] for name, record in records.items()}
    total, peak = round(sum(seconds.values()), 1), max(record["peak_memory_gib"] for record in records.values())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    timings = {"seconds": seconds, "total_seconds": total, "peak_memory_gib": peak, "cores": cores}
    write_json(home / "timings.json", timings | {"in_one_run": whole})
    print(f"\nall steps: {total / 60:.1f} minutes, at most {peak:.2f} GiB")


def print_reports(home: Path, names: list[str]) -> None:
    for name in names:
        # torch and matplotlib come with them: seconds, and only here
        from hlm import latency_report, report

        table = report.format_table if name == "evaluate" else latency_report.format_table
        print("\n" + table(json.loads((home / REPORTS[name]).read_text())))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HlmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
