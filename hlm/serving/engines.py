"""What computes vectors from token ids: ONNX Runtime, OpenVINO, or torch with CUDA graphs; used by `query_encoder`.

Each loader gives a function (input_ids, attention_mask), both int64 (rows, tokens), right padding, or None in place of
a mask of ones -> float32 (rows, dim), L2-normalised, and dim. The functions may be called from several threads. In a
forked child a graph is loaded again, and torch says at once that it cannot compute there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hlm.artefacts import HlmError
from hlm.extras import extras_named
from hlm.forks import keep_for_ever, tell_after_fork
from hlm.integrity import file_state
from hlm.serving.bulk import Run

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # QueryEncoder's names of torch's dtypes


class _Graph:
    """A `Run` of an ONNX file. In a forked child, where the threads of its parent do not run, the first call loads the
    file again.

    Args:
        load: the file under an engine.

    Raises:
        HlmError: what `load` raises; or, from a call in a forked child, a file that was replaced meanwhile.
    """

    def __init__(self, path: Path, load: Callable[[Path], tuple[Run, int]]) -> None:
        self._path, self._load, self._lock = path, load, threading.Lock()
        self._file = file_state(path)
        self._run: Run | None
        self._run, self.dim = load(path)
        tell_after_fork(self)

    def __call__(self, ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        return (self._run or self._loaded_again())(ids, mask)

    def after_fork(self) -> None:
        keep_for_ever(self._run)
        self._run, self._lock = None, threading.Lock()

    def _loaded_again(self) -> Run:
        with self._lock:
            if self._run is None:
                if file_state(self._path) != self._file:
                    raise HlmError(
                        f"expected {self._path} as it was when this process was forked, found it replaced; load the "
                        "encoder in each process, after it is forked"
                    )
                self._run, _ = self._load(self._path)
            return self._run


def onnxruntime(path: Path, threads: int) -> tuple[Run, int]:
    """A graph under ONNX Runtime on `threads` cores. One without `attention_mask` refuses padding.

    Raises:
        HlmError: a damaged file, or none of `hlm.serving.export`.
    """
    import onnxruntime

    def load(path: Path) -> tuple[Run, int]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # A sum and its LayerNormalization take a sixth of the time that ONNX Runtime's fused kernel takes.
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["SkipLayerNormFusion"]
        )
        inputs = {part.name for part in session.get_inputs()}
        shapes = {part.name: part.shape for part in session.get_outputs()}
        dim = _width(path, inputs, shapes.get("sentence_embedding"))

        def run(ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
            feed = {"input_ids": ids}
            if "attention_mask" in inputs:
                feed["attention_mask"] = _whole(ids, mask)
            elif mask is not None:
                raise HlmError(f"{path}: expected texts of one length in a batch, found padded ones")
            return session.run(["sentence_embedding"], feed)[0]

        return run, dim

    return _opened(path, load, "ONNX Runtime")


def openvino(path: Path, precision: str, threads: int) -> tuple[Run, int]:
    """A graph under OpenVINO on `threads` cores, "fp32" or "bf16".

    Raises:
        HlmError: OpenVINO is not installed, a damaged file, or none of `hlm.serving.export`.
    """
    with extras_named("backend 'openvino'"):
        import openvino
    hint = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"}
    settings = hint | {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}

    def load(path: Path) -> tuple[Run, int]:
        model = openvino.Core().compile_model(str(path), "CPU", settings)
        inputs = {name for part in model.inputs for name in part.names}
        output = next((part for part in model.outputs if "sentence_embedding" in part.names), None)
        shape = [size.get_length() if size.is_static else None for size in output.partial_shape] if output else None
        dim = _width(path, inputs, shape)
        own = threading.local()  # a request runs one call at a time

        def run(ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
            if not hasattr(own, "request"):
                own.request = model.create_infer_request()
            own.request.infer({"input_ids": ids, "attention_mask": _whole(ids, mask)}, share_inputs=True)
            return own.request.get_tensor(output).data.copy()

        return run, dim

    return _opened(path, load, "OpenVINO")


def _opened(path: Path, load: Callable[[Path], tuple[Run, int]], engine: str) -> tuple[Run, int]:
    try:
        graph = _Graph(path, load)
    except HlmError:
        raise
    except Exception as error:  # the engines have classes of their own for what is damaged, and not the same ones
        raise HlmError(
            f"{path}: expected a graph that {engine} loads, found {type(error).__name__}: "
            f"{str(error).splitlines()[0][:200] if str(error) else ''}; copy the folder again, or export it again"
        ) from error
    return graph, graph.dim


def _width(path: Path, inputs: set[str], shape: Sequence[Any] | None) -> int:
    """The width of a graph's vectors."""
    if "input_ids" not in inputs or inputs - {"input_ids", "attention_mask"} or not shape or type(shape[-1]) is not int:
        raise HlmError(
            f"{path}: expected a graph with input_ids and attention_mask in and sentence_embedding of a fixed width "
            f"out, found {', '.join(sorted(inputs))} in; move this folder's onnx/ away, and it is exported again"
        )
    return shape[-1]


