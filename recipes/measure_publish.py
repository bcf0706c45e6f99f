"""Publishing over HTTP, measured: every request of a publish fails once in every way, and a round trip in both modes.

    python recipes/measure_publish.py --config recipes/configs/quickstart/publish.yaml --output results/hub.json

The Hub is the one of the tests, on loopback; the clients are the real ones. The round trip is of the run that the
config names; faults are tried on two tiny runs made for it, where a publish takes a second.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from hlm.artefacts import HlmError, read_manifest, write_json
from hlm.config import parse, run_recipe
from hlm.machine import facts
from hlm.report import command_line, environment

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the Hub and its clients' process are the tests' own

from hub_client import Client  # noqa: E402
from hub_faults import FAULTS, Always  # noqa: E402
from hub_server import HubServer  # noqa: E402

from recipes.publish import TYPES, PublishConfig, repositories_of  # noqa: E402

if TYPE_CHECKING:
    from hub_repositories import State

OUTAGES = {"outage_503": "503", "outage_lost_request": "lost_request"}  # from the request on, until the rerun
NOT_PROVEN = [
    "It is not the Hub: its quotas, rate limits, checks of cards, malware scans, permissions of organisations, latency "
    "and HTTPS are not here.",
    "Xet in version 1 of its endpoints, to which hf_xet falls back; upload grants and version 2 are not spoken here, "
    "and names of xorbs are not verified, contents are.",
    "One fault at a time, or one outage; waits between the clients' retries are a hundredth of theirs; recipes/"
    "publish.py checks a release before its first request once for all faults.",
    "A process killed in the middle of a publish is an outage that lasts; it is not tried by itself.",
    "An altered byte is tried in what is uploaded and in answers, not in the small files inside a commit's request: "
    "the Hub has nothing to compare those with.",
]


@dataclass
class MeasurePublishConfig:
    output: str = "results/hub.json"
    modes: list[str] = field(default_factory=lambda: ["lfs", "xet"], metadata={"help": "of upload and download"})
    scenarios: list[str] = field(
        default_factory=lambda: ["first", "update", "pull"],
        metadata={"help": "publish to an empty Hub; publish a run in which all differs over another; pull"},
    )
    faults: list[str] = field(default_factory=lambda: [*FAULTS, *OUTAGES], metadata={"help": "kinds of fault"})
    every: int = field(default=1, metadata={"help": "fail each n-th request only"})
    round_trip: bool = field(default=True, metadata={"help": "publish and pull the run that the config names"})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    config, release = parse(MeasurePublishConfig, PublishConfig, argv=argv)
    began = time.perf_counter()
    measured: dict[str, Any] = {"settings": {"measure": asdict(config), "release": asdict(release)}}
    measured |= {"environment": environment(command_line("recipes/measure_publish.py", argv)), "machine": facts()}
    with tempfile.TemporaryDirectory(prefix="hlm-hub-") as temporary:
        home = Path(temporary)
        runs = [tiny_run(home / f"run{seed}", release, seed) for seed in (0, 1)] if config.scenarios else []
        for mode in config.modes:
            found = measured.setdefault(mode, {})
            if config.round_trip:
                found["round_trip"] = round_trip(home / f"{mode}-round", mode, release)
            for scenario in config.scenarios:
                sweep = pull_faults if scenario == "pull" else publish_faults
                found[scenario] = sweep(home / f"{mode}-{scenario}", mode, scenario, runs, config)
                print(mode, scenario, {name: one for name, one in found[scenario].items() if name != "failures"})
    measured |= {"seconds": time.perf_counter() - began, "not_proven": NOT_PROVEN}
    write_json(config.output, measured)
    return measured


def tiny_run(folder: Path, release: PublishConfig, seed: int) -> list[str]:
    """A teacher's adapter, stores and a student with ONNX files, by the recipes; the arguments that publish them."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    from hlm.data import load
    from hlm.encoders import load_encoder, save_encoder
    from hlm.sample_catalogue import write_catalogue
    from recipes import embed, export, teacher

    data = str(folder / "data")
    write_catalogue(data, ads=60, unlabelled=40, train_queries=40, dev_queries=10, test_queries=20, seed=seed)
    texts = list(load(data, splits=()).queries["text"])
    tokenizer = AutoTokenizer.from_pretrained(release.student).train_new_from_iterator([texts], 300)
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "bare")
    tokenizer.save_pretrained(folder / "bare")
    parts = [Transformer(str(folder / "bare"), max_seq_length=48), Pooling(32, pooling_mode="mean"), Normalize()]
    SentenceTransformer(modules=parts, device="cpu").save_pretrained(str(folder / "base"), create_model_card=False)
    teacher.main(
        ["--backbone", str(folder / "base"), "--data", data, "--output", str(folder / "teacher"), "--min_score", "3",
         "--lora_rank", "4", "--max_steps", "1", "--per_device_train_batch_size", "16", "--save_strategy", "no",
         "--disable_tqdm", "true"]
    )  # fmt: skip
    embed.main(["--model", str(folder / "teacher"), "--data", data, "--output", str(folder / "vectors")])
    model = load_encoder(str(folder / "teacher"), device="cpu", max_seq_length=24)  # so it is another encoder
    inputs = {"teacher": read_manifest(folder / "teacher", "teacher")["encoder"]}
    save_encoder(model, folder / "student", "student", inputs=inputs, config={})
    export.main(["--student", str(folder / "student"), "--output", str(folder / "online")])
    own = {"student": folder / "online", "teacher": folder / "teacher", "vectors": folder / "vectors", "data": data}
    given = asdict(release) | {"report": None, "latency": None, "tag": f"v{seed}", "name": "tiny", "namespace": "acme"}
    return written(folder, given | {name: str(path) for name, path in own.items()})


