"""One YAML for all steps: `run.yaml` says what is the user's own, and a shipped set of configs says the rest.

`hlm init FOLDER` writes it from three answers, `hlm run FOLDER` makes the steps' YAML files of it and runs them.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hlm.errors import HlmError
from hlm.machine import computes_in_bf16
from hlm.outputs import resolved
from hlm.recipe_files import sets
from hlm.settings import build, closest, coerce, hints_of, overridden, read_yaml
from hlm.step_table import STEPS

RUN_FILE = "run.yaml"
ON_CPU = "esci_mini"  # the set for data of one's own on a CPU
MAKE_DATA = ("make_catalogue", "prepare")
# What `hlm prepare` makes a dataset of, where `hlm init` is given it.
RAW = {
    "catalogue": "the ads",
    "log": "queries",
    "clicks": "clicks on ads",
    "judgements": "grades that people gave",
    "columns": "what their columns are, where names do not say it: title=name,_id=sku",
}
FEW_THREES = 1  # the least good grade of a log's pairs: few of them have a 3
PAPER_P99_MS = 15.0  # the latency budget of HARNESS-LM
LARGE_GIB = 78  # a GPU that Qwen3-Embedding-8B trains on: one H100, `hlm plan`


@dataclass
class RunFile:
    """What `run.yaml` can say."""

    like: str = field(metadata={"help": "the set of configs that holds where this file says nothing"})
    output: str = field(metadata={"help": "folder of everything that the steps write"})
    data: str | None = field(default=None, metadata={"help": "dataset with train queries: a folder or a Hub id"})
    catalogue: str | None = field(default=None, metadata={"help": "one without: train queries are derived from it"})
    backbone: str | None = field(default=None, metadata={"help": "the teacher before it is tuned; null: the set's"})
    min_score: int | None = field(default=None, metadata={"help": "lowest grade of a good ad; null: the set's"})
    p99_ms: float | None = field(default=None, metadata={"help": "latency budget of the student online"})
    steps: dict[str, Any] = field(default_factory=dict, metadata={"help": "step -> settings; null leaves it out"})


def read_run_file(path: Path) -> RunFile:
    """Reads `run.yaml`.

    Raises:
        HlmError: broken YAML, an unknown key, no such set, or two answers to where the data is.
    """
    run = build(RunFile, read_yaml(str(path), hints_of(RunFile)))
    if run.like not in (known := sets()):
        raise HlmError(
            f"{path}: like: expected one of {', '.join(known)}, found '{run.like}'{closest(run.like, known)}"
        )
    if run.data and run.catalogue:
        raise HlmError(
            f"{path}: expected data or catalogue, found both; keep `catalogue` where train queries are missing"
        )
    return run


def step_settings(path: Path) -> dict[str, dict[str, Any]]:
    """Step -> its settings, of the set `like` and over it what `run.yaml` at `path` says.

    Raises:
        HlmError: as `read_run_file`; a step or a setting that the set does not have; or no data.
    """
    run = read_run_file(path)
    steps = {
        name: yaml.safe_load(file.read_text(encoding="utf-8"))
        for name in STEPS
        if (file := sets()[run.like] / f"{name}.yaml").is_file()
    }
    home = f"runs/{run.like}"

    def moved(text: str) -> str:
        if run.data and text == f"{home}/data":
            return run.data
        return run.output + text[len(home) :] if text == home or text.startswith(f"{home}/") else text

    steps = {name: _texts(settings, moved) for name, settings in steps.items()}
    _set_data(run, steps, path)
    _set_publish(run, steps.get("publish", {}))
    if run.backbone:
        if "teacher" in steps:
            steps["teacher"]["backbone"] = run.backbone
        else:  # a teacher that is not made here: the backbone is the student's
            steps["align"]["student"] = steps["prune"]["model"] = run.backbone
        systems = steps.get("evaluate", {}).get("systems", {})
        if isinstance(systems.get("backbone"), dict):
            systems["backbone"]["model"] = run.backbone
        elif "backbone" in systems:
            systems["backbone"] = run.backbone
    if run.min_score is not None:
        for settings in steps.values():
            settings |= {"min_score": run.min_score} if "min_score" in settings else {}
    if run.p99_ms is not None:
        if "benchmark" not in steps:
            raise HlmError(f"{path}: p99_ms: expected a set that times its student, found '{run.like}'; leave it out")
        steps["benchmark"]["budgets"] = {"p99_ms": run.p99_ms}
    for name, own in run.steps.items():
        if name not in steps:
            raise HlmError(f"{path}: steps: expected some of {', '.join(steps)}, found '{name}'{closest(name, steps)}")
        if own is None:
            del steps[name]
        elif isinstance(own, dict):
            steps[name] = overridden(steps[name], own)
        else:
            raise HlmError(f"{path}: steps: {name}: expected settings, or null to leave it out, found {own!r}")
    return steps


def _set_data(run: RunFile, steps: dict[str, dict[str, Any]], path: Path) -> None:
    """Leaves out the steps that make data where there is some; names the catalogue to those that derive queries."""
    if run.catalogue:
        if "source" not in steps.get("prepare", {}):
            raise HlmError(f"{path}: catalogue: expected a set that derives queries, such as esci_mini; correct like")
        steps["prepare"]["source"] = run.catalogue
        steps["prepare"].pop("general_queries", None)
    elif run.data:
        for name in MAKE_DATA:
            steps.pop(name, None)
    elif "make_catalogue" not in steps:
        raise HlmError(f"{path}: expected data or catalogue, found neither; only the set quickstart makes its own")


def _set_publish(run: RunFile, settings: dict[str, Any]) -> None:
    """Takes out of `publish` what holds for the set's own data and backbone alone."""
    settings["name"] = Path(run.output).name
    if run.data or run.catalogue:
        for name in ("licence", "language"):
            settings.pop(name, None)
    if run.backbone:
        settings.pop("base_model", None)
    if not Path(settings.get("space", "")).is_dir():  # an installed HLM does not bring the demo
        settings.pop("space", None)


