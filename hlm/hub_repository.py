"""A repository on the Hub: made, written to in one commit, tagged; and what its errors mean."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlm import __version__
from hlm.artefacts import MANIFEST, HlmError

# huggingface_hub is imported where it is used: a folder is found without it.
if TYPE_CHECKING:
    from huggingface_hub import HfApi

AGAIN = "run it again: what has arrived is not sent again, and nothing is half there meanwhile"
REMEDIES = {
    401: "log in with `hf auth login` or set HF_TOKEN",
    402: "the Hub asks for payment, as for Spaces that compute: subscribe, or leave that repository out",
    403: "use a token that may write there, or correct the name",
    404: "correct the name, or log in with `hf auth login` where it is private",
    409: "something else changed it meanwhile; run it again",
    412: "something else changed it meanwhile; run it again",
    413: "it is too large for one commit; split it",
    429: "the Hub asks to wait; wait some minutes, then run it again",
}


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub and the branch that is written to.

    Attributes:
        private: created so; an older one that is public is refused, never written to.
        revision: branch; created from main where it is missing.
        token: None: as huggingface_hub finds it (`hf auth login`, HF_TOKEN). Never shown, nor in an error.
        endpoint: None: HF_ENDPOINT, or the Hub.
    """

    repo_id: str
    repo_type: str = "model"
    private: bool = False
    revision: str = "main"
    token: str | None = field(default=None, repr=False)
    endpoint: str | None = None

    @property
    def name(self) -> str:
        return f"{self.repo_type} {self.repo_id}"

    @property
    def where(self) -> dict[str, str]:
        return {"repo_id": self.repo_id, "repo_type": self.repo_type}

    def api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(self.endpoint, token=self.token, library_name="hlm", library_version=__version__)

    def create(self) -> None:
        """Makes the repository and its branch where they are missing.

        Raises:
            HlmError: it is public and was to be private, the revision is no branch, or the Hub refuses.
        """
        if re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise HlmError(f"revision: expected a branch, found the commit {self.revision}; name a branch to write to")
        api = self.api()
        with hub_errors(f"{self.name} could not be made ready"):
            sdk = {"space_sdk": "gradio"} if self.repo_type == "space" else {}
            api.create_repo(**self.where, private=self.private or None, exist_ok=True, **sdk)
            if self.private and not api.repo_info(**self.where).private:
                raise HlmError(
                    f"expected {self.name} to be private, found it public; make it private on its settings page, or "
                    "choose another name"
                )
            if self.revision != "main":
                api.create_branch(**self.where, branch=self.revision, exist_ok=True)

    def tags(self) -> dict[str, str]:
        """Tag -> commit."""
        with hub_errors(f"the tags of {self.name} could not be read"):
            return {tag.name: tag.target_commit for tag in self.api().list_repo_refs(**self.where).tags}

    def tag(self, name: str, commit: str) -> None:
        """Names a commit, once and for all.

        Raises:
            HlmError: the tag stands on another commit.
        """
        if self._refuse_taken(name, commit) is None:
            with hub_errors(f"{self.name}, commit {commit}, could not be tagged {name}"):
                self.api().create_tag(**self.where, tag=name, revision=commit)

    def write(self, files: Mapping[str, Path | bytes], message: str, tag: str | None = None) -> tuple[str, bool]:
        """Makes the branch hold exactly `files` (and the Hub's own .gitattributes), in one commit or none.

        Large files go first and the commit last, so that a failure leaves the branch as it was; what has arrived is
        not sent again. Files equal to the repository's own are left out, and with nothing left no commit is made.

        Args:
            files: path in the repository -> a file or its content.
            tag: refused before anything is sent where it stands on another commit than the one to come.

        Returns:
            The commit, and whether it was made now.

        Raises:
            HlmError: not written by HLM before, changed by someone else meanwhile, or the Hub cannot be reached.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        api = self.api()
        with hub_errors(f"{self.name} was not changed"):
            head = api.repo_info(**self.where, revision=self.revision).sha
            there = self.hashes(head)
            ours = any(path.endswith(MANIFEST) or path.startswith("hlm/") for path in there)
            foreign = sorted(set(there) - {".gitattributes", "README.md"})
            if foreign and not ours:
                raise HlmError(
                    f"expected {self.name} to be new or written by HLM before, found other files there "
                    f"({', '.join(foreign[:3])}); choose another name, or empty it by hand"
                )
            added = [path for path, content in files.items() if not same_content(content, there.get(path))]
            gone = [path for path in there if path not in files and path != ".gitattributes"]
            changed = bool(added or gone)
            if tag is not None:
                self._refuse_taken(tag, None if changed else head)
            if not changed:
                return head, False
            operations: list[Any] = [
                CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
                for path, content in files.items()
                if path in added
            ]
            operations += [CommitOperationDelete(path, is_folder=False) for path in gone]
            commit = api.create_commit(
                **self.where, operations=operations, commit_message=message, revision=self.revision, parent_commit=head
            ).oid
        with hub_errors(f"{self.name}, commit {commit}, was written and could not be compared with what was sent"):
            there = self.hashes(commit)
            wrong = [path for path, content in files.items() if not same_content(content, there.get(path))]
        if wrong:
            raise HlmError(
                f"{self.name}, commit {commit}: expected what was sent, found other content of {', '.join(wrong[:3])}; "
                f"{AGAIN}"
            )
        return commit, True

    def hashes(self, commit: str) -> dict[str, str]:
        """Path -> SHA-256 of a large file, Git's hash of a small one."""
        from huggingface_hub.hf_api import RepoFile

        entries = self.api().list_repo_tree(**self.where, revision=commit, recursive=True)
        return {e.path: e.lfs.sha256 if e.lfs else e.blob_id for e in entries if isinstance(e, RepoFile)}

    def _refuse_taken(self, tag: str, commit: str | None) -> str | None:
        """The commit that the tag stands on, where that is `commit`; None: it is free."""
        found = self.tags().get(tag)
        if found not in (None, commit):
            raise HlmError(
                f"tag {tag} of {self.name}: expected it to be free or on {commit or 'the commit to come'}, found it on "
                f"{found}; choose another tag, a release is never moved"
            )
        return found


