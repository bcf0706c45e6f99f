"""A corpus that is read from disk when it is asked for."""

import numpy as np
import pyarrow as pa
import pytest

from hlm.data.contract import document_text, load
from hlm.data.ids import rows_with
from hlm.data.views import DocumentTexts, Rows


def test_texts_and_rows_are_those_of_the_table(catalogue_200):
    corpus = load(str(catalogue_200), splits=()).corpus
    rows = Rows(corpus)
    expected = [document_text(row) for row in corpus]
    assert len(rows) == 200 and [row["_id"] for row in rows] == [row["_id"] for row in rows] == corpus["_id"][:]
    texts = DocumentTexts(corpus)
    assert list(texts) == expected and texts[3] == expected[3] and texts[-1] == expected[-1]
    assert texts[190:300] == expected[190:] and texts[5:5] == []
    some = texts.of(np.array([7, 7, 0, 199]))
    assert list(some) == [expected[row] for row in (7, 7, 0, 199)] and some[1:3] == [expected[7], expected[0]]
    with pytest.raises(IndexError):
        texts[200]


def test_rows_of_ids_across_chunks():
    column = pa.chunked_array([["a", "b"], [], ["c", "d", "e"]], pa.string())
    assert rows_with(column, ["e", "a", "x", "a", "c"]).tolist() == [4, 0, -1, 0, 2]
    assert rows_with(column, pa.array(["d"])).tolist() == [3] and rows_with(column, []).tolist() == []
