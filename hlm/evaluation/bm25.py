"""BM25 over the catalogue's texts: the lexical baseline of every report.

Scores are those of bm25s (arXiv 2407.03618), Lucene's variant, to the last bit, but a catalogue of any size is scored
block by block: in memory are one block of documents, reduced to the queries' words, and what was found so far.
"""

from __future__ import annotations

import array
import math
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hlm.artefacts import HlmError
from hlm.data.contract import Row, document_text
from hlm.data.words import terms
from hlm.evaluation.metrics import Run
from hlm.progress import progress

BLOCK = 2**20  # documents scored at once


def tokenise(text: str, *, stem: bool = True, single: bool = False) -> list[str]:
    """Words and numbers for BM25, case folded: "WH-1000XM4, 15.6\\"" -> wh, 1000xm4, 15.6; see `hlm.data.words.terms`.

    Punctuation separates, except inside a decimal number. Scripts without spaces, and Korean, come as pairs of
    characters; with `single`, for documents, one by one as well. `stem` folds English plurals only (Harman's S
    stemmer, JASIS 1991): a full stemmer would also rewrite brands and model names.
    """
    words = terms(text, single=single)
    return [_singular(word) for word in words] if stem else words


def _singular(word: str) -> str:
    if word.endswith("ies") and not word.endswith(("eies", "aies")) and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("es") and not word.endswith(("aes", "ees", "oes")) and len(word) > 3:
        return word[:-1]
    if word.endswith("s") and not word.endswith(("us", "ss")) and len(word) > 3:
        return word[:-1]
    return word


def bm25_run(
    corpus: Collection[Row],
    queries: Iterable[tuple[str, str]],
    k: int,
    *,
    k1: float = 1.5,
    b: float = 0.75,
    stem: bool = True,
) -> Run:
    """BM25 (Lucene's variant) over `document_text`: the lexical baseline.

    Documents without a word of the query are not in its run. What the documents hold of the queries' words lies in
    temporary files meanwhile, about 10 bytes a word.

    Args:
        corpus: rows with `_id`, `title`, `text`, read twice.
        queries: (query id, text).
        k: documents for each query.
        k1, b: term saturation and length normalisation.
        stem: see `tokenise`.

    Raises:
        HlmError: k below 1, or a corpus without a single word.
    """
    if k < 1:
        raise HlmError(f"k: expected 1 or more, found {k}")
    words = {query: tokenise(text, stem=stem) for query, text in queries}
    number = {word: place for place, word in enumerate(dict.fromkeys(word for text in words.values() for word in text))}
    asked = {query: [number[word] for word in text] for query, text in words.items()}
    found = {query: (np.zeros(0, np.int64), np.zeros(0, np.float32)) for query in asked}
    with tempfile.TemporaryDirectory(prefix="hlm-bm25-") as folder:
        read = progress(corpus, what="BM25: read the corpus", unit="document", total=len(corpus))
        blocks = _Blocks.of(_counted(read, number, stem), len(number), Path(folder))
        if not blocks.words:
            raise HlmError(f"BM25 found no word in {blocks.starts[-1]} documents; check the corpus")
        for start, scores_of in progress(blocks.scored(k1, b), what="BM25: search", unit="block", total=len(blocks)):
            for query, numbers in asked.items():
                found[query] = _best(found[query], start, scores_of(numbers), k)
    return _named(found, corpus)


@dataclass(frozen=True)
class _Block:
    """Some documents and what they hold of the queries' words: the words' postings."""

    lengths: np.ndarray  # int32 (documents,): words of each
    rows: np.ndarray  # int32 (postings,): the document within the block, ascending
    words: np.ndarray  # int32 (postings,): number of the word
    counts: np.ndarray  # int32 (postings,): how often the document has it


