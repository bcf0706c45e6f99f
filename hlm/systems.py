"""Systems under measurement: a query encoder as a callable, loaded by path or from an object, and its cold start.

    python -m hlm.systems '{"settings": {"model": "runs/quickstart/student"}, "query": "red shoe", "started": 0}'

is the fresh process that `cold_start` starts. Only what a backend needs is imported: an import is part of a cold start.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlm.artefacts import HlmError
from hlm.machine import other_load, peak_memory_mib, read_counters

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

SENTENCE_TRANSFORMERS, HLM = "sentence-transformers", "hlm"
BACKENDS = (SENTENCE_TRANSFORMERS, HLM)


@dataclass(frozen=True)
class System:
    """What is measured: texts in, float32 (len(texts), dim) out, and facts for the report (JSON-able)."""

    encode: Callable[[list[str]], np.ndarray]
    facts: dict[str, Any] = field(default_factory=dict)


def load_system(
    model: str,
    *,
    backend: str = SENTENCE_TRANSFORMERS,
    prompt_name: str | None = "query",
    dtype: str = "float32",
    engine: str = "auto",
    precision: str = "auto",
    device: str | None = None,
) -> System:
    """Loads a query encoder by path.

    Args:
        model: folder, Hub id or `package:...`, as in `hlm.encoders.load_encoder`.
        backend: "sentence-transformers", measured through `SentenceTransformer.encode`, or "hlm", through
            `hlm.runtime.QueryEncoder`.
        prompt_name, dtype, device: of sentence-transformers; a model without that prompt gets none.
        engine, precision: what QueryEncoder calls `backend` and `precision`.

    Raises:
        HlmError: an unknown backend, one that is not installed, or what loading refuses.
    """
    if backend not in BACKENDS:
        raise HlmError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    if backend == SENTENCE_TRANSFORMERS:
        from hlm.encoders import load_encoder

        return sentence_transformers_system(load_encoder(model, dtype=dtype, device=device), prompt_name)
    if model.startswith("package:"):
        from hlm.encoders import resolve  # brings torch, which the runtime may do without

        model = resolve(model)
    return query_encoder_system(query_encoder_class().from_pretrained(model, backend=engine, precision=precision))


def query_encoder_class() -> Any:
    try:
        from hlm.runtime import QueryEncoder
    except ImportError as error:
        raise HlmError(
            f"backend 'hlm' needs hlm.runtime, which does not import here ({error}); install what it names, or measure "
            f"under backend '{SENTENCE_TRANSFORMERS}'"
        ) from error
    return QueryEncoder


def sentence_transformers_system(model: SentenceTransformer, prompt_name: str | None = "query") -> System:
    """`SentenceTransformer.encode` as a user calls it: numpy out, one batch a call, no progress bar."""
    from hlm.encoders import prompt_of
    from hlm.pruning import parameter_counts

    prompt = prompt_of(model, prompt_name)

    def encode(texts: list[str]) -> np.ndarray:
        return model.encode(texts, prompt=prompt or None, batch_size=len(texts), show_progress_bar=False)

    total, without_embeddings = parameter_counts(model)
    facts = {
        "backend": SENTENCE_TRANSFORMERS,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "prompt": prompt,
        "params_total": total,
        "params_non_embedding": without_embeddings,
    }
    return System(encode, facts)


def query_encoder_system(encoder: Any) -> System:
    """Anything with `.encode(list[str]) -> float32 (n, dim)`, an `hlm.runtime.QueryEncoder` above all."""
    chosen = {name: getattr(encoder, name, None) for name in ("backend", "precision")}
    facts = {"backend": HLM, "engine": chosen["backend"], "precision": chosen["precision"]}
    return System(encoder.encode, {name: value for name, value in facts.items() if isinstance(value, str)})


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
    home = str(Path(__file__).resolve().parent.parent)  # the same hlm as this one, installed or not
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    before = read_counters()
    task = {"settings": settings, "query": query, "started": time.monotonic()}
    done = subprocess.run(
        [sys.executable, "-m", "hlm.systems", json.dumps(task)],
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


def cold_starts(systems: Mapping[str, dict[str, Any]], query: str, repeats: int) -> dict[str, dict[str, Any]]:
    """`repeats` cold starts of each system, taking turns.

    Returns:
        {system: the median of each figure of `cold_start`, "processes", and the highest "other_load"}; nothing for
        0 repeats.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name, settings in systems.items():
            found[name].append(cold_start(settings, query))
    medians = {}
    for name, starts in found.items():
        if starts:
            loads = [start.pop("other_load") for start in starts]
            medians[name] = {key: statistics.median(start[key] for start in starts) for key in starts[0]}
            medians[name] |= {"processes": len(starts), "other_load": None if None in loads else max(loads)}
    return medians


def main(task: dict[str, Any]) -> dict[str, Any]:
    """In the fresh process; `started` is the parent's monotonic clock, which all processes share."""
    entered = time.monotonic()
    if task["settings"].get("backend", SENTENCE_TRANSFORMERS) == SENTENCE_TRANSFORMERS:
        import hlm.encoders  # noqa: F401 - only its time counts here
    else:
        query_encoder_class()
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
    print(json.dumps(main(json.loads(sys.argv[1]))))
