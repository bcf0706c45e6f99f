"""Publishes a run on the Hub: its student, teacher's adapter, dataset with vectors and index, and the demo.

Everything is checked before anything is sent; each repository changes in one commit; what points to others comes after
them, tags last. The same run published twice changes nothing, and after a failure the same call completes it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from hlm.artefacts import HlmError, read_manifest
from hlm.hub.repository import Repository, collect
from hlm.indexes.lineage import open_fitting, read_student, verify
from hlm.publishing.publish import Published, publish_folder
from hlm.publishing.staging import stage_dataset, stage_space, stage_student, stage_teacher
from hlm.settings import keywords
from hlm.steps import PublishConfig

TYPES = {"teacher": "model", "dataset": "dataset", "student": "model", "space": "space"}  # in the order of publishing


@dataclass(frozen=True)
class Release:
    """A run on the Hub: part (teacher, dataset, student, space) -> its repository, and the collection of them; None
    after a dry run."""

    repositories: dict[str, Published]
    collection: str | None = None


@keywords(PublishConfig)
def publish(config: PublishConfig) -> Release:
    """Publishes a run; with `dry_run` it only says what it would send.

    Every setting of `PublishConfig` is a keyword. What others added on the Hub stays, what they edited there is not
    overwritten: `delete_others` and `overwrite_edited` do so.

    Raises:
        HlmError: parts that do not belong together, something that must not go out, files that others edited on the
            Hub, or a request that failed; the message says what is whole so far.
    """
    repositories = repositories_of(config)
    with tempfile.TemporaryDirectory(prefix="hlm-publish-") as temporary:
        # All is laid out, checked and compared before anything is sent: what is refused then has left nothing anywhere.
        planned = lay_out(config, repositories, Path(temporary) / "planned", {}, dry_run=True)
        if config.dry_run:
            return Release(planned)
        check_plan(planned)
        done: dict[str, Published] = {}
        try:
            for repository in repositories.values():  # so that no card links to a repository that is not there
                repository.create()
            lay_out(config, repositories, Path(temporary) / "sent", done, dry_run=False)
            slug = collect(config.name, list(repositories.values()), "Written by HLM")
            for part, one in done.items():
                if config.tag and one.commit:
                    repositories[part].tag(config.tag, one.commit)
        except HlmError as error:
            whole = ", ".join(f"{one.repo_type} {one.repo_id} at {(one.commit or '')[:12]}" for one in done.values())
            raise HlmError(
                f"{error}. Whole so far: {whole or 'nothing'}; the same command goes on from there"
            ) from error
    return Release(done, slug)


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


def lay_out(
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
            home / part,
            repository.repo_id,
            repo_type=repository.repo_type,
            card=card,
            private=config.private,
            revision=config.revision,
            tag=config.tag,
            defer_tag=True,
            dry_run=dry_run,
            delete_others=config.delete_others,
            overwrite_edited=config.overwrite_edited,
            sources=sources(config, part),
            public_names=public_names(config, repositories),
        )
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
    found = read_manifest(config.teacher or "", "teacher")["encoder"]
    if wanted != found:
        raise HlmError(f"expected the student's teacher {wanted} at {config.teacher}, found {found}; name that teacher")
