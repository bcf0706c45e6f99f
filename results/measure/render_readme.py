"""Writes the tables of README.md (between its markers) and of results/README.md from results/*.json.

    python results/measure/render_readme.py runs/quickstart runs/latency/alternatives

Folders given are kept first: report.json and timings.json of runs/<name> become results/<name>.json, latency.json
becomes results/latency-<name>.json, compare.json results/compare.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hlm.artefacts import write_json
from hlm.benchmark import report as latency_report
from hlm.evaluation.report import undefined
from hlm.report_files import checked_report, read_latency
from hlm.report_types import LatencyReport, Recovery, Report

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
RECOVERED = ("precision@10", "ndcg@10", "condensed_ndcg@10")
TITLES = {
    "quickstart": "Sample catalogue",
    "electronics": "Electronics, judged by people",
    "esci_mini": "Shopping queries, judged by people",
}
METRICS = ["ndcg@10", "condensed_ndcg@10", "judged@10", "precision@10", "recall@100", "mrr@10", "overlap@10"]
# What decides, for the README; results/README.md has all of it.
SHORT = {
    "quickstart": ["ndcg@10", "recall@100", "overlap@10"],
    "electronics": ["ndcg@10", "condensed_ndcg@10", "judged@10"],
    "esci_mini": ["ndcg@10", "precision@10", "overlap@10"],
}
SHORT_LATENCY = ["system", "backend", "p50 ms", "p99 ms", "queries/s", "peak MiB"]
# results/latency-<name>.json -> what it is
LATENCY = {
    "quickstart": "The quickstart's student online, beside its teacher",
    "alternatives": "The same student under everything that would serve it",
    "cascade": "Every student of the quickstart's cascade",
    "true-shapes": "The published shapes with random weights",
    "true-shapes-bf16": "The published shapes with random weights in bf16",
}


def table(report: Report, columns: list[str]) -> str:
    """One report as Markdown: a row a system, with these columns where it has them."""
    columns = [name for name in columns if any(name in row for row in report["systems"].values())]
    rows = []
    for name, row in report["systems"].items():
        cells = [f"{row[column]:.3f}" if row.get(column) is not None else "-" for column in columns]
        size = "-"
        if row.get("params_total"):
            size = f"{row['params_total'] / 1e6:.1f}M ({row['params_non_embedding'] / 1e6:.1f}M)"
        kept = report["recovery_by_system"].get(name, {}).get("ndcg@10")
        rows.append([name, *cells, percent(kept) if kept else "-", size])
    return markdown(["system", *columns, "recovery of ndcg@10", "parameters (without embeddings)"], rows)


def summary(report: Report) -> str:
    """Recovery and overlap of the refined student."""
    found = [f"{metric} {percent(report['recovery'][metric])}" for metric in RECOVERED if metric in report["recovery"]]
    lines = ["Recovery of the student: " + ", ".join(found) + "."] if found else []
    lines += [f"{line}." for line in undefined(report)]
    if (overlap := report["systems"].get("student", {}).get("overlap@10")) is not None:
        lines.append(f"Of the student's ten best ads, {overlap:.1%} are among the teacher's ten.")
    return "\n\n".join(lines)


def ensembles(report: Report) -> str:
    """What each retriever adds to each ensemble."""
    metric = f"ndcg@{report['k']}"
    rows = []
    for name, fusion in report.get("fusions", {}).items():
        weights = fusion["weights"] or [None] * len(fusion["systems"])
        for member, weight in zip(fusion["systems"], weights, strict=True):
            adds = fusion["members"][member]
            clicked = adds["interleaving"]["preference"]["value"]
            rows.append(
                [
                    name,
                    member,
                    "by ranks" if weight is None else f"{weight:.1f}",
                    f"{adds['without'][metric]:.3f}",
                    f"{report['systems'][name][metric]:.3f}",
                    percent(adds["uplift"][metric]),
                    percent(adds["only_found"]["share"]),
                    "-" if clicked is None else f"{clicked:.1%}",
                ]
            )
    if not rows:
        return ""
    columns = [
        "ensemble",
        "retriever",
        "weight",
        f"{metric} without it",
        "with it",
        "uplift",
        "relevant ads only it found",
    ]
    about = "Weights are chosen on dev. Clicks are simulated from the judgements: nobody clicked."
    return markdown([*columns, "preferred by simulated clicks"], rows) + f"\n\n{about}"


def percent(recovery: Recovery) -> str:
    if recovery["value"] is None:
        return "-"
    interval = f"{recovery['ci95'][0]:.1%} to {recovery['ci95'][1]:.1%}" if recovery["ci95"] else "no interval"
    return f"{recovery['value']:.1%} ({interval})"


def block() -> str:
    parts = []
    for name, title in TITLES.items():
        path = ROOT / "results" / f"{name}.json"
        if path.is_file():
            results = json.loads(path.read_text())
            report = checked_report(results["report"], path)
            parts += [f"### {title}", table(report, SHORT[name]), timing(results)]
        path = ROOT / "results" / f"latency-{name}.json"
        if path.is_file():
            parts.append(latency_table(read_latency(path), SHORT_LATENCY))
    return "\n\n".join(filter(None, parts)) or "Not measured yet."


def details() -> str:
    """results/README.md: every measurement with its notes and the command that takes it."""
    about = "Rendered by `measure/render_readme.py` from the JSON beside it; machine, versions and load are in that."
    parts = ["# Measured", about]
    for name, title in TITLES.items():
        if (found := read(name)) is not None:
            report = checked_report(found["report"], ROOT / "results" / f"{name}.json")
            parts += [f"## {title}", command(report), table(report, METRICS), summary(report), ensembles(report)]
            parts += [timing(found)]
    for name, title in LATENCY.items():
        path = ROOT / "results" / f"latency-{name}.json"
        if path.is_file():
            latency = read_latency(path)
            notes = [f"- {note}" for note in latency_report.notes(latency)]
            parts += [f"## {title}", command(latency), latency_table(latency), "\n".join(notes)]
    for name, title, rows in (
        ("compare", "Training and embedding beside the sentence-transformers scripts they replace", compared),
        ("memory", "Memory of alignment as the query log grows", remembered),
        ("prepare", "Raw logs with every kind of dirt through hlm prepare", prepared),
        ("index-70k", "From text to ads: 70,000 ads on one thread", searched),
        ("install", "What an install takes, and how fast it starts", light),
        ("gpu", "The published shapes on one GPU", on_gpu),
        ("reliability", "Two writers on one output, and kills at random moments", reliable),
        ("demo", "The demo as a visitor meets it", visited),
        ("hub-lfs", "Publishing and pulling with a fault at every request, over LFS", published),
        ("hub-xet", "Publishing and pulling with a fault at every request, over Xet", published),
    ):
        if (found := read(name)) is not None:
            parts += [f"## {title}", command(found), rows(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def read(name: str) -> dict[str, Any] | None:
    path = ROOT / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def command(found: Mapping[str, Any]) -> str:
    """The command that takes the measurement again: the script is named where it lies now, whatever the JSON says."""
    line = found.get("command") or found.get("environment", {}).get("command")
    if not line:
        return ""
    script, _, arguments = line.partition(" ")
    here = Path("results/measure") / Path(script).name
    return f"`python {here if (ROOT / here).is_file() else script} {arguments}`"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    ruler = "|---|" + "---:|" * (len(header) - 1)
    return "\n".join(["| " + " | ".join(header) + " |", ruler, *("| " + " | ".join(row) + " |" for row in rows)])


def compared(found: dict[str, Any]) -> str:
    rows, where = [], []
    for name, one in found["comparisons"].items():
        low, high = one["ratio_range"]
        speeds = [f"{one[side]['rows_per_s']:,.0f}" for side in ("ours", "theirs")]
        rows.append([name, *speeds, f"{one['ratio']:.2f}x", f"{low:.2f} to {high:.2f}"])
        for side in ("ours", "theirs") if "parts_ms" in one["ours"] else ():
            parts = ", ".join(f"{part} {ms:.0f}" for part, ms in one[side]["parts_ms"].items())
            where.append(f"- {name}, {side}: {parts}")
    memory = found["memory_a_row"]
    text = markdown(["comparison", "ours rows/s", "theirs rows/s", "ratio, median", "of repeats"], rows)
    text += f"\n\nAnonymous memory a row of alignment: {memory['ours']:,.0f} B here, {memory['theirs']:,.0f} B there. "
    return text + "Where a step's milliseconds go:\n\n" + "\n".join(where)


def remembered(found: dict[str, Any]) -> str:
    columns = ("rows", "disk_mib", "anonymous_peak_mib", "file_backed_peak_mib", "seconds")
    rows = [
        [
            *(f"{run[name]:,.0f}" for name in columns),
            f"{run['limit_mib']:,} MiB, {'kept' if run['passed'] else 'broken'}",
        ]
        for run in found["runs"]
    ]
    header = [
        "queries",
        "on disk MiB",
        "anonymous peak MiB",
        "file-backed peak MiB",
        "seconds",
        found["runs"][0]["limit"],
    ]
    return markdown(header, rows) + f"\n\nA query more costs {found['bytes_a_row']:.0f} B of anonymous memory."


def prepared(found: dict[str, Any]) -> str:
    """Time and memory of each log; what of the planted got through, and what was lost for nothing."""
    sizes = ("log_mib", "seconds", "peak_mib")
    rows = [[f"{run['lines']:,}", run["kind"], *(f"{run[name]:,.0f}" for name in sizes)] for run in found["runs"]]
    through, of = (sum(run[name] for run in found["runs"]) for name in ("planted_found", "planted"))
    lost = found["product_numbers"]
    return (
        markdown(["lines", "log", "on disk MiB", "seconds", "peak MiB"], rows)
        + f"\n\nOf the e-mail addresses and numbers that were planted, {through} of {of:,} got through. "
        f"Of {lost['of']:,} sizes, prices, models and numbers of the catalogue {lost['lost']:,} were taken for these."
    )


def searched(found: dict[str, Any]) -> str:
    """From text to ads by each side; filters, ours and FAISS's own; memory of an opened index."""
    sides, rows = found["text_to_ads"], []
    crowded = {name for name, one in sides.items() if one["latency_ms"]["over"] == "all"}
    for name, one in sides.items():
        times = [("-" if {name, of} & crowded else f"{by:.1f}x") for of, by in one["times_faster_than"].items()]
        rows.append([name, f"{one['recall']:.4f}", f"{one['p50_ms']:.2f}{'!' if name in crowded else ''}", *times])
    beside = [f"faster than {name}" for name in next(iter(sides.values()))["times_faster_than"]]
    about = found["queries_are"]
    chosen = ", ".join(f"{name} is {one['factory']}" for name, one in found["chosen"].items())
    text = markdown(["side", f"recall of the {found['settings']['k']} nearest", "p50 ms", *beside], rows)
    text += (
        f"\n\nA query's nearest ad has a cosine of {about['query_to_nearest_ad']:.2f}, an ad's nearest other one "
        f"{about['ad_to_nearest_other_ad']:.2f}. {chosen}."
    )
    if crowded:
        text += (
            " Times marked ! were taken while others took the CPUs, and have no ratios: long calls lose more to others "
            "than short ones. Recall and bytes do not depend on it."
        )
    rows = [
        [name, *(f"{one[side][what]:.3f}" for side in ("ours", "faiss") for what in ("recall", "short_lists"))]
        for name, one in found["filters"].items()
    ]
    header = ["filter, index", "recall", "short lists", "FAISS's own recall", "FAISS's own short lists"]
    memory = [
        [name, f"{one['mapped_bytes_a_vector']:,.0f}", f"{one['read_bytes_a_vector']:,.0f}"]
        for name, one in found["memory"].items()
    ]
    own = markdown(["anonymous bytes a vector", "as HLM opens it", "as FAISS reads it"], memory)
    return f"{text}\n\n{markdown(header, rows)}\n\n{own}"


