"""Vectors from outside: finite, and of length 1 from here on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hlm.artefacts import HlmError


def normalised(vectors: np.ndarray, where: Callable[[int], str]) -> np.ndarray:
    """The rows L2-normalised, float32.

    Raises:
        HlmError: a row that is not finite, or 0 throughout; `where` names it.
    """
    vectors = np.asarray(vectors, dtype=np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    wrong = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
    if len(wrong):
        found = "zeros alone" if norms[wrong[0], 0] == 0 else "NaN or infinity"
        raise HlmError(f"{where(int(wrong[0]))}: expected a finite vector with a direction, found {found}")
    return vectors / norms
