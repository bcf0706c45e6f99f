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
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from hlm.artefacts import fingerprint_texts
from hlm.data.contract import RetrievalData, load
from hlm.encoders.loading import encode, fingerprint, load_encoder, prompt_of, save_encoder, sent
from hlm.identity import PATHS, as_config, up_to_date
from hlm.indexes.exact import exact_search
from hlm.indexes.lineage import check_student, named_teacher
from hlm.settings import keywords
from hlm.steps import RefineConfig
from hlm.training.agreement import judged_by_people
from hlm.training.batches import TokenTable
from hlm.training.checkpoints import claimed_output
from hlm.training.dev_retrieval import DevRetrieval
from hlm.training.frozen import FrozenVectors
from hlm.training.gradcache import gather_with_gradient, loss_of_chunks
from hlm.training.inputs import kept_pairs
from hlm.training.losses import id_mask, l2_alignment, refinement_contrastive
from hlm.training.mining import (
    gather_rows,
    padded_rows,
    positive_scores,
    search_device,
    select_hard_negatives,
    shared_rows,
    top_k_documents,
)
from hlm.training.rates import check_rates, train_at_best_rate
from hlm.training.trainer import (
    RecipeTrainer,
    TrainingArguments,
    finish,
    recorded,
    set_dropout,
)
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
    check_rates(config.try_learning_rates, args)
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
    judged = judged_by_people(data) if config.try_learning_rates else []
    if judged:
        identity["inputs"]["typed/judged"] = fingerprint_texts(judged)
    if up_to_date(config.output, "student", identity, paths=PATHS):
        return
    set_dropout(model, config.dropout)
    refinement = Refinement(model, data, documents, queries, config, args)
    evaluator = DevRetrieval(
        dict(data.split_queries("dev")), data.qrels["dev"], index=exact_search(documents, refinement.width)
    )

    def trainer_with(args: TrainingArguments) -> RecipeTrainer:
        return RecipeTrainer(
            model,
            args,
            rows=len(refinement.pairs),
            keys=refinement.tokens.lengths(refinement.pairs[:, 0]),
            collate=Collate(refinement.pairs, refinement.tokens, config.cache_chunk),
            step_loss=refinement.loss,
            evaluator=evaluator,
            extra_state={"negatives": refinement.negatives},
            callbacks=[Refresh(refinement, config.refresh_epochs)] if config.hard_negatives else [],
        )

    trainer, measured = train_at_best_rate(trainer_with, args, config.try_learning_rates, {*judged}, identity)
    if trainer.is_world_process_zero():
        save_encoder(model, config.output, "student", **identity, **measured, **named_teacher(documents))
    finish(trainer, measured)


class Refinement:
    """Pairs, pool and masks as row numbers of the store, and the loss over them.

    A step never waits for a GPU where there is one process: tables are looked up by the row numbers that the host has,
    and what is found is sent. Several processes have to agree on the pool and read one another's positives once.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        data: RetrievalData,
        documents: VectorStore,
        queries: VectorStore,
        config: RefineConfig,
        args: TrainingArguments,
    ) -> None:
        self.model, self.documents, self.config, self.seed = model, documents, config, args.seed
        self.width, self.device = model.get_embedding_dimension(), args.device
        self.ads = FrozenVectors(documents, self.width, self.device)
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
        if config.alignment_weight:
            self.targets = FrozenVectors(queries, self.width, self.device)
        self.excluded = padded_rows(self.known)
        self.teacher_top = torch.full((len(number), 1), -1)
        if config.mask_top:
            self.teacher_top = self.searched(self.teachers_best, config.mask_top)
        self.negatives = torch.full((len(number), config.hard_negatives), -1)
        self.pool: tuple[torch.Tensor, torch.Tensor] | None = None
        if config.pool >= len(documents):
            self.pool = self.pooled(np.arange(len(documents)))

    def pooled(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return sent(torch.from_numpy(rows), self.device), self.ads.gather(rows)

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

    def draw(self, positives: np.ndarray, positive_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The step's pool: ids (M,) and vectors (M, width). The positives of the whole batch, on all devices, seed the
        draw: every device and a resumed run draw alike."""
        if self.pool:
            return self.pool
        everywhere = gather_with_gradient(positive_ids) if torch.distributed.is_initialized() else positives
        generator = np.random.default_rng((self.seed, *everywhere.tolist()))
        return self.pooled(np.sort(generator.choice(len(self.documents), self.config.pool, replace=False)))

    def loss(self, model: torch.nn.Module, batch: dict) -> torch.Tensor:
        def contrast(queries: torch.Tensor) -> torch.Tensor:
            return self.contrast(queries, batch)

        return loss_of_chunks(model, [batch["query"]], contrast, cached=bool(self.config.cache_chunk))

    def contrast(self, queries: torch.Tensor, batch: dict) -> torch.Tensor:
        rows, positives = batch["rows"]
        pool_ids, pool = self.draw(positives, batch["positive_ids"])
        top, excluded, negative_ids = (
            sent(table[rows], self.device) for table in (self.teacher_top, self.excluded, self.negatives)
        )
        hard = None
        if self.config.hard_negatives:
            hard = self.ads.gather(self.negatives[rows].clamp(min=0).view(-1).numpy()).view(*negative_ids.shape, -1)
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
            self.ads.gather(positives),
            pool,
            positive_ids=batch["positive_ids"],
            pool_ids=pool_ids,
            mask=id_mask(top, pool_ids),
            negatives=hard,
            negative_ids=None if hard is None else negative_ids,
            excluded_ids=excluded,
            temperature=self.config.temperature,
            margin=self.config.margin,
            **together,
        )
        if self.config.alignment_weight:
            loss = loss + self.config.alignment_weight * l2_alignment(
                queries, self.targets.gather(self.teacher_rows[rows])
            )
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
            "rows": (query.copy(), positive.copy()),  # numpy: they stay on the host
            "query_ids": torch.from_numpy(query.copy()),
            "positive_ids": torch.from_numpy(positive.copy()),
        }


class Refresh(TrainerCallback):
    """Mines at the start and then every `epochs` epochs; a resumed run goes on with the negatives it had."""

    def __init__(self, refinement: Refinement, epochs: int) -> None:
        self.refinement, self.epochs = refinement, epochs

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = max(1, state.max_steps // max(1, round(state.num_train_epochs))) * self.epochs
        if state.global_step % steps == 0:
            self.refinement.refresh()
