"""Whether everything written for a GPU holds on this one: parity, latency, training and embedding beside the plan.

    python recipes/gpu_check.py --output results/gpu.json

Stages run in the order of their worth, each in a process and with a time limit of its own; the file is written after
each figure, so that a run that is cut short keeps what it has. Weights are random, shapes the published ones: nothing
is downloaded. On a machine without a GPU, `--tiny` runs every stage on the CPU in a minute, to see that they run.
Exit status 1: a stage failed. What a stage falls short of stands in the table and in the file, and is no failure.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import PretrainedConfig, Qwen3Config

from hlm.artefacts import HlmError, write_json
from hlm.benchmark import gpu_online, gpu_stages
from hlm.benchmark.gpu_inputs import made_encoder, made_texts
from hlm.benchmark.queries import catalogue_queries
from hlm.benchmark.random_weights import random_backbone, random_encoder, shape_config
from hlm.config import parse, run_recipe
from hlm.encoders.loading import check_device
from hlm.encoders.qwen_tokenizer import find_tokenizer
from hlm.evaluation.report import command_line, environment
from hlm.machine import facts
from hlm.planning.settings import Assumptions, read_steps
from hlm.training.trainer import TrainingArguments

HOME = Path(__file__).resolve().parent.parent
CONFIGS = HOME / "recipes" / "configs" / "qwen3-8b-190m"
GPU_TESTS = Path("tests/serving/test_query_encoder.py")
INSTRUCTION = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
Note = Callable[[dict[str, Any]], None]


@dataclass
class GpuCheckConfig:
    output: str = field(default="runs/gpu.json", metadata={"help": "file; what it held is replaced"})
    minutes: float = field(default=9.0, metadata={"help": "of all stages; each gets its share"})
    only: list[str] = field(default_factory=list, metadata={"help": "stages to run; default: all"})
    tiny: bool = field(default=False, metadata={"help": "small shapes, on the CPU unless `device` is given"})
    device: str | None = field(default=None, metadata={"help": "default: cuda, or cpu with --tiny"})


@dataclass(frozen=True)
class Setting:
    """What stages read: the shapes, the settings and sizes of their steps, and the device."""

    device: str
    teacher: PretrainedConfig
    student: PretrainedConfig
    steps: dict[str, dict[str, Any]]
    sizes: Assumptions
    tiny: bool

    def encoder(self, config: PretrainedConfig, prompt: str = "") -> tuple[Any, list[str]]:
        """An encoder in the precision that it is served in, and queries for it."""
        if self.tiny:
            dtype = "bfloat16" if self.device == "cuda" else "float32"
            return made_encoder(config, dtype, self.device, 32), made_texts(20, 8, 30)
        backbone = random_backbone(config, "bfloat16", device=self.device)
        return random_encoder(backbone, find_tokenizer(None), prompt=prompt), catalogue_queries()[-200:]


def machine(setting: Setting, seconds: float, note: Note) -> dict[str, Any]:
    here = environment("") | facts()
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        here |= {"gpu": properties.name, "gpu_memory": properties.total_memory, "cuda": torch.version.cuda}
    return {"environment": here, "measured": gpu_online.ceilings(setting.device, mib=64 if setting.tiny else 4096)}


def parity(setting: Setting, seconds: float, note: Note) -> dict[str, Any]:
    return {"measured": gpu_online.parity(setting.device)}


def online_student(setting: Setting, seconds: float, note: Note) -> dict[str, Any]:
    model, queries = setting.encoder(setting.student)
    sizes = [8, 32] if setting.tiny else [32, 512, 2048, 8192]
    return gpu_online.online(model, queries, batch_sizes=sizes, seconds=2.0 if setting.tiny else seconds / 2, note=note)


def online_teacher(setting: Setting, seconds: float, note: Note) -> dict[str, Any]:
    model, queries = setting.encoder(setting.teacher, INSTRUCTION)
    sizes = [8] if setting.tiny else [32, 512]
    return gpu_online.online(
        model, queries[:50], batch_sizes=sizes, seconds=2.0 if setting.tiny else seconds / 2, note=note
    )


def teacher_step(setting: Setting, seconds: float, note: Note) -> dict[str, Any]:
    step, steps = setting.steps["teacher"], 2 if setting.tiny else 8
    return gpu_stages.lora_step(
        setting.teacher, step, setting.sizes, device=setting.device, steps=steps, seconds=0.6 * seconds, note=note
    )


def embed_rate(setting: Setting, seconds: float, note: Note) -> dict[str, Any]:
    step, seconds = setting.steps["embed"], 1.0 if setting.tiny else 0.6 * seconds
    return gpu_stages.store_rate(
        setting.teacher, step, setting.sizes, device=setting.device, seconds=seconds, note=note
    )


def align_rate(setting: Setting, seconds: float, note: Note) -> dict[str, Any]:
    steps = 4 if setting.tiny else 400
    return gpu_stages.align_rate(
        setting.student,
        setting.steps["align"],
        setting.sizes,
        teacher_width=setting.teacher.hidden_size,
        device=setting.device,
        steps=steps,
        seconds=0.5 * seconds,
        note=note,
    )


def refine_rate(setting: Setting, seconds: float, note: Note) -> dict[str, Any]:
    steps, documents = (4, 200) if setting.tiny else (400, 131_072)
    return gpu_stages.refine_rate(
        setting.student,
        setting.steps["refine"],
        setting.sizes,
        teacher_width=setting.teacher.hidden_size,
        documents=documents,
        device=setting.device,
        steps=steps,
        seconds=0.4 * seconds,
        note=note,
    )


def faiss_search(setting: Setting, seconds: float, note: Note) -> dict[str, Any]:
    return gpu_online.faiss_gpu(*((1_000, 32) if setting.tiny else (1_000_000, 1024)))


def cuda_tests(setting: Setting, seconds: float, note: Note) -> dict[str, Any]:
    """The tests that need a GPU, in a process of their own."""
    if setting.device != "cuda":
        return {"skipped": "no GPU"}
    if not (HOME / "tests").is_dir():  # an installed package has none
        return {"skipped": f"no tests at {HOME / 'tests'}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cuda", str(HOME / GPU_TESTS)]
    done = subprocess.run(command, cwd=HOME, capture_output=True, text=True, check=False, timeout=seconds)
    last = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1]
    if done.returncode:
        raise HlmError(f"expected the tests that need a GPU to pass, found: {last}")
    return {"measured": {"pytest": last}}


# Stage -> (what it does, seconds of nine minutes). The most valuable first.
STAGES: dict[str, tuple[Callable[[Setting, float, Note], dict[str, Any]], float]] = {
    "machine": (machine, 20),
    "parity": (parity, 45),
    "online_190m": (online_student, 45),
    "online_8b": (online_teacher, 60),
    "teacher_step_8b": (teacher_step, 110),
    "embed_8b": (embed_rate, 75),
    "align_190m": (align_rate, 40),
    "refine_190m": (refine_rate, 60),
    "tests": (cuda_tests, 75),
    "faiss": (faiss_search, 25),
}
# Figure -> (stage, path in it, what is asked, whether more is better).
ASKED = {
    "190M p50, tokenisation included, ms": ("online_190m", ("measured", "p50_ms"), 0.5, False),
    "8B p50 / 190M p50, both as HLM serves": ("ratios", ("latency",), 60, True),
    "8B by sentence-transformers / 190M p50": ("ratios", ("latency_over_sentence_transformers",), 60, True),
    "190M throughput / 8B throughput": ("ratios", ("throughput",), 40, True),
}
PLANNED = ("teacher_step_8b", "embed_8b", "align_190m", "refine_190m")
READY, IMPORTS_S = "ready", 120  # what a stage's process says when it has imported all this, and how long that may take
TIME_BAND, MEMORY_BAND = 0.30, 0.15  # how far the plan may be from what is measured


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse(GpuCheckConfig, argv=argv)
    names = read_names(config.only)
    device = config.device or ("cpu" if config.tiny else "cuda")
    check_device(device)
    output = check_file(Path(config.output))
    command = command_line("recipes/gpu_check.py", argv)
    result: dict[str, Any] = {"environment": {"command": command}, "stages": {}}
    run_stages(names, (config.tiny, device), config.minutes, result, lambda: write_json(output, result))
    print(table(result))
    failed = [name for name in names if result["stages"][name]["status"] in ("failed", "stopped")]
    if failed:
        raise SystemExit(1)


def read_names(only: list[str]) -> list[str]:
    unknown = [name for name in only if name not in STAGES]
    if unknown:
        raise HlmError(f"only: expected stages of {', '.join(STAGES)}, found {unknown[0]!r}")
    return [name for name in STAGES if name == "machine" or name in only or not only]


def check_file(output: Path) -> Path:
    """Refuses, before any work, a file that this script did not write."""
    if output.exists():
        try:
            known = {"environment", "stages"} <= json.loads(output.read_text(encoding="utf-8")).keys()
        except (OSError, ValueError, AttributeError):
            known = False
        if not known:
            raise HlmError(f"output: expected a file of this script at {output}, found another; name another output")
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


def make_setting(tiny: bool, device: str) -> Setting:
    steps = read_steps(CONFIGS, TrainingArguments)
    if not tiny:
        (sizes,) = parse(Assumptions, argv=["--config", str(CONFIGS / "plan.yaml")])
        student = shape_config("Qwen/Qwen3-Embedding-0.6B", layers=4, ffn=768)
        return Setting(device, shape_config("Qwen/Qwen3-Embedding-8B"), student, steps, sizes, False)
    shape = {
        "vocab_size": 500,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    less: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "lora_rank": 4,
        "cache_chunk": 3,
        "max_seq_length": 16,
        "pool": 32,
        "hard_negatives": 2,
        "batch_tokens": 64,
    }
    less |= {} if device == "cuda" else {"bf16": False, "dtype": "float32"}
    steps = {name: {**step, **{key: less[key] for key in less.keys() & step.keys()}} for name, step in steps.items()}
    sizes = Assumptions(
        documents=200, queries=100, unlabelled=100, query_tokens=4, prompt_tokens=3, document_tokens=10, longest_query=8
    )
    return Setting(
        device, Qwen3Config(hidden_size=48, **shape), Qwen3Config(hidden_size=32, **shape), steps, sizes, True
    )


def run_stages(
    names: list[str], setting: tuple[bool, str], minutes: float, result: dict[str, Any], write: Callable[[], None]
) -> None:
    """Runs stages until the time is over; `result` is written after each figure."""
    over = perf_counter() + 60 * minutes
    share = 60 * minutes / sum(STAGES[name][1] for name in names)
    for name in names:
        limit = min(STAGES[name][1] * share, over - perf_counter())
        entry: dict[str, Any] = {"status": "not reached" if limit < 1 else "running"}
        result["stages"][name] = entry
        write()
        if limit >= 1:
            print(f"{name}: at most {limit:.0f} s", flush=True)
            run_stage(name, setting, limit, entry, write)
        result["environment"] = entry.pop("environment", {}) | result["environment"]  # the command stays
        result["ratios"] = ratios(result["stages"])
        result["asked"] = asked(result)
        write()


def run_stage(
    name: str, setting: tuple[bool, str], limit: float, entry: dict[str, Any], write: Callable[[], None]
) -> None:
    """One stage in a process of its own: one that fails, hangs or runs out of memory takes no other with it."""
    # A forked process starts at once, but cannot use a GPU that its parent, or what that imports, has asked about.
    context: Any = multiprocessing.get_context("fork" if setting[1] == "cpu" else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=in_child, args=(name, setting, limit, theirs))
    began = perf_counter()
    process.start()
    theirs.close()
    until = began + limit + IMPORTS_S
    try:
        while process.is_alive() or ours.poll():
            if not ours.poll(max(0.0, until - perf_counter())):
                entry["status"] = "stopped"
                entry["error"] = f"it was still running after {limit:.0f} s"
                break
            found = ours.recv()
            if found == READY:
                until = perf_counter() + limit
                continue
            entry |= found
            write()
    except EOFError:  # the process ended
        process.join()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
        process.kill()
        process.join()
    if entry["status"] == "running":
        entry |= {"status": "failed", "error": f"the process ended with {process.exitcode}"}
    entry["seconds"] = perf_counter() - began


def in_child(name: str, setting: tuple[bool, str], limit: float, pipe: Any) -> None:
    os.setsid()  # a group of its own
    pipe.send(READY)
    try:
        found = STAGES[name][0](make_setting(*setting), limit, lambda part: pipe.send(dict(part)))
        pipe.send(found | {"status": "skipped" if "skipped" in found else "done"})
    except Exception as error:
        traceback.print_exc()
        pipe.send({"status": "failed", "error": f"{type(error).__name__}: {error}"})
    finally:
        pipe.close()


def ratios(stages: dict[str, Any]) -> dict[str, float]:
    student, teacher = (stages.get(name, {}).get("measured", {}) for name in ("online_190m", "online_8b"))
    found = {}
    for name, figure, more in (
        ("latency", "p50_ms", False),
        ("latency_over_sentence_transformers", "eager_p50_ms", False),
        ("throughput", "best_queries_per_s", True),
    ):
        ours, theirs = student.get("p50_ms" if "p50" in figure else figure), teacher.get(figure)
        if ours and theirs:
            found[name] = ours / theirs if more else theirs / ours
    return found


def asked(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every figure that is asked for, beside what was measured; the plan's among them."""
    rows = []
    for figure, (stage, path, wanted, more) in ASKED.items():
        value: Any = result["ratios"] if stage == "ratios" else result["stages"].get(stage, {})
        for key in path:
            value = value.get(key, {}) if isinstance(value, dict) else {}
        if isinstance(value, int | float):
            reached = value >= wanted if more else value <= wanted
            rows.append({"figure": figure, "measured": value, "asked": wanted, "reached": bool(reached)})
    for stage in PLANNED:
        over = result["stages"].get(stage, {}).get("measured_over_planned", {})
        for name, band in (("step_seconds", TIME_BAND), ("peak_memory_allocated", MEMORY_BAND)):
            if name in over:
                reached = 1 - band <= over[name] <= 1 + band
                figure = f"{stage}: {'time' if name == 'step_seconds' else 'memory'}, measured / planned"
                rows.append({"figure": figure, "measured": over[name], "asked": f"1 ± {band}", "reached": reached})
    return rows


def table(result: dict[str, Any]) -> str:
    lines = [f"{'stage':<18}{'status':<12}{'seconds':>8}  figures"]
    for name, entry in result["stages"].items():
        shown = entry.get("error") or entry.get("skipped") or figures(entry)
        lines.append(f"{name:<18}{entry['status']:<12}{entry.get('seconds', 0):>8.1f}  {shown}")
    lines.append("")
    for row in result["asked"]:
        mark = "reached" if row["reached"] else "short"
        lines.append(f"{row['figure']:<48}{row['measured']:>10.3g}  asked {row['asked']:<9}  {mark}")
    return "\n".join(lines)


def figures(entry: dict[str, Any]) -> str:
    names = ("p50_ms", "best_queries_per_s", "step_seconds", "rows_per_s", "fraction_of_peak", "agrees", "pytest")
    found = {name: entry.get("measured", {}).get(name) for name in names}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in found.items()
        if value is not None
    )


if __name__ == "__main__":
    run_recipe(main)
