"""From text to ads: a query encoder and the index that it searches, measured as one system."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlm.artefacts import MANIFEST, HlmError
from hlm.fields import read_json
from hlm.indexes.index import open_index

if TYPE_CHECKING:
    import numpy as np


def with_index(
    encode: Callable[[list[str]], np.ndarray], model: str, folder: str, k: int
) -> tuple[Callable[[list[str]], np.ndarray], dict[str, Any]]:
    """An encoder that searches `k` ads, ids and all, in every call, and what of them the report says; vectors stay what
    comes out.

    Args:
        model: the encoder's folder or name: a student searches its teacher's vectors, any other model its own.
        folder: of the index.

    Raises:
        HlmError: no index there, one of another encoder or another width, or a k below 1.
    """
    index = open_index(folder, expect_encoder=_searches(model))
    vectors = encode(["a query"])
    if vectors.shape[1] != index.dim:
        raise HlmError(f"{folder}: expected an index of width {vectors.shape[1]} as {model}, found {index.dim}")
    index.search(vectors, k)  # refuses a k that is none, before anything is measured

    def encode_and_search(texts: list[str]) -> np.ndarray:
        vectors = encode(texts)
        index.search(vectors, k)
        return vectors

    searched: dict[str, Any] = {"engine": index.engine, "factory": index.factory, "ads": len(index), "k": k}
    measured = index.measured or {}
    searched |= {name: measured[name] for name in ("recall",) if name in measured and measured.get("k") == k}
    return encode_and_search, searched


def _searches(model: str) -> str | None:
    """The fingerprint of the encoder whose vectors a model searches; None where no manifest tells it."""
    manifest = Path(model) / MANIFEST
    if not manifest.is_file():
        return None
    found = read_json(manifest)
    return (found.get("inputs") or {}).get("teacher") if found.get("kind") == "student" else found.get("encoder")
