"""Publishes a run on the Hub: its student, teacher's adapter, dataset with vectors and index, and the demo.

    python recipes/publish.py --config recipes/configs/quickstart/publish.yaml --namespace NAME --dry-run

Without --dry-run it does what that printed, with the token of `hf auth login` or HF_TOKEN. Everything is checked before
anything is sent; each repository changes in one commit; what points to others comes after them, tags last. The same run
published twice changes nothing, and after a failure the same command completes it. What others added on the Hub stays,
what they edited there is not overwritten: --delete_others and --overwrite_edited do so.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import RepoCard

import hlm
from hlm.artefacts import MANIFEST, HlmError, read_manifest, write_json
from hlm.config import parse, run_recipe
from hlm.data.contract import load
from hlm.data.tables import find_table, read_rows
from hlm.hub.repository import Repository, collect
from hlm.publishing.card_facts import system_of
from hlm.publishing.cards import dataset_card, eval_results, student_card, teacher_card
from hlm.publishing.files import RESULTS, folder_files, own_file
from hlm.publishing.publish import Published, link_files, publish_folder
from hlm.vectors.index import AdIndex
from hlm.vectors.lineage import open_fitting, read_student, verify
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)

TYPES = {"teacher": "model", "dataset": "dataset", "student": "model", "space": "space"}  # in the order of publishing
SPLITS = ("train", "dev", "test")
UNKNOWN = "0" * 40  # in a dry run, the commit that is not there yet


@dataclass
class PublishConfig:
    student: str = field(metadata={"help": "the online folder: the student with its ONNX files"})
    vectors: str = field(metadata={"help": "the teacher's stores: corpus and queries, and index where it was built"})
    data: str = field(metadata={"help": "the dataset: a folder, published too, or a Hub id that the demo reads"})
    name: str = field(metadata={"help": "what the names of the repositories begin with, and the collection's title"})
    namespace: str | None = field(default=None, metadata={"help": "user or organisation that owns the repositories"})
    teacher: str | None = field(default=None, metadata={"help": "its folder, for the adapter; null: left out"})
    space: str | None = field(default=None, metadata={"help": "the demo's folder; null: left out"})
    report: str | None = field(default=None, metadata={"help": "report.json of recipes/evaluate.py"})
    latency: str | None = field(default=None, metadata={"help": "latency.json of recipes/benchmark.py"})
    student_repo: str | None = field(default=None, metadata={"help": "owner/name; null: NAMESPACE/NAME-student"})
    teacher_repo: str | None = field(default=None, metadata={"help": "owner/name; null: NAMESPACE/NAME-teacher"})
    dataset_repo: str | None = field(default=None, metadata={"help": "owner/name; null: NAMESPACE/NAME-dataset"})
    space_repo: str | None = field(default=None, metadata={"help": "owner/name; null: NAMESPACE/NAME-space"})
    base_model: str | None = field(
        default=None, metadata={"help": "the backbone's Hub id, if the run had it elsewhere"}
    )
    licence: str | None = field(default=None, metadata={"help": "as the Hub writes it, for example apache-2.0"})
    language: list[str] = field(default_factory=list, metadata={"help": "codes of the texts' languages, such as en"})
    unlabelled: bool = field(default=False, metadata={"help": "publish the queries without judgements, often a log"})
    private: bool = field(
        default=False, metadata={"help": "private repositories; the demo then needs a secret HF_TOKEN in its settings"}
    )
    revision: str = field(default="main", metadata={"help": "branch to publish on, made where it is missing"})
    tag: str | None = field(default=None, metadata={"help": "the release's name, for example v1.0; never moved"})
    delete_others: bool = field(default=False, metadata={"help": "delete files that others added on the Hub"})
    overwrite_edited: bool = field(
        default=False, metadata={"help": "overwrite cards and other files that others edited on the Hub"}
    )
    public_names: list[str] = field(
        default_factory=list, metadata={"help": "names of the user, the home or the machine that may be published"}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "print every file, its size, the cards and what would change; send nothing"}
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Published]:
    (config,) = parse(PublishConfig, argv=argv)
    repositories = repositories_of(config)
    with tempfile.TemporaryDirectory(prefix="hlm-publish-") as temporary:
        # All is laid out, checked and compared before anything is sent: what is refused then has left nothing anywhere.
        planned = publish(config, repositories, Path(temporary) / "planned", {}, dry_run=True)
        if config.dry_run:
            print_plan(planned)
            return planned
        check_plan(planned)
        done: dict[str, Published] = {}
        try:
            for repository in repositories.values():  # so that no card links to a repository that is not there
                repository.create()
            publish(config, repositories, Path(temporary) / "sent", done, dry_run=False)
            slug = collect(config.name, list(repositories.values()), "Written by HLM")
            for part, repository in repositories.items() if config.tag else ():
                repository.tag(config.tag, done[part].commit)
        except HlmError as error:
            whole = ", ".join(f"{one.repo_type} {one.repo_id} at {one.commit[:12]}" for one in done.values())
            raise HlmError(
                f"{error}. Whole so far: {whole or 'nothing'}; the same command goes on from there"
            ) from error
    print_table(done)
    print(f"collection {slug}" + (f", tag {config.tag}" if config.tag else ""))
    return done


def repositories_of(config: PublishConfig) -> dict[str, Repository]:
    """Part -> its repository, in the order of publishing: none points to one after it but by name."""
    repositories = {}
    for part, kind in TYPES.items():
        if part in ("teacher", "space") and getattr(config, part) is None:
            continue
        name = getattr(config, f"{part}_repo")
        if name is None and config.namespace is None:
            raise HlmError(f"expected namespace or {part}_repo, found neither; give --namespace, your name on the Hub")
        name = name or f"{config.namespace}/{config.name}-{part}"
        repositories[part] = Repository(name, kind, config.private, config.revision)
    return repositories


def publish(
    config: PublishConfig, repositories: dict[str, Repository], home: Path, done: dict[str, Published], *, dry_run: bool
) -> dict[str, Published]:
    """Lays out each repository's folder under `home` and publishes it; `done` grows with every one that is whole."""
    for part, repository in repositories.items():
        if part == "teacher":
            check_teacher(config)
        stage = {"teacher": stage_teacher, "dataset": stage_dataset, "student": stage_student, "space": stage_space}
        card = stage[part](config, repositories, done, home / part)
        if dry_run and part == "dataset":
            verify(config.student, home / part / "index")
            open_fitting(home / part / "vectors/corpus", read_student(config.student))
        done[part] = publish_folder(
            home / part, repository.repo_id, repo_type=repository.repo_type, card=card, private=config.private,
            revision=config.revision, tag=config.tag, defer_tag=True, dry_run=dry_run,
            delete_others=config.delete_others, overwrite_edited=config.overwrite_edited,
            sources=sources(config, part), public_names=public_names(config, repositories),
        )  # fmt: skip
    return done