def light(found: dict[str, Any]) -> str:
    rows = []
    for name, one in found["environments"].items():
        largest = sorted(one["packages"].items(), key=lambda item: -item[1])[:3]
        beside = ", ".join(f"{package} {size / 2**20:.0f}" for package, size in largest)
        rows.append([f"pip install {name}", f"{one['mib']:.0f}", f"{len(one['packages'])}", beside])
    sizes = markdown(["command", "MiB", "packages", "the largest, MiB"], rows)
    rows = [
        [name, f"{one['wall_s']:.2f}", f"{one['cpu_s']:.2f}", "-" if one["others"] is None else f"{one['others']:.0%}"]
        for name, one in found["commands"].items()
    ]
    header = ["from cold, median", "s", "CPU s", "of the CPUs used by others"]
    return f"{sizes}\n\n{markdown(header, rows)}"


def on_gpu(found: dict[str, Any]) -> str:
    """Stages of recipes/gpu_check.py: what each found, and of a failed one why."""
    rows = []
    for name, stage in found["stages"].items():
        measured = stage.get("measured", {})
        names = ("p50_ms", "p99_ms", "tokenise_p50_ms", "best_queries_per_s", "step_seconds", "rows_per_s", "agrees")
        shown = [f"{figure} {measured[figure]:.3g}" for figure in names if figure in measured]
        shown += [measured["pytest"]] if "pytest" in measured else []
        predicted = stage.get("predicted", {}).get("H200", {})
        ahead = [f"{figure} {value:.3g}" for figure, value in predicted.items()]
        rows.append([name, stage["status"], ", ".join(shown) or "-", ", ".join(ahead) or "-"])
    text = markdown(["stage", "status", "measured", "predicted for an H200"], rows)
    if "note" in found:
        text += f"\n\n{found['note']}"
    if trial := found.get("trial"):
        ours, theirs = trial["190M"], trial["8B"]
        ratio = theirs["p50_ms"] / ours["p50_ms"]
        beside = theirs["sentence_transformers_p50_ms"] / ours["p50_ms"]
        best = max(ours["queries_per_s"].values()), max(theirs["queries_per_s"].values())
        text += (
            f"\n\n{trial['note']} The 190M student took {ours['p50_ms']:.2f} ms, tokenisation included. "
            f"The 8B teacher took {theirs['p50_ms']:.2f} ms as HLM serves it ({ratio:.0f}x), and "
            f"{theirs['sentence_transformers_p50_ms']:.1f} ms under sentence-transformers ({beside:.0f}x). "
            f"They encoded {best[0]:,} and {best[1]:,} queries a second ({best[0] / best[1]:.0f}x)."
        )
    return text


