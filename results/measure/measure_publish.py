"""Publishing over HTTP, measured: every request of a publish fails once in every way, and a round trip in both modes.

    python results/measure/measure_publish.py --release recipes/configs/quickstart/publish.yaml --output hub.json

The Hub is the one of the tests, on loopback; the clients are the real ones. The round trip is of the release that
is named; faults are tried on two tiny runs made for it, where a publish takes a second.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hlm.artefacts import HlmError, write_json
from hlm.config import parse, run_recipe
from hlm.evaluation.report import command_line, environment
from hlm.machine import facts

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the Hub and its clients' process are the tests' own

from hub_client import Client  # noqa: E402
from hub_faults import FAULTS, Always  # noqa: E402
from hub_repositories import State, different, not_whole  # noqa: E402
from hub_run import tiny_run  # noqa: E402
from hub_server import HubServer  # noqa: E402

OUTAGES = {"outage_503": "503", "outage_lost_request": "lost_request"}  # from the request on, until the rerun
NOT_PROVEN = [
    "It is not the Hub: its quotas, rate limits, checks of cards, malware scans, permissions of organisations, latency "
    "and HTTPS are not here.",
    "Xet in version 1 of its endpoints, to which hf_xet falls back; upload grants and version 2 are not spoken here, "
    "and names of xorbs are not verified, contents are.",
    "One fault at a time, or one outage; waits between the clients' retries are a hundredth of theirs; recipes/"
    "publish.py checks a release before its first request once for all faults.",
    "A process killed in the middle of a publish is an outage that lasts; it is not tried by itself. Nor are files so "
    "large that LFS sends them in parts.",
    "An altered byte is tried in what is uploaded and in answers, not in the small files inside a commit's request: "
    "the Hub has nothing to compare those with.",
]
KNOWN = {"modes": ["lfs", "xet"], "scenarios": ["first", "update", "pull"], "faults": [*FAULTS, *OUTAGES]}


@dataclass
class MeasurePublishConfig:
    release: str = field(metadata={"help": "config of recipes/publish.py: what is published and pulled"})
    output: str = field(default="results/hub.json", metadata={"help": "file for the figures"})
    modes: list[str] = field(default_factory=lambda: KNOWN["modes"], metadata={"help": "of upload and download"})
    scenarios: list[str] = field(
        default_factory=lambda: KNOWN["scenarios"],
        metadata={"help": "publish to an empty Hub; publish a run in which all differs over another; pull"},
    )
    faults: list[str] = field(default_factory=lambda: KNOWN["faults"], metadata={"help": "kinds of fault"})
    every: int = field(default=1, metadata={"help": "only each n-th request fails"})
    round_trip: bool = field(default=True, metadata={"help": "publish and pull the release"})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    (config,) = parse(MeasurePublishConfig, argv=argv)
    release = checked(config)
    began = time.perf_counter()
    measured: dict[str, Any] = {"settings": asdict(config), "release": release, "machine": facts()}
    measured["environment"] = environment(command_line("results/measure/measure_publish.py", argv))
    with tempfile.TemporaryDirectory(prefix="hlm-hub-") as temporary:
        home, runs = Path(temporary), []
        fixed = {"report": None, "latency": None, "name": "tiny", "namespace": "acme"}
        if release.get("space"):  # an edit meanwhile changes nothing
            fixed["space"] = str(shutil.copytree(release["space"], home / "space"))
        for seed in (0, 1) if "update" in config.scenarios else (1,) if config.scenarios else ():
            run = tiny_run(home / f"run{seed}", release["student"], seed)
            runs.append(written(home / f"run{seed}", release | fixed | run | {"tag": f"v{seed}"}))
        for mode in config.modes:
            found = measured[mode] = {}
            with HubServer(home / mode) as hub, Client(hub, home / f"{mode}-client", xet=mode == "xet") as client:
                if config.round_trip:
                    argv = written(home / mode, release | {"namespace": "acme", "private": True, "tag": "v1"})
                    found["round_trip"] = round_trip(hub, client, argv, release)
                for scenario in config.scenarios:
                    sweep = pull_faults if scenario == "pull" else publish_faults
                    hub.restore(State())
                    found[scenario] = sweep(hub, client, runs if scenario == "update" else runs[-1:], config)
                    print(mode, scenario, {name: one for name, one in found[scenario].items() if name != "failures"})
                    write_json(config.output, measured | {"whole": False})
                found["tokens_in_output"] = client.said.read_text().count(hub.tokens["acme"])
    measured |= {"whole": True, "seconds": time.perf_counter() - began, "not_proven": NOT_PROVEN}
    measured["publish_faults"] = totals(measured, config)
    write_json(config.output, measured)
    print(measured["publish_faults"])
    return measured


def checked(config: MeasurePublishConfig) -> dict[str, Any]:
    for name, known in KNOWN.items():
        if unknown := set(getattr(config, name)) - set(known):
            raise HlmError(
                f"{name}: expected any of {', '.join(known)}, found {', '.join(sorted(unknown))}; correct it"
            )
    if config.every < 1 or not Path(config.release).is_file():
        raise HlmError(
            f"expected a config of recipes/publish.py and every n-th request, found {config.release} and "
            f"every={config.every}; name recipes/configs/quickstart/publish.yaml, after make quickstart"
        )
    return yaml.safe_load(Path(config.release).read_text(encoding="utf-8"))


def totals(measured: dict[str, Any], config: MeasurePublishConfig) -> dict[str, int]:
    """Of all modes' publishes together."""
    scenarios = [measured[mode][one] for mode in config.modes for one in config.scenarios if one != "pull"]
    found: dict[str, int] = {}
    for count in (count for scenario in scenarios for count in scenario["faults"].values()):
        found = {name: found.get(name, 0) + value for name, value in count.items()}
    return found


