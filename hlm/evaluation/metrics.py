"""Retrieval runs, their metrics through trec_eval, and what a student keeps of its teacher.

A run is `{query id: {document id: score}}`, as in pytrec_eval. Everything that ranks a run goes through `ranking`, so
that ties break the same way everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytrec_eval

from hlm.artefacts import HlmError
from hlm.data.words import count_words
from hlm.indexes.exact import StoreSearch
from hlm.indexes.index import Index
from hlm.report_types import Recovery

Run = dict[str, dict[str, float]]
Qrels = dict[str, dict[str, int]]
Scores = dict[str, float]  # query id -> value of one metric

RECALL_DEPTH = 100


def ranking(documents: Mapping[str, float], k: int | None = None) -> list[str]:
    """Document ids by descending score, at most `k`; equal scores by descending id, which is trec_eval's order."""
    by_id = sorted(documents, reverse=True)
    return sorted(by_id, key=documents.__getitem__, reverse=True)[:k]


def relevance_threshold(qrels: Qrels) -> int:
    """The lowest grade that binary metrics count as relevant: 2 for graded judgements, 1 where no grade exceeds 1."""
    return 2 if max((grade for judged in qrels.values() for grade in judged.values()), default=0) > 1 else 1


def metric_names(k: int = 10, *, incomplete: bool = False) -> list[str]:
    """The names of the metrics `per_query` returns, in the order reports show them."""
    names = [f"precision@{k}", f"ndcg@{k}", f"recall@{RECALL_DEPTH}", f"mrr@{k}"]
    return names + ([f"condensed_ndcg@{k}", f"judged@{k}"] if incomplete else [])


def check_judgements(qrels: Qrels, k: int, relevance_level: int) -> None:
    """Refuses judgements that no run can be scored by: what `per_query` refuses whatever the run is.

    Raises:
        HlmError: k below 1, no judgements, or no document as relevant as asked for.
    """
    if k < 1:
        raise HlmError(f"k: expected 1 or more, found {k}")
    if not qrels:
        raise HlmError("expected judgements of at least one query, found none; choose another split")
    if not any(grade >= relevance_level for judged in qrels.values() for grade in judged.values()):
        raise HlmError(
            f"no document is judged {relevance_level} or more; choose a lower relevance_level or another split"
        )


def per_query(
    run: Run,
    qrels: Qrels,
    k: int = 10,
    *,
    relevance_level: int | None = None,
    incomplete: bool = False,
) -> dict[str, Scores]:
    """Scores of every judged query, computed by trec_eval.

    Precision, recall and MRR are binary: a grade of `relevance_level` or more is relevant. nDCG is trec_eval's: the
    gain is the grade itself, discounted by log2(rank + 1), the ideal from all judgements. Recall is taken at 100, MRR
    at `k`. A query of `qrels` that the run lacks scores 0 throughout, and so does one without a relevant document
    (trec_eval's way with `-c`): both stay in the mean. Queries of the run without judgements are left out.

    Args:
        run: ranked to depth 100 or more, so that recall@100 means what it says.
        qrels: grades; 0 is judged and not relevant.
        k: cut-off.
        relevance_level: `relevance_threshold(qrels)` by default.
        incomplete: add `condensed_ndcg@k` (unjudged documents dropped from the run first; Sakai, SIGIR 2007) and
            `judged@k` (judged share of the first k).

    Returns:
        {metric: {query id: value}}, every value in [0, 1]; the metrics of `metric_names`.

    Raises:
        HlmError: k below 1, no judgements, no query in common, no document as relevant as asked for, or a score that
            is not finite.
    """
    level = relevance_threshold(qrels) if relevance_level is None else relevance_level
    check_judgements(qrels, k, level)
    if not qrels.keys() & run.keys():
        raise HlmError(
            f"none of the run's {len(run)} queries has a judgement (the run has {_few(run)}, the judgements "
            f"{_few(qrels)}); choose the split that belongs to these queries"
        )
    for query, documents in run.items():
        if not np.isfinite(list(documents.values())).all():
            raise HlmError(f"the run has a score that is not finite for query '{query}'; check the encoder")

    ranked = {query: ranking(run.get(query, {})) for query in qrels}
    values = _trec(ranked, qrels, {f"P.{k}", f"ndcg_cut.{k}", f"recall.{RECALL_DEPTH}"}, level)
    # trec_eval's reciprocal rank has no cut-off: it is the run that is cut.
    cut = _trec({query: documents[:k] for query, documents in ranked.items()}, qrels, {"recip_rank"}, level)
    keys = [f"P_{k}", f"ndcg_cut_{k}", f"recall_{RECALL_DEPTH}"]
    scores = {name: values[key] for name, key in zip(metric_names(k), keys, strict=False)}
    scores[f"mrr@{k}"] = cut["recip_rank"]
    if incomplete:
        condensed = {query: [d for d in documents if d in qrels[query]] for query, documents in ranked.items()}
        scores[f"condensed_ndcg@{k}"] = _trec(condensed, qrels, {f"ndcg_cut.{k}"}, level)[f"ndcg_cut_{k}"]
        scores[f"judged@{k}"] = {
            query: sum(d in qrels[query] for d in documents[:k]) / max(1, len(documents[:k]))
            for query, documents in ranked.items()
        }
    return scores


