"""Alignment on query logs of growing size under a fixed limit of memory: does it stay flat?

    python results/measure/measure_memory.py --output results/memory.json

For each size it writes a log of random queries as Parquet shards and a store of random teacher vectors, and runs
recipes/align.py on them, tokenising included, as a user would. Where the system lets it make a memory cgroup, the limit
holds for everything it brings in, pages of memory-mapped files too (pages still cached since they were written count to
the writer, so "file-backed" can be more). Elsewhere it is RLIMIT_DATA, which holds for memory that no file backs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hlm.artefacts import HlmError, write_json
from hlm.config import parse, run_recipe
from hlm.data.contract import load
from hlm.data.sample_catalogue import write_catalogue
from hlm.encoders.loading import fingerprint, load_encoder
from hlm.evaluation.report import align, command_line, environment
from hlm.machine import facts, status_mib
from hlm.vectors.store import write_store

logger = logging.getLogger(__name__)
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
MIB = 2**20
SHARD = 250_000  # queries a Parquet file
SAMPLED_S = 0.1
CGROUPS = Path("/sys/fs/cgroup")


@dataclass
class MeasureMemoryConfig:
    student: str = field(default="runs/quickstart/pruned", metadata={"help": "what is aligned: a folder or a Hub id"})
    output: str = field(default="results/memory.json", metadata={"help": "file for the figures"})
    rows: list[int] = field(
        default_factory=lambda: [500_000, 1_000_000, 2_000_000, 5_000_000], metadata={"help": "sizes of the query log"}
    )
    dim: int = field(default=384, metadata={"help": "width of the teacher's vectors, the student's or more"})
    limit_mib: int = field(default=1536, metadata={"help": "memory that alignment may take"})
    steps: int = field(default=200, metadata={"help": "of training, over rows from the whole log"})
    batch: int = field(default=128, metadata={"help": "queries in a batch"})
    work: str | None = field(
        default=None, metadata={"help": "folder for the data, removed in the end; null: temporary"}
    )


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse(MeasureMemoryConfig, argv=argv)
    needed = disk_bytes(max(config.rows), config.dim)
    with tempfile.TemporaryDirectory(prefix="hlm-memory-", dir=config.work) as work:
        if (free := shutil.disk_usage(work).free) < needed:
            raise HlmError(
                f"expected {needed / 2**30:.1f} GiB free for the data, found {free / 2**30:.1f} at {work}; free some, "
                "name another folder with --work, or lower --rows"
            )
        runs = []
        for rows in config.rows:
            folder = Path(work) / str(rows)
            on_disk = write_run(folder, rows, config)
            runs.append({"rows": rows, "disk_mib": on_disk / MIB} | run_limited(folder, config))
            shutil.rmtree(folder)
            logger.info("%s", runs[-1])
    report = {
        "runs": runs,
        "bytes_a_row": bytes_a_row(runs),
        "settings": {name: value for name, value in asdict(config).items() if name != "work"},
        "environment": environment(command_line("results/measure/measure_memory.py", argv)) | facts(),
    }
    write_json(config.output, report)
    print("\n".join(align(table(report))))
    if not all(run["passed"] for run in runs):
        raise HlmError(
            f"expected alignment to end within {config.limit_mib} MiB, found it did not; see {config.output}"
        )


def disk_bytes(rows: int, dim: int) -> int:
    """What a run needs: float16 vectors and ids, texts as Parquet and in the Arrow cache, token ids."""
    return rows * (2 * dim + 250) + 200 * MIB


def write_run(folder: Path, rows: int, config: MeasureMemoryConfig) -> int:
    """Data and stores of a log of `rows` queries; returns their bytes on disk."""
    data, vectors = folder / "data", folder / "vectors"
    write_catalogue(data, ads=200, unlabelled=10, train_queries=50, dev_queries=10, test_queries=10, seed=0)
    (data / "unlabelled.jsonl").unlink()
    (data / "unlabelled").mkdir()
    for start in range(0, rows, SHARD):
        texts = queries(start, min(start + SHARD, rows))
        pq.write_table(pa.table({"text": texts}), data / "unlabelled" / f"{start // SHARD:05}.parquet")
    made = load(str(data), splits=(), cache_dir=folder / "cache")
    teacher = fingerprint(load_encoder(config.student))
    generator = np.random.default_rng(0)

    def encode(texts: list[str]) -> np.ndarray:
        found = generator.standard_normal((len(texts), config.dim), dtype=np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    for part, table in (("corpus", made.corpus), ("queries", made.queries), ("unlabelled", made.unlabelled)):
        named = "_id" in table.column_names

        def records(start: int, stop: int, named: bool = named, table: Any = table) -> Iterator[tuple[str, str]]:
            ids = table[start:stop]["_id"] if named else (f"u{number}" for number in range(start, stop))
            return ((name, "") for name in ids)  # the vectors are drawn: texts are not looked at

        write_store(
            vectors / part,
            records,
            encode,
            dim=config.dim,
            encoder=teacher,
            source=made.fingerprint(part),
            n_rows=len(table),
        )
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def queries(start: int, stop: int) -> list[str]:
    """Distinct queries of two to four drawn words and a number."""
    generator = np.random.default_rng(start)
    words = np.array("red blue steel small cheap new laptop printer phone cable shoe boot kettle saw lamp desk".split())
    drawn = words[generator.integers(len(words), size=(stop - start, 4))]
    counts = generator.integers(2, 5, size=stop - start)
    rows = zip(drawn.tolist(), counts.tolist(), range(start, stop), strict=True)
    return [" ".join([*found[:count], str(number)]) for found, count, number in rows]


def run_limited(folder: Path, config: MeasureMemoryConfig) -> dict[str, Any]:
    """Runs recipes/align.py under the limit and watches it."""
    words = {
        "student": config.student,
        "data": folder / "data",
        "vectors": folder / "vectors",
        "output": folder / "out",
        "per_device_train_batch_size": config.batch,
        "max_steps": config.steps,
        "save_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": "true",
    }
    command = [sys.executable, str(RECIPES / "align.py"), "--parts", "unlabelled"]
    command += [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    variables = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "MALLOC_TRIM_THRESHOLD_": "131072"}
    with limit(config.limit_mib * MIB) as (kind, enter), open(folder / "log", "w+", encoding="utf-8") as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, preexec_fn=enter)
        samples = []
        while process.poll() is None:
            sample = [status_mib(field, process.pid) for field in ("RssAnon", "RssFile")]
            if None not in sample:
                samples.append(sample)
            time.sleep(SAMPLED_S)
        log.seek(0)
        told = log.read().strip().splitlines()
    tokenised = folder / "out.training"
    found = {
        "passed": process.returncode == 0,
        "limit": kind,
        "limit_mib": config.limit_mib,
        "seconds": time.perf_counter() - started,
        "anonymous_peak_mib": max((anonymous for anonymous, _ in samples), default=0.0),
        "anonymous_end_mib": samples[-1][0] if samples else 0.0,
        "file_backed_peak_mib": max((backed for _, backed in samples), default=0.0),
    }
    shutil.rmtree(tokenised, ignore_errors=True)
    return found if found["passed"] else found | {"status": process.returncode, "last_words": told[-3:]}


@contextlib.contextmanager
def limit(size: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """What the limit is, and what a child calls before it becomes the program."""
    group = memory_cgroup()
    if group is None:
        yield "RLIMIT_DATA", lambda: resource.setrlimit(resource.RLIMIT_DATA, (size, size))
        return
    try:
        old = (group / "memory.limit_in_bytes").is_file()  # version 1
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(size))
        yield "memory cgroup", lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def memory_cgroup() -> Path | None:
    """A new memory cgroup of version 1 or 2; None where none can be made."""
    for home in (CGROUPS / "memory", CGROUPS):
        group = home / f"hlm-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if any((group / name).is_file() for name in ("memory.limit_in_bytes", "memory.max")):
            return group
        group.rmdir()
    return None


def bytes_a_row(runs: list[dict[str, Any]]) -> float | None:
    """Slope of the anonymous peak between the smallest and the largest run that passed; None with fewer than two."""
    passed = sorted((run for run in runs if run["passed"]), key=lambda run: run["rows"])
    if len(passed) < 2:
        return None
    first, last = passed[0], passed[-1]
    return MIB * (last["anonymous_peak_mib"] - first["anonymous_peak_mib"]) / (last["rows"] - first["rows"])


def table(report: dict[str, Any]) -> list[list[str]]:
    rows = [["queries", "on disk MiB", "anonymous peak MiB", "file-backed peak MiB", "seconds", "within the limit"]]
    for run in report["runs"]:
        cells = [
            f"{run[name]:,.0f}"
            for name in ("rows", "disk_mib", "anonymous_peak_mib", "file_backed_peak_mib", "seconds")
        ]
        rows.append([*cells, f"{'yes' if run['passed'] else 'no'}, {run['limit_mib']:,} MiB ({run['limit']})"])
    if report["bytes_a_row"] is not None:
        rows.append(["a query more", "", f"{report['bytes_a_row']:.0f} B", "", "", ""])
    return rows


if __name__ == "__main__":
    run_recipe(main)
