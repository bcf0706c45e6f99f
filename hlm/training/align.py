"""Phase 2: prunes the student and aligns it to the frozen teacher's query vectors, cut by cut."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.modules import Dense

from hlm.artefacts import HlmError
from hlm.data.contract import RetrievalData, load
from hlm.data.counts import counts_of, fingerprint_counts, weights_of
from hlm.encoders.loading import add_head, encode, fingerprint, load_encoder, prompt_of, save_encoder
from hlm.encoders.pruning import check_cascade, cut
from hlm.identity import PATHS, as_config, up_to_date
from hlm.indexes.exact import exact_search
from hlm.indexes.lineage import named_teacher
from hlm.outputs import resolved
from hlm.settings import closest, keywords
from hlm.steps import AlignConfig
from hlm.training.batches import TokenTable
from hlm.training.checkpoints import claimed_output
from hlm.training.dev_retrieval import DevRetrieval
from hlm.training.gradcache import gather_with_gradient
from hlm.training.inputs import check_start
from hlm.training.losses import cosine_alignment, kernel_alignment, kl_distillation, l2_alignment, matryoshka
from hlm.training.trainer import (
    RecipeTrainer,
    TrainingArguments,
    finish,
    recorded,
    set_dropout,
    train,
)
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)

OBJECTIVES = ("l2", "cosine", "kernel", "kl")


@keywords(AlignConfig, TrainingArguments)
def align(config: AlignConfig, args: TrainingArguments) -> Path:
    """Aligns a student to a teacher's query vectors; every stage of `cascade` cuts the student of the stage before and
    trains it again. Without a cascade the student is aligned as it is.

    Every setting of `AlignConfig` and of `TrainingArguments` is a keyword. Each finished stage is kept in
    `output`.stages, so a run that was killed goes on where it was; an output that is up to date is left alone.

    Returns:
        `output`: the student of the last stage, a sentence-transformers folder.

    Raises:
        HlmError: settings that do not work, a student of another teacher, vectors of other data, or an output that is
            somebody's.
    """
    stages = config.cascade or [{}]
    check_cascade(stages)
    if unknown := sorted({*config.also} - {*OBJECTIVES}):
        raise HlmError(
            f"also: expected weights of {', '.join(OBJECTIVES)}, found '{unknown[0]}'{closest(unknown[0], OBJECTIVES)}"
        )
    if config.queries is not None and config.queries < 1:
        raise HlmError(f"queries: expected 1 or more, found {config.queries}; leave it out to take all")
    if not 0 <= config.count_power <= 1:
        raise HlmError(
            f"count_power: expected 0 (all weigh the same) to 1 (as often as typed), found {config.count_power}"
        )
    if config.count_power and "kernel" in (config.objective, *config.also):
        raise HlmError(
            "count_power: expected an objective of single queries, found kernel, which compares pairs; take l2"
        )
    args.check_hardware("align", config)
    made = resolved(config.output)
    folders = [f"{made}.stages/{number}" for number in range(1, len(stages))] + [config.output]
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(claimed_output(folder, "student", args)) for folder in folders]
        _align_all(stages, outputs, dataclasses.replace(config, output=outputs[-1]), args)
    return Path(outputs[-1])


def _align_all(stages: list[dict], outputs: list[str], config: AlignConfig, args: TrainingArguments) -> None:
    """Every stage after the other: one trains what the one before wrote."""
    data = load(config.data, splits=("train", "dev"), skip_bad_rows=config.skip_bad_rows)
    queries = Queries(config, data)
    documents = VectorStore.open(Path(config.vectors) / "corpus")
    documents.check(encoder=queries.encoder, source=data.fingerprint("corpus"))
    source = config.student
    for stage, output in zip(stages, outputs, strict=True):
        source = _align(source, stage, output, config, args, data, queries, documents)


def _align(
    source: str,
    stage: dict,
    output: str,
    config: AlignConfig,
    args: TrainingArguments,
    data: RetrievalData,
    queries: Any,
    documents: VectorStore,
) -> str:
    """One stage: cut, train, save to `output`; returns the folder."""
    args = dataclasses.replace(  # type: ignore[call-arg]
        args, num_train_epochs=stage.get("epochs", args.num_train_epochs)
    )
    args.output_dir = f"{output}.training"
    model = load_encoder(source, max_seq_length=config.max_seq_length)
    if source == config.student:
        check_start(source, documents, model)
    identity: dict[str, Any] = {
        "inputs": {"student": fingerprint(model), "teacher": queries.encoder, "vectors": queries.fingerprint}
        | {"documents": documents.fingerprint}
        | {f"qrels/{split}": data.fingerprint(f"qrels/{split}") for split in ("train", "dev")}
        | ({"counts": queries.counts} if queries.counts else {}),
        "config": as_config(config, recorded(args)) | {"stage": stage},
    }
    if up_to_date(output, "student", identity, paths=PATHS):
        return output
    shape = {"layers": None, "ffn": None} | {key: value for key, value in stage.items() if key != "epochs"}
    model = cut(model, method=config.method, texts=queries.sample(config.calibration), **shape)
    if not config.prompt:
        model.prompts = {"query": "", "document": ""}
    width = model.get_embedding_dimension()
    headed = any(isinstance(module, Dense) for module in model) and width == documents.dim  # by the stage before
    if (config.head and not headed) or width > documents.dim:
        sample = queries.sample(2048)
        add_head(model, encode(model, sample), queries.vectors.of(np.arange(len(sample))).numpy())
        width = documents.dim
    set_dropout(model, config.dropout)
    # One folder for all stages: where they read with the same tokenizer and prompt, texts are tokenised once.
    tokens = TokenTable(
        model, queries, prompt_of(model, "query"), folder=f"{config.output}.training", source=queries.source
    )
    loss = objective(config, documents, width)
    rows = min(len(tokens), config.queries or len(tokens))  # their order is a shuffled one: the first are a sample
    trainer = RecipeTrainer(
        model,
        args,
        rows=rows,
        keys=tokens.lengths(queries.vectors.order[:rows]),
        collate=Collate(tokens, queries.vectors, queries.weights),
        step_loss=lambda wrapped, batch: loss(
            wrapped(batch["query"])["sentence_embedding"], batch["teacher"], batch.get("weights")
        ),
        evaluator=DevRetrieval(
            dict(data.split_queries("dev")), data.qrels["dev"], index=exact_search(documents, width)
        ),
    )
    measured = train(trainer, identity)
    if trainer.is_world_process_zero():
        save_encoder(model, output, "student", **identity, **measured, **named_teacher(documents))
    finish(trainer, measured)
    return output


class Queries:
    """The texts to align on, each with its row in one of the teacher's stores; unlabelled texts stay on disk.

    A slice gives texts in the order of the tables; row `i` of training is text `vectors.order[i]`.
    """

    def __init__(self, config: AlignConfig, data: RetrievalData) -> None:
        unknown = set(config.parts) - {"unlabelled", "train"}
        if unknown or not config.parts:
            raise HlmError(f"parts: expected unlabelled, train or both, found {config.parts}")
        self.texts: list[Sequence[str]] = []
        stores: list[tuple[VectorStore, np.ndarray | None]] = []
        sources, counts = [], []
        for part in config.parts:
            name = "queries" if part == "train" else part
            store = VectorStore.open(Path(config.vectors) / name)
            sources += [part, data.fingerprint(name)]
            store.check(source=sources[-1])
            if part == "train":
                ids, texts = zip(*data.split_queries("train"), strict=True)
                sources.append(data.fingerprint("qrels/train"))  # they say which of the queries these are
                self.texts.append(texts)
                rows: np.ndarray | None = store.rows_of(list(ids))
            else:
                rows = rows_of_kinds(data, config.kinds) if config.kinds else None
                log = data.unlabelled if rows is None else data.unlabelled.select(rows)  # type: ignore[union-attr]
                self.texts.append(log["text"])  # type: ignore[index]
                sources += config.kinds
            stores.append((store, rows))
            if config.count_power:  # a store has the rows of its table
                every = counts_of(getattr(data, name), name)
                counts.append(every if rows is None else every[rows])
        encoders = {store.encoder for store, _ in stores}
        if len(encoders) > 1:
            raise HlmError(f"expected one teacher's vectors in {config.vectors}, found {encoders}; run embed again")
        self.encoder = encoders.pop()
        self.fingerprint = " ".join(store.fingerprint for store, _ in stores)
        self.source = " ".join(sources)
        self.starts = np.cumsum([0] + [len(texts) for texts in self.texts])
        # The texts are read in a fixed shuffled order, so that calibration sees all parts.
        order = np.random.default_rng(0).permutation(np.arange(len(self), dtype=np.int32))
        self.vectors = TeacherVectors(stores, self.starts, order)
        self.weights: np.ndarray | None = None  # float32, by text
        self.counts = ""
        if counts:
            self.weights = weights_of(np.concatenate(counts), config.count_power)
            self.counts = fingerprint_counts(np.concatenate(counts))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, rows: slice) -> list[str]:
        start, stop, _ = rows.indices(len(self))
        return [
            text
            for texts, first in zip(self.texts, self.starts, strict=False)
            for text in texts[max(0, start - first) : max(0, stop - first)]
        ]

    def sample(self, count: int) -> list[str]:
        """The texts of the first `count` rows of training."""
        rows = self.vectors.order[:count]
        parts = np.searchsorted(self.starts, rows, side="right") - 1
        return [self.texts[part][int(row - self.starts[part])] for part, row in zip(parts, rows, strict=True)]


def rows_of_kinds(data: RetrievalData, kinds: list[str]) -> np.ndarray:
    """int64 (rows,): the unlabelled queries whose column `kind` is one of these.

    Raises:
        HlmError: no such column, or none of one of the kinds.
    """
    columns = [] if data.unlabelled is None else data.unlabelled.column_names
    if data.unlabelled is None or "kind" not in columns:
        raise HlmError(f"kinds: expected unlabelled queries with a column 'kind', found {columns}; leave kinds out")
    found = np.array([str(kind) for kind in data.unlabelled["kind"]])
    known = sorted({*found.tolist()})
    if missing := sorted({*kinds} - {*known}):
        raise HlmError(f"kinds: expected some of {', '.join(known)}, found '{missing[0]}'; correct it")
    return np.flatnonzero(np.isin(found, kinds))


@dataclass
class TeacherVectors:
    """The teacher's vectors by row of training. Workers of the data loader open the stores anew."""

    stores: list[tuple[VectorStore, np.ndarray | None]]  # a part's store and its texts' rows there; None: one by one
    starts: np.ndarray  # (parts + 1,) where each part begins among all texts
    order: np.ndarray  # (texts,) int32, row of training -> text

    def of(self, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """float32 (rows, teacher's width), from the memory map."""
        rows = self.order[rows]
        part = np.searchsorted(self.starts, rows, side="right") - 1
        out = np.empty((len(rows), self.stores[0][0].dim), dtype=np.float32)
        for number, (store, known) in enumerate(self.stores):
            here = part == number
            if here.any():
                inside = rows[here] - self.starts[number]
                out[here] = store.gather(inside if known is None else known[inside])
        return torch.from_numpy(out)


@dataclass
class Collate:
    """Rows of training -> a batch; what a worker of the data loader needs, and no more."""

    tokens: TokenTable
    vectors: TeacherVectors
    weights: np.ndarray | None = None  # float32, by text

    def __call__(self, rows: list[int]) -> dict:
        texts = self.vectors.order[rows]
        batch = {"query": self.tokens.features(texts), "teacher": self.vectors.of(rows)}
        return batch if self.weights is None else batch | {"weights": torch.from_numpy(self.weights[texts])}


Objective = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def objective(config: AlignConfig, documents: VectorStore, width: int) -> Objective:
    """(student (B, width), teacher (B, teacher's width), weights (B,) or None) -> scalar: the objective, and those
    beside it by weight."""
    main = one_objective(config.objective, config, documents, width)
    beside = [(weight, one_objective(name, config, documents, width)) for name, weight in config.also.items()]
    if not beside:
        return main
    return lambda student, teacher, weights: sum(
        (weight * loss(student, teacher, weights) for weight, loss in beside), start=main(student, teacher, weights)
    )


def one_objective(name: str, config: AlignConfig, documents: VectorStore, width: int) -> Objective:
    """The objective of this name, as `objective` gives it."""
    if name == "kernel":
        # Compares similarities, so widths may differ, and the pairs are those of the whole batch on all devices.
        return lambda student, teacher, _: kernel_alignment(
            gather_with_gradient(student), gather_with_gradient(teacher)
        )
    if name == "kl":
        count = min(config.kl_documents, len(documents))
        rows = np.linspace(0, len(documents) - 1, count).astype(np.int64)
        pool = matryoshka(torch.from_numpy(documents.gather(rows)), width)

        def kl(student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
            documents = pool.to(student.device)
            return kl_distillation(student, matryoshka(teacher, width), documents, config.temperature, weights)

        return kl
    distance = l2_alignment if name == "l2" else cosine_alignment
    return lambda student, teacher, weights: distance(student, matryoshka(teacher, width), weights)
