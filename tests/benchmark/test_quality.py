"""What a fast way to run a model keeps: agreement with another, and quality out of the report."""

import json

import numpy as np
import pytest

from hlm.artefacts import HlmError
from hlm.benchmark.quality import agreement, agreements, quality, same_encoders
from hlm.indexes.faiss_index import AdIndex
from hlm.vectors.store import VectorStore, write_store


def test_agreement_in_cosine_and_in_what_is_found(tmp_path):
    vectors = np.eye(4, dtype=np.float32)
    write_store(
        tmp_path / "store",
        [(f"ad{row}", str(row)) for row in range(4)],
        lambda texts: vectors[[int(text) for text in texts]],
        dim=4,
        encoder="e",
        source="s",
        n_rows=4,
    )
    index = AdIndex.build(VectorStore.open(tmp_path / "store"))
    turned = np.array([[0.8, 0.6, 0, 0], [0, 1, 0, 0]], dtype=np.float32)
    found = agreement(turned, vectors[:2], index, k=1)
    assert found == {"min_cosine": pytest.approx(0.8), "mean_cosine": pytest.approx(0.9), "overlap": 1.0}
    assert agreement(vectors[2:], vectors[:2], index, k=1) == {"min_cosine": 0, "mean_cosine": 0, "overlap": 0}
    assert agreement(np.zeros((1, 4)), vectors[:1]) == {"min_cosine": 0, "mean_cosine": 0}  # no NaN in the JSON


def test_vectors_that_are_not_finite_agree_with_nothing():
    def encode(texts):
        return np.array([[np.inf if text == "red shoe" else 1.0, 0] for text in texts])

    with pytest.raises(HlmError, match="int8: expected finite vectors.*1 of 4 queries, the first 'red shoe'"):
        agreements(
            {"fp32": lambda texts: np.ones((4, 2)), "int8": encode},
            {"int8": "fp32"},
            ["shoe", "red shoe", "red steel kettle", "a kettle"],
            None,
            k=10,
        )


def test_the_same_model_by_fingerprint_or_by_path(tmp_path):
    for name, encoder in (("student", "f1"), ("online", "f1"), ("other", "f2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "hlm.json").write_text(json.dumps({"encoder": encoder}))
    models = {name: str(tmp_path / name) for name in ("student", "other", "online")}
    models |= {"hub": "owner/name", "int8": str(tmp_path / "online"), "hub again": "owner/name"}
    assert same_encoders(models) == {"online": "student", "int8": "student", "hub again": "hub"}


def test_quality_comes_from_the_report():
    report = {
        "k": 10,
        "systems": {"teacher": {"ndcg@10": 0.5}, "student": {"ndcg@10": 0.49, "overlap@10": 0.8}},
        "recovery_by_system": {"student": {"ndcg@10": {"value": 0.98, "ci95": [0.97, 0.99]}}},
    }
    assert quality(report, "teacher") == {"system": "teacher", "metric": "ndcg@10", "ndcg": 0.5}
    assert quality(report, "student")["recovery"] == 0.98 and quality(report, "student")["overlap"] == 0.8
    with pytest.raises(HlmError, match="among teacher, student, found 'studnet'"):
        quality(report, "studnet")
    report["recovery_by_system"]["student"]["ndcg@10"] = {"value": None, "ci95": None, "reason": "why"}
    undefined = quality(report, "student")
    assert undefined["recovery"] is undefined["recovery_ci95"] is None and undefined["recovery_reason"] == "why"
