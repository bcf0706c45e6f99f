"""Phase 1: LoRA fine-tunes the teacher contrastively on query-document pairs, merges it, saves adapter and model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from sentence_transformers import SentenceTransformer
from torch.distributed.tensor import DTensor

from hlm.artefacts import fingerprint_json
from hlm.data.contract import RetrievalData, load
from hlm.data.ids import rows_with
from hlm.data.views import DocumentTexts
from hlm.encoders.lengths import say_what_is_cut
from hlm.encoders.loading import encode, fingerprint, load_encoder, prompt_of, save_encoder
from hlm.encoders.lora import add_lora, enable_gradient_checkpointing, merge_lora, weaken_lora
from hlm.identity import PATHS, as_config, up_to_date
from hlm.merge_weights import weights_of
from hlm.progress import progress
from hlm.settings import keywords
from hlm.steps import TeacherConfig
from hlm.training.agreement import LEAST_JUDGED, Agreement, TypedQueries
from hlm.training.batches import TokenTable
from hlm.training.checkpoints import claimed_output
from hlm.training.dev_retrieval import DevRetrieval
from hlm.training.gradcache import gather_with_gradient, loss_of_chunks, rows_of_short_texts
from hlm.training.inputs import kept_pairs
from hlm.training.losses import qwen3_contrastive
from hlm.training.mining import gather_rows, mine_hard_negatives, padded_rows, search_device, shared_rows
from hlm.training.rates import check_rates, trainers_at
from hlm.training.selection import choose, dev_retrieval, keep_checkpoints, learnt_by, typed_retrieval
from hlm.training.trainer import (
    RecipeTrainer,
    TrainingArguments,
    finish,
    recorded,
    train,
)
from hlm.vectors.store import VectorStore, write_store

logger = logging.getLogger(__name__)

SIMILAR_LENGTH = 32  # rows of similar length that are padded together


@keywords(TeacherConfig, TrainingArguments)
def train_teacher(config: TeacherConfig, args: TrainingArguments) -> Path:
    """Tunes a backbone on a dataset's train pairs and merges what it learnt.

    Every setting of `TeacherConfig` and of `TrainingArguments` is a keyword. A run that was killed goes on from its
    last checkpoint, beside `output`; an output that is up to date is left alone.

    Returns:
        `output`: the merged model, a sentence-transformers folder; the LoRA adapter alone is in `adapter` there.

    Raises:
        HlmError: settings, data or backbone that do not work, or an output that is somebody's.
    """
    if weights_of(config.merge_weight):
        keep_checkpoints(args)
    check_rates(config.try_learning_rates, args)
    args.check_hardware("teacher", config)
    with claimed_output(config.output, "teacher", args) as output:
        _tune(dataclasses.replace(config, output=output), args)
    return Path(output)


def _tune(config: TeacherConfig, args: TrainingArguments) -> None:
    data = load(config.data, splits=("train", "dev"), skip_bad_rows=config.skip_bad_rows)
    model = load_encoder(config.backbone, dtype=config.dtype, max_seq_length=config.max_seq_length)
    parts = ["corpus", "queries", *(f"qrels/{split}" for split in ("train", "dev") if split in data.qrels)]
    identity = {
        "inputs": {"backbone": fingerprint(model)} | {part: data.fingerprint(part) for part in parts},
        "config": as_config(config, recorded(args)),
    }
    typed = TypedQueries.of(data) if weights_of(config.merge_weight) else None
    if typed:
        identity["inputs"] |= typed.fingerprints
    if up_to_date(config.output, "teacher", identity, paths=PATHS):
        return
    source = fingerprint_json([identity["inputs"]["corpus"], config.oracle])
    # A folder for each backbone: what another one mined, before a run that never came to a checkpoint, is in no way.
    mined = f"{args.output_dir}/backbone-{fingerprint_json([identity['inputs']['backbone'], source])[:8]}"
    pairs, negatives, (evaluator, signal) = searched(model, data, typed, config, mined, source)
    set_seed(args.seed)  # the adapter starts at random: alike in every process and after a kill
    add_lora(model, rank=config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout)
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(model)
        # Done, and in the only order that works under LoRA: the trainer must not do it again, under either name.
        args.gradient_checkpointing = args.activation_checkpointing = False
    batches = Batches.of(model, pairs, negatives, config)

    def trainer_with(args: TrainingArguments) -> RecipeTrainer:
        return RecipeTrainer(
            model,
            args,
            rows=len(pairs.rows),
            collate=batches.collate,
            step_loss=batches.loss,
            keys=pairs.rows[:, 1] if config.queries_per_document > 1 else None,
            group=config.queries_per_document,
            evaluator=evaluator,
        )

    trainer, measured = trained_and_chosen(trainer_with, args, config, identity, signal)
    trained = trainer.trained_tensors()
    if trainer.is_world_process_zero():
        model = whole(model, trained, config)
        state = model.state_dict()
        adapter = {name: state[name].clone() for name in trained}
        peft_config = model[0].model.peft_config["default"]
        save_encoder(
            merge_lora(model),
            config.output,
            "teacher",
            **identity,
            **measured,
            beside=lambda folder: save_adapter(adapter, peft_config, config.backbone, folder / "adapter"),
        )
    finish(trainer, measured)


def searched(
    model: SentenceTransformer,
    data: RetrievalData,
    typed: TypedQueries | None,
    config: TeacherConfig,
    folder: str,
    source: str,
) -> tuple[Pairs, np.ndarray, tuple[DevRetrieval | None, str | None]]:
    """What the untuned backbone is asked for: hard negatives, and dev retrieval with what it is judged by."""
    pairs = Pairs(data, config)
    if PartialState().is_main_process:
        for role, texts in (("query", pairs.queries), ("document", pairs.documents)):
            say_what_is_cut(model, partial(numbered, texts), len(texts), role=role)

    def agreement(texts: list[str]) -> Agreement:
        return Agreement.of(model, texts, data, backbone_vectors(model, pairs.documents, folder, source))

    dev: tuple[DevRetrieval | None, str | None] = (dev_retrieval(data, config), None)
    if typed:
        dev = typed_retrieval(data, config, typed, agreement)
    return pairs, mine(model, pairs, config, folder, source), dev


def trained_and_chosen(
    make: Callable[[TrainingArguments], RecipeTrainer],
    args: TrainingArguments,
    config: TeacherConfig,
    identity: dict[str, Any],
    signal: str | None,
) -> tuple[RecipeTrainer, dict[str, Any]]:
    """Trains, and keeps the share `merge_weight` of what was learnt, or chooses it with the checkpoint and the rate.

    Args:
        make: a trainer of the one model, with these arguments.
        signal: what dev queries are judged by; None: there is nothing to choose by, so the backbone is handed on.

    Returns:
        The trainer that `finish` takes, and what the manifest says of dev.
    """
    weights = weights_of(config.merge_weight)
    if weights is None:
        if config.try_learning_rates:
            logger.warning(
                "try_learning_rates: %g is taken: dev chooses a rate with merge_weight, which is %s; set it to auto",
                args.learning_rate,
                config.merge_weight,
            )
        trainer, weight = make(args), config.merge_weight
        assert isinstance(weight, float)
        return trainer, train(trainer, identity, then=partial(weaken_lora, trainer.model, weight))
    if signal is None:
        logger.warning(
            "the teacher is its backbone: merge_weight has to be chosen by dev queries that people judged (%d or more) "
            "or by unlabelled queries that people typed, and there are none; add some, or set a number",
            LEAST_JUDGED,
        )
        nothing = {"step": 0, "merge_weight": 0.0, "signal": None}  # an adapter begins without effect
        return make(args), {"chosen": nothing}
    first: RecipeTrainer | None = None
    learnt: dict[tuple[float, int], dict[str, torch.Tensor]] = {}
    for trainer in trainers_at(make, args, config.try_learning_rates):
        first = first or trainer
        train(trainer, identity, measure=False)
        found = learnt_by(trainer)
        if config.try_learning_rates:  # a GPU still has to hold the next rate's training
            found = {at: {name: tensor.cpu() for name, tensor in adapter.items()} for at, adapter in found.items()}
        learnt |= found
    assert first is not None
    chosen = choose(first, learnt, weights)
    dev = {"metric": "ndcg@10", "start": chosen["backbone"], "end": chosen["ndcg@10"]}
    return first, {"dev": dev, "chosen": {"signal": signal} | chosen}


def whole(model: SentenceTransformer, trained: dict[str, torch.Tensor], config: TeacherConfig) -> SentenceTransformer:
    """The model itself; under FSDP, where every process holds a part of it, the backbone with what was trained."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return model
    model = load_encoder(config.backbone, device="cpu", dtype=config.dtype, max_seq_length=config.max_seq_length)
    add_lora(model, rank=config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout)
    model.load_state_dict(trained, strict=False)
    return model