def written(folder: Path, release: dict[str, Any]) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "publish.yaml").write_text(yaml.safe_dump(release))
    return ["--config", str(folder / "publish.yaml")]


def publish_faults(
    home: Path, mode: str, scenario: str, runs: list[list[str]], config: MeasurePublishConfig
) -> dict[str, Any]:
    """Every fault at every request of one publish, each from the same state of the Hub and a client that knows nothing;
    then the same command again."""
    with HubServer(home / "hub") as hub:
        client = Client(hub, home / "client", xet=mode == "xet")
        if scenario == "update":
            succeed(client.ask("publish", argv=runs[0], fresh=True))
        old = hub.saved()
        hub.restart_log()
        succeed(client.ask("publish", argv=runs[1], fresh=True))
        new, requests = hub.saved(), list(hub.log)
        counts, failures = {}, []
        for fault in config.faults:
            count = counts[fault] = dict.fromkeys(
                ("tried", "completed", "clear_error", "other_error", "half_published", "reruns_completed"), 0
            )
            for number in range(1, len(requests) + 1, config.every):
                hub.restore(old)
                inject(hub, number, fault)
                answer = client.ask("publish", argv=runs[1], fresh=True)
                if not hub.injected:  # requests in parallel: this time there were fewer
                    continue
                half = not_whole(hub, old, new)
                hub.restart_log()
                again = client.ask("publish", argv=runs[1], fresh=False)
                half += not_whole(hub, old, new)
                left = different(hub, new) if "value" in again else [again["text"]]
                count["tried"] += 1
                count[outcome(answer)] += 1
                count["half_published"] += bool(half)
                count["reruns_completed"] += not left
                if half or left or outcome(answer) == "other_error":
                    found = {"fault": fault, "number": number, "request": " ".join(requests[number - 1][1:3])}
                    failures.append(found | {"answer": answer, "half_published": half, "rerun": left})
        client.close()
        leaks = client.said.read_text().count(hub.tokens["acme"])
    return {"requests": len(requests), "faults": counts, "failures": failures, "tokens_in_output": leaks}