def _trec(ranked: dict[str, list[str]], qrels: Qrels, measures: set[str], level: int) -> dict[str, Scores]:
    """trec_eval's measures of ranked lists: {measure: {query id: value}}, 0 where a list is empty."""
    # Scores are made from the ranks, so that trec_eval, which reads them as 32-bit floats, cannot see other ties.
    runs = {
        query: {document: float(len(documents) - rank) for rank, document in enumerate(documents)}
        for query, documents in ranked.items()
        if documents
    }
    judged = {query: {d: int(grade) for d, grade in qrels[query].items()} for query in ranked}
    found = pytrec_eval.RelevanceEvaluator(judged, measures, relevance_level=level).evaluate(runs)
    names = [measure.replace(".", "_") for measure in measures]
    return {name: {query: float(found.get(query, {}).get(name, 0.0)) for query in ranked} for name in names}


def mean(scores: Scores) -> float:
    """The mean over queries."""
    return float(np.mean(list(scores.values())))


def recovery(student: Scores, teacher: Scores, *, samples: int = 10_000, seed: int = 0) -> Recovery:
    """How much of the teacher's metric the student keeps: `ratio` of the student to the teacher."""
    return ratio(student, teacher, samples=samples, seed=seed)


def uplift(treatment: Scores, control: Scores, *, samples: int = 10_000, seed: int = 0) -> Recovery:
    """What a treatment gains over a control: `ratio` minus 1; 0.05 is a gain of 5%."""
    found = ratio(treatment, control, samples=samples, seed=seed, names=("treatment", "control"))
    value = None if found["value"] is None else found["value"] - 1
    return {**found, "value": value, "ci95": found["ci95"] and [bound - 1 for bound in found["ci95"]]}


def ratio(
    ours: Scores,
    theirs: Scores,
    *,
    samples: int = 10_000,
    seed: int = 0,
    names: tuple[str, str] = ("student", "teacher"),
    scores: str = "scores",
) -> Recovery:
    """The ratio of two means over the same queries.

    The interval is the percentile interval of the paired bootstrap (Efron and Tibshirani 1993, ch. 13): queries are
    drawn with replacement, both sides keep the same draw.

    Args:
        ours, theirs: {query id: value} of one metric.
        samples: bootstrap samples, 1 or more.
        seed: of the draws.
        names: of the two sides, for messages; `scores` is their verb.

    Returns:
        {"value": ratio, "ci95": [low, high]}; above 1 where ours is better. Where the ratio is undefined, as the mean
        of theirs is 0, both are None. Where only the interval is, over fewer than 2 queries or with a mean of theirs
        that is 0 in more than 1% of the samples, "ci95" alone is None. "reason" then says which, and is absent
        otherwise.

    Raises:
        HlmError: other queries on the two sides, no query, or no samples.
    """
    if ours.keys() != theirs.keys() or not theirs:
        raise HlmError(
            f"expected the same queries for {names[0]} and {names[1]}, found {len(ours)} and {len(theirs)} with "
            f"{len(ours.keys() & theirs.keys())} in common; evaluate both on one split"
        )
    if samples < 1:
        raise HlmError(f"bootstrap samples: expected 1 or more, found {samples}")
    queries = sorted(theirs)  # the order decides the draws: the interval must not depend on how a dict was filled
    pairs = np.array([[ours[query], theirs[query]] for query in queries], np.float64)
    means = pairs.mean(axis=0)
    if means[1] == 0:
        return {"value": None, "ci95": None, "reason": f"the {names[1]} {scores} 0 on all {len(queries)} queries"}
    value = float(means[0] / means[1])
    if len(queries) < 2:
        return {"value": value, "ci95": None, "reason": "an interval needs 2 queries or more, there is 1"}
    kept = _resampled_ratios(pairs, samples, seed)
    if len(kept) < 0.99 * samples:
        reason = f"no interval: the {names[1]} {scores} 0 in {samples - len(kept)} of {samples} samples of the "
        return {"value": value, "ci95": None, "reason": f"{reason}{len(queries)} queries; use more queries"}
    low, high = np.percentile(kept, [2.5, 97.5])
    return {"value": value, "ci95": [float(low), float(high)]}


