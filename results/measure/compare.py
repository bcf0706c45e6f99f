"""Alignment, embedding and refinement here against the sentence-transformers scripts they replace, side by side.

    python results/measure/compare.py --config recipes/configs/quickstart/compare.yaml

Every job is a fresh process, `ours` and `theirs` take turns, and both see the same model, rows, batch and precision.
`ours` runs the recipe. `theirs` is what sentence-transformers documents: its trainer with `EmbedDistillLoss` over a
label column of teacher vectors, `SentenceTransformer.encode` (against `recipes/embed.py` and against `QueryEncoder`),
its trainer with `CachedMultipleNegativesRankingLoss`.
Under `output`: compare.json, with medians, ratios, where a step's time goes, and anonymous memory a row.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import logging
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hlm.artefacts import HlmError, write_json
from hlm.benchmark.random_weights import random_backbone, random_encoder, shape_config
from hlm.config import parse, run_recipe
from hlm.data.contract import document_text, load, training_pairs
from hlm.data.sample_catalogue import write_catalogue
from hlm.encoders.loading import load_encoder, write_legacy_layout
from hlm.encoders.qwen_tokenizer import find_tokenizer
from hlm.evaluation.report import align, command_line, environment
from hlm.machine import anonymous_mib, facts, other_load, read_counters
from hlm.serving.export import export
from hlm.serving.query_encoder import QueryEncoder
from hlm.vectors.store import VectorStore, write_store

logger = logging.getLogger(__name__)
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SIDES = ("ours", "theirs")
WARM_UP = 3  # steps that are not counted


@dataclass
class CompareConfig:
    student: str = field(metadata={"help": "the student that is aligned, embedded with and refined: a folder"})
    data: str = field(metadata={"help": "the dataset, with unlabelled queries"})
    vectors: str = field(metadata={"help": "its teacher's stores, as recipes/embed.py writes them"})
    output: str = field(metadata={"help": "folder for compare.json"})
    shape: str | None = field(default=None, metadata={"help": "align this Qwen3 shape as well, with random weights"})
    layers: int = field(default=4, metadata={"help": "of that shape"})
    ffn: int = field(default=768, metadata={"help": "of that shape"})
    align_batch: int = field(default=128, metadata={"help": "queries in a batch of alignment"})
    shape_batch: int = field(default=64, metadata={"help": "queries in a batch of that shape's alignment"})
    refine_batch: int = field(default=256, metadata={"help": "pairs in a batch of refinement"})
    refine_config: str = field(
        default="recipes/configs/quickstart/refine.yaml", metadata={"help": "its other settings"}
    )
    min_score: int = field(default=3, metadata={"help": "lowest grade that makes a training pair"})
    steps: int = field(default=30, metadata={"help": f"of which the first {WARM_UP} are not counted"})
    refine_steps: int = field(default=10, metadata={"help": "as for steps; theirs encodes the ads and takes long"})
    shape_steps: int = field(default=8, metadata={"help": "as for steps"})
    rows: int = field(default=24000, metadata={"help": "unlabelled queries; memory a row is read against a quarter"})
    repeats: int = field(default=3, metadata={"help": "runs of each side, in turn; the median counts"})


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse(CompareConfig, argv=argv)
    if (
        config.rows < 8 * config.align_batch
        or min(config.steps, config.refine_steps, config.shape_steps) <= WARM_UP + 1
    ):
        raise HlmError(
            f"expected 8 batches of rows or more and more than {WARM_UP + 1} steps, found {config.rows} rows and "
            f"{config.steps}, {config.refine_steps} and {config.shape_steps} steps; raise them"
        )
    work = Path(config.output) / "compare.work"
    shutil.rmtree(work, ignore_errors=True)
    comparisons = plan(config, work)
    found = {name: {side: [] for side in SIDES} for name in comparisons}
    for repeat in range(config.repeats):
        for name, job in comparisons.items():
            for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
                found[name][side].append(run_job(job | {"side": side, "work": str(work / "job")}))
                logger.info("%d %s %s: %.1f rows/s", repeat + 1, name, side, found[name][side][-1]["rows_per_s"])
    report = {
        "comparisons": {name: summary(comparisons[name], sides) for name, sides in found.items()},
        "memory_a_row": memory_a_row(comparisons, found),
        "settings": asdict(config),
        "environment": environment(command_line("results/measure/compare.py", argv)) | facts(),
    }
    write_json(Path(config.output) / "compare.json", report)
    shutil.rmtree(work)
    print("\n".join(align(table(report))))


def plan(config: CompareConfig, work: Path) -> dict[str, dict[str, Any]]:
    """Comparison -> the job both sides do; writes the data they need."""
    few, all_rows = config.rows // 4, config.rows
    student = {"model": config.student, "steps": config.steps}
    jobs = {}
    for name, rows in ((f"align, {few} rows", few), (f"align, {all_rows} rows", all_rows)):
        made = subset(config, rows, work / str(rows))
        jobs[name] = student | made | {"kind": "align", "batch": config.align_batch, "rows": rows}
    jobs["embed"] = jobs[name] | {"kind": "embed"}
    jobs["embed, online encoder"] = jobs[name] | {"kind": "encode", "online": str(work / "online")}
    shutil.copytree(config.student, work / "online")
    export(config.student, work / "online", int8=False)
    refine = student | {
        "kind": "refine",
        "steps": config.refine_steps,
        "data": config.data,
        "vectors": config.vectors,
        "batch": config.refine_batch,
    }
    refine |= {"min_score": config.min_score, "config": config.refine_config}
    jobs["refine"] = refine | {"negatives": 0}
    jobs["refine, their ads with as many hard negatives"] = refine | {"negatives": 4}
    if config.shape:
        made = shape_student(config, work / "shape")
        made |= {"kind": "align", "batch": config.shape_batch, "steps": config.shape_steps}
        jobs[f"align, {config.shape.rsplit('/')[-1]} of {config.layers} layers"] = made
    return jobs


def subset(config: CompareConfig, rows: int, folder: Path) -> dict[str, str]:
    """The dataset and the stores with only the first `rows` unlabelled queries."""
    shutil.copytree(config.data, folder / "data", ignore=shutil.ignore_patterns("unlabelled*", ".*"))
    texts = load(config.data, splits=()).unlabelled["text"][:rows]
    if len(texts) < rows:
        raise HlmError(f"rows: expected at most {len(texts)} (the unlabelled queries of {config.data}), found {rows}")
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (folder / "data/unlabelled.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "vectors").mkdir()
    for part in ("corpus", "queries"):
        (folder / "vectors" / part).symlink_to(Path(config.vectors, part).resolve())
    store = VectorStore.open(Path(config.vectors) / "unlabelled")
    place = {text: number for number, text in enumerate(texts)}
    write_store(
        folder / "vectors/unlabelled",
        lambda start, stop: ((f"u{number}", texts[number]) for number in range(start, stop)),
        lambda batch: store.gather([place[text] for text in batch]),
        dim=store.dim,
        encoder=store.encoder,
        source=load(str(folder / "data"), splits=()).fingerprint("unlabelled"),
        n_rows=rows,
    )
    return {"data": str(folder / "data"), "vectors": str(folder / "vectors")}


def shape_student(config: CompareConfig, folder: Path) -> dict[str, str]:
    """A student of a true shape with random weights, and a teacher of the same shape with other ones."""
    tokenizer = find_tokenizer(None)
    for seed, name in enumerate(("teacher", "student")):
        backbone = random_backbone(
            shape_config(config.shape, layers=config.layers, ffn=config.ffn), "float32", seed=seed
        )
        random_encoder(backbone, tokenizer).save_pretrained(str(folder / name), create_model_card=False)
        write_legacy_layout(folder / name)
    data = folder / "data"
    rows = max(config.shape_batch * (config.shape_steps + 1), 200)
    write_catalogue(data, ads=200, unlabelled=rows, train_queries=50, dev_queries=10, test_queries=10, seed=0)
    recipe("embed", ["--model", str(folder / "teacher"), "--data", str(data), "--output", str(folder / "vectors")])
    return {"model": str(folder / "student"), "data": str(data), "vectors": str(folder / "vectors"), "rows": rows}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """One job in a fresh process; adds what others took of the CPUs meanwhile."""
    shutil.rmtree(job["work"], ignore_errors=True)
    before = read_counters()
    done = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps(job)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise HlmError(f"{job['kind']}, {job['side']}: the process failed: {done.stderr.strip()[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    return result | {"other_load": other_load(before, read_counters(), children_s=result.pop("cpu_s"))}


def do_job(job: dict[str, Any]) -> dict[str, Any]:
    """Runs in the fresh process."""
    clock = StepClock()
    started = time.perf_counter()
    JOBS[job["kind"], job["side"]](job)
    if job["kind"] in ("embed", "encode"):
        result = {"rows_per_s": job["rows"] / (time.perf_counter() - started)}
    else:
        result = clock.figures(job["batch"])
    return result | {"cpu_s": time.process_time()}


class StepClock:
    """Listens to transformers' Trainer: when each step begins, and what its parts take."""

    def __init__(self) -> None:
        from accelerate import Accelerator
        from transformers import Trainer

        self.starts: list[float] = []
        self.parts: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.anonymous_mib = 0.0
        step = Trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            if not self.starts:
                gc.collect()
                ctypes.CDLL(None).malloc_trim(0)  # what was freed on the way would count as held
                self.anonymous_mib = anonymous_mib()
            self.starts.append(time.perf_counter())
            return step(*args, **kwargs)

        Trainer.training_step = training_step
        Trainer.get_batch_samples = self.timed("data", Trainer.get_batch_samples)
        Accelerator.backward = self.timed("backward", Accelerator.backward)
        torch.optim.AdamW.step = self.timed("optimizer", torch.optim.AdamW.step)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.parts[part].append((start, time.perf_counter()))

        return wrapped

    def figures(self, batch: int) -> dict[str, Any]:
        first, last = self.starts[WARM_UP], self.starts[-1]
        steps = len(self.starts) - 1 - WARM_UP
        found = {
            part: 1e3 * sum(stop - start for start, stop in times if first <= start < last) / steps
            for part, times in self.parts.items()
        }
        whole = 1e3 * (last - first) / steps
        found["forward and the rest"] = whole - sum(found.values())
        return {
            "rows_per_s": 1e3 * batch / whole,
            "step_ms": whole,
            "parts_ms": found,
            "anonymous_mib": self.anonymous_mib,
        }


