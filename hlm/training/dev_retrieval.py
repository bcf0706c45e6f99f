"""Retrieval on dev queries while a model trains: what checkpoints are chosen by, and whether training did any good."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from accelerate.utils import broadcast_object_list
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.evaluation import BaseEvaluator
from torch.distributed.tensor import DTensor

from hlm.encoders.loading import encode
from hlm.evaluation.metrics import Qrels, Scores, dense_run, mean, per_query
from hlm.indexes.exact import StoreSearch
from hlm.indexes.faiss_index import AdIndex
from hlm.indexes.index import Index

logger = logging.getLogger(__name__)


class DevRetrieval(BaseEvaluator):
    """nDCG@10 and precision@10 of the model in training on dev queries: what checkpoints are chosen by.

    Alignment loss predicts ranking only loosely, so no checkpoint is ever chosen by loss.

    Args:
        texts: dev query id -> text.
        qrels: the dev judgements.
        index: frozen document vectors; or None, with `documents` (id -> text) to be encoded anew each time, as for a
            teacher, whose own document vectors move.
    """

    def __init__(
        self,
        texts: Mapping[str, str],
        qrels: Qrels,
        *,
        index: Index | StoreSearch | None = None,
        documents: Mapping[str, str] | None = None,
        prompt_name: str = "query",
    ) -> None:
        super().__init__()
        self.texts, self.qrels, self.index, self.documents = texts, qrels, index, documents
        self.prompt_name = prompt_name
        self.primary_metric = "dev_ndcg@10"

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        scores = self.scores(model)
        metrics = {f"dev_{name}": mean(scores[name]) for name in ("ndcg@10", "precision@10")}
        logger.info("step %s: %s", steps, ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        return metrics

    def scores(self, model: SentenceTransformer) -> dict[str, Scores]:
        """Metric -> dev query id -> value, of the model as it is."""
        index = self.index
        if index is None:
            documents = self.documents or {}
            vectors = encode(model, list(documents.values()), prompt_name="document")
            index = AdIndex.from_vectors(vectors, list(documents))
        # The GPU waits while the CPU searches and counts: once an evaluation, over a few hundred queries.
        queries = encode(model, list(self.texts.values()), prompt_name=self.prompt_name)
        run = dense_run(queries, index, list(self.texts), 100)
        return per_query(run, self.qrels, 10)


def on_dev(trainer: SentenceTransformerTrainer) -> float | None:
    """nDCG@10 on dev of the model as it is, computed in the precision it trains in; None without dev judgements. Every
    process must call it."""
    if trainer.evaluator is None:
        return None

    def measured() -> float:
        with trainer.accelerator.autocast():
            metrics = trainer.evaluator(trainer.model, steps=trainer.state.global_step)
        return float(metrics[trainer.evaluator.primary_metric])

    return _in_one_process(trainer, measured)


def scores_on_dev(trainer: SentenceTransformerTrainer) -> Scores:
    """nDCG@10 of each dev query, of the model as it is, computed in the precision it trains in. Every process must call
    it."""

    def measured() -> Scores:
        with trainer.accelerator.autocast():  # also where nothing was trained in this process, after a kill
            return trainer.evaluator.scores(trainer.model)["ndcg@10"]

    return _in_one_process(trainer, measured)


def _in_one_process(trainer: SentenceTransformerTrainer, measured: Callable[[], Any]) -> Any:
    """What the first process finds, for all; where each holds a part of the model, all must compute."""
    sharded = any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    found = None
    if sharded or trainer.is_world_process_zero():
        found = measured()
    return broadcast_object_list([found])[0]
