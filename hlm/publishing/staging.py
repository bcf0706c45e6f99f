"""Lays out the folder of each repository of a release, with its card: links to what the steps wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import RepoCard

import hlm
from hlm.artefacts import MANIFEST, HlmError, read_manifest, write_json
from hlm.data.contract import load
from hlm.data.tables import find_table, read_rows
from hlm.fields import read_json
from hlm.hub.repository import Repository
from hlm.indexes.faiss_index import AdIndex
from hlm.indexes.index import ENGINES, KIND, engine_of
from hlm.indexes.lineage import open_fitting, read_student
from hlm.publishing.card_facts import system_of
from hlm.publishing.cards import dataset_card, eval_results, student_card, teacher_card
from hlm.publishing.files import RESULTS, folder_files, own_file
from hlm.publishing.publish import link_files
from hlm.report_files import read_latency, read_report
from hlm.steps import PublishConfig
from hlm.vectors import versions
from hlm.vectors.store import VectorStore

SPLITS = ("train", "dev", "test")
# Of the package; in a wheel, recipes and cards lie within it.
LEFT_OUT = (".*", "__pycache__", "py.typed", "recipes", "model_cards")
UNKNOWN = "0" * 40  # in a dry run, the commit that is not there yet


def about(config: PublishConfig, repositories: dict[str, Repository], part: str) -> dict[str, Any]:
    """What a card says beside the manifests."""
    others = {f"{one}_repo": repositories[one].repo_id for one in repositories if one != "space"}
    files = {
        "report": read_report(config.report) if config.report else None,
        "latency": read_latency(config.latency) if config.latency else None,
    }
    given = {name: getattr(config, name) for name in ("base_model", "licence", "language", "public_names")}
    return {"repo_id": repositories[part].repo_id, **others, **files, **given}


def stage_teacher(config: PublishConfig, repositories: dict, done: dict, home: Path) -> str:
    teacher = Path(config.teacher or "")  # a part that is None is not laid out
    link_files(teacher, home)
    settings = home / "adapter/adapter_config.json"
    if config.base_model and settings.is_file():  # where the run found its backbone is nobody else's path
        values = json.loads(settings.read_text()) | {"base_model_name_or_path": config.base_model}
        settings.unlink()
        write_json(settings, values)
    return teacher_card(teacher, **about(config, repositories, "teacher"))


def stage_dataset(config: PublishConfig, repositories: dict, done: dict, home: Path) -> str:
    vectors, student = Path(config.vectors), read_student(config.student)
    if Path(config.data).is_dir():
        stage_tables(Path(config.data), home, config.unlabelled)
    for part in ("corpus", "queries"):
        if part == "corpus" or (vectors / part / MANIFEST).is_file():
            open_fitting(vectors / part, student, "vectors")
            link_current(vectors / part, home / "vectors" / part)
    if (vectors / "index" / MANIFEST).is_file() and _is_published(vectors / "index"):
        link_current(vectors / "index", home / "index")
    else:
        AdIndex.build(VectorStore.open(vectors / "corpus"), dim=student["dim"]).save(home / "index")
    (home / "reports").mkdir()
    for path in (Path(path) for path in (config.report, config.latency) if path):
        for one in (path, path.with_suffix(".png")):
            if one.is_file():
                (home / "reports" / one.name).symlink_to(one.resolve())
    return dataset_card(home, **about(config, repositories, "dataset"))


def link_current(source: Path, target: Path) -> None:
    """Links to the files of a store or an index; where it has versions, to those of the current one, as if it had no
    others."""
    if not versions.are_kept(source):
        link_files(source, target)
        return
    target.mkdir(parents=True)
    for name, path in versions.current_files(source).items():
        own_file(path, [source])
        (target / name).symlink_to(path.resolve())


def _is_published(index: Path) -> bool:
    """Whether the engine of an index has files that are published; of another one FAISS builds the like."""
    return bool(ENGINES[engine_of(read_manifest(index, KIND), index / MANIFEST)].files)


def stage_tables(data: Path, home: Path, unlabelled: bool) -> None:
    """Links to the tables; where they are compressed, or of several formats, which `datasets` does not read, all of
    them as JSONL."""
    texts = ["corpus", "queries", *(["unlabelled"] if unlabelled else [])]
    wanted = (*texts, *(f"qrels/{split}" for split in SPLITS))
    found = {part: path for part in wanted if (path := find_table(data, part))}
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
    space = Path(config.space or "")
    if not (space / "app.py").is_file():
        raise HlmError(f"space: expected the demo's folder at {config.space}, found no app.py there; correct the path")
    for name, path in folder_files(space):
        if path.suffix != ".png":
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, home / name)
    package = Path(hlm.__file__).parent
    shutil.copytree(package, home / "hlm", ignore=shutil.ignore_patterns(*LEFT_OUT))
    student, dataset = done["student"], done["dataset"]
    commits = {"student": student.commit or UNKNOWN}
    ids: dict[str, str | None] = {"student": student.repo_id, "teacher": None}
    ours = ["vectors", "index"] + (["data"] if Path(config.data).is_dir() else [])
    for name in [*ours, *(name for name in ("report", "latency") if getattr(config, name))]:
        ids[name], commits[name] = dataset.repo_id, dataset.commit or UNKNOWN
    settings = read_json(home / "config.json")
    settings |= {"data": config.data, "report": None, "latency": None} | ids | {"revisions": commits}
    write_json(home / "config.json", settings)
    card = RepoCard.load(home / "README.md")
    models = [repositories[part].repo_id for part in ("student", "teacher") if part in repositories]
    card.data.models, card.data.datasets = models, [dataset.repo_id]
    card.data.preload_from_hub = [f"{student.repo_id} {','.join(student.files)} {commits['student']}"]
    return str(card)
