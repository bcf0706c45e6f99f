"""The index that HLM chooses beside other engines, at equal recall, on one thread and the student's own queries.

    python results/measure/measure_index_peers.py --vectors VECTORS --online ONLINE --data DATA --work WORK \\
        --output results/index-peers.json

VECTORS, ONLINE and DATA are as of results/measure/measure_index.py. Each engine is built once, kept under WORK, and
searched with more and more effort by half of the queries, until it finds what is asked for. The other half are timed:
one query at a time, from a vector to the ids of `k` ads, all engines in turns. An engine whose package is missing is
left out and named. The load of the machine is in the file: measure on an idle one.

    pip install hnswlib usearch scalable-vs 'hlm[lance]'
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import faiss
import numpy as np
import torch

from hlm.artefacts import HlmError, write_json
from hlm.config import parse, run_recipe
from hlm.data.contract import load
from hlm.evaluation.report import command_line, environment
from hlm.indexes import tuning
from hlm.indexes.index import create_index
from hlm.indexes.index_parts import normalised
from hlm.indexes.recall import exact_neighbours, recalls
from hlm.machine import facts
from hlm.serving.query_encoder import QueryEncoder
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)
NOT_RUN = {"pgvector": "needs a PostgreSQL server, which this script does not start"}
WARM_UP = 20
FOLDERS = ("vectors", "online", "data", "work", "output")


@dataclass
class PeersConfig:
    vectors: str = field(metadata={"help": "the teacher's stores"})
    online: str = field(metadata={"help": "the student's online folder"})
    data: str = field(metadata={"help": "the dataset: its unlabelled queries are searched"})
    work: str = field(metadata={"help": "folder for what is built"})
    output: str = field(metadata={"help": "file for the figures"})
    engines: list[str] = field(
        default_factory=lambda: [*ENGINES], metadata={"help": "which of the engines; all by default"}
    )
    recalls: list[float] = field(default_factory=lambda: [0.95, 0.98], metadata={"help": "what is asked for"})
    k: int = field(default=100, metadata={"help": "ads that are searched"})
    queries: int = field(default=1000, metadata={"help": "half choose the effort, half are timed"})
    repeats: int = field(default=3, metadata={"help": "turns of every engine; medians are taken"})
    build_threads: int = field(default=1, metadata={"help": "threads of others' builds; searches have one"})
    candidates: list[str] = field(default_factory=list, metadata={"help": "HLM's; empty: those of the size"})


@dataclass
class Built:
    """An engine's index: what searches one vector at a setting, and the settings from little effort to much."""

    what: str
    search: Callable[[np.ndarray, Any], list[str]]
    settings: Iterator[Any]
    bytes: int


@dataclass
class Task:
    store: VectorStore
    ids: list[str]
    dim: int
    work: Path
    config: PeersConfig

    def vectors(self) -> np.ndarray:
        return normalised(self.store.gather(np.arange(len(self.store))), self.dim, first_row=0)

    def named(self, rows: np.ndarray) -> list[str]:
        ids = self.ids
        return [ids[row] for row in rows.ravel().tolist()]

    def kept(self, path: Path, make: Callable[[Path], Any]) -> Path:
        """What an engine built, made once; a build that was killed is begun again."""
        if not path.exists():
            aside = path.with_name(f"{path.name}.partial")
            shutil.rmtree(aside, ignore_errors=True)
            aside.unlink(missing_ok=True)
            make(aside)
            aside.rename(path)
        return path


def growing(least: int, most: int) -> Iterator[int]:
    """1.4 times as much each time."""
    value = least
    while value <= most:
        yield value
        value = max(value + 1, int(1.4 * value))


def hlm(task: Task, queries: np.ndarray, exact: list[list[str]], target: float) -> Built:
    """What `hlm index` chooses for this recall."""
    trials, bounds = [], tuning.Bounds(target, None, None)
    folder = task.work / "candidates"
    for factory in task.config.candidates or tuning.candidates(len(task.store), task.dim):
        index, size = tuning.build_candidate(task.store, factory, task.dim, None, folder, 0)
        trials += tuning.explore(index, size, queries, exact, task.config.k, bounds)
    best = tuning.choose(trials, bounds)
    index, _ = tuning.build_candidate(task.store, best.factory, task.dim, None, folder, 0)
    index.set_options(**best.options)
    k = task.config.k
    what = f"{best.factory} {tuning.shown_options(best.options)}"
    return Built(what, lambda query, _: index.search(query, k)[1], iter([None]), best.bytes)