def pull_faults(
    home: Path, mode: str, scenario: str, runs: list[list[str]], config: MeasurePublishConfig
) -> dict[str, Any]:
    """Every fault at every request of a pull of student and adapter, and disks that fill up; then the pull again."""
    from hlm.lineage import verify_student

    wanted = {"student": ["acme/tiny-student", "model"], "teacher": ["acme/tiny-teacher", "model"]}
    with HubServer(home / "hub") as hub:
        client = Client(hub, home / "client", xet=mode == "xet")
        succeed(client.ask("publish", argv=runs[1], fresh=True))
        right = {
            part: {path: hub.content(entry) for path, entry in hub.branch("models", name)[1].items()}
            for part, (name, _) in wanted.items()
        }
        hub.restart_log()
        succeed(client.ask("pull", wanted=wanted, fresh=True))
        requests = list(hub.log)
        tries = [(fault, n) for fault in config.faults for n in range(1, len(requests) + 1, config.every)]
        sizes = sorted({len(content) for files in right.values() for content in files.values()})
        tries += [("disk_full", size - 1) for size in sizes if size]
        counts, failures = {}, []
        for fault, number in tries:
            full = {"largest": number} if fault == "disk_full" else {}
            hub.restart_log()
            if not full:
                inject(hub, number, fault)
            answer = client.ask("pull", wanted=wanted, fresh=True, **full)
            if not full and not hub.injected:
                continue
            hub.restart_log()
            wrong = wrong_files(home / "client/home/hub", right)
            again = client.ask("pull", wanted=wanted, fresh=False)
            left = missing_files(again.get("value", {}), right)
            count = counts.setdefault(
                fault,
                dict.fromkeys(
                    ("tried", "completed", "clear_error", "other_error", "wrong_content", "found_by_hlm",
                     "reruns_completed"), 0
                ),
            )  # fmt: skip
            count["tried"] += 1
            count[outcome(answer)] += 1
            count["wrong_content"] += bool(wrong)
            count["reruns_completed"] += not left
            if wrong and "value" in answer:
                try:
                    verify_student(answer["value"]["student"])
                except HlmError:
                    count["found_by_hlm"] += 1
            if wrong or left or outcome(answer) == "other_error":
                request = None if full else " ".join(requests[number - 1][1:3])
                found = {"fault": fault, "number": number, "request": request, "wrong_content": wrong}
                failures.append(found | {"answer": answer, "rerun": left})
        client.close()
    return {"requests": len(requests), "faults": counts, "failures": failures}


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


def trees(state: State, repository: tuple[str, str]) -> dict[str, dict[str, str]]:
    """Commit -> path -> Git's hash."""
    repo = state.repos.get(repository)
    return {
        commit: {path: entry.oid for path, entry in files.items()}
        for commit, files in (repo.commits.items() if repo else ())
    }


def not_whole(hub: HubServer, old: State, new: State) -> list[str]:
    """What stands on the Hub that is neither as before nor as it is to be, or whose content is lost."""
    found = []
    for repository, repo in hub.state.repos.items():
        allowed = [*trees(old, repository).values(), *trees(new, repository).values()]
        for commit, tree in trees(hub.state, repository).items():
            if tree not in allowed:
                found.append(f"{repository[1]}: commit {commit}")
        last = trees(new, repository)[new.repos[repository].branches["main"]]
        known = old.repos[repository].tags if repository in old.repos else {}
        for tag, commit in repo.tags.items():
            if known.get(tag) != commit and trees(hub.state, repository)[commit] != last:
                found.append(f"{repository[1]}: tag {tag}")
        for path, entry in repo.commits[repo.branches["main"]].items():
            if entry.sha256 and hashlib.sha256(hub.content(entry)).hexdigest() != entry.sha256:
                found.append(f"{repository[1]}: content of {path}")
    return found


def different(hub: HubServer, new: State) -> list[str]:
    """What a completed publish has left otherwise than one without faults; a second commit of the same counts, too."""
    found = [f"{kind}/{name}" for (kind, name), repo in new.repos.items() if hub.state.repos.get((kind, name)) != repo]
    shelves = [
        {slug: [(one["type"], one["id"]) for one in shelf["items"]] for slug, shelf in state.collections.items()}
        for state in (hub.state, new)
    ]
    return found + ([] if shelves[0] == shelves[1] else ["the collection"])


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


