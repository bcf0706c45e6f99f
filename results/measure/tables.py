"""Tables in Markdown of what single scripts measured: a function for each of results/*.json that is no report."""

from __future__ import annotations

from itertools import accumulate
from typing import Any


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
    notes = "".join(f" {run['lines']:,} lines: {run['note']}." for run in found["runs"] if run.get("note"))
    return (
        markdown(["lines", "log", "on disk MiB", "seconds", "peak MiB"], rows)
        + f"\n\nOf the e-mail addresses and numbers that were planted, {through} of {of:,} got through. "
        f"Of {lost['of']:,} sizes, prices, models and numbers of the catalogue {lost['lost']:,} were taken for "
        f"these.{notes}"
    )


def text_to_ads(found: dict[str, Any]) -> str:
    """From text to ads by each side: recall, milliseconds, and how many times faster than what others' pages show."""
    sides, rows = found["text_to_ads"], []
    crowded = {name for name, one in sides.items() if one["latency_ms"]["over"] == "all"}
    for name, one in sides.items():
        ratios = {of: f"{by:.1f}x" if by >= 1 else f"{by:.2f}x" for of, by in one["times_faster_than"].items()}
        times = ["-" if {name, of} & crowded else by for of, by in ratios.items()]
        rows.append(
            [
                name.replace("hlm + hlm_", "hlm, asked for "),
                f"{one['recall']:.4f}",
                f"{one['p50_ms']:.2f}{'!' if name in crowded else ''}",
                *times,
            ]
        )
    beside = [f"faster than {name}" for name in next(iter(sides.values()))["times_faster_than"]]
    about = found["queries_are"]
    chosen = ", ".join(f"{name.removeprefix('hlm_')}: {one['factory']}" for name, one in found["chosen"].items())
    text = markdown(["side", f"recall of the {found['settings']['k']} nearest", "p50 ms", *beside], rows)
    text += (
        f"\n\nA query's nearest ad has a cosine of {about['query_to_nearest_ad']:.2f}, an ad's nearest other one "
        f"{about['ad_to_nearest_other_ad']:.2f}. What is chosen for a recall of {chosen}."
    )
    if crowded:
        text += (
            " Times marked ! were taken while others took the CPUs, and have no ratios: long calls lose more to others "
            "than short ones. Recall and bytes do not depend on it."
        )
    return text


def searched(found: dict[str, Any]) -> str:
    """`text_to_ads`; filters, ours and FAISS's own; memory of an opened index."""
    rows = [
        [
            name,
            *(f"{one[side][what]:.3f}" for side in ("ours", "faiss") for what in ("recall", "short_lists")),
            f"{one['ours']['p99_ms']:.1f}",
        ]
        for name, one in found["filters"].items()
    ]
    header = ["filter, index", "recall", "short lists", "FAISS's own recall", "FAISS's own short lists", "p99 ms"]
    memory = [
        [name, f"{one['mapped_bytes_a_vector']:,.0f}", f"{one['read_bytes_a_vector']:,.0f}"]
        for name, one in found["memory"].items()
    ]
    own = markdown(["anonymous bytes a vector", "as HLM opens it", "as FAISS reads it"], memory)
    return f"{text_to_ads(found)}\n\n{markdown(header, rows)}\n\n{own}"


def first_students(found: dict[str, Any]) -> str:
    """Minutes from raw files to a student, its report, and a dry run; what the student keeps."""
    rows = []
    for run in found["runs"]:
        before = sum(seconds for name, seconds in run["seconds"].items() if name not in ("run", "publish"))
        until = dict(zip(run["steps"], accumulate(run["steps"].values()), strict=True))
        kept = run["recovery"]["student"]
        recovery = f"{kept['value']:.1%} ({kept['ci95'][0]:.1%} to {kept['ci95'][1]:.1%})"
        students = [before + until["refine"], before + until["export"]]
        times = [before, *students, sum(run["seconds"].values())]
        minutes = [f"{seconds / 60:.1f}" for seconds in times]
        log = f"{run['lines']:,}{' of UBI' * (run.get('files') == 'ubi')}"
        rows.append([log, f"{run['ads']:,}", *minutes, str(run["queries"]), recovery])
    header = ["log lines", "ads", "data, minutes", "student", "report and online folder", "timings and dry run"]
    notes = "".join(f"\n\n{run['lines']:,} lines {run['note']}." for run in found["runs"] if run.get("note"))
    return markdown([*header, "test queries", "recovery of ndcg@10"], rows) + notes


