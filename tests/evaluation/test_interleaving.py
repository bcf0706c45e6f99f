"""Team-draft interleaving: drafts of known draws, chances of a click by hand, and simulated outcomes."""

import numpy as np
import pytest

from hlm.artefacts import HlmError
from hlm.evaluation.interleaving import click_chances, interleave, team_draft


@pytest.mark.parametrize(
    ("coins", "shown", "teams"),
    [
        # The control's list is a b c d, the treatment's b e a f; a capital is the treatment's.
        ((False, False), "abce", "cTcT"),
        ((True, True), "baec", "TcTc"),
        ((True, False), "bace", "TccT"),
        ((False, True), "abec", "cTTc"),
    ],
)
def test_drafts_of_known_draws(coins, shown, teams):
    found = team_draft("abcd", "beaf", 4, coins)
    assert found == (list(shown), [team == "T" for team in teams])


def test_a_draft_ends_with_the_shorter_list_and_at_k():
    assert team_draft("abc", "ax", 10, [True] * 5) == (["a", "b", "x", "c"], [True, False, True, False])
    assert team_draft("abc", "a", 10, [True] * 5) == (["a", "b"], [True, False])  # it has none left
    assert team_draft("abc", "", 10, [True] * 5) == ([], [])
    assert team_draft("abcd", "efgh", 3, [True] * 2) == (["e", "a", "f"], [True, False, True])


def test_chances_of_a_click():
    # Grades 3, 0, 2 of at most 3: gains 7/7, 0, 3/7; looked at with 1, 1/2, 1/3.
    assert click_chances([3, 0, 2], 3).tolist() == pytest.approx([1, 0.1 / 2, (0.1 + 0.9 * 3 / 7) / 3])
    assert click_chances([3, 0], 3, noise=0).tolist() == [1, 0]


def test_two_ads_are_won_as_often_as_arithmetic_says():
    """One ad a team, k = 2. The relevant one is clicked with 1 or 1/2, the other with 0.1 or 0.05."""
    qrels = {f"q{n}": {"good": 1, "bad": 0} for n in range(50)}
    treatment, control = {q: {"good": 1.0} for q in qrels}, {q: {"bad": 1.0} for q in qrels}
    found = interleave(control, treatment, qrels, k=2, impressions=400, samples=500)
    wins = (0.95 + 0.5 * 0.9) / 2
    losses = (0.0 + 0.5 * 0.1) / 2
    assert found["simulated"] is True and found["impressions"] == 20_000
    assert found["wins"] == pytest.approx(wins, abs=0.015) and found["losses"] == pytest.approx(losses, abs=0.006)
    assert found["wins"] + found["ties"] + found["losses"] == pytest.approx(1)
    preference = found["preference"]
    assert preference["value"] == pytest.approx(found["wins"] + found["ties"] / 2)
    assert preference["ci95"][0] < preference["value"] < preference["ci95"][1]
    again = interleave(control, treatment, qrels, k=2, impressions=400, samples=500)
    assert again == found != interleave(control, treatment, qrels, k=2, impressions=400, samples=500, seed=1)


def test_a_ranking_beside_itself_is_preferred_by_nobody():
    qrels = {f"q{n}": {f"d{i}": i % 3 for i in range(10)} for n in range(40)}
    generator = np.random.default_rng(0)
    run = {query: {d: generator.random() for d in judged} for query, judged in qrels.items()}
    found = interleave(run, run, qrels, samples=500)
    low, high = found["preference"]["ci95"]
    assert low < 0.5 < high and found["preference"]["value"] == pytest.approx(0.5, abs=0.02)


def test_what_cannot_be_interleaved_is_refused():
    with pytest.raises(HlmError, match="impressions: expected 1"):
        interleave({"q": {}}, {"q": {}}, {"q": {"a": 1}}, impressions=0)
    with pytest.raises(HlmError, match="found none of 'q'"):
        interleave({"q": {}}, {}, {"q": {"a": 1}})