def _resampled_ratios(pairs: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """First over second in each bootstrap sample of float64 (queries, 2); samples without a ratio are left out."""
    generator = np.random.default_rng(seed)
    ratios = []
    block = max(1, 4_000_000 // len(pairs))  # 32 MB of draws at a time
    for start in range(0, samples, block):
        draws = generator.integers(len(pairs), size=(min(block, samples - start), len(pairs)))
        drawn = pairs[draws].mean(axis=1)
        defined = drawn[:, 1] > 0
        ratios.append(drawn[defined, 0] / drawn[defined, 1])
    return np.concatenate(ratios)


def overlap(run_a: Run, run_b: Run, k: int = 10) -> Scores:
    """Share of the first `k` documents that two runs have in common, whatever their order, for each query.

    Of the longer list's length where neither run has `k` documents; 0 where both are empty.

    Raises:
        HlmError: the runs hold other queries.
    """
    if run_a.keys() != run_b.keys():
        raise HlmError(
            f"expected two runs over the same queries, found {len(run_a)} and {len(run_b)} with "
            f"{len(run_a.keys() & run_b.keys())} in common; search with the same queries"
        )
    result = {}
    for query in run_a:
        first, second = set(ranking(run_a[query], k)), set(ranking(run_b[query], k))
        result[query] = len(first & second) / max(1, len(first), len(second))
    return result


def length_slice(text: str) -> str:
    """The slice of a query by its number of words (`count_words`): "1", "2", "3-4" or "5+"."""
    words = count_words(text)
    return "1" if words <= 1 else "2" if words == 2 else "3-4" if words <= 4 else "5+"


def slices(
    groups: Mapping[str, str],
    student: Scores,
    teacher: Scores,
    overlaps: Scores,
    *,
    k: int = 10,
    samples: int = 10_000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Student against teacher on groups of queries.

    Args:
        groups: query id -> group name, for every query of `student`.
        student, teacher: nDCG@k of each query.
        overlaps: overlap@k of each query.

    Returns:
        {group: {"n", "student_ndcg@k", "teacher_ndcg@k", "overlap@k", "recovery": see `recovery`}} in alphabetical
        order.
    """
    result = {}
    for group in sorted(set(groups.values())):
        members = [query for query in student if groups[query] == group]
        if not members:
            continue
        ours, theirs = ({query: side[query] for query in members} for side in (student, teacher))
        result[group] = {
            "n": len(members),
            f"student_ndcg@{k}": mean(ours),
            f"teacher_ndcg@{k}": mean(theirs),
            f"overlap@{k}": mean({query: overlaps[query] for query in members}),
            "recovery": recovery(ours, theirs, samples=samples, seed=seed),
        }
    return result


def dense_run(query_vectors: np.ndarray, index: Index | StoreSearch, query_ids: Sequence[str], k: int) -> Run:
    """Searches `index` with float32 (n, dim) normalised vectors; scores are cosines.

    Raises:
        HlmError: as many ids as vectors were expected, or what `Index.search` refuses.
    """
    if len(query_ids) != len(query_vectors):
        raise HlmError(f"expected one id for each query vector, found {len(query_ids)} and {len(query_vectors)}")
    scores, ids = index.search(query_vectors, k)
    return {
        query: dict(zip(found, row[: len(found)].tolist(), strict=True))
        for query, found, row in zip(query_ids, ids, scores, strict=True)
    }


def _few(ids: Iterable[str]) -> str:
    listed = sorted(ids)
    return ", ".join(f"'{i}'" for i in listed[:3]) + (", ..." if len(listed) > 3 else "")
