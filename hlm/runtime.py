"""The online path: a query in, its vector out, by the tokenizers library and ONNX Runtime alone.

Neither torch nor transformers is imported, unless a folder has no ONNX files yet: then they are exported, once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from hlm.artefacts import MANIFEST, HlmError, fingerprint_file

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "onnxruntime")
FILES = {"fp32": "onnx/model.onnx", "int8": "onnx/model_quantized.onnx"}
BATCH_TOKENS = 2048


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
        session: onnxruntime.InferenceSession,
        *,
        prompt: str = "",
        precision: str = "fp32",
        fingerprint: str | None = None,
        teacher: str | None = None,
    ) -> None:
        self._tokenizer, self._session, self._prompt = tokenizer, session, prompt
        self.dim: int = session.get_outputs()[1].shape[-1]
        self.backend, self.precision = "onnxruntime", precision
        self.fingerprint, self.teacher = fingerprint, teacher

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | Path,
        *,
        backend: str = "auto",
        precision: str = "auto",
        revision: str | None = None,
        threads: int | None = None,
    ) -> QueryEncoder:
        """Loads a student from a folder or the Hub.

        Args:
            id_or_folder: a sentence-transformers folder or Hub id. Without ONNX files it is exported, once, into
                `~/.cache/hlm` (or $HLM_CACHE).
            backend: "onnxruntime"; "auto" is the same.
            precision: "fp32" (vectors within 1e-4 of sentence-transformers') or "int8" (see hlm.json for what it
                costs); "auto" is fp32.
            revision: branch, tag or commit of a Hub repository.
            threads: that one call computes with; None leaves it to ONNX Runtime: all cores.

        Raises:
            HlmError: nothing to load there, a missing or changed file, or an unknown backend or precision.
        """
        precision = "fp32" if precision == "auto" else precision
        for name, value, known in (("backend", backend, BACKENDS), ("precision", precision, ("auto", *FILES))):
            if value not in known:
                raise HlmError(f"{name}: expected one of {', '.join(known)}, found {value!r}")
        if threads is not None and threads < 1:
            raise HlmError(f"threads: expected 1 or more, found {threads}")
        folder = _local(str(id_or_folder), revision)
        manifest = _json(folder / MANIFEST)
        path = folder / FILES[precision]
        record = manifest.get("onnx", {}).get(precision)
        if record is not None:
            found = fingerprint_file(path) if path.is_file() else "no file"
            if found != record["fingerprint"]:
                raise HlmError(
                    f"{path}: expected content {record['fingerprint']} as hlm.json says, found {found}; the file was "
                    "changed or cut short: fetch or export it again"
                )
        elif not path.is_file():
            path = _exported(folder, precision)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return cls(
            _tokenizer(folder),
            session,
            prompt=_json(folder / "config_sentence_transformers.json").get("prompts", {}).get("query") or "",
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
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, Sequence) or isinstance(texts, bytes):
            raise HlmError(f"expected texts to encode, found {type(texts).__name__}; pass a str or a list of str")
        for text in texts:
            if not isinstance(text, str):
                raise HlmError(f"expected texts to encode, found {type(text).__name__}; pass a str or a list of str")
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast([self._prompt + t for t in texts])]
        if len(ids) == 1:
            row = np.array(ids, dtype=np.int64)
            return self._run(row, np.ones_like(row))
        out = np.empty((len(ids), self.dim), dtype=np.float32)
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
        while order:
            count = max(1, BATCH_TOKENS // max(1, len(ids[order[0]])))
            rows, order = order[:count], order[count:]
            inputs = np.zeros((len(rows), len(ids[rows[0]])), dtype=np.int64)
            mask = np.zeros_like(inputs)
            for place, row in enumerate(rows):
                inputs[place, : len(ids[row])] = ids[row]
                mask[place, : len(ids[row])] = 1
            out[rows] = self._run(inputs, mask)
        return out

    def _run(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return self._session.run(["sentence_embedding"], {"input_ids": ids, "attention_mask": mask})[0]


class AsyncQueryEncoder:
    """Queries that arrive together are encoded together.

    Args:
        encoder: what encodes, in one thread of its own.
        window_ms: how long the first query of a batch waits for others.
        max_texts: a batch is closed at so many texts, window or not.
        max_waiting: callers beyond these wait for room before they are queued.
    """

    def __init__(
        self, encoder: QueryEncoder, *, window_ms: float = 1.0, max_texts: int = 64, max_waiting: int = 4096
    ) -> None:
        if window_ms < 0 or max_texts < 1 or max_waiting < 1:
            raise HlmError(
                f"expected window_ms from 0 and max_texts and max_waiting from 1, found {window_ms}, {max_texts} and "
                f"{max_waiting}"
            )
        self._encoder, self._window, self._max_texts = encoder, window_ms / 1e3, max_texts
        self._queue: asyncio.Queue[tuple[str, asyncio.Future[np.ndarray]] | None] = asyncio.Queue(max_waiting)
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
        future: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        await self._queue.put((text, future))
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
            batch, deadline = [], None
            while len(batch) < self._max_texts:
                try:
                    left = None if deadline is None else max(0.0, deadline - loop.time())
                    item = self._queue.get_nowait() if left == 0 else await asyncio.wait_for(self._queue.get(), left)
                except (TimeoutError, asyncio.QueueEmpty):
                    break
                if item is None:
                    last = True
                    break
                batch.append(item)
                deadline = deadline or loop.time() + self._window
            batch = [(text, future) for text, future in batch if not future.done()]  # a cancelled one costs nothing
            if not batch:
                continue
            try:
                vectors = await loop.run_in_executor(self._thread, self._encoder.encode, [text for text, _ in batch])
            except Exception as error:  # goes to every caller of this batch; the next batch is served
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), vector in zip(batch, vectors, strict=True):
                if not future.done():
                    future.set_result(vector)


def _local(source: str, revision: str | None) -> Path:
    folder = Path(source)
    if not folder.is_dir():
        if source.startswith((".", "/")) or source.count("/") > 1:
            raise HlmError(f"expected a model folder at {source}, found none; run the step that writes it")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=["*.json", "*.txt", "onnx/*"]))
            if not list(folder.glob("onnx/*.onnx")):
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