def hnswlib(task: Task) -> Built:
    import hnswlib

    def make(path: Path) -> None:
        graph = hnswlib.Index(space="ip", dim=task.dim)
        graph.init_index(max_elements=len(task.store), ef_construction=200, M=32)
        graph.add_items(task.vectors(), num_threads=task.config.build_threads)
        graph.save_index(str(path))

    path = task.kept(task.work / "hnswlib.bin", make)
    index = hnswlib.Index(space="ip", dim=task.dim)
    index.load_index(str(path))
    index.set_num_threads(1)

    def search(query: np.ndarray, ef: int) -> list[str]:
        index.set_ef(ef)
        return task.named(index.knn_query(query, task.config.k)[0])

    return Built("M 32, ef_construction 200, float32", search, growing(task.config.k, 4096), size_of(path))


def usearch(task: Task) -> Built:
    from usearch.index import Index

    def make(path: Path) -> None:
        index = Index(ndim=task.dim, metric="ip", dtype="f16", connectivity=32, expansion_add=200)
        index.add(np.arange(len(task.store)), task.vectors(), threads=task.config.build_threads)
        index.save(str(path))

    path = task.kept(task.work / "usearch.bin", make)
    index = Index.restore(str(path))

    def search(query: np.ndarray, ef: int) -> list[str]:
        index.expansion_search = ef
        return task.named(index.search(query, task.config.k, threads=1).keys)

    return Built("connectivity 32, expansion_add 200, float16", search, growing(task.config.k, 4096), size_of(path))


def svs(task: Task) -> Built:
    """In float16: its LVQ runs on Intel's processors alone, and ends the process on others."""
    import svs

    def make(folder: Path) -> None:
        parameters = svs.VamanaBuildParameters(graph_max_degree=64, window_size=200, alpha=0.95)
        halves = task.vectors().astype(np.float16)
        index = svs.Vamana.build(parameters, halves, svs.DistanceType.MIP, num_threads=task.config.build_threads)
        folder.mkdir()
        index.save(*(str(folder / name) for name in ("config", "graph", "data")))

    folder = task.kept(task.work / "svs", make)
    graph, data = (
        svs.GraphLoader(str(folder / "graph")),
        svs.VectorDataLoader(str(folder / "data"), svs.DataType.float16),
    )
    index = svs.Vamana(str(folder / "config"), graph, data, svs.DistanceType.MIP, num_threads=1)

    def search(query: np.ndarray, window: int) -> list[str]:
        if index.search_window_size != window:
            index.search_window_size = window
        return task.named(index.search(query[None], task.config.k)[0])

    return Built("Vamana 64, window 200, float16", search, growing(task.config.k, 4096), size_of(folder))


def lancedb(task: Task) -> Built:
    """As HLM's living engine asks it: IVF with RaBitQ codes, candidates scored again."""
    from hlm.indexes.index import open_index

    folder = task.work / "lance"
    if not (folder / "hlm.json").is_file():
        create_index(folder, task.store, "lance:IVF_RQ", dim=task.dim)
    index: Any = open_index(folder)
    cells = growing(4, 4096)

    def search(query: np.ndarray, nprobe: int) -> list[str]:
        return index.search(query, task.config.k, nprobe=nprobe, refine_factor=4)[1]

    return Built("IVF_RQ, refine_factor 4", search, cells, size_of(folder))


