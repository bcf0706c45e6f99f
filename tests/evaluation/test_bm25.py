"""BM25: its words, its scores against the formula, and what importing it does not start."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hlm.artefacts import HlmError
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


def test_bm25_does_not_start_jax(tmp_path):
    """JAX would take three quarters of a GPU's memory; bm25s asks for it where it is installed."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("open(__file__ + '.started', 'w')")
    code = (
        "import sys, hlm.evaluation.bm25 as bm25\n"
        "row = {'_id': 'd', 'title': '', 'text': 'red shoe'}\n"
        "assert list(bm25.bm25_run([row], [('q', 'shoe')], 1)) == ['q']\n"
        "assert 'bm25s' in sys.modules and 'jax' not in sys.modules\n"
        "import jax\n"  # who wants it still has it
    )
    paths = [str(tmp_path), str(Path(__file__).resolve().parents[2])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-c", code.rpartition("import jax")[0]], env=environment, check=True)
    assert not (tmp_path / "jax" / "__init__.py.started").exists()
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert (tmp_path / "jax" / "__init__.py.started").exists()
