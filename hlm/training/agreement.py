"""What BM25 and the backbone find for queries that nobody judged: pairs to train on where both agree, and judgements
to choose by."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from sentence_transformers import SentenceTransformer

from hlm.artefacts import fingerprint_texts
from hlm.data.contract import RetrievalData, iterate, query_text
from hlm.data.spelling import canonical
from hlm.encoders.loading import encode
from hlm.evaluation.bm25 import bm25_run
from hlm.evaluation.metrics import ranking
from hlm.training.mining import search_device, top_k_documents
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)

DEPTH = 20  # documents of each ranking that are looked at
BOTH = 10  # a document is agreed on where both rankings have it among so many
CONSTANT = 10  # of reciprocal rank fusion: small, as only the first ranks are looked at
HELD_OUT = 0.15  # share of the queries that are never trained on: judgements are made for them
MOST_HELD_OUT = 500  # they are searched once for each candidate


@dataclass(frozen=True)
class TypedQueries:
    """The queries of a dataset that people typed: those that do not call themselves derived.

    Attributes:
        judged: ids of the dev queries.
        trained, held_out: distinct unlabelled queries; "usb hub" and "usb hubs" are on the same side.
    """

    judged: list[str]
    trained: list[str]
    held_out: list[str]

    @classmethod
    def of(cls, data: RetrievalData) -> TypedQueries:
        dev = data.qrels.get("dev", {})
        judged = [row["_id"] for row in iterate(data.queries) if row["_id"] in dev and not row.get("derived")]
        sides: tuple[list[str], list[str]] = ([], [])
        rows = iterate(data.unlabelled) if data.unlabelled is not None else ()
        for text in dict.fromkeys(query_text(row) for row in rows if not row.get("derived")):
            share = int.from_bytes(hashlib.sha256(canonical(text).encode()).digest()[:8], "big") / 2**64
            sides[share < HELD_OUT].append(text)
        return cls(judged, sides[0], sides[1][:MOST_HELD_OUT])

    @property
    def fingerprints(self) -> dict[str, str]:
        return {f"typed/{name}": fingerprint_texts(texts) for name, texts in vars(self).items()}


@dataclass(frozen=True)
class Agreement:
    """Two rankings of each query: rows of the corpus, best first."""

    texts: list[str]
    lexical: list[list[int]]
    dense: list[list[int]]

    @classmethod
    def of(cls, model: SentenceTransformer, texts: list[str], data: RetrievalData, documents: VectorStore) -> Agreement:
        """Searches the corpus with BM25 and with the backbone.

        Args:
            model: the untuned backbone.
            documents: its vectors, one a row of the corpus.
        """
        row_of = {name: row for row, name in enumerate(data.corpus["_id"])}
        corpus = data.corpus.select_columns(["_id", "title", "text"])
        names = [str(number) for number in range(len(texts))]
        run = bm25_run(iterate(corpus), zip(names, texts, strict=True), DEPTH)
        lexical = [[row_of[name] for name in ranking(run[number])] for number in names]
        vectors = encode(model, texts, prompt_name="query")
        _, rows = top_k_documents(vectors, documents, min(DEPTH, len(documents)), device=search_device(model))
        return cls(texts, lexical, rows.tolist())

    def pairs(self, most: int) -> Iterator[tuple[str, list[int], list[int]]]:
        """(query, the best `most` documents agreed on, all documents of both rankings) of every query with a document
        agreed on. The last are no negatives: many of them are relevant."""
        for text, lexical, dense in zip(self.texts, self.lexical, self.dense, strict=True):
            both = {*lexical[:BOTH]} & {*dense[:BOTH]}
            if both:
                fused = fusion(lexical, dense)
                best = sorted(both, key=lambda row: (-fused[row], row))
                yield text, best[:most], sorted(fused)

    def judgements(self, ids: list[str]) -> dict[int, dict[str, int]]:
        """Number of a query -> document id -> grade, of every query with a document agreed on."""
        found = {}
        for number, (lexical, dense) in enumerate(zip(self.lexical, self.dense, strict=True)):
            both = {*lexical[:BOTH]} & {*dense[:BOTH]}
            if both:
                found[number] = {ids[row]: int(row in both) for row in {*lexical, *dense}}
        return found


def fusion(*rankings: list[int]) -> dict[int, float]:
    """Reciprocal rank fusion: document -> sum of 1 / (CONSTANT + rank) over the rankings that have it (Cormack et al.,
    SIGIR 2009)."""
    scores: dict[int, float] = {}
    for found in rankings:
        for rank, document in enumerate(found, start=1):
            scores[document] = scores.get(document, 0.0) + 1 / (CONSTANT + rank)
    return scores
