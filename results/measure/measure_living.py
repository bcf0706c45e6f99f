"""A catalogue that changes while it is searched: four clients, upserts and deletes at a steady rate, and swaps.

    python results/measure/measure_living.py --work WORK --output results/living.json --minutes 5

Builds an index in LanceDB of synthetic vectors. Then it lets clients, each a process that sends queries at a steady
rate, search it: first alone, then while another process puts and deletes ads and commits once a second. In each client
a thread opens the newest version five times a second. Every id names the commit that put it, so that an answer tells by
itself whether it is of the version that was open. Then FAISS's index is swapped under threads that open and search it.

Writes `output`: time of a search without and with changes; errors, answers that are not of the version that was open,
how long after a commit its version was still not searched, and what the swaps did.
"""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hlm.artefacts import HlmError, write_json
from hlm.config import parse, run_recipe
from hlm.evaluation.report import command_line, environment
from hlm.indexes.faiss_index import AdIndex
from hlm.indexes.index import create_index, open_index
from hlm.indexes.rollback import roll_back
from hlm.machine import facts
from hlm.vectors import versions
from hlm.vectors.store import VectorStore, write_store

logger = logging.getLogger(__name__)
KEPT_COMMITS = 10  # what a commit put is deleted so many commits later


@dataclass
class MeasureLivingConfig:
    work: str = field(metadata={"help": "folder for what is built; what an earlier run left there is replaced"})
    output: str = field(metadata={"help": "file for the figures"})
    minutes: float = field(default=5, metadata={"help": "of searching, without changes and then with them"})
    rows: int = field(default=100_000, metadata={"help": "ads in the index"})
    dim: int = field(default=384, metadata={"help": "width of the vectors"})
    kind: str = field(default="lance:IVF_RQ", metadata={"help": "the index"})
    clients: int = field(default=4, metadata={"help": "processes that search"})
    queries_per_second: float = field(default=10, metadata={"help": "of each client"})
    changes_per_minute: int = field(default=10_000, metadata={"help": "puts and deletes, two of three are puts"})
    k: int = field(default=100, metadata={"help": "ads that are searched"})
    swaps: int = field(default=1000, metadata={"help": "of the index that is swapped under threads"})


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse(MeasureLivingConfig, argv=argv)
    work = Path(config.work)
    shutil.rmtree(work / "living", ignore_errors=True)
    store = make_store(work / "living/store", config)
    folder = work / "living/index"
    create_index(folder, store, config.kind)
    report: dict[str, Any] = {
        "settings": {name: value for name, value in asdict(config).items() if name not in ("work", "output")},
        "environment": environment(command_line("results/measure/measure_living.py", argv)),
        "machine": facts(),
    }
    seconds = 60 * config.minutes
    report["quiet"] = summary(search_while(folder, config, lambda: time.sleep(seconds)), {})
    changing: dict[str, Any] = {}
    found = search_while(folder, config, lambda: changing.update(change(folder, config, seconds)))
    report["changing"] = summary(found, changing.pop("at")) | changing
    report["p99_times_the_quiet_one"] = report["changing"]["p99_ms"] / report["quiet"]["p99_ms"]
    report["swaps"] = swap(work / "living/swapped", config.swaps)
    write_json(config.output, report)
    for name in ("quiet", "changing", "p99_times_the_quiet_one", "swaps"):
        print(name, report[name])


