"""A text that is longer than the model reads is said before it is paid for."""

import logging

import numpy as np
import pytest

from hlm.encoders.lengths import LOOKED_AT, looked_at, say_what_is_cut
from hlm.encoders.loading import load_encoder, tokenise


def words(count):
    return " ".join(["red"] * count)


@pytest.fixture
def model(tiny_bert):
    return load_encoder(tiny_bert, device="cpu", max_seq_length=8)  # six words and BERT's two tokens


def said(model, texts, caplog, role="document"):
    caplog.clear()
    with caplog.at_level(logging.INFO):
        say_what_is_cut(model, lambda start, stop: [("", text) for text in texts[start:stop]], len(texts), role=role)
    return [(record.levelno, record.getMessage()) for record in caplog.records]


def test_the_shares_are_those_of_the_texts(model, caplog):
    texts = [words(6)] * 4 + [words(7)] * 3 + [words(15)] * 2 + [words(31)]
    assert len(tokenise(model, [words(6)])[0]) == len(tokenise(model, [words(7)])[0]) == 8
    assert said(model, texts, caplog) == [
        (
            logging.WARNING,
            "60% of 10 ads looked at have more tokens than max_seq_length, 8, and their ends are not read (30% have "
            "more than 16, 10% more than 32): a higher one may find more, and takes longer",
        )
    ]
    ((level, text),) = said(model, [words(6)] * 3 + [words(7)], caplog, role="query")
    assert level == logging.INFO and text.startswith("25% of 4 queries looked at") and text.endswith("0% more than 32)")
    assert said(model, [words(6)] * 9, caplog) == said(model, [], caplog) == []
    assert said(model, [words(6)] * 200 + [words(7)], caplog) == []  # under 1%


def test_the_prompt_counts_and_what_is_cut_stays_cut(model, caplog):
    model.prompts = {"query": "red red ", "document": ""}
    ((_, text),) = said(model, [words(5)] * 3, caplog, role="query")
    assert text.startswith("100% of 3 queries") and not said(model, [words(5)] * 3, caplog)
    assert len(tokenise(model, [words(50)])[0]) == 8  # looking at more changed nothing


def test_a_model_without_a_limit_cuts_nothing(model, caplog):
    model.max_seq_length = None
    assert said(model, [words(50)], caplog) == []


def test_a_model_that_reads_the_end_loses_the_beginning(model, caplog):
    model.tokenizer.truncation_side = "left"
    ((_, text),) = said(model, [words(7)], caplog)
    assert "their beginnings are not read" in text


@pytest.mark.parametrize("rows", [0, 1, LOOKED_AT, LOOKED_AT + 1, 123_457])
def test_the_texts_looked_at_are_spread_over_the_table(rows):
    blocks = looked_at(rows)
    found = np.concatenate([np.arange(block.start, block.stop) for block in blocks])
    assert len(found) == min(rows, LOOKED_AT) == len(np.unique(found)) and found.max(initial=0) == max(rows - 1, 0)
    if len(blocks) > 1:
        gaps = np.diff([block.start for block in blocks])
        assert gaps.max() - gaps.min() <= 1
