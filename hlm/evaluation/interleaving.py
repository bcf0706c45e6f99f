"""Team-draft interleaving with simulated clicks: which of two rankings would be clicked more, said from judgements.

Nobody clicked: a click model turns grades into clicks. It says what position-biased users who agree with the judges
would prefer, and cannot replace an online test.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hlm.artefacts import HlmError
from hlm.evaluation.metrics import Qrels, Run, mean, ranking, ratio
from hlm.report_types import Interleaving

NOISE = 0.1  # chance that an irrelevant ad is clicked once it is looked at (Ai et al., SIGIR 2018)


def team_draft(
    control: Sequence[str], treatment: Sequence[str], k: int, coins: Sequence[bool]
) -> tuple[list[str], list[bool]]:
    """Team-draft interleaving (Radlinski, Kurup and Joachims, CIKM 2008).

    In each round both teams take their best document that is not taken yet. The draft ends after `k` documents, or
    where the team whose turn it is has none left.

    Args:
        control, treatment: document ids, best first.
        coins: one for each round, at least (k + 1) // 2: whether the treatment takes first.

    Returns:
        (document ids in the order they are shown, whether each is the treatment's)
    """
    shown: list[str] = []
    of_treatment: list[bool] = []
    while len(shown) < k:
        first = bool(coins[len(shown) // 2])
        turn = first if len(shown) % 2 == 0 else not first
        best = next((document for document in (treatment if turn else control) if document not in shown), None)
        if best is None:
            break
        shown.append(best)
        of_treatment.append(turn)
    return shown, of_treatment


def click_chances(grades: Sequence[int], best: int, *, noise: float = NOISE) -> np.ndarray:
    """Chances of a click at each rank by a position-based model.

    An ad at rank r is looked at with a chance of 1 / r (Joachims, Swaminathan and Schnabel, WSDM 2017), and then
    clicked with a chance of noise + (1 - noise) (2^grade - 1) / (2^best - 1) (Chapelle et al., CIKM 2009).

    Args:
        grades: of the ads as they are shown; 0 where one is not judged.
        best: the highest grade there is, 1 or more.

    Returns:
        float64 (ads,)
    """
    gains = (2.0 ** np.maximum(grades, 0) - 1) / (2.0**best - 1)
    return (noise + (1 - noise) * gains) / np.arange(1, len(gains) + 1)


def interleave(
    control: Run,
    treatment: Run,
    qrels: Qrels,
    *,
    k: int = 10,
    impressions: int = 100,
    samples: int = 10_000,
    seed: int = 0,
) -> Interleaving:
    """Shows every query's interleaved ads `impressions` times to simulated users, and counts whose ads they click more.

    Args:
        control, treatment: runs over the queries of `qrels` or more.
        impressions: simulated for each query, 1 or more.
        samples: of the bootstrap over queries, for the interval of the preference.
        seed: of drafts, clicks and bootstrap.

    Returns:
        Shares of the impressions: the treatment "wins" with more clicks, "loses" with fewer, "ties" with as many.
        "preference" is wins + ties / 2, so 0.5 where nothing tells the two apart (Chapelle et al., TOIS 2012).

    Raises:
        HlmError: no impressions, or a query that a run lacks.
    """
    if impressions < 1:
        raise HlmError(f"impressions: expected 1 or more, found {impressions}")
    if missing := sorted(qrels.keys() - (control.keys() & treatment.keys())):
        raise HlmError(f"interleaving: expected both runs to hold the judged queries, found none of '{missing[0]}'")
    best = max(1, *(grade for judged in qrels.values() for grade in judged.values()))
    generator = np.random.default_rng(seed)
    shares = {}
    for query in sorted(qrels):
        lists = ranking(control[query], k), ranking(treatment[query], k)
        differences = _click_differences(*lists, qrels[query], best, k, impressions, generator)
        shares[query] = [float(np.mean(outcome)) for outcome in (differences > 0, differences == 0, differences < 0)]
    wins, ties, losses = (mean({query: found[place] for query, found in shares.items()}) for place in range(3))
    preferred = {query: found[0] + found[1] / 2 for query, found in shares.items()}
    return {
        "simulated": True,
        "impressions": impressions * len(qrels),
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "preference": ratio(preferred, dict.fromkeys(preferred, 1.0), samples=samples, seed=seed),
    }


def _click_differences(
    control: list[str],
    treatment: list[str],
    grades: dict[str, int],
    best: int,
    k: int,
    impressions: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Clicks on the treatment's ads minus those on the control's, int64 (impressions,)."""
    rounds = (k + 1) // 2
    draws = generator.integers(0, 2, size=(impressions, rounds)).astype(bool)
    # Of few rounds there are few drafts, which many impressions share.
    coins, of_draw = np.unique(draws, axis=0, return_inverse=True)
    chance = generator.random((impressions, k))
    differences = np.zeros(impressions, np.int64)
    for number, draft in enumerate(coins):
        shown, teams = team_draft(control, treatment, k, draft)
        rows = np.flatnonzero(of_draw.reshape(-1) == number)
        chances = click_chances([grades.get(document, 0) for document in shown], best)
        clicks = chance[rows, : len(shown)] < chances
        differences[rows] = clicks @ np.where(teams, 1, -1).astype(np.int64)
    return differences
