"""Phase 2: prunes the student and aligns it to the frozen teacher's query vectors, cut by cut.

    accelerate launch recipes/align.py --config recipes/configs/quickstart/align.yaml

Every stage of `cascade` cuts the student of the stage before and trains it again; each finished stage is kept in
`output`.stages, so a killed run goes on where it was. Without a cascade the student is aligned as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from sentence_transformers.sentence_transformer.modules import Dense

from hlm.artefacts import HlmError
from hlm.config import parse, run_recipe
from hlm.data.contract import load
from hlm.encoders.loading import add_head, encode, fingerprint, load_encoder, prompt_of, save_encoder
from hlm.encoders.pruning import check_cascade, cut
from hlm.outputs import resolved
from hlm.training.batches import TokenTable
from hlm.training.checkpoints import PATHS
from hlm.training.dev_retrieval import DevRetrieval
from hlm.training.gradcache import gather_with_gradient
from hlm.training.inputs import check_start
from hlm.training.losses import cosine_alignment, kernel_alignment, kl_distillation, l2_alignment, matryoshka
from hlm.training.trainer import (
    RecipeTrainer,
    TrainingArguments,
    as_config,
    claimed_output,
    finish,
    set_dropout,
    train,
    up_to_date,
)
from hlm.vectors.index import AdIndex
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)


@dataclass
class AlignConfig:
    student: str = field(metadata={"help": "what the first stage starts from: a folder, a Hub id or package:..."})
    data: str = field(metadata={"help": "the dataset: a folder or a Hub id"})
    vectors: str = field(metadata={"help": "the teacher's stores, as recipes/embed.py writes them"})
    output: str = field(metadata={"help": "folder for the aligned student"})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "leave out rows without text, and judgements of what is not in the data"}
    )
    cascade: list[dict] = field(
        default_factory=list, metadata={"help": "stages: {layers: 4 or [0, 1, 4, 5], ffn: 1024, epochs: 2}, in order"}
    )
    method: Literal["middle_skip", "norm_ratio"] = field(
        default="middle_skip", metadata={"help": "which layers a stage keeps when it gives their number"}
    )
    objective: Literal["l2", "cosine", "kernel", "kl"] = field(default="l2")
    temperature: float = field(default=0.05, metadata={"help": "of the kl objective"})
    kl_documents: int = field(default=4096, metadata={"help": "ads that the kl objective compares the queries with"})
    head: bool = field(default=False, metadata={"help": "a linear head to the teacher's width, inside the model"})
    parts: list[str] = field(
        default_factory=lambda: ["unlabelled", "train"], metadata={"help": "queries to align on: unlabelled, train"}
    )
    prompt: bool = field(default=False, metadata={"help": "keep the student's query prompt; alignment teaches it"})
    dropout: float = field(default=0.0)
    calibration: int = field(default=512, metadata={"help": "queries that layers and FFN units are scored on"})
    max_seq_length: int | None = field(default=None)


def main(argv: Sequence[str] | None = None) -> None:
    config, args = parse(AlignConfig, TrainingArguments, argv=argv)
    stages = config.cascade or [{}]
    check_cascade(stages)
    args.check_hardware("align", config)
    made = resolved(config.output)
    folders = [f"{made}.stages/{number}" for number in range(1, len(stages))] + [config.output]
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(claimed_output(folder, "student", args)) for folder in folders]
        align_all(stages, outputs, dataclasses.replace(config, output=outputs[-1]), args)


def align_all(stages: list[dict], outputs: list[str], config: AlignConfig, args: TrainingArguments) -> None:
    """Every stage after the other: one trains what the one before wrote."""
    data = load(config.data, splits=("train", "dev"), skip_bad_rows=config.skip_bad_rows)
    queries = Queries(config, data)
    documents = VectorStore.open(Path(config.vectors) / "corpus")
    documents.check(encoder=queries.encoder, source=data.fingerprint("corpus"))
    source = config.student
    for stage, output in zip(stages, outputs, strict=True):
        source = align(source, stage, output, config, args, data, queries, documents)


def align(source: str, stage: dict, output: str, config: AlignConfig, args, data, queries, documents) -> str:
    """One stage: cut, train, save to `output`; returns the folder."""
    args = dataclasses.replace(args, num_train_epochs=stage.get("epochs", args.num_train_epochs))
    args.output_dir = f"{output}.training"
    model = load_encoder(source, max_seq_length=config.max_seq_length)
    if source == config.student:
        check_start(source, documents, model)
    identity = {
        "inputs": {"student": fingerprint(model), "teacher": queries.encoder, "vectors": queries.fingerprint}
        | {"documents": documents.fingerprint}
        | {f"qrels/{split}": data.fingerprint(f"qrels/{split}") for split in ("train", "dev")},
        "config": as_config(config, args) | {"stage": stage},
    }
    if up_to_date(output, "student", identity, paths=PATHS):
        return output
    model = cut(model, stage.get("layers"), stage.get("ffn"), config.method, queries.sample(config.calibration))
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
    trainer = RecipeTrainer(
        model,
        args,
        rows=len(tokens),
        keys=tokens.lengths(queries.vectors.order),
        collate=Collate(tokens, queries.vectors),
        step_loss=lambda wrapped, batch: loss(wrapped(batch["query"])["sentence_embedding"], batch["teacher"]),
        evaluator=DevRetrieval(
            dict(data.split_queries("dev")), data.qrels["dev"], index=AdIndex.build(documents, dim=width)
        ),
    )
    measured = train(trainer, identity)
    if trainer.is_world_process_zero():
        save_encoder(model, output, "student", **identity, **measured)
    finish(trainer, measured)
    return output


class Queries:
    """The texts to align on, each with its row in one of the teacher's stores; unlabelled texts stay on disk.

    A slice gives texts in the order of the tables; row `i` of training is text `vectors.order[i]`.
    """

    def __init__(self, config: AlignConfig, data) -> None:
        unknown = set(config.parts) - {"unlabelled", "train"}
        if unknown or not config.parts:
            raise HlmError(f"parts: expected unlabelled, train or both, found {config.parts}")
        self.texts: list[Sequence[str]] = []
        stores: list[tuple[VectorStore, np.ndarray | None]] = []
        sources = []
        for part in config.parts:
            name = "queries" if part == "train" else part
            store = VectorStore.open(Path(config.vectors) / name)
            sources += [part, data.fingerprint(name)]
            store.check(source=sources[-1])
            if part == "train":
                ids, texts = zip(*data.split_queries("train"), strict=True)
                sources.append(data.fingerprint("qrels/train"))  # they say which of the queries these are
                self.texts.append(texts)
                stores.append((store, store.rows_of(list(ids))))
            else:
                self.texts.append(data.unlabelled["text"])
                stores.append((store, None))
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

    def __call__(self, rows: list[int]) -> dict:
        return {"query": self.tokens.features(self.vectors.order[rows]), "teacher": self.vectors.of(rows)}


def objective(config: AlignConfig, documents: VectorStore, width: int):
    """(student (B, width), teacher (B, teacher's width)) -> scalar."""
    if config.objective == "kernel":
        # Compares similarities, so widths may differ, and the pairs are those of the whole batch on all devices.
        return lambda student, teacher: kernel_alignment(gather_with_gradient(student), gather_with_gradient(teacher))
    if config.objective == "kl":
        count = min(config.kl_documents, len(documents))
        rows = np.linspace(0, len(documents) - 1, count).astype(np.int64)
        pool = matryoshka(torch.from_numpy(documents.gather(rows)), width)

        def kl(student, teacher):
            return kl_distillation(student, matryoshka(teacher, width), pool.to(student.device), config.temperature)

        return kl
    distance = l2_alignment if config.objective == "l2" else cosine_alignment
    return lambda student, teacher: distance(student, matryoshka(teacher, width))


if __name__ == "__main__":
    run_recipe(main)
