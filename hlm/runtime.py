"""The online path: a query in, its vector out, by the tokenizers library and ONNX Runtime or OpenVINO alone.

Neither torch nor transformers is imported, unless a folder has no ONNX files yet (they are exported, once) or the
model runs on a GPU.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from hlm.artefacts import MANIFEST, HlmError, fingerprint_file
from hlm.machine import instructions

logger = logging.getLogger(__name__)

# Backend -> the precisions it runs.
BACKENDS = {
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "torch": ("fp32", "bf16", "fp16"),
}
FILES = {"fp32": "onnx/model.onnx", "bf16": "onnx/model.onnx", "int8": "onnx/model_quantized.onnx"}
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}
BATCH_TOKENS, ENOUGH_TOKENS = 2048, 64
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # what a GPU pads to: few shapes, few kernels to choose

# (input_ids, attention_mask), both int64 (rows, tokens) -> float32 (rows, dim), normalised
Run = Callable[[np.ndarray, np.ndarray], np.ndarray]


class QueryEncoder:
    """Encodes queries with a published student; made by `from_pretrained`. Safe to call from several threads.

    Attributes:
        dim: width of the vectors.
        backend, precision: what runs.
        fingerprint, teacher: of the student and of the teacher it was aligned to, from hlm.json; None without one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        run: Run,
        dim: int,
        *,
        prompt: str = "",
        backend: str = "onnxruntime",
        precision: str = "fp32",
        fingerprint: str | None = None,
        teacher: str | None = None,
    ) -> None:
        self._tokenizer, self._run, self._prompt = tokenizer, run, prompt
        self.dim, self.backend, self.precision = dim, backend, precision
        self.fingerprint, self.teacher = fingerprint, teacher

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | Path,
        *,
        backend: str = "auto",
        precision: str = "auto",
        revision: str | None = None,
        device: str | None = None,
        threads: int | None = None,
    ) -> QueryEncoder:
        """Loads a student from a folder or the Hub.

        Args:
            id_or_folder: a sentence-transformers folder or Hub id. Without ONNX files it is exported, once, into
                `~/.cache/hlm` (or $HLM_CACHE).
            backend: "onnxruntime", "openvino" (where it is installed) or "torch" (what runs on a GPU). "auto" takes
                torch for a GPU, OpenVINO for bf16 and else ONNX Runtime.
            precision: "fp32" (vectors within 1e-4 of sentence-transformers'), "bf16", "fp16" (torch alone) or "int8"
                (hlm.json says what it costs). "auto": bf16 on a GPU, and on a processor with bf16 instructions where
                OpenVINO is installed; else fp32.
            revision: branch, tag or commit of a Hub repository.
            device: "cpu" or a GPU such as "cuda:0"; None is the CPU.
            threads: that one call computes with on the CPU; None: all cores this process may use.

        Raises:
            HlmError: nothing to load there, a missing or changed file, an unknown backend or precision, or one that
                does not go with the other or with the device.
        """
        backend, precision = _choose(backend, precision, device)
        if threads is not None and threads < 1:
            raise HlmError(f"threads: expected 1 or more, found {threads}")
        threads = threads or _cores()
        folder = _local(str(id_or_folder), revision, weights=backend == "torch")
        manifest = _json(folder / MANIFEST)
        if backend == "torch":
            run, dim = _torch(folder, precision, device or "cpu")
        else:
            path = _onnx_file(folder, precision, manifest)
            run, dim = _onnxruntime(path, threads) if backend == "onnxruntime" else _openvino(path, precision, threads)
        return cls(
            _tokenizer(folder),
            run,
            dim,
            prompt=_json(folder / "config_sentence_transformers.json").get("prompts", {}).get("query") or "",
            backend=backend,
            precision=precision,
            fingerprint=manifest.get("encoder"),
            teacher=manifest.get("inputs", {}).get("teacher"),
        )

    def encode(self, texts: str | Sequence[str]) -> np.ndarray:
        """float32 (n, dim), rows L2-normalised, in the order of `texts`; a single str gives one row.

        Texts of similar length share a batch of at most 2,048 padded tokens; one text is never padded.

        Raises:
            HlmError: a text that is no str.
        """
        return self.encode_ids(self.tokenise([texts] if isinstance(texts, str) else texts))

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text after the query prompt, special tokens among them, cut where the model cuts.

        Raises:
            HlmError: a text that is no str.
        """
        if not isinstance(texts, Sequence) or isinstance(texts, bytes):
            raise HlmError(f"expected texts to encode, found {type(texts).__name__}; pass a str or a list of str")
        for text in texts:
            if not isinstance(text, str):
                raise HlmError(f"expected texts to encode, found {type(text).__name__}; pass a str or a list of str")
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast([self._prompt + text for text in texts])]

    def encode_ids(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """As `encode`, of what `tokenise` gave."""
        if len(ids) == 1:
            row = np.array(ids, dtype=np.int64)
            return self._run(row, np.ones_like(row))
        out = np.empty((len(ids), self.dim), dtype=np.float32)
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
        while order:
            longest = max(1, len(ids[order[0]]))
            count = max(1, BATCH_TOKENS // longest)
            # A text that would be padded by a third opens the next batch, once this one is large enough.
            full = -(-ENOUGH_TOKENS // longest)
            count = next(
                (n for n in range(full, min(count, len(order))) if 4 * len(ids[order[n]]) < 3 * longest), count
            )
            rows, order = order[:count], order[count:]
            inputs = np.zeros((len(rows), len(ids[rows[0]])), dtype=np.int64)
            mask = np.zeros_like(inputs)
            for place, row in enumerate(rows):
                inputs[place, : len(ids[row])] = ids[row]
                mask[place, : len(ids[row])] = 1
            out[rows] = self._run(inputs, mask)
        return out


class AsyncQueryEncoder:
    """Queries that arrive together are encoded together.

    Args:
        encoder: what encodes, in one thread of its own.
        window_ms: how long the first query of a batch waits for others.
        max_tokens: a batch is closed where it holds so many tokens, window or not.
        max_waiting: callers beyond these wait for room before they are queued.
    """

    def __init__(
        self, encoder: QueryEncoder, *, window_ms: float = 1.0, max_tokens: int = 512, max_waiting: int = 4096
    ) -> None:
        if window_ms < 0 or max_tokens < 1 or max_waiting < 1:
            raise HlmError(
                f"expected window_ms from 0 and max_tokens and max_waiting from 1, found {window_ms}, {max_tokens} and "
                f"{max_waiting}"
            )
        self._encoder, self._window, self._max_tokens = encoder, window_ms / 1e3, max_tokens
        self._queue: asyncio.Queue[tuple[list[int], asyncio.Future[np.ndarray]] | None] = asyncio.Queue(max_waiting)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hlm-encoder")
        self._worker: asyncio.Task[None] | None = None
        self._closed = False

    async def __aenter__(self) -> AsyncQueryEncoder:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def encode(self, text: str) -> np.ndarray:
        """float32 (dim,), L2-normalised.

        Raises:
            HlmError: a text that is no str, or an encoder that was closed.
        """
        if self._closed:
            raise HlmError("expected an open AsyncQueryEncoder, found a closed one; make a new one")
        if not isinstance(text, str):  # refused here: one caller's mistake must not fail the others of its batch
            raise HlmError(f"expected a text to encode, found {type(text).__name__}; pass a str")
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        (ids,) = self._encoder.tokenise([text])  # microseconds, so not worth a thread
        future: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        await self._queue.put((ids, future))
        return await future

    async def close(self) -> None:
        """Encodes what is queued, then stops."""
        self._closed = True
        if self._worker is not None:
            await self._queue.put(None)
            await self._worker
            self._worker = None
        self._thread.shutdown()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        last = False
        while not last:
            batch, tokens, deadline = [], 0, None
            while tokens < self._max_tokens:
                try:
                    left = None if deadline is None else max(0.0, deadline - loop.time())
                    item = self._queue.get_nowait() if left == 0 else await asyncio.wait_for(self._queue.get(), left)
                except (TimeoutError, asyncio.QueueEmpty):
                    break
                if item is None:
                    last = True
                    break
                batch.append(item)
                tokens += len(item[0])
                deadline = deadline or loop.time() + self._window
            batch = [(ids, future) for ids, future in batch if not future.done()]  # a cancelled one costs nothing
            if not batch:
                continue
            try:
                vectors = await loop.run_in_executor(self._thread, self._encoder.encode_ids, [ids for ids, _ in batch])
            except Exception as error:  # goes to every caller of this batch; the next batch is served
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), vector in zip(batch, vectors, strict=True):
                if not future.done():
                    future.set_result(vector)


def _choose(backend: str, precision: str, device: str | None) -> tuple[str, str]:
    """The backend and the precision that "auto" stands for."""
    on_gpu = device is not None and not device.startswith("cpu")
    known = dict.fromkeys(precision for each in BACKENDS.values() for precision in each)
    for name, value, values in (("backend", backend, BACKENDS), ("precision", precision, known)):
        if value not in ("auto", *values):
            raise HlmError(f"{name}: expected one of auto, {', '.join(values)}, found {value!r}")
    if backend == precision == "auto" and not on_gpu and _has_bf16() and importlib.util.find_spec("openvino"):
        return "openvino", "bf16"
    if backend == "auto":
        backend = "torch" if on_gpu or precision == "fp16" else "openvino" if precision == "bf16" else "onnxruntime"
    if on_gpu and backend != "torch":
        raise HlmError(f"device: expected cpu for backend '{backend}', found {device}; a GPU is for backend 'torch'")
    if precision == "auto":
        precision = "bf16" if on_gpu else "fp32"
    if precision not in BACKENDS[backend]:
        raise HlmError(
            f"precision: expected {' or '.join(BACKENDS[backend])} under backend '{backend}', found {precision!r}"
        )
    return backend, precision


def _has_bf16() -> bool:
    return bool(BF16_INSTRUCTIONS & set(instructions() or ()))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _onnxruntime(path: Path, threads: int) -> tuple[Run, int]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return session.run(["sentence_embedding"], {"input_ids": ids, "attention_mask": mask})[0]

    return run, session.get_outputs()[1].shape[-1]


def _openvino(path: Path, precision: str, threads: int) -> tuple[Run, int]:
    try:
        import openvino
    except ImportError as error:
        raise HlmError("backend 'openvino' needs openvino, found none; pip install 'hlm[openvino]'") from error
    hint = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"}
    settings = hint | {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    model = openvino.Core().compile_model(str(path), "CPU", settings)
    output = model.output("sentence_embedding")
    own = threading.local()  # a request runs one call at a time

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if not hasattr(own, "request"):
            own.request = model.create_infer_request()
        own.request.infer({"input_ids": ids, "attention_mask": mask}, share_inputs=True)
        return own.request.get_tensor(output).data.copy()

    return run, output.get_partial_shape()[1].get_length()


def _torch(folder: Path, precision: str, device: str) -> tuple[Run, int]:
    import torch

    from hlm.encoders import load_encoder

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise HlmError(f"device: expected a GPU that this torch ({torch.__version__}) sees, found none; device='cpu'")
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    model = load_encoder(str(folder), device=device, dtype=names[precision])

    @torch.inference_mode()
    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if model.device.type != "cpu":
            wide = next((length for length in LENGTHS if length >= ids.shape[1]), ids.shape[1])
            ids, mask = (np.pad(each, ((0, 0), (0, wide - each.shape[1]))) for each in (ids, mask))
        tensors = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        features = {name: tensor.to(model.device, non_blocking=True) for name, tensor in tensors.items()}
        vectors = model(features)["sentence_embedding"].float()
        return torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy()  # bf16 leaves lengths off by 1e-2

    return run, model.get_embedding_dimension()


def _onnx_file(folder: Path, precision: str, manifest: dict[str, Any]) -> Path:
    """The folder's ONNX file, as hlm.json describes it; or one from the cache, where the folder has none."""
    path = folder / FILES[precision]
    record = manifest.get("onnx", {}).get("fp32" if precision == "bf16" else precision)
    if record is not None:
        found = fingerprint_file(path) if path.is_file() else "no file"
        if found != record["fingerprint"]:
            raise HlmError(
                f"{path}: expected content {record['fingerprint']} as hlm.json says, found {found}; the file was "
                "changed or cut short: fetch or export it again"
            )
        return path
    return path if path.is_file() else _exported(folder, precision)