def sources(config: PublishConfig, part: str) -> list[Path]:
    """What the links in a part's folder point to."""
    if part != "dataset":
        return [Path(getattr(config, part))] if part != "space" else []
    reports = [Path(path) for path in (config.report, config.latency) if path]
    stores = [Path(config.vectors) / name for name in ("corpus", "queries", "index")]
    return [*stores, Path(config.data), *reports, *(path.with_suffix(".png") for path in reports)]


def public_names(config: PublishConfig, repositories: dict[str, Repository]) -> list[str]:
    ids = [*(one.repo_id for one in repositories.values()), config.base_model or ""]
    return [*config.public_names, *(name for one in ids for name in one.split("/"))]


def check_plan(planned: dict[str, Published]) -> None:
    """Refuses the whole release where one repository could not be compared, or holds what others edited."""
    for one in planned.values():
        if one.changes is None:
            raise HlmError(one.not_compared)
        one.changes.refuse_edited(f"{one.repo_type} {one.repo_id}")


def check_teacher(config: PublishConfig) -> None:
    wanted = read_student(config.student)["inputs"]["teacher"]
    found = read_manifest(config.teacher, "teacher")["encoder"]
    if wanted != found:
        raise HlmError(f"expected the student's teacher {wanted} at {config.teacher}, found {found}; name that teacher")


