"""Tables of a report as rows of text, header first: what retrievers add to an ensemble, what least scores keep."""

from __future__ import annotations

from hlm.report_types import FusionReport, Recovery, Thresholds


def describe(name: str, fusion: FusionReport, k: int) -> str:
    """One sentence: what is fused, and how."""
    if fusion["weights"] is None:
        return f"{name}: {' + '.join(fusion['systems'])}, fused by reciprocal ranks"
    parts = [f"{weight:g} {system}" for system, weight in zip(fusion["systems"], fusion["weights"], strict=True)]
    text = f"{name}: {' + '.join(parts)}, scores normalised by {fusion['normalisation']}"
    if fusion["chosen_ndcg"] is None:
        return f"{text}, weights given"
    return f"{text}, weights chosen on {fusion['weights_from']} (nDCG@{k} {fusion['chosen_ndcg']:.4f} there)"


def contribution_rows(fusion: FusionReport, k: int) -> list[list[str]]:
    """What each member adds to its ensemble."""
    header = ["retriever", f"nDCG@{k} without it", "uplift by it [95%]", f"relevant@{k} only it found [95%]"]
    rows = [[*header, "preferred with it, simulated clicks [95%]"]]
    for name, member in fusion["members"].items():
        found = member["only_found"]
        rows.append(
            [
                name,
                f"{member['without'][f'ndcg@{k}']:.4f}",
                percent(member["uplift"][f"ndcg@{k}"], signed=True),
                f"{percent(found['share'])}, {found['only']} of {found['found']}",
                percent(member["interleaving"]["preference"]),
            ]
        )
    return rows


def threshold_rows(thresholds: Thresholds) -> list[list[str]]:
    """What each system's least score keeps on the reported split."""
    rows = [["system", "least score", "precision [95%]", "queries with an ad", "relevant ads kept", "ads a query"]]
    for name, found in thresholds["systems"].items():
        if found["threshold"] is None:
            rows.append([name, "-", found["reason"], "-", "-", "-"])
            continue
        here = found["reported"]
        kept = "-" if here["kept"] is None else f"{here['kept']:.1%}"
        shown = [percent(here["precision"]), f"{here['coverage']:.1%}", kept, f"{here['shown_per_query']:.2f}"]
        rows.append([name, f"{found['threshold']:.4f}", *shown])
    return rows


def percent(found: Recovery, *, signed: bool = False) -> str:
    """A ratio and its interval in percent; "-" where it is undefined."""
    if found["value"] is None:
        return "-"
    sign = "+" if signed else ""
    interval = f"[{', '.join(f'{100 * bound:{sign}.1f}' for bound in found['ci95'])}]" if found["ci95"] else "[-]"
    return f"{100 * found['value']:{sign}.1f}% {interval}"
