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
from hlm.evaluation.fusion import reciprocal_rank_fusion
from hlm.evaluation.metrics import Qrels, Run, ranking
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
    """What BM25 and the backbone find for each text, at most `DEPTH` documents by id."""

    lexical: Run
    dense: Run

    @classmethod
    def of(cls, model: SentenceTransformer, texts: list[str], data: RetrievalData, documents: VectorStore) -> Agreement:
        """Searches the corpus with BM25 and with the backbone.

        Args:
            model: the untuned backbone.
            documents: its vectors, one a row of the corpus.
        """
        corpus = data.corpus.select_columns(["_id", "title", "text"])
        lexical = bm25_run(iterate(corpus), [(text, text) for text in texts], DEPTH)
        ids = data.corpus["_id"][:]
        vectors = encode(model, texts, prompt_name="query")
        depth = min(DEPTH, len(documents))
        scores, rows = top_k_documents(vectors, documents, depth, device=search_device(model))
        dense = {
            text: {ids[row]: float(score) for row, score in zip(found, values, strict=True)}
            for text, found, values in zip(texts, rows, scores, strict=True)
        }
        return cls(lexical, dense)

    def agreed(self) -> dict[str, list[str]]:
        """Text -> the documents among the first `BOTH` of both, best first, of every text that has any."""
        fused = reciprocal_rank_fusion([self.lexical, self.dense], constant=CONSTANT)
        found = {}
        for text, documents in fused.items():
            both = {*ranking(self.lexical[text], BOTH)} & {*ranking(self.dense[text], BOTH)}
            if both:
                found[text] = [name for name in ranking(documents) if name in both]
        return found

    def pairs(self, most: int) -> Iterator[tuple[str, list[str], list[str]]]:
        """(text, the best `most` documents agreed on, all documents of both) of every text with a document agreed on.
        The last are no negatives: many of them are relevant."""
        for text, documents in self.agreed().items():
            yield text, documents[:most], sorted({*self.lexical[text], *self.dense[text]})

    def judgements(self) -> Qrels:
        """Text -> document -> 1 where agreed on, 0 for others of either, of every text with a document agreed on."""
        agreed = self.agreed()
        found = {text: {*self.lexical[text], *self.dense[text]} for text in agreed}
        return {text: {name: int(name in agreed[text]) for name in sorted(found[text])} for text in found}
