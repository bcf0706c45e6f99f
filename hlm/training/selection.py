"""What a teacher keeps of what it learnt: learning rate, checkpoint and merge weight, chosen on queries that people
typed.

The backbone is a candidate too. Tuned on pairs that are unlike what people type, a teacher is often worse than its
backbone, and no loss shows it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hlm.artefacts import HlmError, fingerprint_json
from hlm.data.contract import RetrievalData, document_text, iterate
from hlm.encoders.lora import adapter_of, set_adapter
from hlm.evaluation.metrics import Qrels, Scores, mean
from hlm.steps import TeacherConfig
from hlm.training.agreement import LEAST_JUDGED, Agreement, TypedQueries
from hlm.training.checkpoints import STATE, checkpoint_folder, fault
from hlm.training.dev_retrieval import DevRetrieval, scores_on_dev
from hlm.training.trainer import RecipeTrainer, TrainingArguments

logger = logging.getLogger(__name__)

JUDGED = "judged dev queries"  # what a choice is made by
AGREED = "unlabelled queries, judged by BM25 and the backbone"
SAMPLES = 10_000
RISK = 0.05  # of keeping what only noise made better
DECIMALS = 4


def dev_retrieval(
    data: RetrievalData, config: TeacherConfig, texts: dict[str, str] | None = None, qrels: Qrels | None = None
) -> DevRetrieval | None:
    """Dev queries, or these, over their judged documents and a fixed sample of others: the teacher's own documents
    move."""
    if qrels is None:
        if "dev" not in data.qrels:
            return None
        texts, qrels = dict(data.split_queries("dev", oracle=config.oracle)), data.qrels["dev"]
    judged = {document for grades in qrels.values() for document in grades}
    keep = min(1.0, config.dev_documents / max(1, len(data.corpus)))
    limit = math.floor(keep * 16**8)
    documents = {
        row["_id"]: document_text(row, oracle=config.oracle)
        for row in iterate(data.corpus)
        if row["_id"] in judged or int(fingerprint_json(row["_id"])[:8], 16) < limit
    }
    return DevRetrieval(texts or {}, qrels, documents=documents)


def typed_retrieval(
    data: RetrievalData, config: TeacherConfig, typed: TypedQueries, searched: Callable[[list[str]], Agreement]
) -> tuple[DevRetrieval | None, str | None]:
    """`dev_retrieval` of queries that people typed, and what they are judged by.

    Dev queries that people judged, where there are enough. Else unlabelled queries with the judgements of
    `Agreement.judgements`. Queries derived from the catalogue are like the pairs trained on, not like what people type:
    where there are no others, there is nothing to choose by.
    """
    if typed.judged:
        texts = dict(data.split_queries("dev", oracle=config.oracle))
        qrels = {query: data.qrels["dev"][query] for query in typed.judged}
        return dev_retrieval(data, config, {query: texts[query] for query in qrels}, qrels), JUDGED
    qrels = searched(typed.unlabelled).judgements() if typed.unlabelled else {}
    if len(qrels) < LEAST_JUDGED:
        return dev_retrieval(data, config), None
    return dev_retrieval(data, config, {text: text for text in qrels}, qrels), AGREED


def keep_checkpoints(args: TrainingArguments) -> None:
    """Keeps every checkpoint until the end, as each may be the one.

    Raises:
        HlmError: the trainer is to choose one by itself.
    """
    if args.load_best_model_at_end:
        raise HlmError(
            "load_best_model_at_end: expected false where merge_weight is chosen, which chooses the checkpoint as well"
        )
    args.save_total_limit = None


def choose(
    trainer: RecipeTrainer, learnt: dict[tuple[float, int], dict[str, Tensor]], weights: tuple[float, ...]
) -> dict[str, Any]:
    """Sets the model to the best of what was learnt, at its best weight on dev, or to the backbone where none is better
    by more than noise. Every process must call it.

    Better means: the mean gain in nDCG@10 over the backbone is more than noise, see `compared`.

    Args:
        learnt: (learning rate, step) -> the adapter then, see `learnt_by`.

    Returns:
        {"learning_rate", "step", "merge_weight", "ndcg@10": what they reach, "backbone": its nDCG@10, "queries": their
        number, "table": [{"learning_rate", "step", "merge_weight", "ndcg@10", "gain", "ci90"}]}; step 0 with weight 0
        is the backbone, which has no rate.
    """
    any_adapter = next(iter(learnt.values()))
    set_adapter(trainer.model, any_adapter, 0.0)
    backbone = scores_on_dev(trainer)
    table: list[dict[str, Any]] = []
    for (rate, step), tensors in learnt.items():
        for weight in weights:
            set_adapter(trainer.model, tensors, weight)
            row = {"learning_rate": rate, "step": step, "merge_weight": weight}
            row |= compared(scores_on_dev(trainer), backbone)
            logger.info("rate %g, step %d, merge weight %.2f: nDCG@10 %.4f, gain %+.4f %s", *row.values())
            table.append(row)
    untuned = round(mean(backbone), DECIMALS)
    found: dict[str, Any] = {"learning_rate": None, "step": 0, "merge_weight": 0.0, "ndcg@10": untuned}
    if better := [row for row in table if row["ci90"][0] > 0]:
        best = max(better, key=lambda row: row["gain"])  # of equals the first rate, the earlier step, the lower weight
        found = {name: best[name] for name in found}
        logger.info("kept: rate %g, step %d, merge weight %.2f: nDCG@10 %.4f", *found.values())
        set_adapter(trainer.model, learnt[best["learning_rate"], best["step"]], best["merge_weight"])
    else:
        logger.warning(
            "the teacher is its backbone: on %d queries nothing that was learnt is better than its nDCG@10 of %.4f by "
            "more than noise; other pairs, or more of them, may help",
            len(backbone),
            untuned,
        )
        set_adapter(trainer.model, any_adapter, 0.0)
    return found | {"backbone": untuned, "queries": len(backbone), "table": table}


def learnt_by(trainer: RecipeTrainer) -> dict[tuple[float, int], dict[str, Tensor]]:
    """(learning rate, step) -> the adapter as it was then, of every checkpoint and of the end, which the model has
    afterwards."""
    end, rate = trainer.state.global_step, trainer.args.learning_rate
    now = adapter_of(trainer.model)
    found = {}
    for step in sorted(int(path.name.rsplit("-", 1)[1]) for path in Path(trainer.args.output_dir).glob("checkpoint-*")):
        folder = checkpoint_folder(trainer.args.output_dir, step)
        if step < end and fault(folder, {STATE}) is None:
            trainer._load_from_checkpoint(str(folder))
            found[rate, step] = adapter_of(trainer.model)
    set_adapter(trainer.model, now, 1.0)
    return found | {(rate, end): now}


def compared(scores: Scores, base: Scores) -> dict[str, Any]:
    """Mean of the scores and its gain over `base`, with the 90% interval of the paired bootstrap of the queries (Efron
    and Tibshirani 1993, ch. 13): a gain is more than noise where the interval lies above zero.

    Returns:
        {"ndcg@10", "gain", "ci90": [low, high]}.
    """
    gains = np.array([scores[query] - base[query] for query in sorted(base)])
    draws = np.random.default_rng(0).integers(len(gains), size=(SAMPLES, len(gains)))
    low, high = np.quantile(gains[draws].mean(axis=1), [RISK, 1 - RISK])
    return {
        "ndcg@10": round(mean(scores), DECIMALS),
        "gain": round(float(gains.mean()), DECIMALS),
        "ci90": [round(float(low), DECIMALS), round(float(high), DECIMALS)],
    }