def written(folder: Path, release: dict[str, Any]) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "publish.yaml").write_text(yaml.safe_dump(release))
    return ["--config", str(folder / "publish.yaml")]


def publish_faults(
    hub: HubServer, client: Client, runs: list[list[str]], config: MeasurePublishConfig
) -> dict[str, Any]:
    """Every fault at every request of publishing the last run, each from the same state of the Hub (with the first of
    two runs published) and a client that knows nothing; then the same command again."""
    *before, argv = runs
    for one in before:
        succeed(client.ask("publish", argv=one, fresh=True))
    old = hub.saved()
    hub.restart_log()
    succeed(client.ask("publish", argv=argv, fresh=True))
    new, requests = hub.saved(), list(hub.log)
    names = ("tried", "completed", "clear_error", "other_error", "half_published", "reruns_completed")
    counts, failures = {fault: dict.fromkeys(names, 0) for fault in config.faults}, []
    for fault, number in tries(requests, config):
        hub.restore(old)
        inject(hub, number, fault)
        answer = client.ask("publish", argv=argv, fresh=True)
        if not hub.injected:  # requests in parallel: this time there were fewer
            continue
        half = not_whole(hub, old, new)
        hub.restart_log()
        again = client.ask("publish", argv=argv, fresh=False)
        half += not_whole(hub, old, new)
        left = different(hub, new) if "value" in again else [again["text"]]
        if note(counts[fault], answer, "half_published", half, left):
            found = {"fault": fault, "number": number, "request": requests[number - 1][1:3]}
            failures.append(found | {"answer": answer, "half_published": half, "rerun": left})
    return {"requests": len(requests), "faults": counts, "failures": failures}


def pull_faults(hub: HubServer, client: Client, runs: list[list[str]], config: MeasurePublishConfig) -> dict[str, Any]:
    """Every fault at every request of a pull of student and adapter, and disks that fill up; then the pull again."""
    wanted = succeed(client.ask("publish", argv=runs[-1], fresh=True))
    wanted = {part: wanted[part] for part in ("student", "teacher")}
    right = contents(hub, wanted)
    hub.restart_log()
    succeed(client.ask("pull", wanted=wanted, fresh=True))
    requests = list(hub.log)
    sizes = sorted({len(content) for files in right.values() for content in files.values()})
    full = [("disk_full", size - 1) for size in sizes[:: config.every] if size]
    names = ("tried", "completed", "clear_error", "other_error", "wrong_content", "reruns_completed")
    counts, failures = {fault: dict.fromkeys(names, 0) for fault in [*config.faults, "disk_full"]}, []
    for fault, number in [*tries(requests, config), *full]:
        hub.restart_log()
        if fault != "disk_full":
            inject(hub, number, fault)
        answer = client.ask("pull", wanted=wanted, fresh=True, largest=number if fault == "disk_full" else None)
        if fault != "disk_full" and not hub.injected:
            continue
        hub.restart_log()
        wrong = wrong_files(client.cache, right)
        again = client.ask("pull", wanted=wanted, fresh=False)
        left = missing_files(again["value"], right) if "value" in again else [again["text"]]
        if note(counts[fault], answer, "wrong_content", wrong, left):
            found = {"fault": fault, "number": number, "wrong_content": wrong}
            found |= {} if fault == "disk_full" else {"request": requests[number - 1][1:3]}
            failures.append(found | {"answer": answer, "rerun": left})
    return {"requests": len(requests), "faults": counts, "failures": failures}


def note(count: dict[str, int], answer: dict[str, Any], harm: str, harmed: Any, left: Any) -> bool:
    """Counts one fault and the rerun after it; whether something went wrong that no fault excuses."""
    count["tried"] += 1
    count[outcome(answer)] += 1
    count[harm] += bool(harmed)
    count["reruns_completed"] += not left
    return bool(harmed or left) or outcome(answer) == "other_error"


def tries(requests: Sequence[Any], config: MeasurePublishConfig) -> list[tuple[str, int]]:
    return [(fault, n) for fault in config.faults for n in range(config.every, len(requests) + 1, config.every)]


