"""The online path: a query in, its vector out, by the tokenizers library and ONNX Runtime or OpenVINO alone.

Neither torch nor transformers is imported, unless a folder has no ONNX files yet (they are exported, once) or the
model runs on a GPU.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from hlm.artefacts import MANIFEST, HlmError
from hlm.encoders.folder import GRAPHS, cutting
from hlm.integrity import file_state, read_steadily
from hlm.machine import cores, instructions
from hlm.serving import engines
from hlm.serving.bulk import Batch, Run, SideBySide, cut_by_length
from hlm.serving.long_texts import first_ids, whole_characters
from hlm.serving.student_files import StudentFiles
from hlm.serving.word_cache import WordCache
from hlm.texts import as_texts, well_formed

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

# Backend -> the precisions it runs.
BACKENDS = {
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "torch": ("fp32", "bf16", "fp16"),
}
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}
BF16_WEIGHTS = 10_000_000  # a smaller body is encoded sooner by ONNX Runtime in fp32, where queries come one by one
# Tokens of a batch, padding counted: what a core's cache holds, and what keeps a GPU busy.
CORE_BATCH_TOKENS, GPU_BATCH_TOKENS = 512, 16384
SIDE_BY_SIDE_TOKENS = 256  # fewer in a call are computed sooner by all cores together
MOST_THREADS = 1024


class QueryEncoder:
    """Encodes queries with a student; made by `from_pretrained` or `from_model`. Safe to call from several threads.

    A server may load it before it forks: under ONNX Runtime and OpenVINO every child loads the graph again at its first
    query, under torch it refuses. One of `from_pretrained` can be pickled: it is loaded again from the same folder.

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
        origin: dict[str, Any] | None = None,
    ) -> None:
        self._tokenizer, self._run = tokenizer, run
        prompt = well_formed(prompt)
        self.words = WordCache.of(tokenizer, prompt)
        self._batch_tokens, self._side_by_side = batch_tokens, side_by_side
        self.dim, self.backend, self.precision, self.prompt = dim, backend, precision, prompt
        self.max_tokens: int | None = (tokenizer.truncation or {}).get("max_length")
        self._whole = whole_characters(tokenizer)
        self.lookup, self.fingerprint, self.teacher = lookup, fingerprint, teacher
        self._origin = origin

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
                `~/.cache/hlm` (or $HLM_CACHE). Every file that is read is compared with what hlm.json tells of it.
                Weights that lie beside a graph are mapped, not copied: give a newer student its place by renaming, do
                not write over the files of one that is served.
            backend: "onnxruntime", "openvino" (where it is installed) or "torch" (what runs on a GPU). "auto" takes
                torch for a GPU, OpenVINO for bf16 and else ONNX Runtime.
            precision: "fp32" (components within 1e-4 of sentence-transformers'), "bf16" or, under torch, "fp16" (within
                0.03), or "int8" (hlm.json says what it costs). "auto": bf16 on a GPU, and for ten million weights or
                more on a processor with bf16 instructions where OpenVINO is installed; else fp32.
            revision: branch, tag or commit of a Hub repository.
            device: "cpu" or a GPU such as "cuda:0"; None is the CPU.
            threads: that one call computes with on the CPU; None: all cores this process may use, by its affinity and
                by its container's limit of CPU time. Under ONNX Runtime many texts in one call are computed a core
                each, which loads the graph a second time.

        Raises:
            HlmError: nothing to load there, a missing, damaged or changed file, an unknown backend, precision or
                device, or one that does not go with the other.
        """
        auto = backend == precision == "auto"
        device = None if device is None else str(device)
        backend, precision = _choose(backend, precision, device)
        if threads is not None and (not isinstance(threads, int) or not 1 <= threads <= MOST_THREADS):
            raise HlmError(f"threads: expected a number from 1 to {MOST_THREADS}, found {threads!r}")
        source = str(id_or_folder)
        source = os.path.abspath(source) if os.path.isdir(source) else source
        threads = threads or cores()

        def load() -> QueryEncoder:
            return cls._read(StudentFiles(source, revision), auto, backend, precision, device, threads)

        folder = StudentFiles.folder_of(source, revision)
        return read_steadily(folder, load) if (folder / MANIFEST).is_file() else load()  # one of others has no versions

    @classmethod
    def _read(
        cls, files: StudentFiles, auto: bool, backend: str, precision: str, device: str | None, threads: int
    ) -> QueryEncoder:
        if auto and backend == "onnxruntime" and _has_bf16() and files.body_weights() >= BF16_WEIGHTS:
            backend, precision = "openvino", "bf16"
        side_by_side, path = None, None
        if backend == "torch":
            run, dim = engines.torch(files.weights(), precision, device or "cpu")
        else:
            names = ["fp32" if precision == "bf16" else precision]
            path = files.graph(["lookup", *names] if (backend, precision) == ("onnxruntime", "fp32") else names)
            if backend == "openvino":
                run, dim = engines.openvino(path, precision, threads)
            else:
                run, dim = engines.onnxruntime(path, threads)
                if threads > 1:
                    side_by_side = SideBySide(_one_core(path, run), threads)
        return cls(
            files.tokenizer(),
            run,
            dim,
            prompt=files.prompt(),
            backend=backend,
            precision=precision,
            batch_tokens=GPU_BATCH_TOKENS if _on_gpu(device) else CORE_BATCH_TOKENS * threads,
            side_by_side=side_by_side,
            lookup=path is not None and path.name == Path(GRAPHS["lookup"]).name,
            fingerprint=files.encoder(),
            teacher=files.teacher(),
            origin={
                "id_or_folder": files.source,
                "revision": files.revision,
                "backend": backend,
                "precision": precision,
                "device": device,
                "threads": threads,
                "identity": files.identity(path),
            },
        )

    def __reduce__(self) -> tuple:
        if self._origin is None:
            raise HlmError(
                "expected a QueryEncoder of from_pretrained to pickle, found one of a model in memory; save the model "
                "and load its folder"
            )
        return _loaded_again, (self._origin,)

    @classmethod
    def from_model(cls, model: SentenceTransformer) -> QueryEncoder:
        """Serves a loaded model under torch, in its dtype and on its device: on a GPU by CUDA graphs. The model is put
        into eval mode.

        Raises:
            HlmError: a tokenizer that is none of the tokenizers library, or a dtype other than those of "torch".
        """
        kind = str(model.dtype).removeprefix("torch.")
        precision = next((name for name, dtype in engines.PRECISIONS.items() if dtype == kind), None)
        fast = getattr(model.tokenizer, "backend_tokenizer", None)
        if precision is None or fast is None:
            raise HlmError(
                f"expected a model in float32, bfloat16 or float16 with a tokenizer of the tokenizers library, found "
                f"{kind} and {type(model.tokenizer).__name__}"
            )
        run, dim = engines.torch_model(model)
        tokenizer = Tokenizer.from_str(fast.to_str())
        return cls(
            cutting(tokenizer, model.max_seq_length, model.tokenizer.truncation_side, where="the model"),
            run,
            dim,
            prompt=(model.prompts or {}).get("query") or "",
            backend="torch",
            precision=precision,
            batch_tokens=GPU_BATCH_TOKENS if _on_gpu(str(model.device)) else CORE_BATCH_TOKENS * cores(),
        )

    def encode(self, texts: str | Iterable[str]) -> np.ndarray:
        """float32 (dim,) of a single str, as `SentenceTransformer.encode` has it; of a list (n, dim), in its order.
        Vectors are L2-normalised.

        Texts of similar length share a batch; on a CPU one text is never padded. Half a surrogate pair counts as
        U+FFFD.

        Raises:
            HlmError: a text that is no str, or that has no token.
        """
        if isinstance(texts, str):
            return self.encode_ids(self.tokenise([texts]))[0]
        return self.encode_ids(self.tokenise(texts))

    def tokenise(self, texts: Iterable[str]) -> list[list[int]]:
        """Token ids of each text after the query prompt, special tokens among them, cut where the model cuts.

        Raises:
            HlmError: a text that is no str or that has no token, or a single str in place of a list.
        """
        texts = as_texts(texts)
        found = self._tokenised(texts)
        if not all(found):  # possible without special tokens around every text
            raise HlmError(
                f"expected texts of at least one token, found {texts[found.index([])]!r:.100} at place "
                f"{found.index([])}; leave such texts out"
            )
        return found

    def _tokenised(self, texts: list[str]) -> list[list[int]]:
        if max(map(len, texts), default=0) <= self._whole:
            return self._whole_ids(texts)
        short = iter(self._whole_ids([text for text in texts if len(text) <= self._whole]))
        return [
            next(short) if len(text) <= self._whole else first_ids(self._tokenizer, self.prompt + text)
            for text in texts
        ]

    def _whole_ids(self, texts: list[str]) -> list[list[int]]:
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
            for batch, vectors in self._computed(cut_by_length(ids, self._batch_tokens, pads=not self.lookup)):
                out[batch.rows] = vectors
        return out

    def _computed(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, np.ndarray]]:
        stream = getattr(self._run, "stream", None)  # of a GPU: it computes the next batch meanwhile
        return stream(batches) if stream else ((batch, self._run(batch.ids, batch.mask)) for batch in batches)


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


def _loaded_again(origin: dict[str, Any]) -> QueryEncoder:
    """A QueryEncoder that was pickled, in another process."""
    settings = {name: value for name, value in origin.items() if name != "identity"}
    encoder = QueryEncoder.from_pretrained(**settings)
    if (encoder._origin or {}).get("identity") != origin["identity"]:
        raise HlmError(
            f"expected {origin['id_or_folder']} as it was when the QueryEncoder was pickled, found it replaced; load "
            "the encoder in each process instead"
        )
    return encoder


def _one_core(path: Path, run: Run) -> Callable[[], Run]:
    """Loads the graph once more, for one core; gives `run` where the file is no longer what it is now."""
    loaded = file_state(path)

    def load() -> Run:
        if file_state(path) == loaded:
            return engines.onnxruntime(path, 1)[0]
        logger.warning("%s was replaced since it was loaded: texts are encoded by what was, and slower", path)
        return run

    return load
