"""What the Hub on loopback keeps: repositories with commits, branches and tags, collections, and what has arrived."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from hub_faults import Refused
from hub_xet import XetStore

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