def reliable(found: dict[str, Any]) -> str:
    counts = ["rounds", "written_in_turn", "told", "mixed", "unloadable", "other"]
    header = ["two writers of", "rounds", "one after the other", "one told", "mixed", "do not load", "other errors"]
    races = [[kind, *(f"{row[name]:,}" for name in counts)] for kind, row in found["writers"].items()]
    counts = ["kills", "ended_before", "other_bits", "failed", "leftovers"]
    steps = [[step, *(f"{row[name]:,}" for name in counts)] for step, row in found["kills"].items()]
    header_of_kills = ["step", "kills", "had ended", "rerun ends in other bits", "rerun fails", "leaves something"]
    return f"{markdown(header, races)}\n\n{markdown(header_of_kills, steps)}"


def visited(found: dict[str, Any]) -> str:
    starts = found["starts"]
    rows = [
        [what.replace("_s", "").replace("_", " ") + ", s", ", ".join(f"{start[what]:.1f}" for start in starts)]
        for what in starts[0]
    ]
    for what, times in (("a search in the browser, ms", found["search_in_browser_ms"]), ("", found["clients"])):
        what = what or f"a search of {times['clients']} clients at once, ms ({times['errors']} errors)"
        rows.append([what, f"p50 {times['p50']:.0f}, p95 {times['p95']:.0f}, p99 {times['p99']:.0f}"])
    return markdown(["what", "measured"], rows)


