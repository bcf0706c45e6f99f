"""What publishing again would do to a repository, and what of it would undo the work of others.

Each commit carries a record of the files that HLM wrote with it, so that any machine can tell them from those that
somebody added or edited on the Hub since.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hlm.errors import HlmError
from hlm.outputs import MANIFEST

RECORD = ".hlm-published.json"
CARD, ATTRIBUTES = "README.md", ".gitattributes"


@dataclass(frozen=True)
class Changes:
    """What writing files to a branch does to it.

    Attributes:
        head: the commit that the branch is on; None: there is no such repository, or none that this login may see.
        added, changed, deleted: paths of files.
        kept: paths of files that others added, or that HLM wrote once and others edited since; they stay.
        edited: those of `changed` that others wrote: on the Hub they are not what HLM put there. They are not written.
        overwritten: the same, where it was asked for.
        record: content of the record that belongs to the files.
        outdated: whether another record, or none, is there.
    """

    head: str | None
    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    edited: tuple[str, ...] = ()
    overwritten: tuple[str, ...] = ()
    record: bytes = b""
    outdated: bool = True

    @property
    def any(self) -> bool:
        return bool(self.added or self.changed or self.deleted or self.outdated)

    def asked(self, *, delete_others: bool, overwrite_edited: bool) -> Changes:
        """The changes with what the two flags add: `kept` is deleted, `edited` is overwritten."""
        changes = replace(self, deleted=(*self.deleted, *self.kept), kept=()) if delete_others else self
        return replace(changes, edited=(), overwritten=self.edited) if overwrite_edited else changes

    def refuse_edited(self, name: str) -> None:
        """Raises an HlmError where something of the repository `name` would be overwritten that others wrote."""
        if self.edited:
            raise HlmError(
                f"{name} was not changed: expected {', '.join(self.edited[:3])} there as HLM wrote it, found it edited "
                "on the Hub, or added there by others; take their text over into what you publish, then run it again "
                "with --overwrite_edited (in Python overwrite_edited=True), which replaces it"
            )

    def lines(self) -> Iterator[str]:
        """What changes, one line a kind."""
        if self.head is None:
            yield "new: the repository is not there yet, or cannot be seen with this login"
        for kind in ("added", "changed", "deleted"):
            if paths := getattr(self, kind):
                yield f"{kind}: {', '.join(paths)}"
        if self.kept:
            yield f"kept, as others wrote it: {', '.join(self.kept)}; --delete_others deletes it"
        if self.edited:
            yield f"refused, as others edited it on the Hub: {', '.join(self.edited)}; --overwrite_edited replaces it"
        if self.overwritten:
            yield f"overwritten, though others edited it on the Hub: {', '.join(self.overwritten)}"
        if not self.any:
            yield "unchanged"


def compare(
    head: str, there: Mapping[str, str], files: Mapping[str, Path | bytes], record: bytes | None, untouched: bool
) -> Changes:
    """Tells what is to be done, file by file.

    Args:
        there: path -> hash of either kind, of what the branch holds.
        files: path -> what it is to hold.
        record: what HLM wrote there last; None: nothing, or a version that kept no record.
        untouched: whether nobody wrote to the repository since the Hub made it, with a card of its own.
    """
    new, wrote = make_record(files), read_record(record)
    same = {path for path, found in read_record(new).items() if there.get(path) in found}
    others = {path for path, found in there.items() if found not in wrote.get(path, ())} - {RECORD, ATTRIBUTES}
    changed = [path for path in files if path in there and path not in same]
    return Changes(
        head,
        added=tuple(path for path in files if path not in there),
        changed=tuple(changed),
        deleted=tuple(path for path in wrote if path in there and path not in files and path not in others),
        kept=() if untouched else tuple(sorted(others - set(files))),
        edited=() if untouched else tuple(path for path in changed if path in others),
        record=new,
        outdated=record != new,
    )


def foreign(there: Mapping[str, str]) -> list[str]:
    """Files of a repository that HLM never wrote to; none where it did, or where the repository is new."""
    ours = any(path == RECORD or path.endswith(MANIFEST) or path.startswith("hlm/") for path in there)
    return [] if ours else sorted(set(there) - {ATTRIBUTES, CARD})


def make_record(files: Mapping[str, Path | bytes]) -> bytes:
    """JSON: {"files": {path: [Git's hash, SHA-256]}}; the Hub tells the one of small files, the other of large ones."""
    return (json.dumps({"files": {path: hashes(content) for path, content in sorted(files.items())}}) + "\n").encode()


def read_record(record: bytes | None) -> dict[str, list[str]]:
    """Path -> hashes; nothing where somebody made something else of the record: all files then count as others'."""
    try:
        files = json.loads(record or b"{}")["files"]
        return {str(path): [str(one) for one in found] for path, found in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def hashes(content: Path | bytes) -> list[str]:
    """[Git's hash, SHA-256] of a content, which is read once and in pieces."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    git, large = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), hashlib.sha256()
    if isinstance(content, bytes):
        git.update(content)
        large.update(content)
    else:
        with open(content, "rb") as file:
            while block := file.read(1 << 20):
                git.update(block)
                large.update(block)
    return [git.hexdigest(), large.hexdigest()]


def same_content(content: Path | bytes, found: str | None) -> bool:
    """Whether the repository's hash, of either kind, is the content's."""
    if found is None:
        return False
    if len(found) == 64 and not isinstance(content, bytes):
        with open(content, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == found
    return found in hashes(content)
