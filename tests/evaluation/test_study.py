"""What a study makes of scores: gains and tests by hand, verdicts on both sides of every border."""

import numpy as np
import pytest
from scipy import stats

from hlm.artefacts import HlmError
from hlm.evaluation.study import check_claim, compare, describe, holm, judge, over_seeds, randomisation_test


def system(*values, metric="ndcg@10"):
    """One seed a list of values."""
    return [{metric: {f"q{n}": value for n, value in enumerate(one)}} for one in values]


STEADY = [0.5 + 0.01 * (n % 7) for n in range(60)]


def better_by(gain, noise=0.0):
    generator = np.random.default_rng(3)
    return [value * (1 + gain) + noise * generator.normal() for value in STEADY]


def test_a_query_counts_with_its_mean_over_seeds():
    assert over_seeds(system([0.2, 1.0], [0.4, 0.0]), "ndcg@10") == {"q0": pytest.approx(0.3), "q1": 0.5}


def test_gain_and_signs_by_hand():
    found = compare(system([0.6, 0.6], [0.4, 0.8]), system([0.5, 0.5]))
    assert found["gain"]["value"] == pytest.approx(0.2) and found["same_sign"]
    assert not compare(system([0.6, 0.6], [0.4, 0.4]), system([0.5, 0.5]))["same_sign"]


def test_randomisation_agrees_with_scipy():
    differences = np.random.default_rng(1).normal(0.02, 0.1, size=50)
    theirs = stats.permutation_test(
        (differences,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", n_resamples=20_000,
        vectorized=True, rng=np.random.default_rng(2),
    ).pvalue  # fmt: skip
    assert randomisation_test(differences, 20_000) == pytest.approx(theirs, abs=0.015)
    assert randomisation_test(np.zeros(4), 100) == 1.0
    assert randomisation_test(np.ones(60), 1000) == pytest.approx(1 / 1001)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_recovery_is_of_what_the_teacher_has():
    ours, teacher = system([0.4, 0.4]), system([0.5, 0.5])
    ours[0]["overlap@10"] = {"q0": 0.5, "q1": 0.7}
    found = describe(ours, teacher, ["ndcg@10", "overlap@10", "judged@10"])
    assert found["recovery"] == {"ndcg@10": {"value": pytest.approx(0.8), "ci95": [pytest.approx(0.8)] * 2}}
    assert found["metrics"]["overlap@10"] == {"mean": pytest.approx(0.6), "by_seed": [pytest.approx(0.6)]}


BETTER = {"text": "a beats b", "better": "a", "than": "b", "paper_gain": 0.05}


@pytest.mark.parametrize(
    ("a", "verdict"),
    [
        ([better_by(0.04), better_by(0.06)], "confirmed"),
        ([better_by(0.08), better_by(-0.01)], "not confirmed"),  # a seed disagrees
        ([better_by(-0.05)], "not confirmed"),
        ([better_by(0.001, 0.02)], "not confirmed"),  # nothing, and narrow enough to tell
        ([better_by(0.01, 0.3)], "not testable at this scale"),  # too wide to tell nothing from the paper's
    ],
)
def test_a_variant_is_better_or_not_or_nobody_can_tell(a, verdict):
    (found,) = judge([BETTER], {"a": system(*a), "b": system(STEADY)}, system(STEADY), {})
    assert found["verdict"] == verdict, found


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        (better_by(0.0), "confirmed"),
        (better_by(-0.05), "not confirmed"),
        (better_by(0.0, 0.2), "not testable at this scale"),
    ],
)
def test_a_variant_keeps_a_share_or_not_or_nobody_can_tell(values, verdict):
    claim = {"text": "a keeps 98%", "variant": "a", "at_least": 0.98}
    (found,) = judge([claim], {"a": system(values)}, system(STEADY), {})
    assert found["verdict"] == verdict, found


def test_claims_are_corrected_together():
    a, b = system(better_by(0.012, 0.02)), system(STEADY)
    (alone,) = judge([BETTER], {"a": a, "b": b}, b, {})
    together = judge([BETTER] * 20, {"a": a, "b": b}, b, {})
    assert alone["p_holm"] == alone["p"] and together[0]["p_holm"] == pytest.approx(min(1, 20 * alone["p"]))


def test_what_was_not_run_is_not_testable():
    found = judge([BETTER, {"text": "fast", "not_testable": "no GPU"}], {}, system(STEADY), {"b": "no package"})
    assert [one["verdict"] for one in found] == ["not testable at this scale"] * 2
    assert [one["why"] for one in found] == ["b was not run: no package", "no GPU"]


def test_a_claim_that_decides_nothing_is_refused():
    with pytest.raises(HlmError, match="claim 1: expected a claim of text with better and than"):
        check_claim({"text": "a is good", "better": "a"}, ["a"], "claim 1")
    with pytest.raises(HlmError, match="expected one of a, b, found 'c'"):
        check_claim({"text": "", "better": "a", "than": "c"}, ["a", "b"], "claim 1")
