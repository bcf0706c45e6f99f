"""What the Hub on loopback keeps: repositories with commits, branches and tags, collections, and what has arrived; and
whether what stands there is whole."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hub_faults import Refused
from hub_xet import XetStore

if TYPE_CHECKING:
    from hub_server import HubServer

REPO = r"(?P<kind>models|datasets|spaces)/(?P<name>[\w.-]+/[\w.-]+)"
GITATTRIBUTES = "".join(
    f"*.{end} filter=lfs diff=lfs merge=lfs -text\n"
    for end in "7z arrow bin bz2 gz h5 model npy npz onnx parquet pickle pkl pt pth safetensors tar zip".split()
)


@dataclass(frozen=True)
class Entry:
    """A file of a commit: small ones have `content`, large ones are named by their SHA-256."""

    size: int
    oid: str  # Git's hash: of the content, or of the LFS pointer
    content: bytes | None = None
    sha256: str | None = None

    @classmethod
    def small(cls, content: bytes) -> Entry:
        return cls(len(content), git_hash(content), content=content)

    @classmethod
    def large(cls, sha256: str, size: int) -> Entry:
        return cls(size, git_hash(pointer(sha256, size)), sha256=sha256)


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit_of(self, revision: str) -> str:
        commit = self.branches.get(revision) or self.tags.get(revision) or revision
        if commit not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def write(self, branch: str, files: dict[str, Entry], title: str) -> str:
        """The one place that changes a branch: the commit is there with all its files, or not at all."""
        parts = [self.branches.get(branch, ""), title, str(len(self.commits))]
        parts += [f"{path}:{entry.oid}" for path, entry in sorted(files.items())]
        commit = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass
class State:
    """All that requests change; large contents are on the disk, `stored` says which of them have arrived."""

    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)  # ("models", "acme/x") -> ...
    collections: dict[str, dict[str, Any]] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)  # SHA-256 -> bytes
    xet: XetStore = field(default_factory=XetStore)


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
