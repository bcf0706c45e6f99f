"""Other projects' ways to a small encoder, with their own code, from the same backbone, data and budget as HLM's.

    python recipes/peers.py --config peer.yaml

`recipes/study.py` runs it for the question `peers`. What comes out is a saved sentence-transformers model. Some search
the teacher's ad vectors, as HLM's students do (`mse`, `embed_distill`, `leaf`, `pynife`). Others have ad vectors of
their own (`contrastive`, `margin_mse`, `model2vec`), so that all ads must be encoded again for them. `scratch` and
`wrapped` are no peers but starts: the student's shape with random weights, and a bare backbone made an encoder.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from transformers import set_seed

from hlm.artefacts import HlmError, claimed
from hlm.config import parse, run_recipe
from hlm.data.contract import RetrievalData, document_text, iterate, load
from hlm.encoders.loading import encode, fingerprint, load_encoder, resolve, save_encoder
from hlm.encoders.static import of_stock
from hlm.identity import PATHS, as_config, up_to_date
from hlm.indexes.faiss_index import AdIndex
from hlm.training.dev_retrieval import DevRetrieval
from hlm.training.inputs import kept_pairs
from hlm.vectors.store import VectorStore


@dataclass
class PeersConfig:
    recipe: Literal[
        "mse", "embed_distill", "leaf", "contrastive", "margin_mse", "pynife", "model2vec", "scratch", "wrapped"
    ] = field(metadata={"help": "whose way"})
    student: str = field(metadata={"help": "what it starts from: folder, Hub id or package:..."})
    teacher: str = field(metadata={"help": "the teacher's folder, whose tokens the static encoders start from"})
    data: str = field(metadata={"help": "the dataset: a folder or a Hub id"})
    vectors: str = field(metadata={"help": "the teacher's stores, as recipes/embed.py writes them"})
    output: str = field(metadata={"help": "folder for the encoder"})
    min_score: int = field(default=3, metadata={"help": "lowest grade that makes a training pair"})
    queries: int | None = field(default=None, metadata={"help": "a sample of so many texts or pairs; null: all"})
    epochs: int = field(default=3, metadata={"help": "over the texts or pairs"})
    batch_size: int = field(default=128, metadata={"help": "texts or pairs a step"})
    learning_rate: float = field(default=1e-4, metadata={"help": "highest, after a tenth of the steps"})
    words: int = field(default=8000, metadata={"help": "whole words that a static encoder gets beside its tokens"})
    seed: int = field(default=0, metadata={"help": "of the sample, the order and new weights"})


@dataclass
class Inputs:
    """What all peers are made of."""

    config: PeersConfig
    data: RetrievalData
    documents: VectorStore

    def log(self) -> tuple[list[str], np.ndarray]:
        """The queries that HLM aligns on, without their judgements, and the teacher's vectors of them."""
        texts, vectors = [], []
        if self.data.unlabelled is not None:
            store = VectorStore.open(Path(self.config.vectors) / "unlabelled")
            texts += list(self.data.unlabelled["text"])
            vectors.append(store.gather(np.arange(len(store))))
        train = self.data.split_queries("train")
        store = VectorStore.open(Path(self.config.vectors) / "queries")
        vectors.append(store.gather(store.rows_of([name for name, _ in train])))
        texts += [text for _, text in train]
        rows = self.sample(len(texts))
        return [texts[row] for row in rows], np.concatenate(vectors)[rows].astype(np.float32)

    def ads(self) -> tuple[list[str], np.ndarray]:
        """The ads' texts and the teacher's vectors of them."""
        texts = [document_text(row) for row in iterate(self.data.corpus)]
        return texts, self.documents.gather(np.arange(len(self.documents))).astype(np.float32)

    def pairs(self) -> list[tuple[str, str, str]]:
        """(query id, query, ad id) of the training pairs."""
        texts = dict(self.data.split_queries("train"))
        found = [(name, texts[name], ad) for name, ad, _ in kept_pairs(self.data, self.config.min_score)]
        return [found[row] for row in self.sample(len(found))]

    def sample(self, count: int) -> np.ndarray:
        rows = np.random.default_rng(self.config.seed).permutation(count)
        return rows[: self.config.queries or count]


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse(PeersConfig, argv=argv)
    with claimed(config.output, "student") as output:
        make(config, str(output))


