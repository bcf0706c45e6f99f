"""The online path: a query in, its vector out, by the tokenizers library and ONNX Runtime or OpenVINO alone.

Neither torch nor transformers is imported, unless a folder has no ONNX files yet (they are exported, once) or the
model runs on a GPU.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from hlm import backends
from hlm.artefacts import MANIFEST, HlmError, check_graph, fingerprint_file
from hlm.backends import Run
from hlm.bulk import SideBySide, cut_by_length
from hlm.hub_cache import local_folder
from hlm.machine import instructions
from hlm.word_cache import WordCache

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

# Backend -> the precisions it runs.
BACKENDS = {
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "torch": ("fp32", "bf16", "fp16"),
}
# As hlm.json names them. "lookup", of small students: fp32 with fewer multiply-adds.
GRAPHS = {"fp32": "onnx/model.onnx", "lookup": "onnx/model_lookup.onnx", "int8": "onnx/model_quantized.onnx"}
CONFIGURATION = ("*.json", "*.txt")
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}
BF16_WEIGHTS = 10_000_000  # a smaller body is encoded sooner by ONNX Runtime in fp32, where queries come one by one
# Tokens of a batch, padding counted: what a core's cache holds, and what keeps a GPU busy.
CORE_BATCH_TOKENS, GPU_BATCH_TOKENS = 512, 32768
SIDE_BY_SIDE_TOKENS = 256  # fewer in a call are computed sooner by all cores together


class QueryEncoder:
    """Encodes queries with a student; made by `from_pretrained` or `from_model`. Safe to call from several threads.

    Attributes:
        dim: width of the vectors.
        backend, precision: what runs.
        prompt: what is put before every query.
        max_tokens: where queries are cut, the prompt and special tokens counted; None: nowhere.
        words: remembers how words were tokenised, see `WordCache`; None: this tokenizer needs the whole text.
        lookup: whether it looks up what the first layer projects of a token, instead of multiplying; and pads nothing.
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
        batch_tokens: int = CORE_BATCH_TOKENS,
        side_by_side: SideBySide | None = None,
        lookup: bool = False,
        fingerprint: str | None = None,
        teacher: str | None = None,
    ) -> None:
        self._tokenizer, self._run = tokenizer, run
        self.words = WordCache.of(tokenizer, prompt)
        self._batch_tokens, self._side_by_side = batch_tokens, side_by_side
        self.dim, self.backend, self.precision, self.prompt = dim, backend, precision, prompt
        self.max_tokens: int | None = (tokenizer.truncation or {}).get("max_length")
        self.lookup, self.fingerprint, self.teacher = lookup, fingerprint, teacher

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
                `~/.cache/hlm` (or $HLM_CACHE). Weights that lie beside a graph are mapped, not copied: give a newer
                student its place by renaming, do not write over the files of one that is served.
            backend: "onnxruntime", "openvino" (where it is installed) or "torch" (what runs on a GPU). "auto" takes
                torch for a GPU, OpenVINO for bf16 and else ONNX Runtime.
            precision: "fp32" (components within 1e-4 of sentence-transformers'), "bf16" or, under torch, "fp16" (within
                0.03), or "int8" (hlm.json says what it costs). "auto": bf16 on a GPU, and for ten million weights or
                more on a processor with bf16 instructions where OpenVINO is installed; else fp32.
            revision: branch, tag or commit of a Hub repository.
            device: "cpu" or a GPU such as "cuda:0"; None is the CPU.
            threads: that one call computes with on the CPU; None: all cores this process may use. Under ONNX Runtime
                many texts in one call are computed a core each, which loads the graph a second time.

        Raises:
            HlmError: nothing to load there, a missing or changed file, an unknown backend or precision, or one that
                does not go with the other or with the device.
        """
        auto = backend == precision == "auto"
        backend, precision = _choose(backend, precision, device)
        if threads is not None and threads < 1:
            raise HlmError(f"threads: expected 1 or more, found {threads}")
        threads = threads or _cores()
        folder = local_folder(id_or_folder, revision=revision, patterns=CONFIGURATION)
        if not (folder / "modules.json").is_file() or not (folder / "tokenizer.json").is_file():
            raise HlmError(
                f"expected a sentence-transformers folder with modules.json and tokenizer.json, found {folder}"
            )
        manifest = _json(folder / MANIFEST)
        if auto and backend == "onnxruntime" and _has_bf16() and _body_weights(folder) >= BF16_WEIGHTS:
            backend, precision = "openvino", "bf16"
        side_by_side, path = None, None
        if backend == "torch":
            weights = local_folder(id_or_folder, revision=revision, patterns=[*CONFIGURATION, "*.safetensors"])
            run, dim = backends.torch(weights, precision, device or "cpu")
        else:
            path = _graph(id_or_folder, revision, backend, precision, manifest.get("onnx") or {})
            if backend == "openvino":
                run, dim = backends.openvino(path, precision, threads)
            else:
                run, dim = backends.onnxruntime(path, threads)
                if threads > 1:
                    side_by_side = SideBySide(_one_core(path, run), threads)
        return cls(
            _tokenizer(folder),
            run,
            dim,
            prompt=_json(folder / "config_sentence_transformers.json").get("prompts", {}).get("query") or "",
            backend=backend,
            precision=precision,
            batch_tokens=GPU_BATCH_TOKENS if _on_gpu(device) else CORE_BATCH_TOKENS * threads,
            side_by_side=side_by_side,
            lookup=path is not None and path.name == Path(GRAPHS["lookup"]).name,
            fingerprint=manifest.get("encoder"),
            teacher=manifest.get("inputs", {}).get("teacher"),
        )

    @classmethod
    def from_model(cls, model: SentenceTransformer) -> QueryEncoder:
        """Serves a loaded model under torch, in its dtype and on its device: on a GPU by CUDA graphs. The model is put
        into eval mode.

        Raises:
            HlmError: a tokenizer that is none of the tokenizers library, or a dtype other than those of "torch".
        """
        kind = str(model.dtype).removeprefix("torch.")
        precision = next((name for name, dtype in backends.PRECISIONS.items() if dtype == kind), None)
        fast = getattr(model.tokenizer, "backend_tokenizer", None)
        if precision is None or fast is None:
            raise HlmError(
                f"expected a model in float32, bfloat16 or float16 with a tokenizer of the tokenizers library, found "
                f"{kind} and {type(model.tokenizer).__name__}"
            )
        run, dim = backends.torch_model(model)
        return cls(
            _cutting(Tokenizer.from_str(fast.to_str()), model.max_seq_length),
            run,
            dim,
            prompt=model.prompts.get("query") or "",
            backend="torch",
            precision=precision,
            batch_tokens=GPU_BATCH_TOKENS if _on_gpu(str(model.device)) else CORE_BATCH_TOKENS * _cores(),
        )

    def encode(self, texts: str | Sequence[str]) -> np.ndarray:
        """float32 (n, dim), rows L2-normalised, in the order of `texts`; a single str gives one row.

        Texts of similar length share a batch; on a CPU one text is never padded.

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
        if self.words:
            return self.words(texts)
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast([self.prompt + text for text in texts])]

    def encode_ids(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """As `encode`, of what `tokenise` gave."""
        if len(ids) == 1:
            return self._run(np.array(ids, dtype=np.int64), None)
        out = np.empty((len(ids), self.dim), dtype=np.float32)
        tokens = sum(map(len, ids))
        if self._side_by_side and tokens >= SIDE_BY_SIDE_TOKENS:
            share = min(CORE_BATCH_TOKENS, -(-tokens // self._side_by_side.threads))
            self._side_by_side(cut_by_length(ids, share, pads=not self.lookup), out)
        else:
            for batch in cut_by_length(ids, self._batch_tokens, pads=not self.lookup):
                out[batch.rows] = self._run(batch.ids, batch.mask)
        return out


def _choose(backend: str, precision: str, device: str | None) -> tuple[str, str]:
    """The backend and the precision that "auto" stands for."""
    on_gpu = _on_gpu(device)
    known = dict.fromkeys(precision for each in BACKENDS.values() for precision in each)
    for name, value, values in (("backend", backend, BACKENDS), ("precision", precision, known)):
        if value not in ("auto", *values):
            raise HlmError(f"{name}: expected one of auto, {', '.join(values)}, found {value!r}")
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


def _on_gpu(device: str | None) -> bool:
    return device is not None and not device.startswith("cpu")


def _has_bf16() -> bool:
    """Whether the processor has the instructions, and what uses them is installed."""
    return bool(BF16_INSTRUCTIONS & set(instructions() or ())) and importlib.util.find_spec("openvino") is not None


def _body_weights(folder: Path) -> int:
    """About how many weights lie outside the embedding tables; 0 where the configuration does not tell."""
    config = _json(folder / "config.json")
    hidden, ffn, layers = (config.get(name, 0) for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    return layers * hidden * (4 * hidden + 2 * ffn)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _graph(source: str | Path, revision: str | None, backend: str, precision: str, records: dict[str, Any]) -> Path:
    """The ONNX file, as `records` of hlm.json describe it; or one from the cache, where `source` has none."""
    names = ["fp32" if precision == "bf16" else precision]
    if (backend, precision) == ("onnxruntime", "fp32"):
        names.insert(0, "lookup")
    name = next((name for name in names if name in records), names[-1])
    file = GRAPHS[name]
    folder = local_folder(source, revision=revision, patterns=[*CONFIGURATION, file, f"{file}_data"])
    if name in records:
        check_graph(folder, records[name])
    elif not (folder / file).is_file():
        folder = local_folder(source, revision=revision, patterns=[*CONFIGURATION, "*.safetensors"])
        return _exported(folder, names)
    return folder / file


def _one_core(path: Path, run: Run) -> Callable[[], Run]:
    """Loads the graph once more, for one core; gives `run` where the file is no longer what it is now."""

    def state() -> tuple[int, int, int] | None:
        if not path.exists():
            return None
        found = path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    loaded = state()

    def load() -> Run:
        if state() == loaded:
            return backends.onnxruntime(path, 1)[0]
        logger.warning("%s was replaced since it was loaded: texts are encoded by what was, and slower", path)
        return run

    return load


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, cutting where sentence-transformers cuts and never padding."""
    limits = [
        _json(folder / "sentence_bert_config.json").get("max_seq_length"),
        _json(folder / "tokenizer_config.json").get("model_max_length"),
        _json(folder / "config.json").get("max_position_embeddings"),
    ]
    limit = min((int(limit) for limit in limits if limit), default=None)
    return _cutting(Tokenizer.from_file(str(folder / "tokenizer.json")), limit)


def _cutting(tokenizer: Tokenizer, limit: int | None) -> Tokenizer:
    tokenizer.no_padding()
    if limit:
        tokenizer.enable_truncation(limit)
    return tokenizer


def _exported(folder: Path, names: Sequence[str]) -> Path:
    """The first of these files that there is of a folder that has none, from the cache or made now."""
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.json"), *folder.rglob("*.safetensors")]):
        digest.update(f"{path.relative_to(folder)} {fingerprint_file(path)}".encode())
    cache = Path(os.environ.get("HLM_CACHE") or Path.home() / ".cache" / "hlm") / digest.hexdigest()[:16]
    if not (cache / GRAPHS["fp32"]).is_file():  # which takes its place last
        from hlm.export import export

        logger.info("%s has no %s: exporting it to %s, once", folder, GRAPHS[names[-1]], cache)
        export(str(folder), cache)
    return next(path for name in names if (path := cache / GRAPHS[name]).is_file())