def torch(folder: Path, precision: str, device: str) -> tuple[Run, int]:
    """The model itself under torch, in fp32, bf16 or fp16; on a GPU padded to few shapes and replayed as CUDA graphs.

    Raises:
        HlmError: a device that this torch does not have, or a folder that does not load.
    """
    with extras_named("backend 'torch'"):
        import torch

        from hlm.encoders.loading import load_encoder

    try:
        torch.empty(0, device=device)
    except Exception as error:  # AssertionError, RuntimeError or NotImplementedError, by device and build
        raise HlmError(
            f"device: expected one that this torch ({torch.__version__}) has, found {device} ({str(error)[:80]}); "
            "take device='cpu', or install a torch for your GPU"
        ) from error
    return torch_model(load_encoder(str(folder), device=device, dtype=PRECISIONS[precision]))


class _TorchRun:
    """A `Run` that refuses to compute in a forked child, where torch waits for ever for the threads of its parent.

    Attributes:
        stream: batches -> each with its vectors, of a GPU, which computes ahead; None where nothing is gained by it.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.stream = getattr(run, "stream", None)
        tell_after_fork(self)

    def __call__(self, ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        return self._run(ids, mask)

    def after_fork(self) -> None:
        self._run, self.stream = self._refuse, None

    def _refuse(self, ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        raise HlmError(
            "expected backend 'torch' in the process that loaded it, found a forked one; load the encoder in each "
            "process after it is forked, or take backend 'onnxruntime'"
        )


def torch_model(model: SentenceTransformer) -> tuple[Run, int]:
    """As `torch`, of a model that is loaded; it is put into eval mode. A Qwen3 of last-token pooling computes by
    `hlm.serving.fused.FusedQwen3` texts of up to the longest of `hlm.serving.cuda_graphs.LENGTHS`."""
    import torch

    from hlm.encoders.families import is_causal
    from hlm.serving.cuda_graphs import LENGTHS, CudaGraphs
    from hlm.serving.fused import FusedQwen3

    model.eval()
    causal = hasattr(model[0], "model") and is_causal(model[0].model)  # a static student has no backbone
    backbone, *modules = model
    fused = FusedQwen3(model, LENGTHS[-1]) if FusedQwen3.fits(model) else None

    def forward(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if fused and ids.shape[1] <= fused.longest:
            features, rest = {"sentence_embedding": fused(ids, mask)}, modules[1:]  # the first one pools
        else:
            # Of a causal model no token sees the padding on its right: without a mask to add, attention is faster.
            features = backbone({"input_ids": ids} if causal else {"input_ids": ids, "attention_mask": mask})
            features["attention_mask"], rest = mask, modules
        for module in rest:
            features = module(features)
        vectors = features["sentence_embedding"].float()
        return torch.nn.functional.normalize(vectors, dim=-1)  # bf16 leaves lengths off by 1e-2

    if model.device.type != "cpu":
        return _TorchRun(CudaGraphs(forward, model.device)), model.get_embedding_dimension()

    @torch.inference_mode()
    def run(ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        return forward(torch.from_numpy(ids), torch.from_numpy(_whole(ids, mask))).numpy()

    return _TorchRun(run), model.get_embedding_dimension()


def _whole(ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The mask that None stands for."""
    return np.ones_like(ids) if mask is None else mask
