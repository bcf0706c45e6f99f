"""Runs that an evaluation keeps beside its report, so that a rerun searches only with what has changed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hlm.artefacts import HlmError, atomic_file, fingerprint_json
from hlm.evaluation.metrics import Run

logger = logging.getLogger(__name__)


def check_runs(output: Path, systems: Iterable[str]) -> None:
    """Refuses to overwrite a table that is not a run that an evaluation kept."""
    for name in systems:
        path = run_path(output, name)
        if os.path.lexists(path) and run_key(path) is None:
            raise HlmError(
                f"expected a run of '{name}' at {path}, found a file that HLM did not write; move it, or name another "
                "output"
            )


def run_path(output: str | Path, name: str) -> Path:
    return Path(output) / "runs" / f"{name}.parquet"


def run_key(path: Path) -> str | None:
    """What a run that was kept was made from; None of any other file."""
    try:
        return (pq.read_schema(path).metadata or {}).get(b"hlm_key", b"").decode() or None
    except (pa.ArrowException, OSError):
        return None


def cached_run(path: Path, key: list[Any], queries: list[str], make: Callable[[], Run]) -> Run:
    """The run kept at `path` if it was made from the same `key`; otherwise makes and keeps it."""
    stamp = fingerprint_json(key)
    if run_key(path) == stamp:
        table = pq.read_table(path)
        logger.info("%s is up to date", path)
        run: Run = {query: {} for query in queries}
        for query, document, score in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
            run[query][document] = score
        return run
    run = make()
    rows = [(query, document, score) for query in run for document, score in run[query].items()]
    schema = pa.schema(
        [("query_id", pa.string()), ("document_id", pa.string()), ("score", pa.float64())], {"hlm_key": stamp}
    )
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    write_parquet(path, pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema))
    return run


def write_parquet(path: Path, table: pa.Table) -> None:
    with atomic_file(path) as aside:
        pq.write_table(table, aside)