def _counted(corpus: Iterable[Row], number: dict[str, int], stem: bool) -> Iterator[_Block]:
    columns = [array.array("i") for _ in range(4)]
    for row in corpus:
        words = tokenise(document_text(row), stem=stem, single=True)
        counts: dict[int, int] = {}
        for word in words:
            if (place := number.get(word)) is not None:
                counts[place] = counts.get(place, 0) + 1
        columns[1].extend([len(columns[0])] * len(counts))
        columns[2].extend(counts)
        columns[3].extend(counts.values())
        columns[0].append(len(words))
        if len(columns[0]) == BLOCK:
            yield _Block(*(np.array(column, dtype=np.int32) for column in columns))
            columns = [array.array("i") for _ in range(4)]
    if columns[0]:
        yield _Block(*(np.array(column, dtype=np.int32) for column in columns))


@dataclass(frozen=True)
class _Blocks:
    """All documents, in files, and what the score of any of them needs to know of all."""

    folder: Path
    starts: list[int]  # the first document of each block, and how many there are
    words: int  # of all documents
    documents_with: np.ndarray  # int64 (words of queries,): how many documents have each

    @classmethod
    def of(cls, blocks: Iterable[_Block], vocabulary: int, folder: Path) -> _Blocks:
        starts, words, documents_with = [0], 0, np.zeros(vocabulary, np.int64)
        for place, block in enumerate(blocks):
            np.savez(folder / f"{place}.npz", **vars(block))
            starts.append(starts[-1] + len(block.lengths))
            words += int(block.lengths.sum(dtype=np.int64))
            documents_with += np.bincount(block.words, minlength=vocabulary)
        return cls(folder, starts, words, documents_with)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def scored(self, k1: float, b: float) -> Iterator[tuple[int, _Scores]]:
        """The first document of each block, and what scores its documents."""
        total = self.starts[-1]
        having = self.documents_with.tolist()
        rarity = np.array([math.log(1 + (total - n + 0.5) / (n + 0.5)) for n in having], dtype=np.float32)
        for place, start in enumerate(self.starts[:-1]):
            with np.load(self.folder / f"{place}.npz") as stored:
                block = _Block(**stored)
            norm = k1 * ((1 - b) + b * block.lengths / (self.words / total))
            share = block.counts / (norm[block.rows] + block.counts)
            order = np.argsort(block.words, kind="stable")
            data = (rarity[block.words] * share).astype(np.float32)[order]
            ends = np.searchsorted(block.words[order], np.arange(len(rarity) + 1))
            yield start, _Scores(block.rows[order], data, ends, len(block.lengths))


@dataclass(frozen=True)
class _Scores:
    """The postings of a block, word by word, with what each adds to a score."""

    rows: np.ndarray
    data: np.ndarray
    starts: np.ndarray
    documents: int

    def __call__(self, words: list[int]) -> np.ndarray:
        """float32 (documents,), the scores for a query of these words, which may repeat."""
        scores = np.zeros(self.documents, np.float32)
        for word in words:
            part = slice(self.starts[word], self.starts[word + 1])
            scores[self.rows[part]] += self.data[part]  # no document twice
        return scores


def _best(
    found: tuple[np.ndarray, np.ndarray], start: int, scores: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores of the k best so far, in no order."""
    rows = _top(scores, np.flatnonzero(scores > 0), k)
    rows, scores = np.concatenate([found[0], rows + start]), np.concatenate([found[1], scores[rows]])
    kept = _top(scores, np.arange(len(rows)), k)
    return rows[kept], scores[kept]


def _top(scores: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    return rows if len(rows) <= k else rows[np.argpartition(-scores[rows], k - 1)[:k]]


def _named(found: dict[str, tuple[np.ndarray, np.ndarray]], corpus: Iterable[Row]) -> Run:
    wanted = np.unique(np.concatenate([np.zeros(0, np.int64), *(rows for rows, _ in found.values())]))
    places = iter([*wanted.tolist(), -1])
    place, names = next(places), {}
    for number, row in enumerate(corpus):
        if number == place:
            names[number], place = row["_id"], next(places)
    return {
        query: {names[row]: score for row, score in zip(rows.tolist(), scores.tolist(), strict=True)}
        for query, (rows, scores) in found.items()
    }
