"""Least scores that keep a stated precision: chosen by hand-made scores, reported on other queries."""

import pytest

from hlm.artefacts import HlmError
from hlm.evaluation.thresholds import at_threshold, calibrate, choose_threshold

# By descending score: r r - r - - over both queries; precision 1, 1, 2/3, 3/4, 3/5, 1/2.
RUN = {"p": {"a": 0.9, "b": 0.7, "c": 0.5}, "q": {"d": 0.8, "e": 0.6, "f": 0.4}}
QRELS = {"p": {"a": 2, "b": 1, "c": 0}, "q": {"d": 3, "e": 2, "f": 0}}


@pytest.mark.parametrize(
    ("precision", "wanted"),
    [(1.0, (0.8, 1.0)), (0.75, (0.6, 0.75)), (0.7, (0.6, 0.75)), (0.6, (0.5, 0.6)), (0.5, (0.4, 0.5))],
)
def test_the_lowest_score_that_keeps_the_precision(precision, wanted):
    assert choose_threshold(RUN, QRELS, precision, level=2) == wanted


def test_ads_of_equal_scores_are_shown_together():
    run = {"p": {"a": 0.9, "b": 0.9}, "q": {"d": 0.9, "e": 0.8}}
    assert choose_threshold(run, QRELS, 0.75, level=2) == (0.8, 0.75)
    assert choose_threshold(run, QRELS, 0.8, level=2) == (None, 0.75)  # one of the three with 0.9 is not relevant


def test_unjudged_ads_count_unless_they_are_left_out():
    run = {"p": {"a": 0.9, "new": 0.8}, "q": {"d": 0.7}}
    assert choose_threshold(run, QRELS, 0.9, level=2) == (0.9, 1.0)
    assert choose_threshold(run, QRELS, 0.9, level=2, judged_only=True) == (0.7, 1.0)


def test_what_a_least_score_keeps():
    found = at_threshold(RUN, QRELS, 0.75, level=2, samples=200)
    # a and d are shown; of the relevant a, d and e, one in three is lost.
    assert found["precision"] == {"value": 1.0, "ci95": [1.0, 1.0]}
    assert (found["coverage"], found["shown_per_query"]) == (1.0, 1.0) and found["kept"] == pytest.approx(2 / 3)
    assert at_threshold(RUN, QRELS, 0.85, level=2, samples=200)["coverage"] == 0.5
    nothing = at_threshold(RUN, QRELS, 0.95, level=2, samples=200)
    assert nothing["precision"]["reason"] == "the shown ads are 0 on all 2 queries" and nothing["coverage"] == 0


def test_a_least_score_is_chosen_on_one_split_and_reported_on_another():
    other = {"r": {"a": 0.9, "b": 0.85}}, {"r": {"a": 0, "b": 2}}
    found = calibrate((RUN, QRELS), other, 1.0, level=2, samples=200)
    assert found["threshold"] == 0.8 and found["chosen_on"]["precision"]["value"] == 1
    assert found["reported"]["precision"]["value"] == 0.5  # as measured there, whatever was wanted
    poor = calibrate(({"p": {"c": 1.0}, "q": {}}, QRELS), other, 0.9, level=2)
    assert poor == {"threshold": None, "reason": "no least score keeps 90%: the best is 0.0%"}
    assert choose_threshold({"p": {}, "q": {}}, QRELS, 0.9, level=2) == (None, 0.0)


@pytest.mark.parametrize("precision", [0, 1.1, 90])
def test_a_precision_is_a_share(precision):
    with pytest.raises(HlmError, match="expected a share above 0"):
        choose_threshold(RUN, QRELS, precision, level=2)