def _local(source: str, revision: str | None, *, weights: bool = False) -> Path:
    folder = Path(source)
    if not folder.is_dir():
        if source.startswith((".", "/")) or source.count("/") > 1:
            raise HlmError(f"expected a model folder at {source}, found none; run the step that writes it")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=["*.json", "*.txt", "onnx/*"]))
            if weights or not list(folder.glob("onnx/*.onnx")):
                folder = Path(snapshot_download(source, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
        except (OSError, ValueError) as error:
            raise HlmError(f"could not fetch {source}: {error}; expected a folder or a reachable Hub id") from error
    if not (folder / "modules.json").is_file() or not (folder / "tokenizer.json").is_file():
        raise HlmError(f"expected a sentence-transformers folder with modules.json and tokenizer.json, found {folder}")
    return folder


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, cutting where sentence-transformers cuts and never padding."""
    limits = [
        _json(folder / "sentence_bert_config.json").get("max_seq_length"),
        _json(folder / "tokenizer_config.json").get("model_max_length"),
        _json(folder / "config.json").get("max_position_embeddings"),
    ]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    limit = min((int(limit) for limit in limits if limit), default=None)
    if limit:
        tokenizer.enable_truncation(limit)
    return tokenizer


def _exported(folder: Path, precision: str) -> Path:
    """The ONNX file of a folder that has none, from the cache or made now."""
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.json"), *folder.rglob("*.safetensors")]):
        digest.update(f"{path.relative_to(folder)} {fingerprint_file(path)}".encode())
    cache = Path(os.environ.get("HLM_CACHE") or Path.home() / ".cache" / "hlm") / digest.hexdigest()[:16]
    if not (cache / FILES[precision]).is_file():
        from hlm.export import export

        logger.info("%s has no %s: exporting it to %s, once", folder, FILES[precision], cache)
        export(str(folder), cache)
    return cache / FILES[precision]
