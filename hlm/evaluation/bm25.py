"""BM25 over the catalogue's texts: the lexical baseline of every report."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from types import ModuleType

import numpy as np

from hlm.artefacts import HlmError
from hlm.data.contract import Row, document_text
from hlm.data.words import terms
from hlm.evaluation.metrics import Run
from hlm.progress import progress


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
    corpus: Iterable[Row],
    queries: Iterable[tuple[str, str]],
    k: int,
    *,
    k1: float = 1.5,
    b: float = 0.75,
    stem: bool = True,
) -> Run:
    """BM25 (Lucene's variant, through bm25s) over `document_text`: the lexical baseline.

    Documents without a word of the query are not in its run.

    Args:
        corpus: rows with `_id`, `title`, `text`.
        queries: (query id, text).
        k: documents for each query.
        k1, b: term saturation and length normalisation.
        stem: see `tokenise`.

    Raises:
        HlmError: k below 1, or a corpus without a single word.
    """
    if k < 1:
        raise HlmError(f"k: expected 1 or more, found {k}")
    vocabulary: dict[str, int] = {}
    ids, documents = [], []
    for row in progress(corpus, what="BM25: read the corpus", unit="document"):
        ids.append(row["_id"])
        # The dictionary's own integers are shared: a token costs 8 bytes, not 40.
        words = tokenise(document_text(row), stem=stem, single=True)
        documents.append([vocabulary.setdefault(word, len(vocabulary)) for word in words])
    if not vocabulary:
        raise HlmError(f"BM25 found no word in {len(ids)} documents; check the corpus")
    engine = _bm25s().BM25(method="lucene", k1=k1, b=b)
    engine.index((documents, vocabulary), create_empty_token=False, show_progress=False)
    del documents
    run = {}
    for query, text in progress(queries, what="BM25: search", unit="query"):
        known = [vocabulary[word] for word in tokenise(text, stem=stem) if word in vocabulary]
        scores = engine.get_scores(known) if known else np.zeros(0, np.float32)
        rows = np.flatnonzero(scores > 0)
        if len(rows) > k:
            rows = rows[np.argpartition(-scores[rows], k - 1)[:k]]
        run[query] = {ids[row]: float(scores[row]) for row in rows}
    return run


def _bm25s() -> ModuleType:
    """bm25s, without JAX: where that is installed, bm25s starts it when imported, to rank five numbers, and JAX takes
    three quarters of a GPU's memory when it starts."""
    hidden = not {"bm25s", "jax"} & sys.modules.keys()
    if hidden:
        sys.modules["jax"] = None  # type: ignore[assignment]  # to import it is an ImportError, which bm25s expects
    try:
        import bm25s
    finally:
        if hidden:
            del sys.modules["jax"]
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG on import
    return bm25s