ENGINES: dict[str, Callable[[Task], Built] | None] = {
    "hlm": None,
    "hnswlib": hnswlib,
    "usearch": usearch,
    "scalable-vs": svs,
    "lancedb": lancedb,
}


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse(PeersConfig, argv=argv)
    if unknown := [name for name in config.engines if name not in ENGINES]:
        raise HlmError(f"engines: expected some of {', '.join(ENGINES)}, found {', '.join(unknown)}; correct them")
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    store = VectorStore.open(Path(config.vectors) / "corpus")
    encoder = QueryEncoder.from_pretrained(config.online, threads=1)
    texts = list(load(config.data, splits=()).unlabelled["text"])[: config.queries]
    vectors = encoder.encode(texts)
    exact = exact_neighbours(store, vectors, config.k)
    work = Path(config.work)
    work.mkdir(parents=True, exist_ok=True)
    task = Task(store, store.ids.to_pylist(), vectors.shape[1], work, config)
    report: dict[str, Any] = {"ads": len(store), "dim": task.dim, "k": config.k, "left_out": dict(NOT_RUN)}
    report["student_is_of_this_teacher"] = encoder.teacher == store.encoder
    sides = chosen(task, vectors[: len(vectors) // 2], exact[: len(vectors) // 2], report)
    report["found"] = timed(sides, vectors[len(vectors) // 2 :], exact[len(vectors) // 2 :], config.repeats)
    given = {name: value for name, value in asdict(config).items() if name not in FOLDERS}
    report |= {
        "settings": given,
        "environment": environment(command_line("results/measure/measure_index_peers.py", argv)),
    }
    report["environment"] |= facts()
    write_json(config.output, report)


@dataclass
class Side:
    """An engine at the least effort that found what was asked for."""

    name: str
    target: float
    built: Built
    setting: Any


def chosen(task: Task, queries: np.ndarray, exact: list[list[str]], report: dict[str, Any]) -> list[Side]:
    """Each engine for each recall; what is missing, or never finds as much, goes into the report."""
    sides = []
    for name in task.config.engines:
        make = ENGINES[name]
        if make is None:
            sides += [Side(name, target, hlm(task, queries, exact, target), None) for target in task.config.recalls]
            continue
        try:
            built = make(task)
        except ImportError as error:
            report["left_out"][name] = f"{type(error).__name__}: {error}"
            logger.warning("%s is left out: %s", name, error)
            continue
        targets = sorted(task.config.recalls)
        for setting in built.settings:
            shares = recalls([built.search(query, setting) for query in queries], exact)
            # As `hlm index` chooses: by what is found beyond the chance of these queries.
            found = float(shares.mean() - tuning.STANDARD_ERRORS * shares.std() / np.sqrt(len(shares)))
            logger.info("%s at %s finds %.4f or more", name, setting, found)
            while targets and found >= targets[0]:
                sides.append(Side(name, targets.pop(0), built, setting))
            if not targets:
                break
        if targets:
            report["left_out"][name] = f"never found {targets[0]} of the exact neighbours"
    return sides


def timed(sides: Sequence[Side], queries: np.ndarray, exact: list[list[str]], repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of one query, medians over `repeats` turns in which the sides follow one another."""
    p50: dict[int, list[float]] = {place: [] for place in range(len(sides))}
    p99: dict[int, list[float]] = {place: [] for place in range(len(sides))}
    for _ in range(repeats):
        for place, side in enumerate(sides):
            times = []
            for query in [*queries[:WARM_UP], *queries]:
                started = perf_counter()
                side.built.search(query, side.setting)
                times.append(1e3 * (perf_counter() - started))
            p50[place].append(float(np.median(times[WARM_UP:])))
            p99[place].append(float(np.quantile(times[WARM_UP:], 0.99)))
    rows = []
    for place, side in enumerate(sides):
        answers = [side.built.search(query, side.setting) for query in queries]
        row = {"engine": side.name, "recall_asked_for": side.target, "what": side.built.what, "setting": side.setting}
        row |= {"recall": float(recalls(answers, exact).mean())}
        row |= {"p50_ms": float(np.median(p50[place])), "p99_ms": float(np.median(p99[place]))}
        row |= {"p50_ms_of_each_repeat": p50[place]}
        row |= {"bytes_on_disk": side.built.bytes}
        rows.append(row)
    return sorted(rows, key=lambda row: (row["recall_asked_for"], row["p50_ms"]))


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return sum(one.stat().st_size for one in files)


if __name__ == "__main__":
    run_recipe(main)