def collect(title: str, repositories: Sequence[Repository], description: str | None = None) -> str:
    """Puts repositories into the collection of this title, of the first one's owner; made where it is missing.

    Returns:
        Its slug; its page is https://huggingface.co/collections/<slug>.
    """
    first = repositories[0]
    api, owner = first.api(), first.repo_id.split("/")[0]
    with hub_errors(f"the collection '{title}' of {owner} was not completed"):
        collection = api.create_collection(
            title, namespace=owner, description=description, private=first.private, exists_ok=True
        )
        there = {(item.item_type, item.item_id) for item in collection.items}
        for repository in repositories:
            if (repository.repo_type, repository.repo_id) not in there:
                api.add_collection_item(
                    collection.slug, item_id=repository.repo_id, item_type=repository.repo_type, exists_ok=True
                )
    return collection.slug


def same_content(content: Path | bytes, found: str | None) -> bool:
    """Whether the repository's hash, of either kind, is the content's."""
    if found is None:
        return False
    if len(found) == 64:
        if isinstance(content, bytes):
            return hashlib.sha256(content).hexdigest() == found
        with open(content, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == found
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    digest.update(content if isinstance(content, bytes) else content.read_bytes())
    return digest.hexdigest() == found


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Whatever huggingface_hub and its transports raise becomes an HlmError: `what`, the cause, what to do."""
    from huggingface_hub import errors

    kinds = [errors.HTTPError, OSError, RuntimeError, ValueError, errors.EntryNotFoundError]
    kinds += [KeyError, AssertionError]  # a damaged answer lacks what huggingface_hub takes of it
    kinds += [
        getattr(errors, name) for name in ("XetDownloadError", "RevisionResolutionError") if hasattr(errors, name)
    ]
    try:
        yield
    except HlmError:
        raise
    except tuple(kinds) as error:
        raise HlmError(f"{what} ({_redacted(_reason(error))}); {_remedy(error)}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str:
    """Type and text of what happened first: an upload's error is wrapped in ones that say less."""
    status, found = _status(error)
    cause = found or next((e for e in _chain(error) if isinstance(e, OSError) and e.errno), None) or error
    text = " ".join(str(cause).split()) or "no further text"
    return f"{type(cause).__name__}{f', HTTP {status}' if status else ''}: {text[:300]}"


def _status(error: BaseException) -> tuple[int | None, BaseException | None]:
    for cause in _chain(error):
        if (response := getattr(cause, "response", None)) is not None and hasattr(response, "status_code"):
            return response.status_code, cause
    return None, None


def _remedy(error: BaseException) -> str:
    status, _ = _status(error)
    text = " ".join(str(cause) for cause in _chain(error))
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if any(isinstance(cause, OSError) and cause.errno in full for cause in _chain(error)) or "No space" in text:
        return f"free some space on the disk, then {AGAIN}"
    if status in REMEDIES:
        return REMEDIES[status]
    if status is not None and status < 500:
        return "correct what the Hub objects to"
    if type(error).__name__ in ("HFValidationError", "RevisionNotFoundError"):
        return "correct the name"
    if type(error).__name__ == "LocalTokenNotFoundError":
        return REMEDIES[401]
    return f"check the connection, then {AGAIN}"


def _redacted(text: str) -> str:
    """Without tokens, and without the queries of addresses, which carry signatures."""
    from huggingface_hub import get_token

    text = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1?...", re.sub(r"\b(hf|api_org)_[A-Za-z0-9]+", "***", text))
    return text.replace(token, "***") if (token := get_token()) else text