def timing(results: dict[str, Any]) -> str:
    if not results.get("timings", {}).get("in_one_run"):
        return ""  # steps were run again since: their times do not add up to a run
    times, environment = results["timings"], results["report"]["environment"]
    return (
        f"All steps took {times['total_seconds'] / 60:.1f} minutes on {times['cores']} cores of "
        f"{environment['cpu']} and {times['peak_memory_gib']:.1f} GiB at the most."
    )


def latency_table(latency: LatencyReport, columns: list[str] | None = None) -> str:
    """latency.json as Markdown: the rows that recipes/benchmark.py prints; or these columns of them, and of what is
    below only what they need."""
    header, *rows = latency_report.rows(latency)
    places = [header.index(name) for name in columns or header]
    header, *rows = [[row[place] for place in places] for row in (header, *rows)]
    text = markdown(header, rows).replace("|---|---:|", "|---|---|", 1)
    environment = latency["environment"]
    ratios = "" if columns else f", ratios to {latency['reference']}"
    where = (
        f"Tokenisation included{ratios}, over {latency['queries']} queries in one run on {environment['cores']} cores "
        f"of {environment['cpu']}."
    )
    known = [f"{line}." for line in latency_report.known_before(latency) if not columns or "tokenised" in line]
    return "\n".join([text, "", " ".join([where, *known])])


