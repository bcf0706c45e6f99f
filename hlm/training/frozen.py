"""Frozen vectors of a store at a student's width, gathered in every training step: from the GPU where they fit.

A refinement step draws tens of thousands of ads. From the memory map that is hundreds of megabytes that the CPU
gathers, slices and normalises and the bus carries, in every step: many times what the student's own pass takes.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from hlm.encoders.loading import sent
from hlm.training.losses import matryoshka
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)

SHARE = 0.25  # of the GPU's free memory that the vectors may take, when the model is loaded and has not trained yet
BYTES = 2  # of a component: fp16, as stored


class FrozenVectors:
    """Rows of `store` as float32 (n, width), L2-normalised, on `device`: `matryoshka` of the stored values.

    On a GPU with room for all rows in fp16 they are copied there once; else each call reads the memory map.
    """

    def __init__(self, store: VectorStore, width: int, device: torch.device) -> None:
        self.store, self.width, self.device = store, width, device
        self.table = self.copied() if device.type == "cuda" and self._fits() else None

    def _fits(self) -> bool:
        free, _ = torch.cuda.mem_get_info(self.device)
        return BYTES * len(self.store) * self.width <= SHARE * free

    def copied(self) -> Tensor:
        table = torch.empty(len(self.store), self.width, dtype=torch.float16, device=self.device)
        for start, block in self.store.iter_blocks():
            half = torch.from_numpy(block[:, : self.width].astype(np.float16))  # exact: fp16 is what is stored
            table[start : start + len(half)] = half.to(self.device)
        logger.info("%d frozen vectors, %d wide, lie on %s", *table.shape, self.device)
        return table

    def gather(self, rows: np.ndarray | Tensor) -> Tensor:
        """The vectors of these row numbers (n,), int64.

        Row numbers on the host cost no wait, wherever the vectors lie; those on a GPU do where the map is read.
        """
        if self.table is not None:
            return matryoshka(self.table[sent(torch.as_tensor(rows), self.device)], self.width)
        rows = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
        return sent(matryoshka(torch.from_numpy(self.store.gather(rows)), self.width), self.device)
