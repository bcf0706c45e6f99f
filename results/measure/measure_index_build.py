"""Building the index of ten million ads in a process that may hold 4 GiB: does it complete, and how does time grow?

    python results/measure/measure_index_build.py --vectors VECTORS --online ONLINE --data DATA --work WORK \\
        --cgroup CGROUP --output results/index-build.json

VECTORS, ONLINE and DATA are as of results/measure/measure_index.py. Where a size has more ads than VECTORS, each
further one is a vector from there with noise added, `near` to it. Each index is built in a process of its own, whose
memory the system limits as in a container, and is then searched from its file by the student's queries, half of which
choose the effort. Stores and indexes of an earlier run are taken as they are.

CGROUP is the folder of a memory control group without processes, which this script may write to: its limit is set, and
what a build reads from the disk counts as well. Without it RLIMIT_DATA is the limit, which counts memory that was
reserved and never touched: Arrow alone reserves a GiB.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from hlm.artefacts import HlmError, write_json
from hlm.config import parse, run_recipe
from hlm.data.contract import load
from hlm.evaluation.report import command_line, environment
from hlm.fields import read_json
from hlm.indexes import tuning
from hlm.indexes.faiss_index import AdIndex
from hlm.indexes.recall import exact_neighbours, recalls
from hlm.machine import facts
from hlm.serving.query_encoder import QueryEncoder
from hlm.vectors.store import VectorStore, write_store

logger = logging.getLogger(__name__)
GIB = 2**30
FOLDERS = ("vectors", "online", "data", "work", "output")
BUILD = """
import json, logging, sys, threading, time
import faiss
from hlm.indexes.faiss_index import AdIndex
from hlm.machine import anonymous_mib
from hlm.vectors.store import VectorStore

logging.basicConfig(level=logging.INFO)
store, folder, factory, threads = sys.argv[1:]
faiss.omp_set_num_threads(int(threads))
before, started, peak = anonymous_mib(), time.monotonic(), [0.0]

def watch():
    while True:
        peak[0] = max(peak[0], anonymous_mib())
        time.sleep(0.1)

