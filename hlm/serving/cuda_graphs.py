"""A model on a GPU: few shapes, each captured once as a CUDA graph and replayed, host copies included."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hlm.encoders.loading import fetched, one_ahead
from hlm.serving.bulk import Batch

logger = logging.getLogger(__name__)

# What a GPU pads to: few shapes, so each has its kernels chosen and its CUDA graph captured once.
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
ROWS = (1, 4, 16, 64)
GRAPH_TOKENS = 2048  # a larger batch keeps a GPU busy for longer than it takes to launch its kernels


def padded_shape(rows: int, tokens: int) -> tuple[int, int]:
    """The shape that a batch is padded to: of `LENGTHS` and, up to `GRAPH_TOKENS` tokens, of `ROWS`."""
    length = next((each for each in LENGTHS if each >= tokens), tokens)
    return next((each for each in ROWS if each >= rows and each * length <= GRAPH_TOKENS), rows), length


def pad(ids: np.ndarray, mask: np.ndarray | None, into: np.ndarray) -> None:
    """Writes a batch into the corner of `into`, int64 (2, rows, tokens): ids and mask. What is added is masked, but for
    the first token of each added row: a row without any token would divide by nothing."""
    count, length = ids.shape
    into[:] = 0
    into[0, :count, :length] = ids
    into[1, :count, :length] = 1 if mask is None else mask
    into[1, count:, 0] = 1


class _Captured(NamedTuple):
    """One shape. Buffers on the host are pinned: the graph copies from and to them."""

    graph: torch.cuda.CUDAGraph
    given: np.ndarray  # int64 (2, rows, tokens), a view of pinned memory
    vectors: np.ndarray  # float32 (rows, dim), likewise
    held: tuple[Tensor, ...]  # what the graph reads and writes must stay


class CudaGraphs:
    """Runs `forward` on a GPU: shapes of at most `GRAPH_TOKENS` tokens are captured when first met, then replayed;
    larger ones run kernel by kernel. Safe to call from several threads.

    Args:
        forward: ids and mask, int64 (rows, tokens) on the GPU -> float32 (rows, dim) there.
        device: the GPU.
    """

    def __init__(self, forward: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> None:
        self._forward, self._device = forward, device
        self.captured: dict[tuple[int, int], _Captured | None] = {}  # None: this shape cannot be captured
        self._pool = None
        self._lock = threading.Lock()  # buffers are shared by all threads

    def __call__(self, ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        return self._start(ids, mask)().copy()  # not a view of pinned memory

    def stream(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, np.ndarray]]:
        """The vectors of each batch, in order; valid until the next is asked for. The GPU computes a batch while the
        caller deals with the one before."""
        return one_ahead((batch, self._start(batch.ids, batch.mask)) for batch in batches)

    def _start(self, ids: np.ndarray, mask: np.ndarray | None) -> Callable[[], np.ndarray]:
        """Begins a batch; what it gives waits for its vectors."""
        shape = padded_shape(*ids.shape)
        if shape[0] * shape[1] <= GRAPH_TOKENS and self._device.type == "cuda":
            vectors = self._replayed(shape, ids, mask)
            if vectors is not None:
                return lambda: vectors
        both = torch.empty((2, *ids.shape), dtype=torch.int64, pin_memory=self._device.type == "cuda")
        pad(ids, mask, both.numpy())  # launching its kernels takes less time than they run: no shape is padded to
        with torch.inference_mode():
            return fetched(self._forward(*both.to(self._device, non_blocking=True)))

    def _replayed(self, shape: tuple[int, int], ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray | None:
        """The vectors of a batch padded to `shape`; None where that shape cannot be captured."""
        with torch.inference_mode(), torch.cuda.device(self._device), self._lock:
            if shape not in self.captured:
                self.captured[shape] = self._capture(shape)
            captured = self.captured[shape]
            if captured is None:
                return None
            pad(ids, mask, captured.given)
            captured.graph.replay()
            torch.cuda.current_stream().synchronize()  # the caller reads the vectors
            return captured.vectors[: len(ids)].copy()

    def _capture(self, shape: tuple[int, int]) -> _Captured | None:
        given = torch.empty((2, *shape), dtype=torch.int64, pin_memory=True)
        pad(np.zeros(shape, dtype=np.int64), None, given.numpy())
        both = given.to(self._device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose kernels and allocate on first calls, outside of the graph
            for _ in range(3):
                output = self._forward(*both)
        torch.cuda.current_stream().wait_stream(stream)
        vectors = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                both.copy_(given, non_blocking=True)
                output = self._forward(*both)
                vectors.copy_(output, non_blocking=True)
        except RuntimeError as error:
            logger.warning("shape %s: no CUDA graph (%s); it runs kernel by kernel", shape, error)
            return None
        self._pool = self._pool or graph.pool()
        return _Captured(graph, given.numpy(), vectors.numpy(), (given, both, output, vectors))