def about(config: PublishConfig, repositories: dict[str, Repository], part: str) -> dict[str, Any]:
    """What a card says beside the manifests."""
    others = {f"{one}_repo": repositories[one].repo_id for one in repositories if one != "space"}
    files = {name: read_json(getattr(config, name)) for name in ("report", "latency")}
    given = {name: getattr(config, name) for name in ("base_model", "licence", "language", "public_names")}
    return {"repo_id": repositories[part].repo_id, **others, **files, **given}


def read_json(path: str | None) -> dict[str, Any] | None:
    try:
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HlmError(
            f"expected a report as JSON at {path}, found none to read ({error}); correct the path"
        ) from error


def stage_teacher(config: PublishConfig, repositories: dict, done: dict, home: Path) -> str:
    link_files(config.teacher, home)
    settings = home / "adapter/adapter_config.json"
    if config.base_model and settings.is_file():  # where the run found its backbone is nobody else's path
        values = json.loads(settings.read_text()) | {"base_model_name_or_path": config.base_model}
        settings.unlink()
        write_json(settings, values)
    return teacher_card(config.teacher, **about(config, repositories, "teacher"))


def stage_dataset(config: PublishConfig, repositories: dict, done: dict, home: Path) -> str:
    vectors, student = Path(config.vectors), read_student(config.student)
    if Path(config.data).is_dir():
        stage_tables(Path(config.data), home, config.unlabelled)
    for part in ("corpus", "queries"):
        if part == "corpus" or (vectors / part / MANIFEST).is_file():
            store = open_fitting(vectors / part, student, "vectors")
            link_files(store.folder, home / "vectors" / part)
    if (vectors / "index" / MANIFEST).is_file():
        link_files(vectors / "index", home / "index")
    else:
        AdIndex.build(VectorStore.open(vectors / "corpus"), dim=student["dim"]).save(home / "index")
    (home / "reports").mkdir()
    for path in (Path(path) for path in (config.report, config.latency) if path):
        for one in (path, path.with_suffix(".png")):
            if one.is_file():
                (home / "reports" / one.name).symlink_to(one.resolve())
    return dataset_card(home, **about(config, repositories, "dataset"))