class Pairs:
    """(query, document) training pairs as row numbers, with every query's known positives."""

    def __init__(self, data: RetrievalData, config: TeacherConfig) -> None:
        triples = kept_pairs(data, config.min_score)
        self.documents = DocumentTexts(data.corpus, oracle=config.oracle)
        rows_of = rows_with(data.corpus.data.column("_id"), [document for _, document, _ in triples])
        best: dict[str, list[tuple[int, int]]] = {}
        for (query, _, grade), row in zip(triples, rows_of.tolist(), strict=True):
            best.setdefault(query, []).append((-grade, row))
        texts = dict(data.split_queries("train", oracle=config.oracle))
        self.queries = [texts[name] for name in best]
        self.known = [[row for _, row in found] for found in best.values()]
        generator = np.random.default_rng(0)
        rows = []
        for number, found in enumerate(best.values()):
            # Best grades first; among equals by chance, or the catalogue's order would choose.
            order = sorted(range(len(found)), key=lambda i: (found[i][0], generator.random()))
            rows += [(number, found[i][1]) for i in order[: config.pairs_per_query]]
        self.rows = np.asarray(rows, dtype=np.int64)  # (pairs, 2): query number, document row
        self.excluded = padded_rows(self.known)


def numbered(texts: Sequence[str], start: int, stop: int) -> Iterator[tuple[str, str]]:
    return zip(map(str, range(start, stop)), texts[start:stop], strict=True)