def vectors_of(rng: np.random.Generator, centres: np.ndarray, count: int) -> np.ndarray:
    """float32 (count, dim), L2-normalised, around centres: like embeddings, unlike noise, they have near neighbours."""
    found = centres[rng.integers(len(centres), size=count)] + 1.2 * rng.normal(size=(count, centres.shape[1]))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def centres_of(config: MeasureLivingConfig) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(max(1, config.rows // 200), config.dim))


def make_store(folder: Path, config: MeasureLivingConfig) -> VectorStore:
    rng, centres = np.random.default_rng(1), centres_of(config)
    write_store(
        folder,
        lambda start, stop: ((f"0-{row}", "") for row in range(start, stop)),
        lambda texts: vectors_of(rng, centres, len(texts)),
        dim=config.dim,
        encoder="synthetic",
        source="synthetic",
        n_rows=config.rows,
    )
    return VectorStore.open(folder)


def search_while(folder: Path, config: MeasureLivingConfig, work: Callable[[], None]) -> list[dict[str, Any]]:
    """What each client found while `work` was done. Clients are started anew: LanceDB does not work in a fork."""
    context = multiprocessing.get_context("spawn")
    ready, ended, found = context.Barrier(config.clients + 1), context.Event(), context.Queue()
    clients = [
        context.Process(target=client, args=(folder, config, seed, ready, ended, found))
        for seed in range(config.clients)
    ]
    for process in clients:
        process.start()
    ready.wait(timeout=300)
    work()
    ended.set()
    answers = [found.get(timeout=300) for _ in clients]
    for process in clients:
        process.join()
    return answers


def client(folder: Path, config: MeasureLivingConfig, seed: int, ready: Any, ended: Any, answers: Any) -> None:
    rng, centres = np.random.default_rng(100 + seed), centres_of(config)
    index: Any = open_index(folder)
    found: dict[str, Any] = {"ms": [], "errors": [], "not_of_the_version": 0, "short": 0, "seen": []}
    for query in vectors_of(rng, centres, 20):  # what is read once is read before
        index.search(query, config.k)
    errors: list[str] = found["errors"]
    threading.Thread(target=keep_fresh, args=(index, ended, errors), daemon=True).start()
    ready.wait(timeout=300)
    due = time.time() + rng.random() / config.queries_per_second
    while not ended.is_set():
        time.sleep(max(0.0, due - time.time()))
        query, started = vectors_of(rng, centres, 1)[0], time.perf_counter()
        version = index.version  # it may become a newer one before the search begins, never an older one
        try:
            ids = index.search(query, config.k)[1]
        except HlmError as error:
            found["errors"].append(str(error))
            ids = None
        found["ms"].append(1e3 * (time.perf_counter() - started))
        if ids is not None:
            found["short"] += len(ids) < min(config.k, len(index))
            newest = range(version, index.version + 1)
            found["not_of_the_version"] += not any(all(is_of(name, one) for name in ids) for one in newest)
            found["seen"].append((time.time(), version))
        due = max(due + 1 / config.queries_per_second, time.time())  # a late client does not catch up
    answers.put(found)


def keep_fresh(index: Any, ended: Any, errors: list[str]) -> None:
    while not ended.wait(0.2):
        try:
            index.refresh()
        except HlmError as error:
            errors.append(str(error))


def is_of(name: str, version: int) -> bool:
    """Whether an ad is in a version: it was put by a commit up to that one, and not deleted yet. Version 1 is the
    build, whose ads stay."""
    put = int(name.partition("-")[0])
    return put == 0 or put < version <= put + KEPT_COMMITS


def change(folder: Path, config: MeasureLivingConfig, seconds: float) -> dict[str, Any]:
    """Puts and deletes, a commit a second: the commit of version n puts ads named n-1."""
    rng, centres, index = np.random.default_rng(2), centres_of(config), open_index(folder)
    puts = round(config.changes_per_minute / 60 * 2 / 3)
    new = max(1, puts // 2)  # the others replace vectors of ads of the build
    commits: dict[int, float] = {}
    put = deleted = 0
    begin = time.time()
    for number in range(1, round(seconds) + 1):
        names = [f"{number}-{row}" for row in range(new)]
        gone = [f"{number - KEPT_COMMITS}-{row}" for row in range(new)] if number > KEPT_COMMITS else []
        many = puts - len(gone) if gone else puts  # as many changes as ever where there is nothing to delete yet
        names += [f"0-{row}" for row in rng.choice(config.rows, many, replace=False)]
        index.put(names, vectors_of(rng, centres, len(names)))
        if gone:
            index.delete(gone)
        index.commit()
        commits[number + 1] = time.time()
        put, deleted = put + len(names), deleted + len(gone)
        time.sleep(max(0.0, begin + number - time.time()))
    took = time.time() - begin
    return {
        "at": commits,
        "commits": len(commits),
        "puts": put,
        "deletes": deleted,
        "changes_a_minute": (put + deleted) / took * 60,
    }


def summary(clients: list[dict[str, Any]], commits: dict[int, float]) -> dict[str, Any]:
    times = np.concatenate([found["ms"] for found in clients])
    late = [at - commits[version + 1] for found in clients for at, version in found["seen"] if version + 1 in commits]
    return {
        "searches": len(times),
        "p50_ms": float(np.percentile(times, 50)),
        "p99_ms": float(np.percentile(times, 99)),
        "errors": sum(len(found["errors"]) for found in clients),
        "first_error": next((found["errors"][0] for found in clients if found["errors"]), None),
        "not_of_the_version_that_was_open": sum(found["not_of_the_version"] for found in clients),
        "short_lists": sum(found["short"] for found in clients),
        "most_seconds_behind": max([0.0, *late]),
    }


def swap(folder: Path, swaps: int, readers: int = 4, rows: int = 1000) -> dict[str, Any]:
    """Threads open an index and search it while it is swapped: every tenth time for a new one, else for an older."""
    shutil.rmtree(folder, ignore_errors=True)
    ended, answers, torn, errors = threading.Event(), [0] * readers, [0], []

    def put(number: int) -> None:
        index = AdIndex.from_vectors(np.eye(rows, 64) + 1e-3, [f"{number}-{row}" for row in range(rows)])
        index.save(folder, keep=3)

    def read(reader: int) -> None:
        query = np.full(64, 1 / 8, np.float32)
        while not ended.is_set():
            try:
                ids = open_index(folder).search(query, rows)[1]
            except HlmError as error:
                errors.append(str(error))
                continue
            torn[0] += len(ids) != rows or len({str(name).partition("-")[0] for name in ids}) != 1
            answers[reader] += 1

    put(0)
    put(1)
    threads = [threading.Thread(target=read, args=(reader,)) for reader in range(readers)]
    for thread in threads:
        thread.start()
    for number in range(swaps):
        found = list(versions.listed(folder, "index"))
        current = versions.number_of(versions.read_manifest(folder, "index"))
        if number % 10 == 0:
            put(number + 2)
        else:
            roll_back(folder, to=next(one for one in found if one != current))
    ended.set()
    for thread in threads:
        thread.join()
    return {"swaps": swaps, "answers": sum(answers), "torn": torn[0], "errors": len(errors), "first": errors[:1]}


if __name__ == "__main__":
    run_recipe(main)
