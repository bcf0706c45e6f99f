"""report.json and latency.json: written and read here, with the version of what they hold (`hlm.report_types`); whose
they are, so that nobody else's are overwritten; and who writes them now."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from hlm.artefacts import HlmError, write_json
from hlm.fields import check_type, optional, read_json
from hlm.locks import locked
from hlm.outputs import os_errors, resolved
from hlm.report_types import SCHEMA_VERSION, LatencyReport, Report

# The report -> what is written beside it. The report comes first and says whose the others are.
FILES = {"report.json": ("report.png", "per_query.parquet"), "latency.json": ("latency.png",)}
# What every report of the name has had, in all versions.
_KEYS = {
    "report.json": {"dataset", "split", "k", "systems", "recovery"},
    "latency.json": {"data", "reference", "settings", "systems", "blocks"},
}


def write_report(folder: str | Path, report: Report) -> None:
    """Writes report.json."""
    write_json(Path(folder) / "report.json", {"schema_version": SCHEMA_VERSION, **report})


def write_latency(folder: str | Path, report: LatencyReport) -> None:
    """Writes latency.json."""
    write_json(Path(folder) / "latency.json", {"schema_version": SCHEMA_VERSION, **report})


def read_report(path: str | Path) -> Report:
    """What recipes/evaluate.py wrote.

    Raises:
        HlmError: no JSON to read, of a later version, or another file than a report: names the field.
    """
    return checked_report(read_json(Path(path)), path)


def read_latency(path: str | Path) -> LatencyReport:
    """What recipes/benchmark.py wrote; raises as `read_report`."""
    return checked_latency(read_json(Path(path)), path)


def checked_report(value: Any, where: str | Path) -> Report:
    """A report read from JSON, which lies at `where`; raises as `read_report`."""
    _check(value, Report, where)
    return cast(Report, value)


def checked_latency(value: Any, where: str | Path) -> LatencyReport:
    """A latency report read from JSON, which lies at `where`; raises as `read_report`."""
    _check(value, LatencyReport, where)
    return cast(LatencyReport, value)


def _check(value: Any, kind: Any, where: str | Path) -> None:
    if (optional(value, int, "schema_version", where=where) or SCHEMA_VERSION) > SCHEMA_VERSION:
        raise HlmError(
            f"{where}: expected a report of version {SCHEMA_VERSION} or before, found {value['schema_version']}; read "
            "it with the version of HLM that wrote it, or measure again"
        )
    check_type(value, kind, where=where)


def check_report(folder: str | Path, name: str) -> Path:
    """Refuses, before any work, a folder whose files of these names are not a report of HLM; other files may lie there.

    Args:
        folder: may start with `~` and lie behind a symbolic link.
        name: "report.json" or "latency.json".

    Returns:
        The folder: absolute, links followed.

    Raises:
        HlmError: somebody else's files, a file instead of a folder, or one that cannot be written to.
    """
    target = resolved(folder)
    existing = next(path for path in (target, *target.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "a folder that this user cannot write to" if existing.is_dir() else "a file"
        raise HlmError(f"output: expected a folder for {name} at {target}, found {what} at {existing}; name another")
    found = [file for file in (name, *FILES[name]) if os.path.lexists(target / file)]
    if found and not _is_report(target / name):
        raise HlmError(
            f"output: expected a folder for {name}, found {', '.join(found)} in {target}, which HLM did not write; "
            "nothing was touched: name another output, or move these files"
        )
    return target


@contextlib.contextmanager
def claimed_report(folder: str | Path, name: str) -> Iterator[Path]:
    """`check_report`, and nobody else writes this report while the block runs. Makes and yields the folder.

    Raises:
        HlmError: as `check_report`; or another process writes it: the message says which.
    """
    target = check_report(folder, name)
    with contextlib.ExitStack() as stack:
        with os_errors(target):
            target.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(target / f".{name}.lock", str(target / name)))
        yield target


def _is_report(path: Path) -> bool:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(report, dict) and _KEYS[path.name] <= report.keys()
