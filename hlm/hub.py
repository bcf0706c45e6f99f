"""Folders <-> the Hub: `local_folder` pulls a repository, `publish_folder` publishes a folder as one commit."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlm import __version__
from hlm.artefacts import HlmError
from hlm.hub_cache import local_folder
from hlm.hub_repository import Repository

# huggingface_hub, torch and faiss are imported where they are used: a folder is found without them.
if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from hlm.index import AdIndex
    from hlm.store import VectorStore

__all__ = ["Published", "link_files", "local_folder", "publish_folder"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """A repository as it stands after publishing, or as it would: `commit` is None after a dry run.

    Attributes:
        files: path -> bytes, of everything in the repository that HLM put there.
        changed: whether this call made the commit; False where the same content stood there before.
    """

    repo_id: str
    repo_type: str
    files: dict[str, int]
    card: str
    commit: str | None = None
    changed: bool = False


def publish_folder(
    folder: str | Path | SentenceTransformer | VectorStore | AdIndex,
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
) -> Published:
    """Verifies a folder and publishes its documented files as one commit; the same content twice makes no second one.

    Args:
        folder: a student's or teacher's folder (of a teacher the LoRA adapter is published), a dataset's (tables,
            `vectors/`, `index/`, `reports/`) or a Space's. Or an object: a student, a store (becomes
            `vectors/corpus`) or an index (`index`) of a dataset.
        repo_id: owner/name; made where it is missing.
        card: the text of README.md; None: the folder's own.
        tag: name of the release; refused where it stands on another commit.
        defer_tag: whether `tag` is only checked, for `Repository.tag` to set it once a release of several is whole.
        dry_run: nothing is sent nor asked; what would be published is returned.
        teacher: fingerprint of its teacher, where a student is given as an object.

    Raises:
        HlmError: damaged, not of the kind, files that have no place there, a secret in one, or the Hub's refusal.
    """
    from hlm.hub_files import CARD, release_files, size_of

    to = Repository(repo_id, repo_type, private, revision, token, endpoint)
    with _as_folder(folder, teacher) as source:
        kind = repo_type if repo_type != "model" else _kind_of(source)
        files = release_files(source, kind, card)
        sizes = {name: size_of(content) for name, content in files.items()}
        written = files.get(CARD, b"")
        text = (written if isinstance(written, bytes) else written.read_bytes()).decode()
        if dry_run:
            return Published(repo_id, repo_type, sizes, text)
        to.create()
        commit, changed = to.write(files, message or f"{kind}, written by HLM {__version__}", tag)
    if tag is not None and not defer_tag:
        to.tag(tag, commit)
    logger.info("%s: %s %s", to.name, "commit" if changed else "unchanged at", commit)
    return Published(repo_id, repo_type, sizes, text, commit, changed)


@contextlib.contextmanager
def _as_folder(thing: Any, teacher: str | None) -> Iterator[Path]:
    if isinstance(thing, (str, Path)):
        yield Path(thing)
        return
    from hlm.index import AdIndex
    from hlm.store import VectorStore

    with tempfile.TemporaryDirectory(prefix="hlm-") as temporary:
        folder = Path(temporary) / "folder"
        if isinstance(thing, AdIndex):
            thing.save(folder / "index")
        elif isinstance(thing, VectorStore):
            link_files(thing.folder, folder / "vectors/corpus")
        elif teacher is None:
            raise HlmError("teacher: expected the fingerprint of the student's teacher, found none; give it")
        else:
            from hlm.encoders import save_encoder

            save_encoder(thing, folder, "student", inputs={"teacher": teacher}, config={})
        yield folder


def link_files(source: str | Path, target: str | Path) -> None:
    """Puts links to the files of the folder `source` into `target`: a view of it that costs no disk."""
    Path(target).mkdir(parents=True)
    for path in Path(source).iterdir():
        if path.is_dir():
            link_files(path, Path(target) / path.name)
        else:
            (Path(target) / path.name).symlink_to(path.resolve())


def _kind_of(folder: Path) -> str:
    return "teacher" if (folder / "adapter").is_dir() else "student"
