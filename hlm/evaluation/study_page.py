"""The study as a page: README.md and plots of results/study, rendered from the JSON that recipes/study.py writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hlm.artefacts import atomic_file
from hlm.evaluation.study import CONFIRMED, METRIC, NOT_CONFIRMED, NOT_TESTABLE
from hlm.recipe_files import STUDY, recipes

ABOUT = """# The study

The claims of the paper (HARNESS-LM, arXiv 2605.23572), and choices that it leaves open, tested on small data. Rendered
by `recipes/study.py` from the JSON beside it, which has the commands, versions and dates.

A gain is relative, in nDCG@10, with a paired-bootstrap 95% interval over queries, each query averaged over the seeds.
p is that of the paired randomisation test, after Holm's correction. A claim that one variant beats another is confirmed
where the gain is positive, p is below 0.05, and every seed agrees. A claim that a variant keeps a share of the teacher
is confirmed where the whole interval of the recovery lies above it. "Not testable at this scale" means that the data
cannot tell: the interval has room for no gain as well as for the paper's, or what the claim needs is not here. The
paper's figures are precision@100 of models of billions of parameters: signs can be compared with them, sizes hardly.

Every variant of a set shares data, teacher and ad vectors, unless it says otherwise. Seeds are those of the students'
training; the teacher is one. Checkpoints, and alternatives where a variant has several, were chosen on dev. Test was
searched once for each variant; `test_read` in the JSON says when. Where there is one seed, no seed could disagree.
"""
FULL, QUICK = "Answered in full", "Run by --quick alone"
QUICK_ABOUT = (
    "These ran with little data, a teacher trained for seconds and one seed. They show that the study runs. "
    "**They answer nothing**; run them without `--quick` for that."
)


def write_page(results: Path) -> None:
    """Writes README.md from the JSON in `results` and in its folder `quick`, which counts where there is no other."""
    full = _read(results)
    quick = {name: one for name, one in _read(results / "quick").items() if name not in full}
    parts = [ABOUT, _scope(full, quick)]
    if full:
        parts += [f"## {FULL}", _verdicts(full), *_questions(full, "", "###")]
    if quick:
        parts += [f"## {QUICK}", QUICK_ABOUT, *_questions(quick, "quick/", "###")]
    with atomic_file(results / "README.md") as aside:
        aside.write_text("\n\n".join(part.strip() for part in parts if part) + "\n", encoding="utf-8")


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def _scope(full: dict[str, Any], quick: dict[str, Any]) -> str:
    """What was run, on what, with how many seeds: nobody should take one for another."""
    rows = []
    for questions, how in ((full, "full"), (quick, "**quick**")):
        for name, question in questions.items():
            for set_name, found in question["sets"].items():
                seeds = ", ".join(map(str, found["seeds"]))
                ran = f"{len(found['variants'])} of {len(found['variants']) + len(found['missing'])}"
                one = ", one seed" if how == "full" and len(found["seeds"]) == 1 else ""
                rows.append([name, set_name, how + one, seeds, str(found["queries"]), ran])
    table = _table(["question", "set", "run", "seeds", "test queries", "variants"], rows)
    shipped = {path.stem for path in (recipes() / "configs" / STUDY).glob("*.yaml")}
    left = ", ".join(sorted(shipped - {*full, *quick}))
    return f"## What was run\n\n{table}" + (f"\n\nNot run yet: {left}." if left else "")


def _verdicts(questions: dict[str, Any]) -> str:
    """Every claim with its verdict, of all questions."""
    rows, counts = [], {CONFIRMED: 0, NOT_CONFIRMED: 0, NOT_TESTABLE: 0}
    for name, question in questions.items():
        for set_name, found in question["sets"].items():
            for claim in found["claims"]:
                counts[claim["verdict"]] += 1
                by = how_much(claim)
                rows.append([claim["text"], claim.get("paper", "-"), name, set_name, f"**{claim['verdict']}**", by])
    if not rows:
        return ""
    total = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    header = ["claim", "paper", "question", "set", "verdict", "by how much"]
    return f"{total}.\n\n" + _table(header, rows)


def how_much(claim: dict[str, Any]) -> str:
    """The figures behind a verdict."""
    if "why" in claim:
        return str(claim["why"])
    if "kept" in claim:
        return f"keeps {_percent(claim['kept'])} of {claim['metric']}, against {claim['at_least']:.0%}"
    text = f"{_percent(claim['gain'], signed=True)} {claim['metric']}, p {_p(claim['p_holm'])}"
    if claim["verdict"] == CONFIRMED:
        return text
    value = claim["gain"]["value"]
    if value is not None and value < 0 and claim["p_holm"] < 0.05 and claim["same_sign"]:
        return f"{text}: the opposite holds"
    return text + ("" if claim["same_sign"] else "; seeds disagree")


def _questions(questions: dict[str, Any], folder: str, level: str) -> Iterator[str]:
    for name, question in questions.items():
        yield f"{level} {question['question']}"
        if question.get("about"):
            yield question["about"]
        for set_name, found in question["sets"].items():
            teacher = found["teacher"].get(METRIC, {}).get("mean")
            where = f"On {set_name}, {found['queries']} test queries, {len(found['seeds'])} seed"
            where += "s" if len(found["seeds"]) != 1 else ""
            yield where + (f"; the teacher's {METRIC} is {teacher:.3f}." if teacher is not None else ".")
            if found["variants"]:
                yield _variants(question["reference"], found)
            for variant, why in found["missing"].items():
                yield f"{variant} was not run: {why}"
        yield f"![{question['question']}]({folder}{name}.png)"


def _variants(reference: str, found: dict[str, Any]) -> str:
    header = ["variant", METRIC, "seeds", "recovery of ndcg@10", "of precision@10", "overlap@10", "body"]
    rows = []
    for name, one in found["variants"].items():
        metric, compared = one["metrics"][METRIC], one.get("against_reference")
        low, high = min(metric["by_seed"]), max(metric["by_seed"])
        overlap = one["metrics"].get("overlap@10")
        gain = "reference"
        if compared:
            gain = f"{_percent(compared['gain'], signed=True)}, p {_p(compared['p_holm'])}"
        rows.append(
            [
                name,
                f"{metric['mean']:.3f}",
                f"{low:.3f} to {high:.3f}" if len(metric["by_seed"]) > 1 else "-",
                _percent(one["recovery"][METRIC]),
                _percent(one["recovery"]["precision@10"]),
                f"{overlap['mean']:.2f}" if overlap else "-",
                f"{one['params_non_embedding'] / 1e6:.2f}M",
                gain,
            ]
        )
    return _table([*header, f"gain over {reference}"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    ruler = "|---|" + "---:|" * (len(header) - 1)
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(["| " + " | ".join(header) + " |", ruler, *("| " + " | ".join(row) + " |" for row in lines)])


def _percent(found: dict[str, Any], *, signed: bool = False) -> str:
    if found["value"] is None:
        return "-"
    sign = "+" if signed else ""
    interval = found["ci95"]
    bounds = f" [{100 * interval[0]:{sign}.1f}, {100 * interval[1]:{sign}.1f}]" if interval else ""
    return f"{100 * found['value']:{sign}.1f}%{bounds}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def draw(question: dict[str, Any], path: Path) -> None:
    """Each variant's recovery of nDCG@10 with its interval, a panel for each set; dots are seeds."""
    sets = {name: one for name, one in question["sets"].items() if one["variants"]}
    if not sets:
        return
    most = max(len(one["variants"]) for one in sets.values())
    figure = Figure(figsize=(5.2 * len(sets) + 1.2, 1.1 + 0.36 * most), layout="constrained")
    for axis, (set_name, found) in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets.items(), strict=True):
        teacher = found["teacher"][METRIC]["mean"]
        for place, one in enumerate(found["variants"].values()):
            kept = one["recovery"][METRIC]
            if kept["value"] is None:
                continue
            low, high = kept["ci95"] or (kept["value"], kept["value"])
            axis.plot([100 * low, 100 * high], [place, place], color="#1b6ca8", linewidth=2)
            axis.plot(100 * kept["value"], place, "o", color="#1b6ca8")
            seeds = [100 * value / teacher for value in one["metrics"][METRIC]["by_seed"]] if teacher else []
            axis.plot(seeds, [place] * len(seeds), "|", color="#d98324", markersize=9)
        axis.axvline(100, color="#d98324", linewidth=1, linestyle="--")
        axis.set_yticks(range(len(found["variants"])), list(found["variants"]))
        axis.invert_yaxis()
        axis.set_xlabel(f"{METRIC}, % of the teacher's; 95% interval, seeds")
        quick = ", QUICK" if question["quick"] else ""
        axis.set_title(f"{set_name}, {found['queries']} queries{quick}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    with atomic_file(path) as aside:
        figure.savefig(aside, dpi=110, format="png")
