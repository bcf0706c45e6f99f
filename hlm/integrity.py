"""Reading what others may damage or replace: every file that is used is the file that the manifest tells of.

Small files are hashed at every load. A large one is hashed once; afterwards it is known by inode, size and times, which
a cache in HLM_CACHE remembers. A folder that is replaced while it is read is read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from hlm.errors import HlmError
from hlm.outputs import MANIFEST, recover, write_json

logger = logging.getLogger(__name__)

LARGE_BYTES = 2**22  # some 3 ms to hash
ATTEMPTS = 10

_known: dict[str, tuple[list[int], str]] = {}  # absolute path -> (state of the file, fingerprint)
T = TypeVar("T")


def fingerprint_file(path: str | Path) -> str:
    """16 hex digits over a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def cache_folder() -> Path:
    """Where HLM keeps what it can make again: HLM_CACHE, or ~/.cache/hlm."""
    try:
        return Path(os.environ.get("HLM_CACHE") or Path.home() / ".cache" / "hlm")
    except RuntimeError as error:
        raise HlmError(f"expected a home folder for the cache, found none ({error}); set HLM_CACHE") from error


def check_files(folder: str | Path, records: Mapping[str, Any], names: Iterable[str]) -> None:
    """Compares files that are about to be read with what the folder's manifest says of them.

    Args:
        records: `files` of the manifest: path within the folder -> fingerprint.
        names: the files that are about to be read; one without a record is refused too where it exists.

    Raises:
        HlmError: a file is missing, changed, cut short, or none that the manifest tells of.
    """
    for name in names:
        path, expected = Path(folder) / name, records.get(name)
        found = known_fingerprint(path) if path.is_file() else None
        if found != expected:
            wanted = f"content {expected}" if expected else "no such file"
            raise HlmError(
                f"{path}: expected {wanted} as {MANIFEST} says, found {found or 'no file'}; it was changed, added or "
                "cut short: copy or pull the folder again, or run the step that writes it again"
            )


def file_state(file: str | Path | int, *, strict: bool = False) -> list[int] | None:
    """What tells a file, by path or descriptor, from one that takes its place: inode, bytes, time of the last write.

    Args:
        strict: adds the time of any change, which tells a write that sets the other time back, and a new link as well.

    Returns:
        None where there is no file.
    """
    try:
        status = os.stat(file)
    except OSError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns, *([status.st_ctime_ns] if strict else [])]


def known_fingerprint(path: str | Path) -> str:
    """`fingerprint_file`, remembered of a large file for as long as its inode, size and times stay as they are."""
    path = Path(os.path.realpath(path))
    state, key = file_state(path, strict=True), str(path)
    if state is None or state[1] < LARGE_BYTES:
        return fingerprint_file(path)
    if _known.get(key, (None,))[0] != state:
        _known[key] = _remembered(key, state) or _remember(key, state, fingerprint_file(path))
    return _known[key][1]


def read_steadily(folder: str | Path, read: Callable[[], T]) -> T:
    """What `read` gives of a folder that another process may replace: it is called again where the folder was replaced
    meanwhile, so its parts are always of one version.

    Args:
        read: reads the folder and keeps no half-read state.

    Raises:
        HlmError: the folder was replaced at every attempt; or whatever `read` raises of a folder that stands still.
    """
    for _ in range(ATTEMPTS):
        with _pinned(folder) as version:
            try:
                result = read()
            except Exception:
                if version is not None and _version(folder) == version:
                    raise
            else:
                if version is not None and _version(folder) == version:
                    return result
        if version is None:
            recover(folder)
        time.sleep(0.01)
    if version is None:
        return read()  # there is nothing, and its own error says so best
    raise HlmError(f"{folder} was replaced {ATTEMPTS} times while it was read; let its writer finish, then load it")


@contextlib.contextmanager
def _pinned(folder: str | Path) -> Iterator[list[int] | None]:
    """The version of a folder. While the block runs its inodes stay taken, so that no later version can have them."""
    opened = []
    try:
        for path in (Path(folder), Path(folder) / MANIFEST):
            with contextlib.suppress(OSError):
                opened.append(os.open(path, os.O_RDONLY))
        yield [os.fstat(descriptor).st_ino for descriptor in opened] if len(opened) == 2 else None
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _version(folder: str | Path) -> list[int] | None:
    try:
        return [os.stat(path).st_ino for path in (Path(folder), Path(folder) / MANIFEST)]
    except OSError:
        return None


def _note(key: str) -> Path:
    return cache_folder() / "hashed" / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.json"


def _remembered(key: str, state: list[int]) -> tuple[list[int], str] | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, HlmError):
        note = json.loads(_note(key).read_text(encoding="utf-8"))
        if note["path"] == key and note["state"] == state:
            return state, str(note["fingerprint"])
    return None


def _remember(key: str, state: list[int], fingerprint: str) -> tuple[list[int], str]:
    try:
        write_json(_note(key), {"path": key, "state": state, "fingerprint": fingerprint})
    except (OSError, HlmError) as error:
        logger.debug("hashes of large files are not remembered: %s", error)
    return state, fingerprint