def stage_tables(data: Path, home: Path, unlabelled: bool) -> None:
    """Links to the tables; where they are compressed, or of several formats, which `datasets` does not read, all of
    them as JSONL."""
    texts = ["corpus", "queries", *(["unlabelled"] if unlabelled else [])]
    found = {part: find_table(data, part) for part in (*texts, *(f"qrels/{split}" for split in SPLITS))}
    found = {part: path for part, path in found.items() if path}
    if unlabelled and "unlabelled" not in found:
        raise HlmError(
            f"unlabelled: expected one table of them in {data}, found none; join shards into unlabelled.parquet, or "
            "leave unlabelled out"
        )
    for path in found.values():
        own_file(path, [data])
    (home / "qrels").mkdir(parents=True)
    if (data / MANIFEST).is_file():
        (home / MANIFEST).symlink_to((data / MANIFEST).resolve())
    kinds = {path.suffix for path in found.values()}
    if len(kinds) == 1 and kinds <= {".jsonl", ".parquet", ".tsv", ".csv"}:  # and neither compressed nor TREC's
        for part, path in found.items():
            (home / part).with_suffix(path.suffix).symlink_to(path.resolve())
        return
    loaded = load(str(data), splits=[split for split in SPLITS if f"qrels/{split}" in found])
    for part, path in found.items():
        rows: Iterable[dict[str, Any]] = (row for _, row in read_rows(path))
        if part.startswith("qrels/"):
            judged = loaded.qrels[part.removeprefix("qrels/")].items()
            rows = ({"query-id": q, "corpus-id": d, "score": grade} for q, ads in judged for d, grade in ads.items())
        with open(home / f"{part}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def stage_student(config: PublishConfig, repositories: dict, done: dict, home: Path) -> str:
    link_files(config.student, home)
    given = about(config, repositories, "student")
    report, dataset = given["report"], done["dataset"]
    if report and system_of(report, read_student(config.student)["encoder"], "student") == "student":
        text = eval_results(
            report, dataset_repo=dataset.repo_id, repo_id=given["repo_id"], revision=dataset.commit or UNKNOWN
        )
        (home / RESULTS).parent.mkdir()
        (home / RESULTS).write_text(text, encoding="utf-8")
    return student_card(config.student, **given)


def stage_space(config: PublishConfig, repositories: dict, done: dict, home: Path) -> str:
    """The demo's folder with the package beside it; its settings and front matter name what was just published."""
    if not (Path(config.space) / "app.py").is_file():
        raise HlmError(f"space: expected the demo's folder at {config.space}, found no app.py there; correct the path")
    for name, path in folder_files(config.space):
        if path.suffix != ".png":
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, home / name)
    package = Path(hlm.__file__).parent
    shutil.copytree(package, home / "hlm", ignore=shutil.ignore_patterns(".*", "__pycache__"))
    student, dataset = done["student"], done["dataset"]
    commits = {"student": student.commit or UNKNOWN}
    ids: dict[str, str | None] = {"student": student.repo_id, "teacher": None}
    ours = ["vectors", "index"] + (["data"] if Path(config.data).is_dir() else [])
    for name in [*ours, *(name for name in ("report", "latency") if getattr(config, name))]:
        ids[name], commits[name] = dataset.repo_id, dataset.commit or UNKNOWN
    settings = read_json(str(home / "config.json"))
    settings |= {"data": config.data, "report": None, "latency": None} | ids | {"revisions": commits}
    write_json(home / "config.json", settings)
    card = RepoCard.load(home / "README.md")
    models = [repositories[part].repo_id for part in ("student", "teacher") if part in repositories]
    card.data.models, card.data.datasets = models, [dataset.repo_id]
    card.data.preload_from_hub = [f"{student.repo_id} {','.join(student.files)} {commits['student']}"]
    return str(card)


def print_plan(planned: dict[str, Published]) -> None:
    for one in planned.values():
        print(f"\n{one.repo_type} {one.repo_id}")
        for name, size in one.files.items():
            print(f"{size:>15,}  {name}")
        print(f"{sum(one.files.values()):>15,}  bytes in {len(one.files)} files")
        print(f"\n--- README.md ---\n{one.card}\n--- end ---")
    print("\nWhat would change on the Hub")
    for one in planned.values():
        print(f"{one.repo_type} {one.repo_id}")
        for line in one.changes.lines() if one.changes else [f"not compared with the Hub: {one.not_compared}"]:
            print(f"  {line}")
    print("dry run: nothing was sent")


def print_table(done: dict[str, Published]) -> None:
    print(f"\n{'repository':<50} {'commit':<13} {'files':>5} {'bytes':>15}")
    for one in done.values():
        state = "" if one.changed else "  unchanged"
        size = sum(one.files.values())
        print(f"{one.repo_type + ' ' + one.repo_id:<50} {one.commit[:12]:<13} {len(one.files):>5} {size:>15,}{state}")
        for line in one.changes.lines() if one.changes.any or one.changes.kept else ():
            print(f"  {line}")


if __name__ == "__main__":
    run_recipe(main)