def make(config: PeersConfig, output: str) -> None:
    """Writes the encoder, unless it is there already, with its nDCG@10 on dev."""
    data = load(config.data, splits=("train", "dev"))
    documents = VectorStore.open(Path(config.vectors) / "corpus")
    documents.check(source=data.fingerprint("corpus"))
    identity: dict[str, Any] = {
        "inputs": {"teacher": documents.encoder, "vectors": documents.fingerprint, "start": start_of(config)},
        "config": as_config(config),
    }
    if up_to_date(output, "student", identity, paths=PATHS | {"teacher"}):
        return
    set_seed(config.seed)
    model = RECIPES[config.recipe](Inputs(config, data, documents))
    facts: dict[str, Any] = {}
    if config.recipe not in ("scratch", "wrapped"):  # starts, which were never trained
        facts["dev"] = {"metric": "ndcg@10", "end": on_dev(model, data, documents, own=config.recipe in OWN_ADS)}
    save_encoder(model, output, "student", **identity, **facts)


def start_of(config: PeersConfig) -> str:
    if config.recipe == "wrapped":
        return config.student
    return fingerprint(load_encoder(config.student))


def on_dev(model: SentenceTransformer, data: RetrievalData, documents: VectorStore, *, own: bool) -> float:
    """nDCG@10 on dev, over the teacher's ad vectors or the model's own."""
    texts, qrels = dict(data.split_queries("dev")), data.qrels["dev"]
    if own:
        ads = {row["_id"]: document_text(row) for row in iterate(data.corpus)}
        retrieval = DevRetrieval(texts, qrels, documents=ads)
    else:
        retrieval = DevRetrieval(texts, qrels, index=AdIndex.build(documents, dim=model.get_embedding_dimension()))
    return retrieval(model.eval())["dev_ndcg@10"]


def trained(inputs: Inputs, model: SentenceTransformer, table: dict[str, Any], loss: torch.nn.Module) -> None:
    """sentence-transformers' stock trainer over a table of texts and labels."""
    config = inputs.config
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            warmup_steps=0.1,
            seed=config.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),
        )
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_dict(table), loss=loss
        )
        trainer.train()


def mse(inputs: Inputs) -> SentenceTransformer:
    """sentence-transformers' `MSELoss` to the teacher's vectors of the queries."""
    return to_vectors(inputs, losses.MSELoss)


def embed_distill(inputs: Inputs) -> SentenceTransformer:
    """sentence-transformers' `EmbedDistillLoss` as it comes: cosines."""
    return to_vectors(inputs, losses.EmbedDistillLoss)


def to_vectors(inputs: Inputs, loss: Callable[[SentenceTransformer], torch.nn.Module]) -> SentenceTransformer:
    model = load_encoder(inputs.config.student)
    texts, vectors = inputs.log()
    trained(inputs, model, {"sentence": texts, "label": vectors}, loss(model))
    return model


def leaf(inputs: Inputs) -> SentenceTransformer:
    """As LEAF (arXiv 2509.12539): the L2 distance to the teacher's vectors of queries and documents, through a linear
    head inside the student."""
    model = load_encoder(inputs.config.student)
    width = model.get_embedding_dimension()
    head = Dense(width, inputs.documents.dim, bias=True, activation_function=torch.nn.Identity())
    if width == inputs.documents.dim:
        torch.nn.init.eye_(head.linear.weight)
        torch.nn.init.zeros_(head.linear.bias)
    model.insert(len(model) - 1, head)
    queries, ads = inputs.log(), inputs.ads()
    texts, vectors = queries[0] + ads[0], np.concatenate([queries[1], ads[1]])
    loss = losses.EmbedDistillLoss(model, distance_metric="l2")
    trained(inputs, model, {"sentence": texts, "label": vectors}, loss)
    return model


def contrastive(inputs: Inputs) -> SentenceTransformer:
    """The small model tuned by itself: sentence-transformers' `MultipleNegativesRankingLoss` on queries and ads."""
    model = load_encoder(inputs.config.student)
    pairs = inputs.pairs()
    ads = {row["_id"]: document_text(row) for row in iterate(inputs.data.corpus)}
    table = {"anchor": [query for _, query, _ in pairs], "positive": [ads[ad] for _, _, ad in pairs]}
    trained(inputs, model, table, losses.MultipleNegativesRankingLoss(model))
    return model


