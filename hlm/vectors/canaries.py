"""Canary queries: fixed texts whose vectors by the teacher travel with its stores and indexes, so that anyone can see
whether a student puts queries where this teacher puts them, whatever its manifest says.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from hlm.artefacts import MANIFEST, HlmError, read_manifest, write_json
from hlm.encoders.loading import encode
from hlm.fields import field

# Far from one another and from any catalogue: a student that lies near its teacher tells them apart, whatever it was
# trained on. They are kept with their vectors, so that a later list does not make older artefacts unreadable.
QUERIES = (
    "wireless noise cancelling headphones",
    "red running shoes size 42",
    "cheap flights to lisbon in may",
    "cordless drill 18v with two batteries",
    "organic dog food for puppies",
    "used electric bike under 1000",
    "car insurance for young drivers",
    "stainless steel kettle 1.7 litre",
    "wooden dining table for six",
    "waterproof winter jacket women",
    "laser printer toner black",
    "camping tent for four people",
)
# A student of the same teacher finds nearly all of its own; by chance one of twelve is found, and six with p < 1e-3.
LEAST_SHARE = 0.5


def made_by(teacher: SentenceTransformer, *, dim: int | None = None) -> dict[str, Any]:
    """The canaries of a teacher, read with its query prompt; `dim` as in `hlm.encoders.loading.encode`."""
    return record(encode(teacher, list(QUERIES), prompt_name="query", dim=dim))


def record(vectors: np.ndarray, texts: Sequence[str] = QUERIES) -> dict[str, Any]:
    """JSON value of canaries: {"texts", "dim", "vectors": base64 of little-endian fp16}.

    Args:
        vectors: float32 (len(texts), dim), L2-normalised, the teacher's vectors of `texts` with its query prompt.
    """
    raw = np.ascontiguousarray(vectors, dtype="<f2").tobytes()
    return {"texts": list(texts), "dim": vectors.shape[1], "vectors": base64.b64encode(raw).decode()}


def vectors_of(canaries: dict[str, Any], dim: int, *, where: str) -> np.ndarray:
    """The teacher's vectors, float32 (n, dim), sliced to `dim` and L2-normalised again.

    Raises:
        HlmError: not what `record` makes, or narrower than `dim`.
    """
    count, width = (
        len(texts_of(canaries, where=where)),
        field(canaries, int, "dim", where=f"{where}, canaries", least=1),
    )
    try:
        raw = base64.b64decode(field(canaries, str, "vectors", where=f"{where}, canaries"), validate=True)
    except ValueError as error:
        raise HlmError(f"{where}: its canaries are damaged ({error}); copy it again, or embed again") from error
    if len(raw) != 2 * count * width:
        raise HlmError(
            f"{where}: its canaries are damaged (expected {count} vectors of {width} values, found {len(raw)} bytes); "
            "copy it again, or embed again"
        )
    vectors = np.frombuffer(raw, dtype="<f2").reshape(count, width)[:, :dim].astype(np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if vectors.shape[1] != dim or not np.isfinite(norms).all() or (norms == 0).any():
        raise HlmError(f"{where}: expected finite canaries at least {dim} wide, found others; embed again")
    return vectors / norms


def texts_of(canaries: dict[str, Any], *, where: str) -> list[str]:
    """The canary queries.

    Raises:
        HlmError: none, or something else than texts.
    """
    where = f"{where}, canaries"
    count = len(field(canaries, list, "texts", where=where))
    if not count:
        raise HlmError(f"{where}: expected queries as 'texts', found none; copy it again, or embed again")
    return [field(canaries, str, "texts", number, where=where) for number in range(count)]


def keep(folder: str | Path, kind: str, canaries: dict[str, Any]) -> None:
    """Writes the canaries into the manifest of a store (kind "vectors") or index (kind "index"), if it has none."""
    manifest = read_manifest(folder, kind)
    if "canaries" not in manifest:
        write_json(Path(folder) / MANIFEST, manifest | {"canaries": canaries})


def check(canaries: dict[str, Any], student: np.ndarray, *, name: str, where: str) -> tuple[int, float]:
    """Refuses a student that does not put the canaries where the teacher puts them.

    Cosines alone would not do: in a narrow space any two queries have a high one. So each of the student's canaries
    must find its own among the teacher's.

    Args:
        student: float32 (n, dim), L2-normalised, the student's vectors of `canaries["texts"]`.
        name: what is checked, for the message.
        where: the store or index that the canaries came with.

    Returns:
        How many find their own, and the mean cosine to the teacher's.

    Raises:
        HlmError: less than half of them do; or the canaries are damaged.
    """
    cosines = student @ vectors_of(canaries, student.shape[1], where=where).T
    found = int((cosines.argmax(axis=1) == np.arange(len(cosines))).sum())
    mean = float(np.diag(cosines).mean())
    if not found >= LEAST_SHARE * len(cosines):  # written so that NaN is refused
        raise HlmError(
            f"expected {name} to put at least half of {len(cosines)} canary queries nearest to where the teacher of "
            f"{where} put them, found {found} (mean cosine {mean:.3f}): it is not that teacher's student, was never "
            "aligned, or was changed; use that teacher's student, or embed the ads with this student's own teacher"
        )
    return found, mean