def round_trip(home: Path, mode: str, release: PublishConfig) -> dict[str, Any]:
    """Publishes the run, pulls it with an empty cache, and compares what was pulled with what was published."""
    given = asdict(release) | {"namespace": "acme", "private": True, "tag": "v1", "dry_run": False}
    repositories = repositories_of(PublishConfig(**given))
    with HubServer(home / "hub") as hub:
        client = Client(hub, home / "client", xet=mode == "xet", timeout_s=1800)
        succeed(client.ask("publish", argv=written(home, given), fresh=True))
        sent = hub.log
        hub.restart_log()
        wanted = {part: [one.repo_id, one.repo_type] for part, one in repositories.items()}
        folders = {part: Path(path) for part, path in succeed(client.ask("pull", wanted=wanted, fresh=True)).items()}
        moved = {
            way: sum(way in path and method == "GET" for _, method, path, _ in hub.log)
            for way in ("/large/", "/xorbs/")
        }
        right = {
            part: {path: hub.content(entry) for path, entry in hub.branch(f"{TYPES[part]}s", one.repo_id)[1].items()}
            for part, one in repositories.items()
        }
        differ = missing_files({part: str(folder) for part, folder in folders.items()}, right)
        found = {"requests": {"publish": len(sent), "pull": len(hub.log)}, "downloads": moved}
        found["files"] = {part: len(files) for part, files in right.items()}
        found["bytes"] = {part: sum(map(len, files.values())) for part, files in right.items()}
        found["max_difference"] = differences(release, folders)
        client.close()
    return found | {"files_that_differ": differ}


def differences(release: PublishConfig, folders: dict[str, Path]) -> dict[str, float]:
    """The largest difference of vectors, pulled against published."""
    from safetensors.numpy import load_file

    from hlm import QueryEncoder
    from hlm.data import load
    from hlm.encoders import encode, load_encoder
    from hlm.index import AdIndex
    from hlm.store import VectorStore

    def far(one: Any, other: Any) -> float:
        return float(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).max())

    texts, found = list(load(release.data, splits=()).queries["text"])[:200], {}
    for precision in ("fp32", "int8"):
        pair = [
            QueryEncoder.from_pretrained(path, precision=precision) for path in (folders["student"], release.student)
        ]
        found[f"student {precision}"] = far(*(one.encode(texts) for one in pair))
    pair = [load_encoder(str(path), device="cpu") for path in (folders["student"], release.student)]
    found["student torch"] = far(*(encode(one, texts) for one in pair))
    if release.teacher:
        name = "adapter_model.safetensors"
        pulled, kept = load_file(folders["teacher"] / name), load_file(Path(release.teacher) / "adapter" / name)
        found["adapter"] = max(far(pulled[key], kept[key]) for key in pulled.keys() | kept.keys())
    for part in ("corpus", "queries"):
        if (folders["dataset"] / "vectors" / part).is_dir():
            pulled, kept = VectorStore.open(folders["dataset"] / "vectors" / part), Path(release.vectors) / part
            pulled.verify()
            found[f"vectors/{part}"] = far(*(one.gather(range(len(one))) for one in (pulled, VectorStore.open(kept))))
    index, vectors = AdIndex.load(folders["dataset"] / "index"), pair[0]
    kept = Path(release.vectors) / "index"
    other = (
        AdIndex.load(kept) if kept.is_dir() else AdIndex.build(VectorStore.open(kept.parent / "corpus"), dim=index.dim)
    )
    (scores, ids), (kept_scores, kept_ids) = (one.search(encode(vectors, texts), 10) for one in (index, other))
    found["index"] = far(scores, kept_scores) if ids == kept_ids else float("inf")
    return found


if __name__ == "__main__":
    run_recipe(main)