def published(found: dict[str, Any]) -> str:
    header = [
        "upload mode, scenario",
        "requests",
        "faults tried",
        "client completed",
        "clear error",
        "other error",
        "half-published or wrong content",
        "reruns completed",
    ]
    rows, modes = [], found["settings"]["modes"]
    for mode in modes:
        for scenario in found["settings"]["scenarios"]:
            one = found[mode][scenario]
            total = {}
            for count in one["faults"].values():
                total = {name: total.get(name, 0) + value for name, value in count.items()}
            half = total.get("half_published", 0) + total.get("wrong_content", 0)
            names = ("tried", "completed", "clear_error", "other_error")
            cells = [one["requests"], *(total[name] for name in names), half, total["reruns_completed"]]
            rows.append([f"{mode}, {scenario}", *(f"{cell:,}" for cell in cells)])
    largest = max(
        value for mode in modes for value in found[mode].get("round_trip", {}).get("max_difference", {"": 0.0}).values()
    )
    limits = "\n".join(f"- {line}" for line in found["not_proven"])
    text = (
        f"Kinds of fault: {', '.join(found['settings']['faults'])}. Vectors pulled after a round trip of the release "
    )
    text += f"differ from those published by {largest} at most.\n\nWhat this does not prove:\n\n{limits}"
    return f"{markdown(header, rows)}\n\n{text}"


def rendered(readme: str) -> str:
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{block()}\n{END}{rest.split(END)[1]}"


def keep(run: Path) -> None:
    """results/<name>.json of a run: its report, and the times of its steps where they were taken."""
    name = run.name.replace("_", "-")
    for source, target in (("latency", f"latency-{name}"), ("compare", "compare")):
        if (run / f"{source}.json").is_file():
            write_json(ROOT / "results" / f"{target}.json", json.loads((run / f"{source}.json").read_text()))
    if name in LATENCY and name not in TITLES:
        return
    if run.name not in TITLES:
        sys.exit(f"error: expected a run named {' or '.join(TITLES)}, found {run.name!r}; name it in TITLES")
    if not (run / "report.json").is_file():
        sys.exit(f"error: expected {run}/report.json, found none; run recipes/quickstart.py first")
    files = {"report": run / "report.json", "timings": run / "timings.json"}
    results = {what: json.loads(path.read_text()) for what, path in files.items() if path.is_file()}
    write_json(ROOT / "results" / f"{run.name}.json", results)


if __name__ == "__main__":
    for given in sys.argv[1:]:
        keep(Path(given))
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text()))
    (ROOT / "results/README.md").write_text(details())
