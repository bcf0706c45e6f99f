"""From text to ads on one thread: the index that `hlm index` chooses beside what the documentation of others shows.

    python results/measure/measure_index.py --vectors VECTORS --student STUDENT --online ONLINE --data DATA \\
        --work WORK --output results/index-70k.json

DATA is a sample catalogue of recipes/make_catalogue.py. VECTORS are of its ads, by the quickstart's teacher
(recipes/embed.py, or the teacher's exported graph, which is faster on a CPU and equal to sentence-transformers to
1e-6). STUDENT and ONLINE are the quickstart's. Every figure of time is of one run in which the sides take turns.
Candidates are kept under `work`.

Writes `output`: what was chosen for each recall and every trial; time from text to ads of each side and its recall;
what AdIndex takes beyond FAISS; anonymous memory of an opened index; and filters, ours and FAISS's own.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import torch

from hlm.artefacts import write_json
from hlm.benchmark.latency import measure, summarise
from hlm.config import parse, run_recipe
from hlm.data.contract import load
from hlm.encoders.loading import load_encoder
from hlm.evaluation.report import command_line, environment
from hlm.indexes import faiss_parts, tuning
from hlm.indexes.faiss_index import AdIndex
from hlm.indexes.recall import exact_neighbours, recalls, sample_of
from hlm.machine import facts
from hlm.serving.query_encoder import QueryEncoder
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)
HNSW = "HNSW32,SQfp16"


@dataclass
class MeasureIndexConfig:
    vectors: str = field(metadata={"help": "the teacher's stores"})
    student: str = field(metadata={"help": "the student's folder, served by sentence-transformers"})
    online: str = field(metadata={"help": "its online folder, served by HLM"})
    data: str = field(metadata={"help": "the dataset: its unlabelled queries are searched"})
    work: str = field(metadata={"help": "folder for what is built"})
    output: str = field(metadata={"help": "file for the figures"})
    recalls: list[float] = field(default_factory=lambda: [0.95, 0.98], metadata={"help": "what is asked for"})
    k: int = field(default=100, metadata={"help": "ads that are searched"})
    queries: int = field(default=2000, metadata={"help": "half choose, half measure"})
    timed: int = field(default=300, metadata={"help": "queries that are timed"})
    filtered: int = field(default=50, metadata={"help": "queries that are searched with each filter"})
    repeats: int = field(default=3, metadata={"help": "turns of every side"})
    block_s: float = field(default=2.0, metadata={"help": "seconds of a turn"})
    candidates: list[str] = field(default_factory=list, metadata={"help": "factory strings; empty: those of the size"})


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse(MeasureIndexConfig, argv=argv)
    torch.set_num_threads(1)  # one thread for everybody
    faiss.omp_set_num_threads(1)
    store = VectorStore.open(Path(config.vectors) / "corpus")
    data = load(config.data, splits=())
    texts = list(data.unlabelled["text"])[: config.queries]
    encoder = QueryEncoder.from_pretrained(config.online, threads=1)
    vectors = encoder.encode(texts)
    exact = exact_neighbours(store, vectors, config.k)
    half = len(texts) // 2
    indexes, report = choose(config, store, vectors[:half], exact[:half], columns_of(data))
    report |= {"ads": len(store), "dim": store.dim, "queries_are": about(store, vectors)}
    heard = texts[half:], vectors[half:], exact[half:]
    report["text_to_ads"] = text_to_ads(config, indexes, encoder, *heard)
    report["beyond_faiss"] = {name: beyond_faiss(index, heard[1], config) for name, index in indexes.items()}
    report["memory"] = memory(Path(config.work), list(indexes))
    report["filters"] = filters(config, indexes, store, data, *heard[:2])
    given = {name: value for name, value in asdict(config).items() if name not in FOLDERS}
    report |= {"settings": given, "environment": environment(command_line("results/measure/measure_index.py", argv))}
    report["environment"] |= facts()
    write_json(config.output, report)


FOLDERS = ("vectors", "student", "online", "data", "work", "output")


def columns_of(data: Any) -> pa.Table:
    return data.corpus.select_columns(["_id", "department", "price"]).with_format("arrow")[:]


def about(store: VectorStore, vectors: np.ndarray) -> dict[str, float]:
    """How far the queries lie from the ads: the mean cosine of a query to its nearest ad, and of an ad to its nearest
    other one."""
    index, ads = AdIndex.build(store), sample_of(store, 0, rows=300)
    to_ads, to_others = index.search(vectors[:300], 1)[0][:, 0], index.search(ads, 2)[0][:, 1]
    return {"query_to_nearest_ad": float(to_ads.mean()), "ad_to_nearest_other_ad": float(to_others.mean())}


def choose(
    config: MeasureIndexConfig, store: VectorStore, queries: np.ndarray, exact: list[list[str]], columns: pa.Table
) -> tuple[dict[str, AdIndex], dict[str, Any]]:
    """The indexes of this run by name: exact, as documented, and the choice for each recall; and what they were chosen
    from."""
    work, trials = Path(config.work), []
    bounds = {wanted: tuning.Bounds(wanted, None, None) for wanted in config.recalls}
    for factory in config.candidates or tuning.candidates(len(store), queries.shape[1]):
        index, size = tuning.build_candidate(store, factory, queries.shape[1], columns, work / "candidates", 0)
        for bound in bounds.values():
            trials += tuning.explore(index, size, queries, exact, config.k, bound)
    found = {"trials": [trial._asdict() for trial in trials], "chosen": {}}
    indexes = {}
    for name, factory in (("flat", "Flat"), ("hnsw32", HNSW)):
        indexes[name], _ = tuning.build_candidate(store, factory, queries.shape[1], columns, work / "candidates", 0)
        indexes[name].save(work / name)
    for wanted, bound in bounds.items():
        best = tuning.choose(trials, bound)
        name = f"hlm_{wanted:g}"
        index, _ = tuning.build_candidate(store, best.factory, queries.shape[1], columns, work / "candidates", 0)
        index.set_options(**best.options)
        index.save(work / name)
        indexes[name], found["chosen"][name] = AdIndex.load(work / name), best._asdict()
        print(tuning.format_table(trials, best, bound, len(store)), flush=True)
    return indexes, found


def text_to_ads(
    config: MeasureIndexConfig,
    indexes: dict[str, AdIndex],
    encoder: QueryEncoder,
    texts: list[str],
    vectors: np.ndarray,
    exact: list[list[str]],
) -> dict[str, Any]:
    """Milliseconds from a text to the ids of `k` ads, and how many of the exact ones are among them."""
    student = load_encoder(config.student, device="cpu")
    ids = indexes["flat"]._ads["_id"].to_pylist()
    stores = indexes["flat"]._index.reconstruct_n(0, len(ids))
    flat, graph = (
        faiss.IndexFlatIP(stores.shape[1]),
        faiss.IndexHNSWFlat(stores.shape[1], 32, faiss.METRIC_INNER_PRODUCT),
    )
    flat.add(stores)
    kept = Path(config.work) / "documented-hnsw32.faiss"
    if kept.is_file():
        graph = faiss.read_index(str(kept))
    else:
        graph.add(stores)
        faiss.write_index(graph, str(kept))

    answers: dict[str, list[list[str]]] = {}

    def documented(name: str, index: faiss.Index) -> Callable[[list[str]], np.ndarray]:
        def answer(queries: list[str]) -> np.ndarray:
            found = student.encode(queries, prompt_name=None, show_progress_bar=False)
            answers[name] = [[ids[row] for row in rows] for rows in index.search(found, config.k)[1]]
            return found

        return answer

    def ours(name: str, index: AdIndex) -> Callable[[list[str]], np.ndarray]:
        def answer(queries: list[str]) -> np.ndarray:
            found = encoder.encode(queries)
            answers[name] = index.search(found, config.k)[1]  # type: ignore[assignment]
            return found

        return answer

    systems = {"sentence-transformers + Flat": documented("sentence-transformers + Flat", flat)}
    systems["sentence-transformers + HNSW32"] = documented("sentence-transformers + HNSW32", graph)
    systems |= {f"hlm + {name}": ours(f"hlm + {name}", index) for name, index in indexes.items()}
    blocks = measure(
        systems, texts[: config.timed], repeats=config.repeats, block_s=config.block_s, batch_sizes=(), seed=0
    )
    summaries = summarise(blocks, texts[: config.timed])
    medians = {name: [b.record()["p50_ms"] for b in blocks if b.system == name] for name in systems}
    found = {}
    for name, answer in systems.items():
        answer(texts)
        found[name] = {
            "p50_ms": float(np.median(medians[name])),
            "p50_ms_of_each_repeat": medians[name],
            "latency_ms": summaries[name]["latency_ms"]["all"],
            "recall": float(recalls(answers[name], exact).mean()),
        }
    for one in found.values():
        one["times_faster_than"] = {
            name: found[name]["p50_ms"] / one["p50_ms"] for name in found if name.startswith("sentence")
        }
    return found


def beyond_faiss(index: AdIndex, vectors: np.ndarray, config: MeasureIndexConfig) -> dict[str, float]:
    """p50 of FAISS called directly, its rows turned into ids by a list, beside `AdIndex.search`; medians of repeats."""
    ids = index._ads["_id"].to_pylist()
    parameters = faiss_parts.parameters(index._index, index._defaults)

    def direct(query: np.ndarray) -> Any:
        scores, rows = index._index.search(query[None], config.k, params=parameters)
        return scores[0], [ids[row] for row in rows[0]]

    times: dict[str, list[float]] = {"faiss_ms": [], "ad_index_ms": []}
    for _ in range(config.repeats):
        for name, search in (("faiss_ms", direct), ("ad_index_ms", lambda query: index.search(query, config.k))):
            times[name].append(float(np.median(timed(search, vectors[: config.timed]))))
    found = {name: float(np.median(values)) for name, values in times.items()}
    return found | {"ratio": found["ad_index_ms"] / found["faiss_ms"]}


def timed(search: Callable[[np.ndarray], Any], vectors: np.ndarray) -> list[float]:
    """Milliseconds of each query, after some that are not counted."""
    for vector in vectors[:20]:
        search(vector)
    times = []
    for vector in vectors:
        started = perf_counter()
        search(vector)
        times.append(1e3 * (perf_counter() - started))
    return times


MEMORY = """
import sys
import faiss, numpy as np
from hlm.machine import anonymous_mib
from hlm.indexes.faiss_index import AdIndex

