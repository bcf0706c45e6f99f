"""Fusion of ranked lists: figures made by hand, ties, weights chosen on judgements."""

import math
import random

import pytest

from hlm.artefacts import HlmError
from hlm.evaluation.fusion import choose_weights, reciprocal_rank_fusion, weighted_fusion
from hlm.evaluation.metrics import ranking

# Two lists of three documents with b and c in common.
LEXICAL = {"q": {"a": 8.0, "b": 6.0, "c": 4.0}}
DENSE = {"q": {"b": 0.9, "d": 0.6, "c": 0.5}}


def test_reciprocal_ranks_of_two_lists():
    fused = reciprocal_rank_fusion([LEXICAL, DENSE])["q"]
    assert fused == pytest.approx({"a": 1 / 61, "b": 1 / 62 + 1 / 61, "c": 1 / 63 + 1 / 63, "d": 1 / 62})
    assert list(fused) == ["b", "c", "a", "d"]
    assert list(reciprocal_rank_fusion([LEXICAL, DENSE], depth=2)["q"]) == ["b", "c"]
    # With a small constant the first ranks outweigh being found twice: 1 against 1/3 + 1/3.
    assert list(reciprocal_rank_fusion([LEXICAL, DENSE], constant=0)["q"]) == ["b", "a", "c", "d"]


def test_weighted_sum_of_normalised_scores_of_two_lists():
    # minmax: a 1, b 0.5, c 0 and b 1, d 0.25, c 0; what a list lacks counts 0.
    fused = weighted_fusion([LEXICAL, DENSE], [0.6, 0.4])["q"]
    assert fused == pytest.approx({"b": 0.7, "a": 0.6, "d": 0.1, "c": 0.0})
    assert list(fused) == ["b", "a", "d", "c"]
    # zscore: mean 6, deviation sqrt(8/3); mean 2/3, deviation sqrt(0.26/9); what a list lacks counts as its last.
    first, second = math.sqrt(8 / 3), math.sqrt(0.26 / 9)
    fused = weighted_fusion([LEXICAL, DENSE], [1, 1], normalisation="zscore")["q"]
    last = (0.5 - 2 / 3) / second
    wanted = {"a": 2 / first + last, "b": (0.9 - 2 / 3) / second, "c": -2 / first + last}
    assert fused == pytest.approx({**wanted, "d": -2 / first + (0.6 - 2 / 3) / second})


@pytest.mark.parametrize(("how", "wanted"), [("minmax", {"a": 1.0, "b": 1.0}), ("zscore", {"a": 0.0, "b": 0.0})])
def test_equal_scores_and_empty_lists_are_normalised(how, wanted):
    runs = [{"q": {"a": 5.0, "b": 5.0}, "none": {}}, {"q": {}, "none": {}}]
    assert weighted_fusion(runs, [1, 2], normalisation=how) == {"q": wanted, "none": {}}
    assert reciprocal_rank_fusion(runs)["none"] == {}


def test_ties_break_by_id_whatever_the_order_of_the_lists():
    """a, b and c are first, second and third in turn: sums that floating point makes unequal."""
    runs = [{"q": dict(zip(order, (3.0, 2.1, 0.3), strict=True))} for order in ("abc", "bca", "cab")]
    for fused in (reciprocal_rank_fusion(runs), weighted_fusion(runs, [0.1] * 3), weighted_fusion(runs[::-1], [7] * 3)):
        assert list(fused["q"]) == ranking(fused["q"]) == ["c", "b", "a"] and len(set(fused["q"].values())) == 1


def test_weights_are_those_of_the_best_ndcg():
    """What is relevant, one list scores at random and the other knows."""
    generator = random.Random(0)
    qrels = {f"q{n}": {f"d{i}": int(i < 3) for i in range(12)} for n in range(20)}
    knows = {query: {d: grade + generator.random() for d, grade in judged.items()} for query, judged in qrels.items()}
    random_run = {query: {d: generator.random() for d in judged} for query, judged in qrels.items()}
    weights, found = choose_weights([random_run, knows], qrels)
    assert found == 1 and weights[1] > 0.5 and sum(weights) == pytest.approx(1)
    # Of all that are best, the most even.
    assert weights == min(([1 - w / 10, w / 10] for w in range(11) if _perfect(random_run, knows, qrels, w)), key=max)
    assert choose_weights([knows, knows, knows], qrels, steps=4)[0] == [0.5, 0.25, 0.25]


def _perfect(noise, knows, qrels, tenths):
    fused = weighted_fusion([noise, knows], [1 - tenths / 10, tenths / 10])
    return all({f"d{i}" for i in range(3)} == set(ranking(fused[query], 3)) for query in qrels)


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [1, math.nan], [1, 1, 1]])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(HlmError, match="expected 2, one for each system"):
        weighted_fusion([LEXICAL, DENSE], weights)


def test_runs_over_other_queries_are_refused():
    with pytest.raises(HlmError, match="found 1 and 2 with 1 in common"):
        reciprocal_rank_fusion([LEXICAL, {**DENSE, "p": {}}])
    with pytest.raises(HlmError, match="found none"):
        weighted_fusion([], [])
