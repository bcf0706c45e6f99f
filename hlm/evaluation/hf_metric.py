"""The retrieval metrics as a Hugging Face `evaluate.Metric`.

It has a module of its own because importing `evaluate` from a script beside `recipes/evaluate.py` would import that
recipe: Python puts a script's own folder first on its path. Recipes use `hlm.evaluation.metrics.per_query` directly.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hlm.artefacts import HlmError
from hlm.evaluation.metrics import mean, per_query


class RetrievalMetric(evaluate.Metric):
    """Precision, nDCG, recall and MRR of ranked lists: `RetrievalMetric().compute(predictions=..., references=...)`.

    predictions: for each query the document ids, best first, e.g. `[["d3", "d1"], ...]`.
    references: for each query `{"ids": ["d1", "d2"], "grades": [3, 0]}`, the judged documents.
    k, relevance_level, incomplete: as in `hlm.evaluation.metrics.per_query`.

    Returns the means over queries, e.g. `{"precision@10": 0.1, "ndcg@10": 0.5, ...}`.

    Works offline and keeps its data in memory: no module is fetched, nothing is written.
    """

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        strings = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description="Retrieval metrics computed by trec_eval, with graded judgements.",
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features(
                {
                    "predictions": strings,
                    "references": {"ids": strings, "grades": datasets.List(datasets.Value("int64"))},
                }
            ),
        )

    def _compute(
        self,
        predictions: list[list[str]],
        references: list[dict[str, Any]],
        k: int = 10,
        relevance_level: int | None = None,
        incomplete: bool = False,
    ) -> dict[str, float]:
        run, qrels = {}, {}
        for number, (ids, judged) in enumerate(zip(predictions, references, strict=True)):
            if len(set(ids)) != len(ids):
                raise HlmError(f"query {number}: expected every document once in the ranking, found one twice")
            if len(judged["ids"]) != len(judged["grades"]):
                raise HlmError(
                    f"query {number}: expected one grade for each judged id, found {len(judged['grades'])} grades and "
                    f"{len(judged['ids'])} ids"
                )
            run[str(number)] = {document: float(len(ids) - rank) for rank, document in enumerate(ids)}
            qrels[str(number)] = dict(zip(judged["ids"], judged["grades"], strict=True))
        scores = per_query(run, qrels, k, relevance_level=relevance_level, incomplete=incomplete)
        return {name: mean(values) for name, values in scores.items()}
