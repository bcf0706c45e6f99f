"""What a training recipe refuses, or warns of, before it begins: another teacher's student, pairs that are left out."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from sentence_transformers import SentenceTransformer

from hlm.artefacts import MANIFEST, HlmError, read_manifest
from hlm.data.contract import RetrievalData, training_pairs
from hlm.encoders.loading import encode, resolve
from hlm.vectors import canaries
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)

# The same vectors in another dtype agree to 3 digits; another tuning of the same backbone does not.
SAME_ENCODER = 0.995


def kept_pairs(data: RetrievalData, min_score: int) -> list[tuple[str, str, int]]:
    """`training_pairs` of the train split; says how many of its pairs they are, and warns where most are left out.

    Raises:
        HlmError: no pair has a grade of `min_score` or more.
    """
    grades = Counter(grade for documents in data.qrels["train"].values() for grade in documents.values())
    shown = ", ".join(f"{count:,} of grade {grade}" for grade, count in sorted(grades.items()))
    pairs = training_pairs(data, "train", min_score=min_score)
    if not pairs:
        raise HlmError(f"min_score: expected train pairs of grade {min_score} or more, found {shown}; lower it")
    total = sum(grades.values())
    queries = len({query for query, _, _ in pairs})
    words = "%s of %s judged pairs (%s of %s queries) have min_score %s or more; qrels/train has %s"
    level = logging.WARNING if len(pairs) < total / 2 else logging.INFO
    judged = len(data.qrels["train"])
    logger.log(level, words, f"{len(pairs):,}", f"{total:,}", f"{queries:,}", f"{judged:,}", min_score, shown)
    return pairs


def check_start(name: str, store: VectorStore, model: SentenceTransformer) -> None:
    """Refuses to align what its manifest calls another teacher, or a student of one. A backbone that HLM has not
    trained is fine, and so is the teacher itself in another dtype or with another limit of tokens.

    Args:
        name: the recipe's `student`. Of a repository on the Hub nothing is known.
        store: vectors by the teacher.
        model: `name`, loaded.

    Raises:
        HlmError: names both teachers.
    """
    path = Path(resolve(name)) / MANIFEST
    if not path.is_file():
        return
    try:
        found, what = read_manifest(path.parent, "teacher").get("encoder"), "another teacher"
    except HlmError:  # then it must be a student
        found = read_manifest(path.parent, "student")["inputs"].get("teacher")
        what = "a student of another teacher"
    if found in (None, store.encoder) or (what == "another teacher" and _same_encoder(model, store)):
        return
    raise HlmError(
        f"student: expected a backbone, teacher {store.encoder} of the vectors at {store.folder}, or a student of it, "
        f"found {name}, {what} ({found}); name the vectors that teacher made, or take {MANIFEST} out of a copy of the "
        "folder to start from its weights all the same"
    )


def _same_encoder(model: SentenceTransformer, store: VectorStore) -> bool:
    if store.canaries is None:
        return False
    width = min(store.dim, model.get_embedding_dimension())
    theirs = canaries.vectors_of(store.canaries, width, where=str(store.folder))
    ours = encode(model, store.canaries["texts"], prompt_name="query", dim=width)
    return float((ours * theirs).sum(axis=1).min()) > SAME_ENCODER