def backbone_vectors(model: SentenceTransformer, texts: Sequence[str], folder: str, source: str) -> VectorStore:
    """The untuned backbone's vectors of the documents, in a store in `folder`: a killed run finds them there."""
    state = PartialState()
    share = -(-len(texts) // state.num_processes)
    with progress(what="encode the documents", unit="text", total=share) as bar:
        write_store(
            folder,
            partial(numbered, texts),
            partial(encode, model, prompt_name="document", bar=bar),
            dim=model.get_embedding_dimension(),
            encoder=fingerprint(model),
            source=source,
            n_rows=len(texts),
            shard_rows=8192,
            process_index=state.process_index,
            num_processes=state.num_processes,
        )
    state.wait_for_everyone()
    return VectorStore.open(folder)


def mine(model: SentenceTransformer, pairs: Pairs, config: TeacherConfig, folder: str, source: str) -> np.ndarray:
    """(queries, k) document rows mined with the untuned backbone, padded with -1; k = 0 mines nothing."""
    if not config.hard_negatives:
        return np.zeros((len(pairs.queries), 0), dtype=np.int64)
    logger.info("mining with the backbone: %d queries, %d documents", len(pairs.queries), len(pairs.documents))
    store = backbone_vectors(model, pairs.documents, folder, source)
    rows = shared_rows(len(pairs.queries))
    found = np.zeros((0, config.hard_negatives), dtype=np.int64)
    if len(rows):
        queries = encode(model, [pairs.queries[row] for row in rows], prompt_name="query")
        known = [pairs.known[row] for row in rows]
        found = mine_hard_negatives(queries, known, store, config.hard_negatives, device=search_device(model))
    return gather_rows(rows, found, len(pairs.queries))


@dataclass
class Batches:
    """Rows of training -> a batch; what a worker of the data loader needs, and no more."""

    rows: np.ndarray  # (pairs, 2) int64: query number, document row
    excluded: torch.Tensor  # (queries, longest) int64 padded with -1: known positives
    negatives: np.ndarray  # (queries, k) int64 padded with -1
    queries: TokenTable
    documents: TokenTable  # of the documents `read`
    read: np.ndarray  # int64, ascending: the documents that training reads
    config: TeacherConfig

    def __post_init__(self) -> None:
        self.document_chunk = self.query_chunk = self.config.cache_chunk or SIMILAR_LENGTH
        if self.config.cache_chunk:
            # `cache_chunk` bounds memory by the longest documents. Short queries fill it by more rows: on an H200, 64
            # queries of 30 tokens took an 8B teacher as long as 16. The same number on every rank.
            query, document = (int(table.lengths().max(initial=1)) for table in (self.queries, self.documents))
            self.query_chunk = rows_of_short_texts(self.config.cache_chunk, query, document)

    @classmethod
    def of(cls, model: SentenceTransformer, pairs: Pairs, negatives: np.ndarray, config: TeacherConfig) -> Batches:
        queries = TokenTable(model, pairs.queries, prompt_of(model, "query"))
        read = np.unique([*pairs.rows[:, 1], *np.maximum(negatives, 0).ravel()])  # as `collate` asks for them
        documents = TokenTable(model, pairs.documents.of(read), prompt_of(model, "document"))
        return cls(pairs.rows, pairs.excluded, negatives, queries, documents, read, config)

    def collate(self, rows: list[int]) -> dict:
        pairs = self.rows[rows]
        query, positive = pairs[np.argsort(self.queries.lengths(pairs[:, 0]), kind="stable")].T
        negative = self.negatives[query]
        # Every document of the batch is encoded once, however many queries it belongs to.
        documents, places = np.unique([*positive, *np.maximum(negative, 0).ravel()], return_inverse=True)
        documents = np.searchsorted(self.read, documents)
        order = np.argsort(self.documents.lengths(documents), kind="stable")
        documents, places = documents[order], np.argsort(order)[places]
        # As many chunks on every rank, however many documents are distinct there: gradient caching asks for it.
        chunks = -(-(1 + negative.shape[1]) * len(rows) // self.document_chunk)
        documents = np.pad(documents, (0, max(0, chunks - len(documents))), mode="edge")
        return {
            "query": [self.queries.features(part) for part in np.array_split(query, -(-len(rows) // self.query_chunk))],
            "document": [self.documents.features(part) for part in np.array_split(documents, chunks)],
            "positive_places": torch.from_numpy(places[: len(rows)]),
            "negative_places": torch.from_numpy(places[len(rows) :].reshape(negative.shape)),
            "query_ids": torch.from_numpy(query),
            "positive_ids": torch.from_numpy(positive),
            "negative_ids": torch.from_numpy(negative),
            "excluded_ids": self.excluded[query],
        }

    def loss(self, model: torch.nn.Module, batch: dict) -> torch.Tensor:
        query_ids, positive_ids = batch["query_ids"], batch["positive_ids"]
        all_query_ids, all_positive_ids = gather_with_gradient(query_ids), gather_with_gradient(positive_ids)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        hard = self.negatives.shape[1] > 0

        def contrast(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
            positives = documents[batch["positive_places"]]
            return qwen3_contrastive(
                queries,
                positives,
                documents[batch["negative_places"]] if hard else None,
                query_ids=query_ids,
                positive_ids=positive_ids,
                negative_ids=batch["negative_ids"] if hard else None,
                excluded_ids=batch["excluded_ids"],
                temperature=self.config.temperature,
                margin=self.config.margin,
                use_hard=hard,
                use_in_batch=self.config.use_in_batch,
                use_query_query=self.config.use_query_query,
                use_document_document=self.config.use_document_document,
                all_queries=gather_with_gradient(queries),
                all_positives=gather_with_gradient(positives),
                all_query_ids=all_query_ids,
                all_positive_ids=all_positive_ids,
                offset=rank * len(queries),
            )

        groups = [batch["query"], batch["document"]]
        return loss_of_chunks(model, groups, contrast, cached=bool(self.config.cache_chunk))


def save_adapter(adapter: dict[str, torch.Tensor], peft_config: Any, backbone: str, folder: Path) -> None:
    """The adapter in PEFT's own layout, so that `PeftModel.from_pretrained` loads it over the backbone."""
    from safetensors.torch import save_file

    folder.mkdir()
    peft_config.base_model_name_or_path = backbone
    peft_config.inference_mode = True
    peft_config.save_pretrained(str(folder))
    names = {name: name.split("base_model.model.", 1)[1].replace(".default.", ".") for name in adapter}
    tensors = {f"base_model.model.{names[name]}": tensor.contiguous() for name, tensor in adapter.items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"))
