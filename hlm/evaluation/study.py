"""What the variants of a recipe say: compared over queries and seeds, and what follows for a claim.

A figure of a variant is the mean over its seeds and over the queries. Intervals and tests are over queries, each with
its mean over the seeds. How far seeds differ stands beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hlm.artefacts import HlmError
from hlm.evaluation.metrics import Scores, mean, ratio, uplift

CONFIRMED, NOT_CONFIRMED, NOT_TESTABLE = "confirmed", "not confirmed", "not testable at this scale"
LEVEL = 0.05  # of a test, after Holm's correction over what is tested together
SAMPLES = 10_000
METRIC = "ndcg@10"

# Of one system: a mapping of metric -> scores for each seed.
BySeed = Sequence[Mapping[str, Scores]]


def over_seeds(system: BySeed, metric: str) -> Scores:
    """Each query's mean over the seeds."""
    return {query: float(np.mean([one[metric][query] for one in system])) for query in system[0][metric]}


def compare(ours: BySeed, theirs: BySeed, metric: str = METRIC, *, samples: int = SAMPLES) -> dict[str, Any]:
    """What `ours` gains over `theirs`.

    Returns:
        {"metric", "gain": `hlm.evaluation.metrics.uplift`, relative, with its interval over queries, "p": of the paired
        randomisation test (Fisher 1935; Smucker, Allan and Carterette, CIKM 2007), two-sided, "same_sign": whether
        ours has the higher mean, or the lower one, at every pair of a seed of ours and the same of theirs}.

    Raises:
        HlmError: the queries of the two are not the same.
    """
    a, b = over_seeds(ours, metric), over_seeds(theirs, metric)
    gain = uplift(a, b, samples=samples)
    differences = np.array([a[query] - b[query] for query in sorted(a)])
    # A side without seeds of its own is the same at all of them.
    pairs = [(ours[n % len(ours)], theirs[n % len(theirs)]) for n in range(max(len(ours), len(theirs)))]
    signs = {float(np.sign(mean(dict(one[metric])) - mean(dict(other[metric])))) for one, other in pairs}
    p = randomisation_test(differences, samples)
    return {"metric": metric, "gain": gain, "p": p, "same_sign": len(signs) == 1}


def randomisation_test(differences: np.ndarray, samples: int = SAMPLES) -> float:
    """Two-sided p of a mean difference of 0: the share of random signs that give as large a mean, the observed one
    counted, so that p is never 0.

    Args:
        differences: float64 (queries,), paired.
    """
    generator, observed, reached = np.random.default_rng(0), abs(differences.mean()), 1
    block = max(1, 4_000_000 // len(differences))
    for start in range(0, samples, block):
        signs = generator.choice((-1.0, 1.0), size=(min(block, samples - start), len(differences)))
        reached += int((np.abs(signs @ differences) / len(differences) >= observed - 1e-12).sum())
    return reached / (samples + 1)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values (1979), in the order given."""
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, place in enumerate(np.argsort(values, kind="stable")):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = highest
    return adjusted


def describe(system: BySeed, teacher: BySeed, metrics: Sequence[str]) -> dict[str, Any]:
    """{"metrics": metric -> {"mean", "by_seed"}, "recovery": metric -> `hlm.evaluation.metrics.recovery`}; metrics that
    the teacher lacks, such as its overlap with itself, have no recovery."""
    found: dict[str, Any] = {"metrics": {}, "recovery": {}}
    for metric in metrics:
        if metric not in system[0]:
            continue
        by_seed = [mean(dict(one[metric])) for one in system]
        found["metrics"][metric] = {"mean": float(np.mean(by_seed)), "by_seed": by_seed}
        if metric in teacher[0]:
            found["recovery"][metric] = ratio(over_seeds(system, metric), over_seeds(teacher, metric))
    return found


def against(systems: Mapping[str, BySeed], reference: str) -> dict[str, dict[str, Any]]:
    """Every other variant compared with the reference; "p_holm" is over all of these."""
    compared = {name: compare(one, systems[reference]) for name, one in systems.items() if name != reference}
    for one, p in zip(compared.values(), holm([one["p"] for one in compared.values()]), strict=True):
        one["p_holm"] = p
    return compared


def check_claim(claim: Mapping[str, Any], variants: Sequence[str], where: str) -> None:
    """Refuses a claim that says nothing that can be decided.

    Raises:
        HlmError: names the claim.
    """
    forms = ({"text", "better", "than"}, {"text", "variant", "at_least"}, {"text", "not_testable"})
    keys = set(claim)
    if not any(form <= keys <= form | {"metric", "paper", "paper_gain"} for form in forms):
        raise HlmError(
            f"{where}: expected a claim of text with better and than, variant and at_least, or not_testable, beside "
            f"metric, paper and paper_gain, found {', '.join(sorted(keys))}"
        )
    for name in (claim.get(key) for key in ("better", "than", "variant")):
        if name is not None and name not in variants:
            raise HlmError(f"{where}: expected one of {', '.join(variants)}, found '{name}'; name a variant")


def judge(
    claims: Sequence[Mapping[str, Any]], systems: Mapping[str, BySeed], teacher: BySeed, missing: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Each claim with its "verdict" and the figures that it follows from.

    One variant is better than another where its gain is positive, its p after Holm's correction over the claims is
    below `LEVEL`, and it is better at every seed. Where that does not hold and the interval has room for both no gain
    and the paper's, the data cannot tell. A variant keeps a share of the teacher where the interval's lower end does;
    it does not where the upper end is below, and in between the data cannot tell.

    Args:
        missing: variant -> why it was not run.
    """
    found: list[dict[str, Any]] = []
    for claim in claims:
        lacking = [claim[key] for key in ("better", "than", "variant") if claim.get(key) in missing]
        if "not_testable" in claim or lacking:
            why = claim.get("not_testable") or f"{lacking[0]} was not run: {missing[lacking[0]]}"
            found.append({**claim, "verdict": NOT_TESTABLE, "why": why})
        elif "better" in claim:
            metric = claim.get("metric", METRIC)
            found.append({**claim, **compare(systems[claim["better"]], systems[claim["than"]], metric)})
        else:
            metric = claim.get("metric", METRIC)
            kept = ratio(over_seeds(systems[claim["variant"]], metric), over_seeds(teacher, metric))
            found.append({**claim, "metric": metric, "kept": kept, "verdict": _keeps(kept, claim["at_least"])})
    tested = [one for one in found if "p" in one]
    for one, p in zip(tested, holm([one["p"] for one in tested]), strict=True):
        one["p_holm"] = p
        one["verdict"] = _is_better(one)
    return found


def _keeps(kept: Mapping[str, Any], at_least: float) -> str:
    if kept["ci95"] is None:
        return NOT_TESTABLE
    low, high = kept["ci95"]
    return CONFIRMED if low >= at_least else NOT_CONFIRMED if high < at_least else NOT_TESTABLE


def _is_better(one: Mapping[str, Any]) -> str:
    value, interval = one["gain"]["value"], one["gain"]["ci95"]
    if value is None or interval is None:
        return NOT_TESTABLE
    if value > 0 and one["p_holm"] < LEVEL and one["same_sign"]:
        return CONFIRMED
    wanted = one.get("paper_gain")
    unsure = wanted is not None and interval[0] <= 0 and interval[1] >= wanted
    return NOT_TESTABLE if unsure else NOT_CONFIRMED