def one_step(folder: str, name: str) -> str:
    """The YAML of one step that `run.yaml` in `folder` stands for, written beside what the steps make.

    Raises:
        HlmError: as `step_settings`; or `run.yaml` has no such step.
    """
    run_file = Path(folder) / RUN_FILE
    configs = configs_of(run_file)
    write_steps(run_file, configs)
    if not (configs / f"{name}.yaml").is_file():
        known = ", ".join(sorted(path.stem for path in configs.glob("*.yaml")))
        raise HlmError(f"expected a step of {run_file}, which are {known}, found '{name}'; set like or steps there")
    return str(configs / f"{name}.yaml")


def configs_of(run_file: Path) -> Path:
    """Where the YAML of the steps goes that `run.yaml` stands for."""
    return Path(os.path.expanduser(read_run_file(run_file).output)) / ".steps/configs"


def _texts(value: Any, change: Callable[[str], str]) -> Any:
    """The same settings with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _texts(one, change) for key, one in value.items()}
    return [_texts(one, change) for one in value] if isinstance(value, list) else value


def write_steps(path: Path, folder: Path) -> None:
    """Writes the YAML of every step that `run.yaml` at `path` asks for; others of an earlier time are removed.

    Raises:
        HlmError: as `step_settings`.
    """
    texts = {f"{name}.yaml": _as_yaml(settings, path) for name, settings in step_settings(path).items()}
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.yaml"):
        if old.name not in texts:
            old.unlink()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def expanded(folder: Path) -> Iterator[Path]:
    """A folder with a YAML file for each step, for as long as it is read: `folder` itself, or what `run.yaml` there
    stands for.

    Raises:
        HlmError: as `step_settings`.
    """
    if not (folder / RUN_FILE).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="hlm-") as aside:
        write_steps(folder / RUN_FILE, Path(aside))
        yield Path(aside)


def _as_yaml(settings: dict[str, Any], path: Path) -> str:
    return f"# Written from {path}, which is what to change.\n{yaml.safe_dump(settings, sort_keys=False)}"


def write_run_file(
    folder: str | Path,
    *,
    data: str | None = None,
    hardware: str | None = None,
    p99_ms: str | float | None = None,
    min_score: str | int | None = None,
    raw: dict[str, list[str]] | None = None,
) -> Path:
    """Writes `run.yaml` from three answers, and the lowest grade of a good ad.

    Args:
        data: a folder or Hub id in the data contract; None: the sample catalogue of the quickstart. Of a folder without
            train judgements queries are derived.
        raw: settings of `hlm prepare`, in place of `data`: the dataset is made first, in the folder of the run, and
            every grade of it makes a good ad unless `min_score` says otherwise. On a terminal it asks whether the
            columns are the right ones.
        hardware: "cpu", or GPUs such as "8xH100"; None: CPU.
        p99_ms: the latency budget; None: the paper's, 15 ms.
        min_score: None: that of the set of configs.

    Raises:
        HlmError: GPUs that are not known, a budget or grade that is no number, or there is such a file already; data
            and raw files; or what is wrong with these.
    """
    target = resolved(folder) / RUN_FILE
    if os.path.lexists(target):
        raise HlmError(f"expected no {RUN_FILE} yet in {target.parent}, found one; change it, or name another folder")
    home = f"runs/{re.sub(r'[^A-Za-z0-9_.-]+', '-', resolved(folder).name)}"
    budget = coerce(p99_ms, float | None, "--p99-ms") or PAPER_P99_MS
    least = _whole(min_score, "--min-score")
    if raw:
        if data:
            raise HlmError(f"expected --data or raw files, found both; leave out --data, or --{' --'.join(raw)}")
        data, least = f"{home}/data", FEW_THREES if least is None else least
    like = _set_for(data, hardware)
    if raw:
        _prepare(str(data), raw)
    derived = data is not None and os.path.isdir(data) and not _has_train(Path(data))
    timed = (sets()[like] / "benchmark.yaml").is_file()
    values: dict[str, Any] = {
        "like": like,
        "output": home,
        "catalogue" if derived else "data": data,
        "backbone": None,
        "min_score": least,
        "p99_ms": budget if timed else None,
        "steps": {"teacher": {"bf16": False}} if like == ON_CPU and not computes_in_bf16() else {},
    }
    helps = {name: item.metadata["help"] for name, item in RunFile.__dataclass_fields__.items()}
    lines = [f"# All steps: hlm run {folder}. What the set `like` says: hlm init OTHER --like {like}."]
    for name, value in values.items():
        text = yaml.safe_dump({name: value}, default_flow_style=True).strip()[1:-1]
        lines.append(f"{text:<40}  # {helps[name]}")
    lines.append("# steps: {align: {learning_rate: 3e-4}, contrastive_only: null}")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def _prepare(data: str, raw: dict[str, list[str]]) -> None:
    """Makes the dataset of raw files; on a terminal it asks about their columns."""
    from hlm.data.logs import prepare  # DuckDB comes with it

    try:
        prepare(output=data, **raw, ask=input if sys.stdin.isatty() and sys.stdout.isatty() else None)
    except HlmError as error:
        raise HlmError(f"{error} (more settings: hlm prepare {data}; then name it with --data)") from error


def data_of(run_file: Path) -> Path:
    """The folder of the dataset that `run.yaml` names."""
    run = read_run_file(run_file)
    return Path(run.data or run.catalogue or "")


def _whole(value: str | int | None, where: str) -> int | None:
    whole = int(value) if isinstance(value, str) and value.isdecimal() else value
    return coerce(whole, int | None, where)


def _has_train(data: Path) -> bool:
    return any((data / "qrels").glob("train*"))


def _set_for(data: str | None, hardware: str | None) -> str:
    """The set of configs for these answers: the paper's models on GPUs, MiniLM on a CPU."""
    if hardware is None or hardware.lower() == "cpu":
        return "quickstart" if data is None else ON_CPU
    if data is None:
        raise HlmError("--data: expected a dataset for a run on GPUs, found none; name a folder or a Hub id")
    from hlm.planning.hardware import GIB, parse_gpus  # torch comes with it, and `hlm --help` does without

    _, gpu = parse_gpus(hardware)
    return "qwen3-8b-190m" if gpu.memory >= LARGE_GIB * GIB else "qwen3-0.6b-190m"


QUESTIONS = {
    "data": "Data: a folder or Hub id with ads and queries (empty: a sample catalogue)",
    "hardware": "Hardware: cpu, or GPUs such as 8xH100 (empty: cpu)",
    "p99_ms": "Latency budget: p99 of one query in milliseconds (empty: 15)",
}


def ask(given: dict[str, str | None]) -> dict[str, str | None]:
    """Asks on the terminal for what is not given; without a terminal nothing is asked."""
    if not sys.stdin.isatty() or any(given.values()):
        return given
    return given | {name: input(f"{question}: ").strip() or None for name, question in QUESTIONS.items()}