def margin_mse(inputs: Inputs) -> SentenceTransformer:
    """sentence-transformers' `MarginMSELoss`: the teacher's margins between an ad that is relevant and one of its best
    hundred that is not judged so."""
    model = load_encoder(inputs.config.student)
    pairs, store = inputs.pairs(), VectorStore.open(Path(inputs.config.vectors) / "queries")
    texts, vectors = inputs.ads()
    row_of = {row["_id"]: number for number, row in enumerate(iterate(inputs.data.corpus))}
    queries = store.gather(store.rows_of([name for name, _, _ in pairs])).astype(np.float32)
    positive = np.array([row_of[ad] for _, _, ad in pairs])
    generator, negative = np.random.default_rng(inputs.config.seed), []
    for (name, _, _), query in zip(pairs, queries, strict=True):
        scores = vectors @ query
        scores[[row_of[ad] for ad in inputs.data.qrels["train"][name]]] = -np.inf
        negative.append(int(generator.choice(np.argsort(-scores)[: min(100, len(scores) // 2)])))
    margins = (queries * (vectors[positive] - vectors[negative])).sum(axis=1)
    table = {
        "query": [query for _, query, _ in pairs],
        "positive": [texts[row] for row in positive],
        "negative": [texts[row] for row in negative],
        "label": margins.tolist(),
    }
    trained(inputs, model, table, losses.MarginMSELoss(model))
    return model


def pynife(inputs: Inputs) -> SentenceTransformer:
    """pynife's: a vocabulary of the log's words, started from the teacher, trained by its cosine loss on the teacher's
    vectors of the ads first, then of the queries. Vocabulary and loss are pynife's own. Its version 0.1.0 cannot start
    the table under transformers 5, nor is its module read by later versions of sentence-transformers: the teacher
    encodes each token here, as there, and the stock module computes the same mean."""
    needed("pynife==0.1.0")
    from pynife.losses import CosineLoss
    from pynife.tokenizer.count_vocabulary import count_tokens_in_dataset
    from pynife.tokenizer.expand import expand_tokenizer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    teacher = load_encoder(inputs.config.teacher)
    queries, ads = inputs.log(), inputs.ads()
    vocabulary = count_tokens_in_dataset(teacher.tokenizer, [*queries[0], *ads[0]])
    size = len(teacher.tokenizer) + inputs.config.words
    tokenizer = expand_tokenizer(
        teacher.tokenizer, vocabulary, min_subword_frequency=0, new_vocab_size=size, filter_numbers=True
    )
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    table = encode(teacher, [token.removeprefix("##") or token for token in tokens])
    module = StaticEmbedding(tokenizer.backend_tokenizer, embedding_weights=table)
    model = SentenceTransformer(modules=[module, Normalize()], device=str(teacher.device))
    for texts, vectors in (ads, queries):
        trained(inputs, model, {"sentence": texts, "label": vectors}, CosineLoss(model))
    model[0] = of_stock(module)
    return model


def model2vec(inputs: Inputs) -> SentenceTransformer:
    """model2vec's: the teacher's vectors of its tokens, less their chief common part, without training."""
    needed("model2vec[distill]==0.10.0")
    from model2vec.distill import distill_from_model
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    teacher = load_encoder(inputs.config.teacher)
    static = distill_from_model(
        teacher[0].model,
        teacher.tokenizer,
        device="cpu",
        pca_dims=teacher.get_embedding_dimension(),
        quantize_to="float32",
    )
    with tempfile.TemporaryDirectory() as folder:
        static.save_pretrained(folder)
        module = StaticEmbedding.from_model2vec(folder)
    return SentenceTransformer(modules=[of_stock(module), Normalize()], device=str(teacher.device))


def needed(package: str) -> None:
    """Refuses where the package of a peer is missing; no extra brings them, as no step of HLM needs them."""
    if importlib.util.find_spec(package.split("=")[0].split("[")[0]) is None:
        raise HlmError(f"expected a peer's package, found none; pip install '{package}', or leave this peer out")


def scratch(inputs: Inputs) -> SentenceTransformer:
    """The same shape with the weights that its architecture starts from."""
    model = load_encoder(inputs.config.student)
    backbone = model[0].model
    fresh = type(backbone)(backbone.config)
    backbone.load_state_dict(fresh.state_dict())
    return model


def wrapped(inputs: Inputs) -> SentenceTransformer:
    """A folder of a bare backbone with mean pooling, to be aligned."""
    module = Transformer(resolve(inputs.config.student))
    return SentenceTransformer(modules=[module, Pooling(module.get_embedding_dimension()), Normalize()])


RECIPES: dict[str, Callable[[Inputs], SentenceTransformer]] = {
    recipe.__name__: recipe
    for recipe in (mse, embed_distill, leaf, contrastive, margin_mse, pynife, model2vec, scratch, wrapped)
}
OWN_ADS = ("contrastive", "margin_mse", "model2vec")  # their ads are not the teacher's vectors


if __name__ == "__main__":
    run_recipe(main)
