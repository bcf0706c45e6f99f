"""Systems under measurement: a query encoder as a callable, loaded by path or from an object, and its cold start.

    python -m hlm.benchmark.systems '{"settings": {"model": "runs/student"}, "query": "red shoe", "started": 0}'

is the fresh process that `cold_start` starts. Only what a backend needs is imported: an import is part of a cold start.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlm.artefacts import HlmError
from hlm.encoders.folder import GRAPHS, EncoderFolder
from hlm.machine import other_load, peak_memory_mib, read_counters
from hlm.processes import end_with_parent

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

SENTENCE_TRANSFORMERS, HLM = "sentence-transformers", "hlm"
COMPILED, ONNX_RUNTIME, OPENVINO = "torch.compile", "onnxruntime", "openvino"
BACKENDS = (SENTENCE_TRANSFORMERS, HLM, ONNX_RUNTIME, OPENVINO, COMPILED)
TORCH_BACKENDS = (SENTENCE_TRANSFORMERS, COMPILED)  # the model is a SentenceTransformer


@dataclass(frozen=True)
class System:
    """What is measured: texts in, float32 (len(texts), dim) out, facts for the report (JSON-able); the number of tokens
    of each text as the model reads it, where that is known; and what makes it forget the words that it has tokenised,
    where it remembers them."""

    encode: Callable[[list[str]], np.ndarray]
    facts: dict[str, Any] = field(default_factory=dict)
    count_tokens: Callable[[list[str]], list[int]] | None = None
    forget: Callable[[], None] | None = None


def load_system(
    model: str,
    *,
    backend: str = SENTENCE_TRANSFORMERS,
    prompt_name: str | None = "query",
    dtype: str = "float32",
    engine: str = "auto",
    precision: str = "auto",
    device: str | None = None,
    index: str | None = None,
    k: int = 100,
) -> System:
    """Loads a query encoder by path, and with `index` what it searches.

    Args:
        model: folder, Hub id or `package:...`, as in `load_encoder`; a folder with onnx/model.onnx for "onnxruntime"
            and "openvino".
        backend: "sentence-transformers", measured through `SentenceTransformer.encode`; "torch.compile", the same with
            its backbone compiled; "hlm", through `hlm.QueryEncoder`; "onnxruntime" or "openvino": what one writes
            around a session of these, see `onnx_system`.
        prompt_name, dtype, device: of sentence-transformers; a model without that prompt gets none. Of the two
            sessions `prompt_name` alone.
        engine, precision: what QueryEncoder calls `backend` and `precision`.
        index: folder of an index: every call searches it for `k` ads, see `hlm.benchmark.text_to_ads`.

    Raises:
        HlmError: an unknown backend, one that is not installed, or what loading refuses.
    """
    if index is not None:
        from hlm.benchmark.text_to_ads import with_index

        named = {"prompt_name": prompt_name, "dtype": dtype, "engine": engine, "precision": precision, "device": device}
        system = load_system(model, backend=backend, **named)  # type: ignore[arg-type]
        encode, searched = with_index(system.encode, model, index, k)
        return replace(system, encode=encode, facts=system.facts | {"index": searched})
    if backend not in BACKENDS:
        raise HlmError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    if backend in TORCH_BACKENDS:
        from hlm.encoders.loading import load_encoder

        encoder = load_encoder(model, dtype=dtype, device=device)
        return sentence_transformers_system(encoder, prompt_name, compiled=backend == COMPILED)
    if model.startswith("package:"):
        from hlm.encoders.loading import resolve  # brings torch, which the runtime may do without

        model = resolve(model)
    if backend != HLM:
        return onnx_system(model, backend, prompt_name)
    encoder = query_encoder_class().from_pretrained(model, backend=engine, precision=precision, device=device)
    made = query_encoder_system(encoder)

    def count_tokens(texts: list[str]) -> list[int]:
        from transformers import AutoTokenizer  # not before it is asked for: the runtime does without

        tokenizer, prompt = AutoTokenizer.from_pretrained(model), EncoderFolder(model).prompt()
        return list(map(len, tokenizer([prompt + text for text in texts], truncation=True)["input_ids"]))

    return replace(made, count_tokens=count_tokens if Path(model).is_dir() else None)


def query_encoder_class() -> Any:
    try:
        from hlm.serving.query_encoder import QueryEncoder
    except ImportError as error:
        raise HlmError(
            f"backend 'hlm' needs hlm.serving.query_encoder, which does not import here ({error}); install what it "
            f"names, or measure under backend '{SENTENCE_TRANSFORMERS}'"
        ) from error
    return QueryEncoder


def sentence_transformers_system(
    model: SentenceTransformer, prompt_name: str | None = "query", *, compiled: bool = False
) -> System:
    """`SentenceTransformer.encode` as a user calls it: numpy out, one batch a call, no progress bar.

    Args:
        compiled: the backbone runs under `torch.compile` with dynamic shapes. The first calls compile, which takes
            minutes where inductor's cache on disk does not have the kernels yet.

    Raises:
        HlmError: `compiled` without the C++ compiler that inductor calls for a model on the CPU.
    """
    import torch

    from hlm.encoders.loading import prompt_of, tokenise
    from hlm.encoders.pruning import parameter_counts

    prompt = prompt_of(model, prompt_name)
    total, without_embeddings = parameter_counts(model)
    if compiled:
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if model.device.type == "cpu" and shutil.which(compiler) is None:
            raise HlmError(
                f"backend '{COMPILED}' needs a C++ compiler for a model on the CPU, found no '{compiler}'; install one "
                "or name it in CXX"
            )
        # `Module.compile` would not do: sentence-transformers calls `forward` itself.
        model[0].model = torch.compile(model[0].model, dynamic=True)

    def encode(texts: list[str]) -> np.ndarray:
        return model.encode(texts, prompt=prompt or None, batch_size=len(texts), show_progress_bar=False)

    facts = {
        "backend": COMPILED if compiled else SENTENCE_TRANSFORMERS,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "prompt": prompt,
        "params_total": total,
        "params_non_embedding": without_embeddings,
    }
    return System(encode, facts, lambda texts: list(map(len, tokenise(model, texts, prompt))))


def onnx_system(model: str, backend: str, prompt_name: str | None = "query") -> System:
    """What one writes around an ONNX file, after Optimum's `ORTModelForFeatureExtraction` and its OpenVINO sibling:
    transformers' tokenizer with padding, the session with its default options, pooling and norm in numpy.

    Args:
        model: a sentence-transformers folder with onnx/model.onnx, whose output `last_hidden_state` is read.
        backend: "onnxruntime" or "openvino".

    Raises:
        HlmError: no such file, a model of more than a transformer, pooling (mean, cls or last token) and
            normalisation, or a backend that is not installed.
    """
    folder = Path(model)
    if not (folder / GRAPHS["fp32"]).is_file():
        raise HlmError(
            f"backend '{backend}' needs {folder / GRAPHS['fp32']}, found none; export the model with recipes/export.py"
        )
    import numpy as np
    from transformers import AutoTokenizer

    files = EncoderFolder(folder)
    mode, prompt = _pooling(files), files.prompt(prompt_name)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), padding_side="right")
    run, inputs = _session(folder / GRAPHS["fp32"], backend)

    def encode(texts: list[str]) -> np.ndarray:
        tokens = tokenizer([prompt + text for text in texts], padding=True, truncation=True, return_tensors="np")
        hidden = run({name: tokens[name] for name in inputs})
        lengths = tokens["attention_mask"].sum(axis=1)
        if mode == "mean":
            mask = tokens["attention_mask"][:, :, None].astype(np.float32)
            pooled = (hidden * mask).sum(axis=1) / lengths[:, None]
        else:
            pooled = hidden[np.arange(len(texts)), lengths - 1 if mode == "lasttoken" else 0]
        return (pooled / np.linalg.norm(pooled, axis=1, keepdims=True)).astype(np.float32)

    def count_tokens(texts: list[str]) -> list[int]:
        return list(map(len, tokenizer([prompt + text for text in texts], truncation=True)["input_ids"]))

    return System(encode, {"backend": backend, "dtype": "float32", "device": "cpu", "prompt": prompt}, count_tokens)


def _session(path: Path, backend: str) -> tuple[Callable[[dict[str, np.ndarray]], np.ndarray], list[str]]:
    """Inputs by name -> `last_hidden_state`, and the names. Neither computes another output that the file has."""
    try:
        if backend == OPENVINO:
            import openvino

            graph = openvino.Core().read_model(path)
            output = graph.output("last_hidden_state")
            network = openvino.compile_model(openvino.Model([output], graph.get_parameters()), "CPU")
            names = [part.get_any_name() for part in network.inputs]
            return lambda tokens: network(tokens)[0], names
        import onnxruntime
    except ImportError as error:
        raise HlmError(f"backend '{backend}' does not import here ({error}); pip install {backend}") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    options = onnxruntime.RunOptions()
    options.only_execute_path_to_fetches = True
    names = [part.name for part in session.get_inputs()]
    return lambda tokens: session.run(["last_hidden_state"], tokens, options)[0], names


def _pooling(files: EncoderFolder) -> str:
    """One of "mean", "cls" and "lasttoken"."""
    kinds = [module.name for module in files.modules()]
    if kinds not in (["Transformer", "Pooling", "Normalize"], ["Transformer", "Pooling"]):
        raise HlmError(
            f"{files.folder}: expected Transformer, Pooling, Normalize, found {', '.join(kinds)}; use backend 'hlm'"
        )
    mode, known = files.pooling(), ("mean", "cls", "lasttoken")
    if mode not in known:
        raise HlmError(f"{files.folder}: expected pooling of {', '.join(known)}, found {mode}; use backend 'hlm'")
    return mode


def query_encoder_system(encoder: Any) -> System:
    """Anything with `.encode(list[str]) -> float32 (n, dim)`, an `hlm.serving.query_encoder.QueryEncoder` above all."""
    chosen = {name: getattr(encoder, name, None) for name in ("backend", "precision")}
    facts = {"backend": HLM, "engine": chosen["backend"], "precision": chosen["precision"]}
    facts = {name: value for name, value in facts.items() if isinstance(value, str)}
    facts |= {"lookup": True} if getattr(encoder, "lookup", False) is True else {}
    words = getattr(encoder, "words", None)
    return System(encoder.encode, facts, forget=words.forget if words else None)


def cold_start(settings: dict[str, Any], query: str) -> dict[str, Any]:
    """A fresh process imports, loads and encodes one query; the files may be in the page cache.

    Args:
        settings: arguments of `load_system`.

    Returns:
        {"total_s": from the start of the process to the first vector, "import_s", "load_s", "first_query_s",
        "peak_memory_mib": resident, of that process, "peak_gpu_memory_mib" where it used CUDA, "other_load"}.

    Raises:
        HlmError: the process failed.
    """
    home = str(Path(__file__).resolve().parents[2])  # the same hlm as this one, installed or not
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    before = read_counters()
    task = {"settings": settings, "query": query, "started": time.monotonic(), "parent": os.getpid()}
    done = subprocess.run(
        [sys.executable, "-m", "hlm.benchmark.systems", json.dumps(task)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    after = read_counters()
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise HlmError(f"cold start of {settings.get('model')}: the process ended with {done.returncode}: {last}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"other_load": other_load(before, after, children_s=found.pop("cpu_s"))}


def cold_starts(
    systems: Mapping[str, dict[str, Any]], query: str, repeats: int, *, max_other_load: float = 0.05
) -> dict[str, dict[str, Any]]:
    """`repeats` cold starts of each system, taking turns.

    Args:
        max_other_load: above this share (0 ... 1) of CPU time taken by others, a start is contaminated.

    Returns:
        {system: the median of each figure of `cold_start` over the clean starts, or over all where there is no clean
        one; "processes" and "contaminated": how many there were; "over": "clean" or "all"; and the highest
        "other_load"}; nothing for 0 repeats.
    """
    from hlm.progress import progress  # not above: a cold start runs this module, and would wait for tqdm

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    turns = [name for _ in range(repeats) for name in systems]
    for name in progress(turns, what="cold starts", unit="start"):
        found[name].append(cold_start(systems[name], query))
    medians = {}
    for name, starts in found.items():
        if starts:
            loads = [start.pop("other_load") for start in starts]
            clean = [start for start, load in zip(starts, loads, strict=True) if (load or 0) <= max_other_load]
            medians[name] = {key: statistics.median(start[key] for start in clean or starts) for key in starts[0]}
            medians[name] |= {"processes": len(starts), "contaminated": len(starts) - len(clean)}
            medians[name] |= {"over": "clean" if clean else "all", "other_load": None if None in loads else max(loads)}
    return medians


def main(task: dict[str, Any]) -> dict[str, Any]:
    """In the fresh process; `started` is the parent's monotonic clock, which all processes share."""
    entered = time.monotonic()
    backend = task["settings"].get("backend", SENTENCE_TRANSFORMERS)
    if backend in TORCH_BACKENDS:
        import hlm.encoders.loading  # noqa: F401 - only its time counts here
    elif backend == HLM:
        query_encoder_class()
    elif backend in (ONNX_RUNTIME, OPENVINO):
        importlib.import_module(backend)
        importlib.import_module("transformers").AutoTokenizer  # noqa: B018 - transformers imports by name
    imported = time.monotonic()
    system = load_system(**task["settings"])
    loaded = time.monotonic()
    system.encode([task["query"]])
    ready = time.monotonic()
    found = {
        "total_s": ready - task["started"],
        "import_s": imported - entered,
        "load_s": loaded - imported,
        "first_query_s": ready - loaded,
        "peak_memory_mib": peak_memory_mib(),
        "cpu_s": time.process_time(),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        found["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return found


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if "parent" in given:  # a measurement that is ended leaves no process behind
        end_with_parent(given["parent"])
    print(json.dumps(main(given)))