def recipe(name: str, argv: list[str]) -> None:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.main(argv)


def training(job: dict[str, Any]) -> dict[str, Any]:
    """Training arguments that both sides share."""
    quiet = {"eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "report_to": "none"}
    size = {"per_device_train_batch_size": job["batch"], "max_steps": job["steps"]}
    return {**size, "learning_rate": 1e-4, "seed": 0, **quiet}


def flags(settings: dict[str, Any]) -> list[str]:
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


def unlabelled(job: dict[str, Any]) -> list[str]:
    with Path(job["data"], "unlabelled.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def align_ours(job: dict[str, Any]) -> None:
    given = {"student": job["model"], "data": job["data"], "vectors": job["vectors"], "output": job["work"]}
    recipe("align", [*flags(given | training(job)), "--parts", "unlabelled"])


def align_theirs(job: dict[str, Any]) -> None:
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss

    texts = unlabelled(job)
    # Stands for teacher.encode, whose time is not counted.
    store = VectorStore.open(Path(job["vectors"]) / "unlabelled")

    def add_teacher_embeddings(batch: dict[str, Any], rows: list[int]) -> dict[str, Any]:
        return {"label": store.gather(rows).tolist()}

    rows = Dataset.from_dict({"sentence": texts}).map(add_teacher_embeddings, batched=True, with_indices=True)
    del texts
    model = load_encoder(job["model"])
    train_theirs(model, rows, EmbedDistillLoss(model, distance_metric="l2"), job)


def train_theirs(model: Any, rows: Any, loss: torch.nn.Module, job: dict[str, Any]) -> None:
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    args = SentenceTransformerTrainingArguments(output_dir=job["work"], **training(job))
    SentenceTransformerTrainer(model=model, args=args, train_dataset=rows, loss=loss).train()


def embed_ours(job: dict[str, Any]) -> None:
    given = {"model": job["model"], "data": job["data"], "output": job["work"]}
    recipe("embed", [*flags(given), "--parts", "unlabelled"])


def embed_theirs(job: dict[str, Any]) -> None:
    vectors = load_encoder(job["model"]).encode(unlabelled(job), normalize_embeddings=True, show_progress_bar=False)
    np.save(Path(job["work"]).with_suffix(".npy"), vectors)


def encode_ours(job: dict[str, Any]) -> None:
    vectors = QueryEncoder.from_pretrained(job["online"]).encode(unlabelled(job))
    np.save(Path(job["work"]).with_suffix(".npy"), vectors)


def refine_ours(job: dict[str, Any]) -> None:
    given = {"config": job["config"], "student": job["model"], "data": job["data"], "vectors": job["vectors"]}
    given |= {"output": job["work"], "min_score": job["min_score"], "load_best_model_at_end": "false"}
    recipe("refine", flags(given | training(job)))


def refine_theirs(job: dict[str, Any]) -> None:
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    data = load(job["data"], splits=("train",))
    queries = dict(data.split_queries("train"))
    documents = {row["_id"]: document_text(row) for row in data.corpus}
    pairs = [(query, ad) for query, ad, _ in training_pairs(data, "train", min_score=job["min_score"])]
    pairs = pairs[: job["batch"] * (job["steps"] + 1)]
    columns = {"anchor": [queries[query] for query, _ in pairs], "positive": [documents[ad] for _, ad in pairs]}
    texts = list(documents.values())
    for number in range(job["negatives"]):  # any will do: what they cost does not depend on which they are
        drawn = np.random.default_rng(number).integers(len(texts), size=len(pairs))
        columns[f"negative_{number + 1}"] = [texts[row] for row in drawn]
    model = load_encoder(job["model"])
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=64)
    train_theirs(model, Dataset.from_dict(columns), loss, job)


JOBS: dict[tuple[str, str], Callable[[dict[str, Any]], None]] = {
    ("align", "ours"): align_ours,
    ("align", "theirs"): align_theirs,
    ("embed", "ours"): embed_ours,
    ("embed", "theirs"): embed_theirs,
    ("encode", "ours"): encode_ours,
    ("encode", "theirs"): embed_theirs,
    ("refine", "ours"): refine_ours,
    ("refine", "theirs"): refine_theirs,
}


def summary(job: dict[str, Any], sides: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the repeats, and the ratio of each repeat's pair."""
    found: dict[str, Any] = {"job": {name: job[name] for name in ("kind", "batch", "steps", "rows") if name in job}}
    for side, runs in sides.items():
        found[side] = {"rows_per_s": statistics.median(run["rows_per_s"] for run in runs), "repeats": runs}
        if "parts_ms" in runs[0]:
            names = runs[0]["parts_ms"]
            found[side]["parts_ms"] = {name: statistics.median(run["parts_ms"][name] for run in runs) for name in names}
    ratios = [ours["rows_per_s"] / theirs["rows_per_s"] for ours, theirs in zip(*sides.values(), strict=True)]
    return found | {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}


def memory_a_row(comparisons: dict[str, dict[str, Any]], found: dict[str, dict[str, list]]) -> dict[str, float]:
    """Bytes of anonymous memory that a row costs when training begins: what one more costs between the two sizes."""
    few, many = [name for name, job in comparisons.items() if job["kind"] == "align"][:2]
    rows = comparisons[many]["rows"] - comparisons[few]["rows"]
    a_row = {}
    for side in SIDES:
        small, large = (min(run["anonymous_mib"] for run in found[name][side]) for name in (few, many))
        a_row[side] = 2**20 * (large - small) / rows
    return a_row


def table(report: dict[str, Any]) -> list[list[str]]:
    rows = [
        ["comparison", "ours rows/s", "theirs rows/s", "ratio", "range", "where a step's time goes (ours | theirs), ms"]
    ]
    for name, found in report["comparisons"].items():
        low, high = found["ratio_range"]
        cells = [f"{found[side]['rows_per_s']:,.0f}" for side in SIDES]
        cells += [f"{found['ratio']:.2f}x", f"{low:.2f} to {high:.2f}"]
        parts = [", ".join(f"{k} {v:.0f}" for k, v in found[side].get("parts_ms", {}).items()) for side in SIDES]
        rows.append([name, *cells, " | ".join(filter(None, parts))])
    bytes_a_row = report["memory_a_row"]
    cells = [f"{bytes_a_row[side]:,.0f} B" for side in SIDES]
    return [*rows, ["memory a row of alignment", *cells, "-", "-", ""]]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        print("\n" + json.dumps(do_job(json.loads(sys.argv[2]))))
    else:
        run_recipe(main)
