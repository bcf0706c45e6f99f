"""BM25: its words, and its scores against the formula and against bm25s."""

import math
import sys

import bm25s
import numpy as np
import pytest

from hlm.artefacts import HlmError
from hlm.evaluation import bm25
from hlm.evaluation.bm25 import bm25_run, tokenise
from hlm.evaluation.metrics import ranking


def test_tokens_keep_model_numbers_and_decimals():
    assert tokenise('Sony WH-1000XM4, 15.6" Headphones.') == ["sony", "wh", "1000xm4", "15.6", "headphone"]
    assert tokenise("batteries glasses bus dress cases HP's ﬁne") == [
        *("battery", "glasse", "bus", "dress", "case", "hp", "s", "fine")
    ]
    assert tokenise("Batteries", stem=False) == ["batteries"]


def test_bm25_run():
    corpus = [
        {"_id": "phone", "title": "Acme X100 phone", "text": "A phone with a good camera."},
        {"_id": "case", "title": "Case for Acme X100", "text": None},
        {"_id": "kettle", "title": None, "text": "Steel kettle, 1.7 l"},
    ]
    queries = [("q1", "phones"), ("q2", "X100 case"), ("q3", "1.7"), ("q4", "zzz"), ("q5", "...")]
    run = bm25_run(corpus, queries, 10)
    assert ranking(run["q1"]) == ["phone"]
    assert ranking(run["q2"]) == ["case", "phone"]
    assert ranking(run["q3"]) == ["kettle"]
    assert run["q4"] == run["q5"] == {}
    assert ranking(bm25_run(corpus, queries, 1)["q2"]) == ["case"]
    assert bm25_run(corpus, [("q", "phones")], 1, stem=False)["q"] == {}
    # Lucene's BM25 by hand: one document of three holds "kettle"; lengths are 10, 4 and 4 words.
    length = np.mean(
        [
            len(tokenise(t))
            for t in ("Acme X100 phone A phone with a good camera", "Case for Acme X100", "Steel kettle 1.7 l")
        ]
    )
    idf = math.log(1 + (3 - 1 + 0.5) / (1 + 0.5))
    assert run["q3"]["kettle"] == pytest.approx(idf / (1 + 1.5 * (1 - 0.75 + 0.75 * 4 / length)), rel=1e-5)
    with pytest.raises(HlmError, match="no word"):
        bm25_run([{"_id": "a", "title": "...", "text": None}], queries, 3)


def test_scores_are_those_of_bm25s_to_the_bit(monkeypatch):
    """Its variant and ours, over all documents at once and block by block."""
    monkeypatch.setitem(sys.modules, "jax", None)  # it would start JAX where that is installed
    rng = np.random.default_rng(0)
    words = np.array([f"w{number}" for number in range(300)])
    drawn = [words[(300 * rng.random(rng.integers(1, 40)) ** 3).astype(int)].tolist() for _ in range(500)]
    corpus = [{"_id": f"d{row}", "title": None, "text": " ".join(text)} for row, text in enumerate(drawn)]
    queries = [(f"q{row}", " ".join(rng.choice(words[:60], 4))) for row in range(50)]
    engine = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    vocabulary: dict = {}
    numbered = [[vocabulary.setdefault(word, len(vocabulary)) for word in text] for text in drawn]
    engine.index((numbered, vocabulary), create_empty_token=False, show_progress=False)
    run = bm25_run(corpus, queries, 500)
    for query, text in queries:
        scores = engine.get_scores([vocabulary[word] for word in text.split()])
        assert run[query] == {f"d{row}": float(scores[row]) for row in np.flatnonzero(scores)}
    monkeypatch.setattr(bm25, "BLOCK", 64)
    assert bm25_run(corpus, queries, 500) == run
    best = {query: sorted(found.values())[-20:] for query, found in run.items()}
    assert {query: sorted(found.values()) for query, found in bm25_run(corpus, queries, 20).items()} == best
