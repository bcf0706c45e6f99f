"""Advisory locks: who writes an output, told to whoever else wants to."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import logging
import os
import shlex
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hlm.errors import HlmError

logger = logging.getLogger(__name__)

# (process, thread, lock file) -> how often this thread took it, and whether the file system has locks
_held: dict[tuple[int, int, str], list[Any]] = {}


@contextlib.contextmanager
def locked(path: Path, what: str, *, wait: bool = False) -> Iterator[bool]:
    """Holds a lock on the file `path`, which is made for it and removed after it. A thread may take its lock again.

    The lock ends with its process, however that ends. Between machines it holds where the file system's locks do, as on
    NFS; where the file system has none, a warning says so and the block runs without.

    Args:
        what: what the lock protects, for the error.
        wait: until whoever holds it has let it go, instead of refusing.

    Yields:
        Whether the file system has locks.

    Raises:
        HlmError: somebody else holds it; the message names process, machine and command.
        OSError: the file cannot be made.
    """
    key = (os.getpid(), threading.get_ident(), str(path))
    if key in _held:
        _held[key][0] += 1
        try:
            yield _held[key][1]
        finally:
            _held[key][0] -= 1
        return
    descriptor, real = _lock(path, what, wait)
    _held[key] = [1, real]
    try:
        yield real
    finally:
        del _held[key]
        path.unlink(missing_ok=True)  # while it is held: whoever waits for this very file sees that it is gone
        os.close(descriptor)


def _lock(path: Path, what: str, wait: bool) -> tuple[int, bool]:
    """The descriptor of the locked file, and whether it is locked."""
    patient = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            real = _flock(descriptor, path, patient)
            if _is(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _myself().encode("utf-8", "replace"), 0)
                return descriptor, real
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode("utf-8", "replace") or "another process"
            os.close(descriptor)
            if wait:
                logger.info("waiting for %s, which writes %s", holder, what)
                patient = True
                continue
            raise HlmError(
                f"expected to be the only one who writes {what}, found that {holder} does; wait for it, end it, or "
                "name another output"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed the file between our opening and our locking it


def _flock(descriptor: int, path: Path, wait: bool) -> bool:
    """Whether the file is locked now: False where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        logger.warning("the file system of %s has no locks: see to it that one process alone writes there", path)
        return False
    return True


def _is(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _myself() -> str:
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} (since {now}: {shlex.join(sys.argv)[:200]})"