threading.Thread(target=watch, daemon=True).start()
index = AdIndex.build(VectorStore.open(store), factory)
built = time.monotonic()
index.save(folder)
found = {"build_s": built - started, "save_s": time.monotonic() - built, "held_mib": anonymous_mib() - before}
print(json.dumps(found | {"peak_anonymous_mib": peak[0]}))
"""


@dataclass
class BuildConfig:
    vectors: str = field(metadata={"help": "the teacher's stores"})
    online: str = field(metadata={"help": "the student's online folder"})
    data: str = field(metadata={"help": "the dataset: its unlabelled queries are searched"})
    work: str = field(metadata={"help": "folder for what is built"})
    output: str = field(metadata={"help": "file for the figures"})
    sizes: list[int] = field(default_factory=lambda: [1_000_000, 10_000_000], metadata={"help": "ads of each index"})
    kind: str = field(default="SQ6", metadata={"help": "what follows the cells, as FAISS writes it"})
    memory_gib: float = field(default=4.0, metadata={"help": "memory that a build may have"})
    cgroup: str | None = field(default=None, metadata={"help": "folder of a memory control group for the builds"})
    threads: int = field(default=2, metadata={"help": "of each build; searches have one"})
    near: float = field(default=0.9, metadata={"help": "cosine of an ad that is made to the one it is made of"})
    target_recall: float = field(default=0.95, metadata={"help": "what a search should find"})
    k: int = field(default=100, metadata={"help": "ads that are searched"})
    queries: int = field(default=400, metadata={"help": "half choose the effort, half are timed"})


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse(BuildConfig, argv=argv)
    torch.set_num_threads(1)
    source = VectorStore.open(Path(config.vectors) / "corpus")
    texts = list(load(config.data, splits=()).unlabelled["text"])[: config.queries]
    queries = QueryEncoder.from_pretrained(config.online, threads=1).encode(texts)
    report: dict[str, Any] = {"found": [measured(config, source, size, queries) for size in sorted(config.sizes)]}
    first, last = report["found"][0], report["found"][-1]
    report["ads_times"], report["build_times"] = last["ads"] / first["ads"], last["build_s"] / first["build_s"]
    given = {name: value for name, value in asdict(config).items() if name not in FOLDERS}
    report |= {
        "settings": given,
        "environment": environment(command_line("results/measure/measure_index_build.py", argv)),
    }
    report["environment"] |= facts()
    write_json(config.output, report)


def measured(config: BuildConfig, source: VectorStore, size: int, queries: np.ndarray) -> dict[str, Any]:
    """One size: its store, its index, built under the limit, and what a search of that finds."""
    folder = Path(config.work) / str(size)
    factory = f"{cells_of(size, source.dim)},{config.kind}"
    store = store_of(source, size, config.near, folder / "store")
    build = built(folder, factory, config)
    index = AdIndex.load(folder / "index")
    faiss.omp_set_num_threads(1)
    exact, half = exact_neighbours(store, queries, config.k), len(queries) // 2
    bounds = tuning.Bounds(config.target_recall, None, None)
    trials = tuning.explore(index, build["bytes"], queries[:half], exact[:half], config.k, bounds)
    fitting = [trial for trial in trials if trial.fits(bounds)]
    best = min(fitting, key=lambda one: one.p50_ms) if fitting else max(trials, key=lambda one: one.recall)
    index.set_options(**best.options)
    recall = float(recalls(index.search(queries[half:], config.k)[1], exact[half:]).mean())
    row = {"ads": size, "factory": factory, **build, "bytes_an_ad": build["bytes"] / size}
    row |= {"options": best.options, "recall": recall, "p50_ms": best.p50_ms}
    logger.info("%s", row)
    return row


def cells_of(size: int, dim: int) -> str:
    """The cells that `hlm index` takes for so many ads."""
    found = [factory for factory in tuning.candidates(size, dim) if factory.startswith("IVF")]
    return found[0].split(",")[0] if found else "IVF16"


def store_of(source: VectorStore, size: int, near: float, folder: Path) -> VectorStore:
    """The first ads of `source`, and then others made of them in turn: as they are, turned by noise to a cosine."""

    def rows(start: int, stop: int) -> Any:
        return ((f"ad{row}", str(row)) for row in range(start, stop))

    def vectors(texts: Sequence[str]) -> np.ndarray:
        numbers = np.array(texts, dtype=np.int64)
        found = source.gather(numbers % len(source)).astype(np.float32)
        noise = np.random.default_rng(int(numbers[0])).standard_normal(found.shape).astype(np.float32)
        noise -= (noise * found).sum(1, keepdims=True) * found
        noise /= np.linalg.norm(noise, axis=1, keepdims=True)
        made = near * found + float(np.sqrt(1 - near**2)) * noise
        return np.where((numbers < len(source))[:, None], found, made)

    about = f"{source.fingerprint} to {size} at {near}"
    write_store(folder, rows, vectors, dim=source.dim, encoder=source.encoder, source=about, n_rows=size)
    return VectorStore.open(folder)


def built(folder: Path, factory: str, config: BuildConfig) -> dict[str, Any]:
    """Builds the index in a process under the limit; its seconds are kept beside it."""
    kept = folder / "built.json"
    asked = {"factory": factory, "memory_gib": config.memory_gib, "threads": config.threads}
    if kept.is_file() and (found := read_json(kept)).items() >= asked.items():
        return dict(found)
    words = [sys.executable, "-c", BUILD, str(folder / "store"), str(folder / "index"), factory, str(config.threads)]
    done = subprocess.run(
        words,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=limit_of(int(config.memory_gib * GIB), config.cgroup),
    )
    size = sum(path.stat().st_size for path in (folder / "index").iterdir())
    found = json.loads(done.stdout.splitlines()[-1]) | {"bytes": size} | asked
    write_json(kept, found)
    return dict(found)


def limit_of(limit: int, cgroup: str | None) -> Callable[[], object]:
    """What limits the memory of the process that calls it, in bytes."""
    if cgroup is None:
        return lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    group = Path(cgroup)
    for name in ("memory.max", "memory.limit_in_bytes"):  # of version 2, and of version 1
        if (group / name).exists():
            (group / name).write_text(str(limit))
            return lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    raise HlmError(f"cgroup: expected a memory control group at {cgroup}, found none; make one with mkdir")


if __name__ == "__main__":
    run_recipe(main)
