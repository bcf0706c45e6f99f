"""Phase 3: trains the student contrastively against the teacher's frozen ad vectors; no ad is encoded."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from hlm.data.contract import load
from hlm.encoders.loading import encode, fingerprint, load_encoder, prompt_of, save_encoder
from hlm.identity import PATHS, as_config, up_to_date
from hlm.settings import keywords
from hlm.steps import RefineConfig
from hlm.training.batches import TokenTable
from hlm.training.dev_retrieval import DevRetrieval
from hlm.training.gradcache import gather_with_gradient, loss_of_chunks
from hlm.training.inputs import kept_pairs
from hlm.training.losses import id_mask, l2_alignment, matryoshka, refinement_contrastive
from hlm.training.mining import (
    gather_rows,
    padded_rows,
    positive_scores,
    search_device,
    select_hard_negatives,
    shared_rows,
    top_k_documents,
)
from hlm.training.trainer import (
    RecipeTrainer,
    TrainingArguments,
    claimed_output,
    finish,
    recorded,
    set_dropout,
    train,
)
from hlm.vectors.faiss_index import AdIndex
from hlm.vectors.lineage import check_student
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)


@keywords(RefineConfig, TrainingArguments)
def refine(config: RefineConfig, args: TrainingArguments) -> Path:
    """Refines a student on a dataset's train pairs. Started from a student that was never aligned, it is the paper's
    naive baseline.

    Every setting of `RefineConfig` and of `TrainingArguments` is a keyword. A run that was killed goes on from its last
    checkpoint, beside `output`; an output that is up to date is left alone.

    Returns:
        `output`: the refined student, a sentence-transformers folder.

    Raises:
        HlmError: settings that do not work, a student of another teacher, vectors of other data, or an output that is
            somebody's.
    """
    args.check_hardware("refine", config)
    with claimed_output(config.output, "student", args) as output:
        _refine(dataclasses.replace(config, output=output), args)
    return Path(output)


def _refine(config: RefineConfig, args: TrainingArguments) -> None:
    documents = VectorStore.open(Path(config.vectors) / "corpus")
    check_student(config.student, documents.encoder)
    data = load(config.data, splits=("train", "dev"), skip_bad_rows=config.skip_bad_rows)
    documents.check(source=data.fingerprint("corpus"))
    model = load_encoder(config.student)
    queries = VectorStore.open(Path(config.vectors) / "queries")
    queries.check(encoder=documents.encoder, source=data.fingerprint("queries"))
    identity: dict[str, Any] = {
        "inputs": {"student": fingerprint(model), "teacher": documents.encoder, "vectors": documents.fingerprint}
        | {"queries": queries.fingerprint, "qrels": data.fingerprint("qrels/train")}
        | {"qrels/dev": data.fingerprint("qrels/dev")},
        "config": as_config(config, recorded(args)),
    }
    if up_to_date(config.output, "student", identity, paths=PATHS):
        return
    set_dropout(model, config.dropout)
    refinement = Refinement(model, data, documents, queries, config, args.seed)
    trainer = RecipeTrainer(
        model,
        args,
        rows=len(refinement.pairs),
        keys=refinement.tokens.lengths(refinement.pairs[:, 0]),
        collate=Collate(refinement.pairs, refinement.tokens, config.cache_chunk),
        step_loss=refinement.loss,
        evaluator=DevRetrieval(
            dict(data.split_queries("dev")), data.qrels["dev"], index=AdIndex.build(documents, dim=refinement.width)
        ),
        extra_state={"negatives": refinement.negatives},
        callbacks=[Refresh(refinement, config.refresh_epochs)] if config.hard_negatives else [],
    )
    measured = train(trainer, identity)
    if trainer.is_world_process_zero():
        save_encoder(model, config.output, "student", **identity, **measured)
    finish(trainer, measured)


class Refinement:
    """Pairs, pool and masks as row numbers of the store, and the loss over them."""

    def __init__(self, model, data, documents, queries, config: RefineConfig, seed: int) -> None:
        self.model, self.documents, self.config, self.seed = model, documents, config, seed
        self.width = model.get_embedding_dimension()
        triples = kept_pairs(data, config.min_score)
        number = {name: row for row, name in enumerate(dict.fromkeys(query for query, _, _ in triples))}
        rows = documents.rows_of([document for _, document, _ in triples])
        self.pairs = np.stack([[number[query] for query, _, _ in triples], rows], axis=1)
        self.known: list[list[int]] = [[] for _ in number]
        for query, row in self.pairs:
            self.known[query].append(int(row))
        texts = dict(data.split_queries("train"))
        self.texts = [texts[name] for name in number]
        self.tokens = TokenTable(model, self.texts, prompt_of(model, "query"))
        self.teacher_queries, self.teacher_rows = queries, queries.rows_of(list(number))
        self.excluded = padded_rows(self.known)
        self.teacher_top = torch.full((len(number), 1), -1)
        if config.mask_top:
            self.teacher_top = self.searched(self.teachers_best, config.mask_top)
        self.negatives = torch.full((len(number), config.hard_negatives), -1)
        self.whole = config.pool >= len(documents)
        if self.whole:
            self.pool_rows = np.arange(len(documents))
            self.pool = self.vectors(self.pool_rows)

    def vectors(self, rows: np.ndarray) -> torch.Tensor:
        """float32 (rows, student's width): frozen ad vectors from the store."""
        return matryoshka(torch.from_numpy(self.documents.gather(rows)), self.width)

    def refresh(self) -> None:
        """Mines hard negatives with the student as it is now."""
        vectors = encode(self.model, self.texts, prompt_name="query")
        found = self.searched(lambda rows: self.negatives_of(rows, vectors[rows]), self.config.hard_negatives)
        self.negatives.copy_(found)
        logger.info("hard negatives: %.1f a query", float((found >= 0).sum(dim=1).float().mean()))

    def searched(self, find: Callable[[np.ndarray], np.ndarray], width: int) -> torch.Tensor:
        """What `find` gives for the queries' rows, int64 (queries, width); each process does its share."""
        rows = shared_rows(len(self.known))
        found = find(rows) if len(rows) else np.zeros((0, width), dtype=np.int64)
        return torch.from_numpy(gather_rows(rows, found, len(self.known)))

    def teachers_best(self, rows: np.ndarray) -> np.ndarray:
        vectors = self.teacher_queries.gather(self.teacher_rows[rows])
        return top_k_documents(vectors, self.documents, self.config.mask_top, device=search_device(self.model))[1]

    def negatives_of(self, rows: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        depth = min(len(self.documents), 100)
        scores, found = top_k_documents(vectors, self.documents, depth, device=search_device(self.model))
        known = [self.known[row] for row in rows]
        limits = positive_scores(vectors, known, self.documents)
        never = [{*one, *top} for one, top in zip(known, self.teacher_top[rows].tolist(), strict=True)]
        return select_hard_negatives(scores, found, limits, never, self.config.hard_negatives)

    def draw(self, positive_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The step's pool: ids (M,) and vectors (M, width). The positives of the whole batch, on all devices, seed the
        draw: every device and a resumed run draw alike."""
        if not self.whole:
            generator = np.random.default_rng((self.seed, *gather_with_gradient(positive_ids).tolist()))
            self.pool_rows = np.sort(generator.choice(len(self.documents), self.config.pool, replace=False))
            self.pool = self.vectors(self.pool_rows)
        return torch.from_numpy(self.pool_rows), self.pool

    def loss(self, model, batch: dict) -> torch.Tensor:
        def contrast(queries):
            return self.contrast(queries, batch)

        return loss_of_chunks(model, [batch["query"]], contrast, cached=bool(self.config.cache_chunk))

    def contrast(self, queries: torch.Tensor, batch: dict) -> torch.Tensor:
        device = batch["query_ids"].device
        query_ids, positive_ids = batch["query_ids"].cpu(), batch["positive_ids"].cpu()
        pool_ids, pool = self.draw(batch["positive_ids"])
        negative_ids = self.negatives[query_ids]
        hard = None
        if negative_ids.shape[1]:
            hard = self.vectors(negative_ids.clamp(min=0).view(-1).numpy()).view(*negative_ids.shape, -1)
        together = {}
        if self.config.query_query:
            together = {"use_query_query": True, "query_ids": batch["query_ids"]}
            if torch.distributed.is_initialized():
                together |= {
                    "all_queries": gather_with_gradient(queries),
                    "all_query_ids": gather_with_gradient(batch["query_ids"]),
                    "offset": torch.distributed.get_rank() * len(queries),
                }
        loss = refinement_contrastive(
            queries,
            self.vectors(positive_ids.numpy()).to(device),
            pool.to(device),
            positive_ids=positive_ids.to(device),
            pool_ids=pool_ids.to(device),
            mask=id_mask(self.teacher_top[query_ids], pool_ids).to(device),
            negatives=None if hard is None else hard.to(device),
            negative_ids=None if hard is None else negative_ids.to(device),
            excluded_ids=self.excluded[query_ids].to(device),
            temperature=self.config.temperature,
            margin=self.config.margin,
            **together,
        )
        if self.config.alignment_weight:
            teacher = torch.from_numpy(self.teacher_queries.gather(self.teacher_rows[query_ids.numpy()])).to(device)
            loss = loss + self.config.alignment_weight * l2_alignment(queries, matryoshka(teacher, self.width))
        return loss


@dataclass
class Collate:
    """Rows of training -> a batch; what a worker of the data loader needs, and no more."""

    pairs: np.ndarray  # (rows, 2) int64: query number, row of the store
    tokens: TokenTable
    chunk: int | None

    def __call__(self, rows: list[int]) -> dict:
        query, positive = self.pairs[rows].T
        chunk = self.chunk or len(rows)
        return {
            "query": [self.tokens.features(query[start : start + chunk]) for start in range(0, len(rows), chunk)],
            "query_ids": torch.from_numpy(query.copy()),
            "positive_ids": torch.from_numpy(positive.copy()),
        }


class Refresh(TrainerCallback):
    """Mines at the start and then every `epochs` epochs; a resumed run goes on with the negatives it had."""

    def __init__(self, refinement: Refinement, epochs: int) -> None:
        self.refinement, self.epochs = refinement, epochs

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        steps = max(1, state.max_steps // max(1, round(state.num_train_epochs))) * self.epochs
        if state.global_step % steps == 0:
            self.refinement.refresh()
