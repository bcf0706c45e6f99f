"""Which learning rate: each is tried from the same start, and dev queries that people judged choose.

No rate suits all pairs. Pairs that are derived from a catalogue are unlike what people type: learnt fast, they do harm.
Many pairs that people made, learnt slowly, do little good.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import Tensor

from hlm.artefacts import HlmError
from hlm.evaluation.metrics import Scores
from hlm.training.agreement import LEAST_JUDGED
from hlm.training.dev_retrieval import scores_on_dev
from hlm.training.selection import compared
from hlm.training.trainer import RecipeTrainer, TrainingArguments, train

logger = logging.getLogger(__name__)


def check_rates(others: list[float], args: TrainingArguments) -> None:
    """Refuses rates that cannot be tried beside `learning_rate`.

    Raises:
        HlmError: one that is not above 0, or a model that FSDP shards.
    """
    if others and args.sharded:
        raise HlmError("try_learning_rates: expected a model that is whole on each GPU, found FSDP; set it to []")
    for rate in others:
        if not (math.isfinite(rate) and rate > 0):
            raise HlmError(f"try_learning_rates: expected numbers above 0, found {rate}")


def trainers_at(
    make: Callable[[TrainingArguments], RecipeTrainer], args: TrainingArguments, others: list[float]
) -> Iterator[RecipeTrainer]:
    """A trainer at `learning_rate` and one at each other rate, of the one model as it was at the first: each to be
    trained before the next is taken.

    The first has the run's training folder, which `finish` removes; the others have folders in it. So a killed run goes
    on within the rate that it was at. Every process must call it.
    """
    start: dict[str, Tensor] = {}
    rates = [*dict.fromkeys((args.learning_rate, *others))]
    for rate in rates:
        folder = f"{args.output_dir}/rate-{rate!r}" if start else args.output_dir
        trainer = make(dataclasses.replace(args, learning_rate=rate, output_dir=folder))  # type: ignore[call-arg]
        if start:
            trainer.take(start)
        elif len(rates) > 1:
            start = _copied(trainer)
        yield trainer
        if len(rates) > 1:
            _let_go(trainer)


def _let_go(trainer: RecipeTrainer) -> None:
    """Frees what only training needs: the optimizer's state is as large as what trains, twice."""
    for holder in (trainer, trainer.callback_handler):
        holder.optimizer = holder.lr_scheduler = None
    trainer.callback_handler.train_dataloader = None
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()


def train_at_best_rate(
    make: Callable[[TrainingArguments], RecipeTrainer],
    args: TrainingArguments,
    others: list[float],
    judged: Collection[str],
    identity: dict[str, Any],
) -> tuple[RecipeTrainer, dict[str, Any]]:
    """Trains at `learning_rate` and at each other rate from the same start. Keeps what `learning_rate` gave, or what is
    better than that on dev by more than noise, as `hlm.training.selection.compared` says. Every process must call it.

    Args:
        make: a trainer of the one model, with these arguments.
        others: none: it is `hlm.training.trainer.train`.
        judged: dev queries that people judged, to choose by. Of fewer than `LEAST_JUDGED` the others are not tried.

    Returns:
        The trainer that `finish` takes, and what `train` returns, of the rate that is kept. Where rates were tried,
        with {"chosen": {"learning_rate", "queries", "table": [{"learning_rate", "ndcg@10", "gain", "ci90"}]}}.
    """
    if others and len(judged) < LEAST_JUDGED:
        logger.warning(
            "try_learning_rates: %g is taken: to choose, dev needs %d queries or more that people judged, and has %d",
            args.learning_rate,
            LEAST_JUDGED,
            len(judged),
        )
        others = []
    if not others:
        trainer = make(args)
        return trainer, train(trainer, identity)
    first: RecipeTrainer | None = None
    base: Scores = {}
    kept: dict[str, Any] = {}
    table: list[dict[str, Any]] = []
    for trainer in trainers_at(make, args, others):
        first = first or trainer
        measured = train(trainer, identity)
        scores = {query: value for query, value in scores_on_dev(trainer).items() if query in judged}
        base = base or scores
        row = {"learning_rate": trainer.args.learning_rate} | compared(scores, base)
        logger.info("learning rate %g: nDCG@10 %.4f, gain %+.4f %s", *row.values())
        if not table or (row["ci90"][0] > 0 and row["gain"] > kept["row"]["gain"]):
            kept = {"row": row, "weights": _copied(trainer), "measured": measured}
        table.append(row)
    assert first is not None
    first.take(kept["weights"])
    rate = kept["row"]["learning_rate"]
    logger.info("kept: learning rate %g", rate)
    return first, kept["measured"] | {"chosen": {"learning_rate": rate, "queries": len(base), "table": table}}


def _copied(trainer: RecipeTrainer) -> dict[str, Tensor]:
    """What trains, as it is now. Every process must call it."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in trainer.trained_tensors().items()}