def living(found: dict[str, Any]) -> str:
    """Searches without and with changes, and swaps under readers."""
    rows = [
        [
            name,
            *(f"{one[what]:,}" for what in ("searches", "errors", "not_of_the_version_that_was_open", "short_lists")),
            *(f"{one[what]:.1f}" for what in ("p50_ms", "p99_ms")),
        ]
        for name, one in (("nothing changes", found["quiet"]), ("ads change", found["changing"]))
    ]
    header = ["while", "searches", "errors", "of another version", "short lists", "p50 ms", "p99 ms"]
    settings, changing, swaps = found["settings"], found["changing"], found["swaps"]
    return (
        f"{markdown(header, rows)}\n\n{settings['kind']} over {settings['rows']:,} vectors of {settings['dim']} values "
        f"made around centres. {settings['clients']} clients send {settings['queries_per_second']:g} queries a second "
        f"each, k = {settings['k']}. {changing['changes_a_minute']:,.0f} puts and deletes a minute come in "
        f"{changing['commits']} commits. p99 is {found['p99_times_the_quiet_one']:.2f} times the quiet one, and a "
        f"commit was searched after {1000 * changing['most_seconds_behind']:.0f} ms at the latest.\n\nFAISS's index "
        f"was swapped {swaps['swaps']:,} times under four threads that opened and searched it: {swaps['answers']:,} "
        f"answers, {swaps['torn']} not whole or of two versions, {swaps['errors']} errors."
    )


def beside(found: dict[str, Any]) -> str:
    """HLM's choice and other engines, for each recall that was asked for."""
    rows = [
        [f"{one['recall_asked_for']:g}", one["engine"], one["what"], f"{one['recall']:.4f}"]
        + [f"{one[name]:.2f}" for name in ("p50_ms", "p99_ms")]
        + [f"{one['bytes_on_disk'] / found['ads']:,.0f}"]
        for one in found["found"]
    ]
    header = ["recall asked for", "engine", "built as", "recall", "p50 ms", "p99 ms", "bytes an ad"]
    left = "; ".join(f"{name}: {why}" for name, why in found["left_out"].items())
    about = f"{found['ads']:,} ads of {found['dim']} values, k = {found['k']}. Left out: {left}."
    return f"{markdown(header, rows)}\n\n{about}"


def grown(found: dict[str, Any]) -> str:
    """Builds under a limit of memory: seconds, bytes, and what a search finds."""
    rows = [
        [
            f"{one['ads']:,}",
            one["factory"],
            f"{one['build_s'] / 60:.1f}",
            f"{one['peak_anonymous_mib'] / 1024:.2f}",
            f"{one['bytes_an_ad']:,.0f}",
            f"{one['recall']:.3f}",
            f"{one['p50_ms']:.2f}",
        ]
        for one in found["found"]
    ]
    settings = found["settings"]
    limit = "memory, what it reads from the disk counted in" if settings["cgroup"] else "anonymous memory"
    header = ["ads", "index", "build, minutes", "peak, GiB", "bytes an ad", "recall", "p50 ms"]
    return (
        f"{markdown(header, rows)}\n\nEach build had {settings['threads']} threads and at most "
        f"{settings['memory_gib']:g} GiB of {limit}. The peak is of anonymous memory. "
        f"{found['ads_times']:.0f} times as many ads took "
        f"{found['build_times']:.1f} times as long. Ads beyond the real vectors are these with noise. A search "
        f"asked for a recall of {settings['target_recall']:g} at k = {settings['k']}. {found.get('note', '')}".rstrip()
    )


def widened(found: dict[str, Any]) -> str:
    """Recall, bytes and time of widths and kinds; what the full width comes to at more ads."""
    rows = [
        [
            f"{one['dim']}",
            f"`{one['factory']}`",
            f"{one['recall']:.3f}",
            f"{one['bytes_an_ad']:,.0f}",
            f"{one['p50_ms']:.2f}",
        ]
        for one in found["found"]
    ]
    costs = markdown(
        ["width", "index", f"recall of the {found['k']} nearest at full width", "bytes an ad", "p50 ms"], rows
    )
    rows = [
        [f"{one['ads']:,}", f"`{one['factory']}`", f"{one['gib']:,.0f}"]
        + [f"{one['build_hours_on_one_core']:,.1f}", f"{one['machines']:,}"]
        for one in sorted(found["to_1b"], key=lambda one: (one["ads"], one["gib"]))
    ]
    header = ["ads", "index", "GiB", "hours to build on one core, at least", f"machines of {found['machine_gib']} GiB"]
    costs += f"\n\n{found['note']}" if "note" in found else ""
    return f"{costs}\n\nFrom bytes and seconds an ad as measured at {found['ads']:,}:\n\n{markdown(header, rows)}"


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
    if asked := found.get("asked"):
        rows = [
            [row["figure"], f"{row['measured']:.3g}", str(row["asked"]), "yes" if row["reached"] else "no"]
            for row in asked
        ]
        text += f"\n\n{markdown(['figure', 'measured', 'asked', 'reached'], rows)}"
    if chunks := found.get("chunks"):
        rows = [
            [shape, *(f"{took[name]:.0f}" for name in ("no_graph_ms", "with_graph_ms"))]
            for shape, took in chunks.items()
        ]
        text += f"\n\n{markdown(['rows x tokens of a chunk', 'without a graph, ms', 'forward and backward, ms'], rows)}"
    if steps := found.get("steps"):
        rows = [
            [size, f"{step['step_seconds']:.1f}", f"{step['peak_memory_allocated'] / 2**30:.0f}"]
            for size, step in steps.items()
        ]
        text += f"\n\n{markdown(['rows a chunk', 's a step', 'peak, GiB'], rows)}"
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
