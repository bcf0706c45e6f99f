"""Folders <-> the Hub: `local_folder` pulls a repository, `publish_folder` publishes a folder as one commit."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlm import __version__
from hlm.artefacts import HlmError
from hlm.hub.cache import local_folder
from hlm.hub.changes import CARD, Changes
from hlm.hub.repository import Repository
from hlm.publishing.files import folder_files

# huggingface_hub, torch and faiss are imported where they are used: a folder is found without them.
if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from hlm.indexes.index import Index
    from hlm.vectors.store import VectorStore

__all__ = ["Published", "link_files", "local_folder", "publish_folder"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """A repository as it stands after publishing, or as it would.

    Attributes:
        files: path -> bytes, of everything in the repository that HLM put there, beside its record of them.
        commit: None after a dry run, except where all of this is published already.
        changed: whether this call made the commit; False where the same content stood there before.
        changes: what was done, or would be; None where a dry run could not compare, for the reason in `not_compared`.
    """

    repo_id: str
    repo_type: str
    files: dict[str, int]
    card: str
    commit: str | None = None
    changed: bool = False
    changes: Changes | None = None
    not_compared: str | None = None


def publish_folder(
    folder: str | Path | SentenceTransformer | VectorStore | Index,
    repo_id: str,
    *,
    repo_type: str = "model",
    card: str | None = None,
    private: bool = False,
    revision: str = "main",
    tag: str | None = None,
    defer_tag: bool = False,
    message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    dry_run: bool = False,
    teacher: str | None = None,
    delete_others: bool = False,
    overwrite_edited: bool = False,
    sources: Sequence[str | Path] = (),
    public_names: Iterable[str] = (),
) -> Published:
    """Verifies a folder and publishes its documented files as one commit; the same content twice makes no second one.

    What HLM published there before and is no longer in the folder is deleted; what others added on the Hub stays.

    Args:
        folder: a student's or teacher's folder (of a teacher the LoRA adapter is published), a dataset's (tables,
            `vectors/`, `index/`, `reports/`) or a Space's. Or an object: a student, a store (becomes
            `vectors/corpus`) or an index (`index`) of a dataset.
        repo_id: owner/name; made where it is missing.
        card: the text of README.md; None: the folder's own.
        tag: name of the release; refused where it stands on another commit.
        defer_tag: whether `tag` is only checked, for `Repository.tag` to set it once a release of several is whole.
        dry_run: nothing is sent; what would be published is returned, and what that would change, if the Hub answers.
        teacher: fingerprint of its teacher, where a student is given as an object.
        delete_others: files are deleted that others added on the Hub.
        overwrite_edited: files are overwritten that others edited on the Hub, such as the card; without it that is
            refused before anything is sent.
        sources: folders and files that links in `folder` may point to.
        public_names: names of this machine, its user or the home folder that may be published; the repository's owner
            and name always may.

    Raises:
        HlmError: damaged, not of the kind, files that have no place there, a secret in one, or the Hub's refusal.
    """
    from hlm.publishing.files import release_files, size_of

    to = Repository(repo_id, repo_type, private, revision, token, endpoint)
    with _as_folder(folder, teacher) as (source, linked):
        kind = repo_type if repo_type != "model" else _kind_of(source)
        names = [*public_names, *repo_id.split("/")]
        files = release_files(source, kind, card, sources=[*sources, *linked], public_names=names)
        sizes = {name: size_of(content) for name, content in files.items()}
        written = files.get(CARD, b"")
        text = (written if isinstance(written, bytes) else written.read_bytes()).decode()
        flags = {"delete_others": delete_others, "overwrite_edited": overwrite_edited}
        if dry_run:
            return _planned(to, files, flags, Published(repo_id, repo_type, sizes, text))
        to.create()
        changes = to.changes(files).asked(**flags)
        title = message or f"{kind}, written by HLM {__version__}"
        commit, changed = to.write(files, title, tag, changes=changes)
    if tag is not None and not defer_tag:
        to.tag(tag, commit)
    logger.info("%s: %s %s; %s", to.name, "commit" if changed else "unchanged at", commit, "; ".join(changes.lines()))
    return Published(repo_id, repo_type, sizes, text, commit, changed, changes)


def _planned(to: Repository, files: dict[str, Path | bytes], flags: dict[str, bool], planned: Published) -> Published:
    try:
        changes = to.changes(files).asked(**flags)
    except HlmError as error:
        return replace(planned, not_compared=str(error))
    return replace(planned, changes=changes, commit=None if changes.any else changes.head)


@contextlib.contextmanager
def _as_folder(thing: Any, teacher: str | None) -> Iterator[tuple[Path, list[Path]]]:
    """(folder, what the links in it point to)."""
    if isinstance(thing, (str, Path)):
        yield Path(thing), []
        return
    from hlm.indexes.index import Index
    from hlm.vectors.store import VectorStore

    with tempfile.TemporaryDirectory(prefix="hlm-") as temporary:
        folder = Path(temporary) / "folder"
        if isinstance(thing, Index):
            thing.save(folder / "index")
        elif isinstance(thing, VectorStore):
            link_files(thing.folder, folder / "vectors/corpus")
        elif teacher is None:
            raise HlmError("teacher: expected the fingerprint of the student's teacher, found none; give it")
        else:
            from hlm.encoders.loading import save_encoder

            save_encoder(thing, folder, "student", inputs={"teacher": teacher}, config={})
        yield folder, [thing.folder] if isinstance(thing, VectorStore) else []


def link_files(source: str | Path, target: str | Path) -> None:
    """Puts links to the files of the folder `source` into `target`: a view of it that costs no disk. Hidden files are
    left out.

    Raises:
        HlmError: a link in `source` leads out of it.
    """
    Path(target).mkdir(parents=True)
    for name, path in folder_files(source):
        link = Path(target) / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())


def _kind_of(folder: Path) -> str:
    return "teacher" if (folder / "adapter").is_dir() else "student"