AdIndex.from_vectors(np.eye(8), list("abcdefgh")).search(np.eye(8)[0], 3)  # what FAISS and Arrow themselves take
for folder in sys.argv[2:]:
    before = anonymous_mib()
    if sys.argv[1] == "mapped":
        index = AdIndex.load(folder)
        index.search(np.eye(index.dim)[0], 100)
        rows = len(index)
    else:
        index = faiss.read_index(folder + "/index.faiss")
        index.search(np.eye(index.d, dtype=np.float32)[:1], 100)
        rows = index.ntotal
    print((anonymous_mib() - before) * 2**20 / rows)
    globals().setdefault("kept", []).append(index)
"""


def memory(work: Path, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Anonymous bytes a vector of each index in a fresh process that has searched it: mapped as AdIndex opens it, and
    read as FAISS reads it by default."""
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for way in ("mapped", "read"):
        words = [sys.executable, "-c", MEMORY, way, *(str(work / name) for name in names)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        for name, line in zip(names, done.stdout.split(), strict=True):
            found[name][f"{way}_bytes_a_vector"] = float(line)
    return found


def filters(
    config: MeasureIndexConfig,
    indexes: dict[str, AdIndex],
    store: VectorStore,
    data: Any,
    texts: list[str],
    vectors: np.ndarray,
) -> dict[str, Any]:
    """Recall, short lists and time of filters that let 1%, 10% or 30% through: rows drawn, and rows far from the query:
    ads of the departments that none of its ten nearest ads is of. Ours, and FAISS's own at the unfiltered settings."""
    departments = np.array(data.corpus["department"])
    rng, names = np.random.default_rng(0), sorted(set(departments))
    ads = store.gather(np.arange(len(store)))
    sample = vectors[: config.filtered]
    nearest = [{departments[row] for row in rows} for rows in np.argpartition(-(sample @ ads.T), 10, axis=1)[:, :10]]
    found: dict[str, Any] = {}
    for share in (0.01, 0.1, 0.3):
        for kind in ("random", "far"):
            masks = []
            for near in nearest:
                among = np.ones(len(ads), bool) if kind == "random" else ~np.isin(departments, list(near))
                rows = np.flatnonzero(among)
                mask = np.zeros(len(ads), bool)
                if kind == "far":  # whole departments, the first of an order drawn anew, cut to the share
                    order = {name: place for place, name in enumerate(rng.permutation(names))}
                    rows = rows[np.argsort([order[departments[row]] for row in rows], kind="stable")]
                    mask[rows[: int(share * len(ads))]] = True
                else:
                    mask[rng.choice(rows, int(share * len(ads)), replace=False)] = True
                masks.append(mask)
            right = [
                set(np.argpartition(-np.where(mask, query @ ads.T, -np.inf), config.k)[: config.k].tolist())
                for mask, query in zip(masks, sample, strict=True)
            ]
            for name, index in indexes.items():
                found[f"{kind} {share:.0%}, {name}"] = {
                    "ours": filtered(index, sample, masks, right, config.k),
                    "faiss": filtered_by_faiss(index, sample, masks, right, config.k),
                }
                logger.info("%s %s %s: %s", kind, share, name, found[f"{kind} {share:.0%}, {name}"])
    return found


def filtered(
    index: AdIndex, queries: np.ndarray, masks: list[np.ndarray], right: list[set[int]], k: int
) -> dict[str, float]:
    places = {name: row for row, name in enumerate(index._ads["_id"].to_pylist())}
    rows, times = [], []
    for query, mask in zip(queries, masks, strict=True):
        chosen = index.select(mask)
        index.search(query, k, where=chosen)  # a filter is used again and again: what is counted once is counted
        started = perf_counter()
        found = index.search(query, k, where=chosen)[1]
        times.append(1e3 * (perf_counter() - started))
        rows.append([places[str(name)] for name in found])
    return figures(rows, right, times, k)


def filtered_by_faiss(
    index: AdIndex, queries: np.ndarray, masks: list[np.ndarray], right: list[set[int]], k: int
) -> dict[str, float]:
    rows, times = [], []
    for query, mask in zip(queries, masks, strict=True):
        selector = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
        parameters = faiss_parts.parameters(index._index, index._defaults, selector)
        parameters = parameters or faiss.SearchParameters(sel=selector)
        started = perf_counter()
        found = index._index.search(query[None], k, params=parameters)[1][0]
        times.append(1e3 * (perf_counter() - started))
        rows.append(found[found >= 0].tolist())
    return figures(rows, right, times, k)


def figures(rows: list[list[int]], right: list[set[int]], times: list[float], k: int) -> dict[str, float]:
    return {
        "recall": float(np.mean([len(set(mine) & best) / len(best) for mine, best in zip(rows, right, strict=True)])),
        "short_lists": float(np.mean([len(mine) < k for mine in rows])),
        "p50_ms": float(np.percentile(times, 50)),
        "p99_ms": float(np.percentile(times, 99)),
    }


if __name__ == "__main__":
    run_recipe(main)
