"""What BM25 and the backbone agree on: judgements to choose a teacher by, for queries that nobody judged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
from sentence_transformers import SentenceTransformer

from hlm.artefacts import fingerprint_texts
from hlm.data.contract import RetrievalData, iterate, query_text
from hlm.data.spelling import canonical
from hlm.data.views import Rows
from hlm.encoders.loading import encode
from hlm.evaluation.bm25 import bm25_run
from hlm.evaluation.metrics import Qrels, Run, ranking
from hlm.training.mining import search_device, top_k_documents
from hlm.vectors.store import VectorStore

DEPTH = 20  # documents of each ranking that are looked at
BOTH = 10  # a document is agreed on where both rankings have it among so many
LEAST_JUDGED = 20  # dev queries; fewer tell nothing
MOST = 500  # queries of either kind: each candidate encodes what is judged for them, and searches it


def some_of(names: Iterable[str]) -> list[str]:
    """At most `MOST` of these, as if by chance, but always the same."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:MOST]


def judged_by_people(data: RetrievalData) -> list[str]:
    """Ids of the dev queries that do not call themselves derived."""
    dev = data.qrels.get("dev", {})
    return [row["_id"] for row in iterate(data.queries) if row["_id"] in dev and not row.get("derived")]


@dataclass(frozen=True)
class TypedQueries:
    """The queries of a dataset that people typed: those that do not call themselves derived.

    Attributes:
        judged: ids of dev queries, `LEAST_JUDGED` to `MOST`; none where fewer are judged.
        unlabelled: where none are judged, at most `MOST` distinct texts; none is a train query, not in another word
            order or number either.

    Of more queries of either kind it is always the same ones, whatever their order in the table.
    """

    judged: list[str]
    unlabelled: list[str]

    @classmethod
    def of(cls, data: RetrievalData) -> TypedQueries:
        judged, train = judged_by_people(data), data.qrels.get("train", {})
        if len(judged) >= LEAST_JUDGED:
            some = {*some_of(judged)}
            return cls([query for query in judged if query in some], [])
        trained = {canonical(row["text"]) or row["text"] for row in iterate(data.queries) if row["_id"] in train}
        rows = iterate(data.unlabelled) if data.unlabelled is not None else ()
        texts = {canonical(row["text"]) or row["text"]: query_text(row) for row in rows if not row.get("derived")}
        return cls([], [texts[text] for text in some_of(texts.keys() - trained)])

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
        lexical = bm25_run(Rows(corpus), [(text, text) for text in texts], DEPTH)
        vectors = encode(model, texts, prompt_name="query")
        depth = min(DEPTH, len(documents))
        scores, rows = top_k_documents(vectors, documents, depth, device=search_device(model))
        names = data.corpus.data.column("_id").take(pa.array(rows.ravel())).to_pylist()
        found = (names[start : start + depth] for start in range(0, len(names), depth))
        dense = {
            text: dict(zip(ids, values.tolist(), strict=True))
            for text, ids, values in zip(texts, found, scores, strict=True)
        }
        return cls(lexical, dense)

    def judgements(self) -> Qrels:
        """Text -> document -> 1 where both rankings have it among the first `BOTH`, 0 for others of either; of every
        text with a document agreed on.

        They favour the backbone, which made half of them: a tuned teacher must come nearer to what both agree on than
        the backbone itself. Judgements that favour nobody, as by BM25 alone, took teachers that people found worse
        (results/teacher_choice.json).
        """
        found = {}
        for text in self.lexical:
            both = {*ranking(self.lexical[text], BOTH)} & {*ranking(self.dense[text], BOTH)}
            if both:
                documents = sorted({*self.lexical[text], *self.dense[text]})
                found[text] = {name: int(name in both) for name in documents}
        return found
