"""What a fast query encoder keeps: quality from a report or measured, and agreement of ways to run one model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hlm.artefacts import MANIFEST, HlmError
from hlm.data.contract import RetrievalData
from hlm.evaluation.metrics import dense_run, mean, per_query
from hlm.indexes.exact import exact_search
from hlm.indexes.faiss_index import AdIndex
from hlm.indexes.index import Index
from hlm.report_types import Quality, Report
from hlm.vectors.store import VectorStore

Encode = Callable[[list[str]], np.ndarray]
TEACHER = "teacher"  # its name in the report, what recovery refers to


def quality(report: Report, name: str) -> Quality:
    """What recipes/evaluate.py found for a system.

    Returns:
        {"system", "metric": "ndcg@k", "ndcg", and for a student "recovery" (of that metric), "recovery_ci95",
        "recovery_reason" where one of these is None, and "overlap" with the teacher}.

    Raises:
        HlmError: the report has no such system.
    """
    if name not in report["systems"]:
        known = ", ".join(report["systems"]) or "none"
        raise HlmError(f"report: expected a system among {known}, found '{name}'; name one of them in `quality`")
    k = report["k"]
    found: Quality = {"system": name, "metric": f"ndcg@{k}", "ndcg": report["systems"][name][f"ndcg@{k}"]}
    kept = report["recovery_by_system"].get(name, {}).get(f"ndcg@{k}")
    if kept:
        found |= {"recovery": kept["value"], "recovery_ci95": kept["ci95"]}
        found |= {"recovery_reason": kept["reason"]} if "reason" in kept else {}
    if f"overlap@{k}" in report["systems"][name]:
        found["overlap"] = report["systems"][name][f"overlap@{k}"]
    return found


def measured_quality(
    encode: Encode, data: RetrievalData, split: str, store: VectorStore, report: Report, name: str
) -> Quality:
    """As `quality`, for a system that the report does not know: all queries of the split search the store's ads.

    Args:
        encode: texts to float32 (n, dim), normalised; the store's vectors are cut to that width.
        report: of this split; gives the cut-off and the teacher's figure.

    Returns:
        {"system": `name`, "metric", "ndcg", "measured": True, and "recovery" where the report has a teacher: None,
        with a "recovery_reason", where that scores 0}.
    """
    metric = f"ndcg@{report['k']}"
    ids, texts = zip(*data.split_queries(split), strict=True)
    vectors = encode_all(name, encode, texts)
    run = dense_run(vectors, exact_search(store, vectors.shape[1]), ids, 100)
    found: Quality = {"system": name, "metric": metric, "measured": True}
    found["ndcg"] = mean(per_query(run, data.qrels[split], report["k"])[metric])
    teacher = report["systems"].get(TEACHER, {}).get(metric)
    if teacher is None:
        return found
    if teacher == 0:
        return found | {"recovery": None, "recovery_reason": "the teacher scores 0 on all queries"}
    return found | {"recovery": found["ndcg"] / teacher}


def same_encoders(models: Mapping[str, str]) -> dict[str, str]:
    """System -> the first one before it that runs the same model: by the fingerprint in hlm.json, which an exported
    folder shares with its student, or by path."""
    first: dict[str, str] = {}
    found = {}
    for name, model in models.items():
        of = first.setdefault(_manifest(model).get("encoder") or model, name)
        if of != name:
            found[name] = of
    return found


def searchable(models: Mapping[str, str], store: VectorStore) -> set[str]:
    """Systems whose vectors may search this store: its encoder, students of it, and what runs the same model as one."""
    found = set()
    for name, model in models.items():
        manifest = _manifest(model)
        if store.encoder in (manifest.get("encoder"), manifest.get("inputs", {}).get("teacher")):
            found.add(name)
    return found


def _manifest(model: str) -> dict[str, Any]:
    path = Path(model) / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def agreements(
    encoders: Mapping[str, Encode], same: Mapping[str, str], queries: Sequence[str], store: VectorStore | None, k: int
) -> dict[str, dict[str, Any]]:
    """`agreement` of each system of `same` (see `same_encoders`) with the one it names, over the ads of a store where
    one is given whose vectors are as wide."""
    found = {}
    for name, other in same.items():
        vectors, others = (encode_all(of, encoders[of], queries) for of in (name, other))
        index = None
        if store is not None and store.dim >= vectors.shape[1]:
            index = AdIndex.build(store, dim=vectors.shape[1])
        found[name] = {"with": other, "k": k} | agreement(vectors, others, index, k)
    return found


def encode_all(name: str, encode: Encode, texts: Sequence[str], rows: int = 32) -> np.ndarray:
    """The float32 (len(texts), dim) vectors of system `name`, `rows` texts a call.

    Raises:
        HlmError: a vector that is not finite, with which nothing can be compared.
    """
    vectors = np.concatenate([encode(list(texts[start : start + rows])) for start in range(0, len(texts), rows)])
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        raise HlmError(
            f"{name}: expected finite vectors, found NaN or infinity for {len(broken)} of {len(texts)} queries, the "
            f"first {texts[broken[0]]!r}; check its weights and precision"
        )
    return vectors


def agreement(vectors: np.ndarray, others: np.ndarray, index: Index | None = None, k: int = 10) -> dict[str, float]:
    """How far two ways of running one model agree on the same queries.

    Args:
        vectors, others: float32 (n, dim), normalised.
        index: of that width; adds "overlap", the share of the first k ads in common.

    Returns:
        {"min_cosine", "mean_cosine"} and, with an index, "overlap" (0 ... 1).
    """
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(others, axis=1)
    cosines = np.einsum("ij,ij->i", vectors, others) / np.maximum(lengths, np.finfo(np.float32).tiny)
    found = {"min_cosine": float(cosines.min()), "mean_cosine": float(cosines.mean())}
    if index is not None:
        (_, ids), (_, other_ids) = index.search(vectors, k), index.search(others, k)
        shares = [len(set(a) & set(b)) / max(1, len(b)) for a, b in zip(ids, other_ids, strict=True)]
        found["overlap"] = float(np.mean(shares))
    return found
