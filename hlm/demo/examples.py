"""Example queries for the demo, chosen from measured answers instead of by hand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from hlm.data.spelling import match_key

logger = logging.getLogger(__name__)

COUNT = 6  # examples that are shown
K = 10  # ads that are looked at, as many as the page shows at first
GOOD = 8  # ads of these that have the data's best grade in an answer worth showing
MOST_JUDGED = 1000  # queries that the student answers to choose from
MOST_COMPARED = 50  # of these, queries that the teacher answers too: it may take long


def choose_examples(
    data: Any,
    student: Callable[[list[str]], np.ndarray],
    teacher: Callable[[str], np.ndarray | None],
    index: Any,
) -> tuple[str, list[str]]:
    """A label that says how they were chosen, and at most six queries, at least one.

    The rule, over the judged queries of the test split (or of dev, where there is no test): of the student's first ten
    ads count those with the data's best grade, and those that the teacher finds too. Queries come in the order of the
    smaller count, then of the first count, then of the file. Where some have eight ads or more of the best grade, the
    others are left out. So is a query that shares a word with one before it: the examples differ. Without judgements
    the first queries of the data are taken.

    Args:
        data: a `hlm.data.contract.RetrievalData`, with the judgements that were loaded.
        student: texts -> float32 (n, dim), L2-normalised.
        teacher: a text -> float32 (1, dim), L2-normalised, or None where it has no vector.
        index: a `hlm.indexes.index.Index` of the teacher's ad vectors.
    """
    split = next((name for name in ("test", "dev") if data.qrels.get(name)), None)
    if split is None:
        texts = (text for _, text in zip(range(MOST_JUDGED), data.queries["text"], strict=False))
        return "Examples: the first queries of the data", _different([" ".join(text.split()) for text in texts])
    judged = data.qrels[split]
    queries = data.split_queries(split)[:MOST_JUDGED]
    best = max(grade for ads in judged.values() for grade in ads.values())
    _, found = index.search(student([text for _, text in queries]), K)
    right = [sum(judged[name].get(ad) == best for ad in ads) for (name, _), ads in zip(queries, found, strict=True)]
    ranked = []
    for place in sorted(range(len(queries)), key=lambda place: -right[place])[:MOST_COMPARED]:
        vector = teacher(queries[place][1])
        ads = [] if vector is None else index.search(vector, K)[1][0]
        ranked.append((right[place], len({*ads} & {*found[place]}), queries[place][1]))
    ranked.sort(key=lambda one: (-min(one[:2]), -one[0]))
    ranked = [one for one in ranked if one[0] >= GOOD] or ranked
    measured = {text: (grade, shared) for grade, shared, text in ranked}
    chosen = _different(list(measured))
    for text in chosen:
        grade, shared = measured[text]
        logger.info("example %r: of %d ads %d are judged best, %d are the teacher's too", text, K, grade, shared)
    compared = any(shared for _, shared in measured.values())
    who = "student and teacher answer" if compared else "the student answers"
    return f"Examples: the {split} queries that {who} best", chosen


def _different(texts: list[str]) -> list[str]:
    """The first of the texts that have no word in common, singular and plural alike."""
    chosen: list[str] = []
    seen: set[str] = set()
    for text in texts:
        words = set(match_key(text).split())
        if len(chosen) < COUNT and not words & seen:
            chosen.append(text)
            seen |= words
    return chosen
