"""A repository on the Hub: made, written to in one commit, tagged; and what its errors mean."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlm import __version__
from hlm.errors import FULL_DISK, HlmError
from hlm.hub.changes import ATTRIBUTES, CARD, RECORD, Changes, compare, foreign, make_record, same_content

# huggingface_hub is imported where it is used: a folder is found without it.
if TYPE_CHECKING:
    from huggingface_hub import HfApi

AGAIN = "run it again: what has arrived is not sent again, and nothing is half there meanwhile"
TIMEOUT_S = 10.0  # for the first question: a dry run without a network does not wait for long
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

    def __post_init__(self) -> None:
        check_id(self.repo_id, self.repo_type)

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

    def changes(self, files: Mapping[str, Path | bytes]) -> Changes:
        """What `write` would do, by asking alone; a branch that is not there yet is compared with main.

        Raises:
            HlmError: not written by HLM before, or the Hub cannot be reached.
        """
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        api = self.api()
        with hub_errors(f"{self.name} could not be compared"):
            try:
                try:
                    head = api.repo_info(**self.where, revision=self.revision, timeout=TIMEOUT_S).sha
                except RevisionNotFoundError:
                    head = api.repo_info(**self.where, timeout=TIMEOUT_S).sha
            except RepositoryNotFoundError:
                return Changes(None, added=tuple(files), record=make_record(files))
            there = self.hashes(head)
            if others := foreign(there):
                raise HlmError(
                    f"expected {self.name} to be new or written by HLM before, found other files there "
                    f"({', '.join(others[:3])}); choose another name, or empty it by hand"
                )
            record = self._read(RECORD, head, there[RECORD]) if RECORD in there else None
            # The Hub makes a Space with a card of its own, which nobody wrote.
            new = CARD in there and set(there) <= {ATTRIBUTES, CARD}
            untouched = new and len(api.list_repo_commits(**self.where, revision=head)) == 1
        return compare(head, there, files, record, untouched)

    def write(
        self,
        files: Mapping[str, Path | bytes],
        message: str,
        tag: str | None = None,
        *,
        delete_others: bool = False,
        overwrite_edited: bool = False,
        changes: Changes | None = None,
    ) -> tuple[str, bool]:
        """Makes the branch hold `files`, in one commit or none: what HLM put there before and is not among them is
        deleted, what others added is kept, and what others edited is not overwritten.

        Large files go first and the commit last, so that a failure leaves the branch as it was; what has arrived is
        not sent again. Files equal to the repository's own are left out, and with nothing left no commit is made.

        Args:
            files: path in the repository -> a file or its content.
            tag: refused before anything is sent where it stands on another commit than the one to come.
            delete_others: what others added is deleted: the branch then holds exactly `files`, the record of them
                (`.hlm-published.json`) and the Hub's own .gitattributes.
            overwrite_edited: what others edited is overwritten.
            changes: of `changes(files)`, where the caller has asked already.

        Returns:
            The commit, and whether it was made now.

        Raises:
            HlmError: not written by HLM before, edited by others, changed by someone else meanwhile, or the Hub cannot
                be reached.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        changes = changes or self.changes(files)
        changes = changes.asked(delete_others=delete_others, overwrite_edited=overwrite_edited)
        changes.refuse_edited(self.name)
        if changes.head is None:
            raise HlmError(f"expected {self.name} on the Hub, found none that this login may write to; {REMEDIES[404]}")
        if tag is not None:
            self._refuse_taken(tag, None if changes.any else changes.head)
        if not changes.any:
            return changes.head, False
        sent = {path: files[path] for path in files if path in {*changes.added, *changes.changed}}
        if changes.outdated:
            sent[RECORD] = changes.record
        operations: list[Any] = [
            CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
            for path, content in sent.items()
        ]
        operations += [CommitOperationDelete(path, is_folder=False) for path in changes.deleted]
        with hub_errors(f"{self.name} was not changed"):
            commit = (
                self.api()
                .create_commit(
                    **self.where,
                    operations=operations,
                    commit_message=message,
                    revision=self.revision,
                    parent_commit=changes.head,
                )
                .oid
            )
        with hub_errors(f"{self.name}, commit {commit}, was written and could not be compared with what was sent"):
            there = self.hashes(commit)
            expected = {**files, RECORD: changes.record}
            wrong = [path for path, content in expected.items() if not same_content(content, there.get(path))]
        if wrong:
            raise HlmError(
                f"{self.name}, commit {commit}: expected what was sent, found other content of {', '.join(wrong[:3])}; "
                f"{AGAIN}"
            )
        return commit, True

    def _read(self, path: str, commit: str, expected: str) -> bytes:
        """A small file's content, past the cache."""
        with tempfile.TemporaryDirectory(prefix="hlm-") as temporary:
            file = self.api().hf_hub_download(**self.where, filename=path, revision=commit, cache_dir=temporary)
            content = Path(file).read_bytes()
        if not same_content(content, expected):
            raise HlmError(f"{self.name}: expected {path} as the Hub has it, found it damaged on arrival; {AGAIN}")
        return content

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


def check_id(repo_id: str, repo_type: str) -> None:
    """Raises an HlmError where the Hub could have no repository of this name and type."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if repo_type not in ("model", "dataset", "space"):
        raise HlmError(f"repo_type: expected model, dataset or space, found {repo_type!r}; correct it")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HlmError(
            f"expected a Hub id (owner/name), found {repo_id!r} ({_line(error)}); correct the name"
        ) from error
    if repo_id.count("/") != 1:
        raise HlmError(f"expected a Hub id (owner/name), found {repo_id!r}; name the owner too")


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
        from hlm.redaction import public_error

        raise HlmError(f"{what} ({public_error(_reason(error))}); {_remedy(error)}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str:
    """Type and text of what happened first: an upload's error is wrapped in ones that say less."""
    status, found = _status(error)
    cause = found or next((e for e in _chain(error) if isinstance(e, OSError) and e.errno), None) or error
    text = _line(cause) or "no further text"
    return f"{type(cause).__name__}{f', HTTP {status}' if status else ''}: {text[:300]}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _status(error: BaseException) -> tuple[int | None, BaseException | None]:
    for cause in _chain(error):
        if (response := getattr(cause, "response", None)) is not None and hasattr(response, "status_code"):
            return response.status_code, cause
    return None, None


def _remedy(error: BaseException) -> str:
    status, _ = _status(error)
    text = " ".join(str(cause) for cause in _chain(error))
    if any(isinstance(cause, OSError) and cause.errno in FULL_DISK for cause in _chain(error)) or "No space" in text:
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