def contents(hub: HubServer, wanted: dict[str, list[str]]) -> dict[str, dict[str, bytes]]:
    """Part -> path -> content, of the main branches."""
    return {
        part: {path: hub.content(entry) for path, entry in hub.branch(f"{kind}s", name)[1].items()}
        for part, (name, kind) in wanted.items()
    }


def inject(hub: HubServer, number: int, fault: str) -> None:
    hub.restart_log()
    hub.faults = Always(number, OUTAGES[fault]) if fault in OUTAGES else {number: fault}


def succeed(answer: dict[str, Any]) -> Any:
    if "value" not in answer:
        raise HlmError(f"expected a publish without faults to succeed, found {answer['error']}: {answer['text']}")
    return answer["value"]


def outcome(answer: dict[str, Any]) -> str:
    if "value" in answer:
        return "completed"
    return "clear_error" if answer["error"] == "HlmError" else "other_error"


def wrong_files(cache: Path, right: dict[str, dict[str, bytes]]) -> list[str]:
    """Files that the cache shows under their names with another content than the Hub's."""
    found = []
    for part, files in right.items():
        for snapshot in cache.glob(f"models--acme--tiny-{part}/snapshots/*"):
            for path in (path for path in snapshot.rglob("*") if path.is_file()):
                if path.read_bytes() != files.get(path.relative_to(snapshot).as_posix()):
                    found.append(f"{part}: {path.relative_to(snapshot)}")
    return found


def missing_files(folders: dict[str, str], right: dict[str, dict[str, bytes]]) -> list[str]:
    found = [part for part in right if part not in folders]
    for part, folder in folders.items():
        for name, content in right[part].items():
            path = Path(folder) / name
            if not path.is_file() or path.read_bytes() != content:
                found.append(f"{part}: {name}")
    return found


def round_trip(hub: HubServer, client: Client, argv: list[str], release: dict[str, Any]) -> dict[str, Any]:
    """Publishes the release, pulls it with an empty cache, and compares what was pulled with what was published."""
    wanted, sent = succeed(client.ask("publish", argv=argv, fresh=True)), hub.log
    hub.restart_log()
    folders = {part: Path(path) for part, path in succeed(client.ask("pull", wanted=wanted, fresh=True)).items()}
    moved = {
        way: sum(way in path and method == "GET" for _, method, path, _ in hub.log) for way in ("/large/", "/xorbs/")
    }
    right = contents(hub, wanted)
    return {
        "requests": {"publish": len(sent), "pull": len(hub.log)},
        "downloads": moved,
        "files": {part: len(files) for part, files in right.items()},
        "bytes": {part: sum(map(len, files.values())) for part, files in right.items()},
        "files_that_differ": missing_files({part: str(folder) for part, folder in folders.items()}, right),
        "max_difference": differences(release, folders),
    }


def differences(release: dict[str, Any], folders: dict[str, Path]) -> dict[str, float]:
    """The largest difference of vectors, pulled against published."""
    from safetensors.numpy import load_file

    from hlm import QueryEncoder
    from hlm.data.contract import load
    from hlm.encoders.loading import encode, load_encoder
    from hlm.indexes.faiss_index import AdIndex
    from hlm.vectors.store import VectorStore

    def far(one: Any, other: Any) -> float:
        return float(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).max())

    texts, found = list(load(release["data"], splits=()).queries["text"])[:200], {}
    for precision in ("fp32", "int8"):
        pair = [
            QueryEncoder.from_pretrained(path, precision=precision) for path in (folders["student"], release["student"])
        ]
        found[f"student {precision}"] = far(*(one.encode(texts) for one in pair))
    pair = [load_encoder(str(path), device="cpu") for path in (folders["student"], release["student"])]
    found["student torch"] = far(*(encode(one, texts) for one in pair))
    if release.get("teacher"):
        name = "adapter_model.safetensors"
        pulled, kept = load_file(folders["teacher"] / name), load_file(Path(release["teacher"]) / "adapter" / name)
        found["adapter"] = max(far(pulled[key], kept[key]) for key in pulled.keys() | kept.keys())
    for part in ("corpus", "queries"):
        if (folders["dataset"] / "vectors" / part).is_dir():
            pulled, kept = VectorStore.open(folders["dataset"] / "vectors" / part), Path(release["vectors"]) / part
            pulled.verify()
            found[f"vectors/{part}"] = far(*(one.gather(range(len(one))) for one in (pulled, VectorStore.open(kept))))
    index, vectors = AdIndex.load(folders["dataset"] / "index"), pair[0]
    kept = Path(release["vectors"]) / "index"
    other = (
        AdIndex.load(kept) if kept.is_dir() else AdIndex.build(VectorStore.open(kept.parent / "corpus"), dim=index.dim)
    )
    (scores, ids), (kept_scores, kept_ids) = (one.search(encode(vectors, texts), 10) for one in (index, other))
    found["index"] = far(scores, kept_scores) if ids == kept_ids else float("inf")
    return found


if __name__ == "__main__":
    run_recipe(main)
