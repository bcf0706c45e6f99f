"""All steps in order, from a catalogue to a measured student; steps whose inputs and configuration are as before are
skipped.

    python recipes/quickstart.py --configs recipes/configs/quickstart

Each step is a recipe with a YAML in the folder given, or one that `run.yaml` there stands for; a step without one is
left out. What a step depends on is its
YAML, its script and the library's files that this imports, the files its YAML names that no step makes, and the steps
before with the manifests they left. A step that is started for nothing sees that by itself and ends at once.

A signal that ends this script ends its step first; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import hlm
from hlm.artefacts import MANIFEST, HlmError, check_output, write_json
from hlm.endings import told_ending
from hlm.imports import sources
from hlm.locks import locked
from hlm.machine import cores
from hlm.planning.run_file import RUN_FILE, configs_of, write_steps
from hlm.processes import Supervisor
from hlm.report_files import check_report
from hlm.settings import read_yaml
from hlm.step_table import STEPS, Step
from hlm.steps import PARTS

RECIPES = Path(__file__).resolve().parent
LIBRARY = Path(hlm.__file__).resolve().parent


class Job(NamedTuple):
    """A step with the YAML it is run from."""

    name: str
    step: Step
    config: Path
    output: Path

    @property
    def looked_for(self) -> str:
        return self.step.writes if self.step.is_report else MANIFEST


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--configs", default="recipes/configs/quickstart", help="folder with one YAML a step, or with run.yaml alone"
    )
    parser.add_argument("--processes", type=int, default=1, help="processes to launch each training step on")
    parser.add_argument("--publish", metavar="NAME", help="afterwards publish it for this user or organisation")
    parser.add_argument("--dry-run", action="store_true", help="of --publish: print what it would send, send nothing")
    parser.add_argument("--check", action="store_true", help="say what is wrong with the settings, run nothing")
    options = parser.parse_args(argv)
    jobs = read_jobs(Path(options.configs))
    if options.check:
        from hlm.training.trainer import TrainingArguments

        for job in jobs:
            check(job, TrainingArguments)
        return 0
    publish = publish_words(Path(options.configs), options.publish, options.dry_run)
    home = jobs[-1].output if jobs[-1].step.is_report else jobs[-1].output.parent  # beside what the steps make
    skipped: list[Job] = []
    records: dict[str, dict[str, Any]] = {}
    with alone(home), Supervisor() as supervisor:
        for job in jobs:  # before the first one has worked for an hour
            check(job)
        before = ""
        for number, job in enumerate(jobs):
            path = home / ".steps" / f"{job.name}.json"
            record = read_record(path)
            stamp = fingerprint(job, [one.output for one in jobs], before)
            if record.get("stamp") == stamp and record.get("result") == result(job):
                print(f"{job.name}: up to date", flush=True)
                skipped.append(job)
            else:
                first = len(skipped) == number  # where there is none, nobody waits for this
                if first and (status := check_trained(supervisor, options.configs, jobs[number:])):
                    return status
                status, used = run_step(supervisor, job, options.processes)
                if status:
                    return status
                record = {"stamp": stamp, "result": result(job), **used}
                if record["result"] is None:
                    raise HlmError(f"step {job.name}: expected {job.looked_for} under {job.output}, found none")
                write_json(path, record)
                print(f"{job.name}: {used['seconds']:.1f} s, at most {used['peak_memory_gib']:.2f} GiB", flush=True)
            if supervisor.signals:
                return 128 + supervisor.signals[0]
            before, records[job.name] = f"{stamp} {record['result']}", record
    print_reports(home, [job.name for job in skipped if job.step.is_report])  # the others have just printed theirs
    if len(skipped) < len(jobs):
        write_timings(home, records, whole=not skipped)
    else:
        print("\nnothing had changed")
    if not publish:
        return 0
    with Supervisor() as supervisor:
        status, _ = supervisor.run(publish)
        return 128 + supervisor.signals[0] if supervisor.signals else status if status >= 0 else 128 - status


def publish_words(configs: Path, namespace: str | None, dry_run: bool) -> list[str]:
    """The command that publishes the run; empty where nobody asked for it.

    Raises:
        HlmError: there are no settings of that step, or a dry run of nothing is asked for.
    """
    if namespace is None:
        if dry_run:
            raise HlmError(
                "--dry-run: expected --publish NAME beside it, found none; say who would own the repositories"
            )
        return []
    config = steps_of(configs) / "publish.yaml"
    if not config.is_file():
        raise HlmError(f"--publish: expected settings at {config}, found none; make them with hlm init")
    words = [*command(STEPS["publish"], config, 1), "--namespace", namespace]
    return [*words, "--dry-run"] if dry_run else words


def steps_of(folder: Path) -> Path:
    """Where the steps' YAML files are: `folder`, or what `run.yaml` there says."""
    return configs_of(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else folder


def read_jobs(configs: Path) -> list[Job]:
    """The steps of a folder of YAML files, or of the one `run.yaml` there."""
    folder, configs = configs, steps_of(configs)
    if configs != folder:
        write_steps(folder / RUN_FILE, configs)
    paths = [(name, step, configs / f"{name}.yaml") for name, step in STEPS.items() if not step.by_name]
    jobs = [
        Job(name, step, config, Path(os.path.expanduser(settings(config)["output"])))
        for name, step, config in paths
        if config.is_file()
    ]
    if not jobs:
        raise HlmError(
            f"expected YAML files of steps in {configs}, found none; name a folder of them, or make one with hlm init"
        )
    return jobs


def check(job: Job, training: type | None = None) -> None:
    """Refuses what the step would refuse of its settings and its output, once it is its turn.

    Args:
        training: the dataclass of the training arguments. Without it, the settings of steps that train are not read.
    """
    if job.step.settings and (training or not job.step.trains):
        read_yaml(str(job.config), job.step.hints(training))
    try:
        if job.step.is_report:
            check_report(job.output, job.step.writes)
        elif job.step.writes == "vectors":
            from hlm.vectors.store import check_store_output  # numpy and pyarrow come with it

            for part in PARTS:
                check_store_output(job.output / part)
            check_output(job.output / "index", "index")
        else:
            check_output(job.output, job.step.writes)
    except HlmError as error:
        raise HlmError(f"step {job.name} ({job.config}): {error}") from error


def check_trained(supervisor: Supervisor, configs: str, jobs: list[Job]) -> int:
    """The same of the settings of those steps that train, in a process of its own: torch comes with the trainer's
    arguments, and would stay in this one beside every step. Returns its exit status."""
    if not any(job.step.trains for job in jobs):
        return 0
    return supervisor.run([sys.executable, str(Path(__file__).resolve()), "--configs", configs, "--check"])[0]


@contextlib.contextmanager
def alone(home: Path) -> Iterator[None]:
    """Nobody else runs these steps meanwhile.

    Raises:
        HlmError: somebody does; the message says which process.
    """
    folder = home / ".steps"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HlmError(
            f"expected a folder for the records of the steps at {folder}, found {error.strerror}; correct `output` in "
            "the steps' YAML, or make it writable"
        ) from error
    with locked(folder / ".lock", f"the steps of {home}"):
        yield


def settings(config: Path) -> dict[str, Any]:
    """The YAML as it stands; the recipe itself checks every key."""
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise HlmError(f"cannot read {config}: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("output"), str):
        raise HlmError(f"{config}: expected `output: FOLDER`, found none; say where the step writes")
    return values


def command(step: Step, config: Path, processes: int) -> list[str]:
    path = os.path.relpath(RECIPES / f"{step.script}.py")
    if processes > 1 and step.parallel:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return [sys.executable, *launch, path, "--config", str(config)]
    return [sys.executable, path, "--config", str(config)]


def read_record(path: Path) -> dict[str, Any]:
    """What is known of a step that ran; {} where nothing is, or it cannot be read: then the step runs again."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return (
        record if isinstance(record, dict) and {"stamp", "result", "seconds", "peak_memory_gib"} <= set(record) else {}
    )


def run_step(supervisor: Supervisor, job: Job, processes: int) -> tuple[int, dict[str, float]]:
    """Exit status as a shell counts it, wall seconds and the peak memory of the largest process that was started."""
    print(f"{job.name}: {job.config}", flush=True)
    words = command(job.step, job.config, processes)
    started = time.monotonic()
    status, usage = supervisor.run(words)
    kib = 2**10 if sys.platform == "darwin" else 1  # macOS counts bytes
    used = {"seconds": time.monotonic() - started, "peak_memory_gib": usage.ru_maxrss / kib / 2**20}
    if status and supervisor.signals:
        status = 128 + supervisor.signals[0]
        ended_by = signal.Signals(supervisor.signals[0]).name
        tell(f"{ended_by}: step {job.name} has ended as well; the same command goes on from there")
    elif status:
        status = status if status > 0 else 128 - status
        tell(
            f"error: step {job.name} ended with status {status}; mend its cause and run this command again\n"
            f"the step alone: {shlex.join(words)}"
        )
    return status, {what: round(value, 2) for what, value in used.items()}


def tell(line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be what has just gone
        print(line, file=sys.stderr, flush=True)


def fingerprint(job: Job, outputs: list[Path], before: str) -> str:
    """What the step's result follows from; sizes and times stand for the content of files that no step makes."""
    digest = hashlib.sha256(before.encode())
    for path in (job.config, *sources(RECIPES / f"{job.step.script}.py", LIBRARY)):
        digest.update(path.read_bytes())
    values = settings(job.config)
    for name in named_in([values.get(setting) for setting in job.step.reads]):
        named = Path(os.path.expanduser(name))
        if not os.path.exists(named):  # a Hub id, or any text: Path.exists refuses a long one
            continue
        if any(named == output or output in named.parents for output in outputs):
            continue  # an earlier step's: `before` stands for it
        for path in [named] if named.is_file() else sorted(named.rglob("*")):
            status = path.stat()
            digest.update(f"{path} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def named_in(value: Any) -> Iterator[str]:
    """Every text in a setting, be it a list or a mapping of others."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from named_in(one)


def result(job: Job) -> str | None:
    """16 hex digits over the manifests that the step left: other ones where a step was run by hand with other
    settings. None where there is nothing."""
    if job.step.is_report:
        paths = [job.output / job.step.writes]
    else:  # less what is half written: in folders whose names begin with a dot
        places = {path: path.relative_to(job.output).parts for path in sorted(job.output.rglob(MANIFEST))}
        paths = [path for path, parts in places.items() if not any(part.startswith(".") for part in parts)]
    paths = [path for path in paths if path.is_file()]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths))
    return digest.hexdigest()[:16] if paths else None


def write_timings(home: Path, records: dict[str, dict[str, Any]], *, whole: bool) -> None:
    """Writes timings.json: each step's time when it last ran, their sum, and the largest step's peak memory."""
    seconds = {name: record["seconds"] for name, record in records.items()}
    total, peak = round(sum(seconds.values()), 1), max(record["peak_memory_gib"] for record in records.values())
    timings = {"seconds": seconds, "total_seconds": total, "peak_memory_gib": peak, "cores": cores()}
    write_json(home / "timings.json", timings | {"in_one_run": whole})
    print(f"\nall steps: {total / 60:.1f} minutes, at most {peak:.2f} GiB")


def print_reports(home: Path, names: list[str]) -> None:
    for name in names:
        # torch and matplotlib come with them: seconds, and only here
        from hlm.benchmark import report as latency_report
        from hlm.evaluation import report

        table = report.format_table if name == "evaluate" else latency_report.format_table
        print("\n" + table(json.loads((home / STEPS[name].writes).read_text())))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Exception, KeyboardInterrupt) as error:
        status, line = told_ending(error)
        if line:
            tell(line)
        sys.exit(status)
