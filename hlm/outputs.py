"""Writing where others read or write too: outputs are checked before the work, locked, written aside and swapped in.

Whoever writes a folder or a file writes it under a name of its own beside the target (`.<name>.<token>.partial`) and
lets it take the target's name when it is whole. A reader sees the old version or the new one. A second writer is
refused while the first one is at work: the lock lies beside the target (`.<name>.lock`) and dies with its process.

A folder that cannot be renamed (a mount point, the working directory, a folder whose parent is read-only) is written
inside itself: the new files lie in `.hlm.<token>.partial` until the old ones make place for them. A kill in that moment
leaves a folder without a manifest, which no reader takes for an artefact and the next writer clears.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import secrets
import shutil
import socket
import sys
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from hlm.errors import FULL_DISK, REMEDIES, HlmError
from hlm.locks import locked

MANIFEST = "hlm.json"
VERSIONS = "versions"  # in an artefact's folder: what belongs to its other versions (`hlm/vectors/versions.py`)
# What systems put into folders by themselves.
IGNORED = frozenset({".DS_Store", "Thumbs.db", "desktop.ini", "lost+found"})
_SWAPPING = ".hlm.swapping"  # in a folder that is written inside itself: the names that come and go

_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"


def check_output(path: str | Path, kind: str | None = None) -> Path:
    """Refuses, before any work, an output that could not be written or would cost somebody's files: `claimed` for a
    moment. Whoever works for long claims the output for as long."""
    with claimed(path, kind) as target:
        return target


@contextlib.contextmanager
def claimed(path: str | Path, kind: str | None = None) -> Iterator[Path]:
    """A folder that this thread alone writes to while the block runs; a claim within a claim is the same claim.

    Args:
        path: a folder to write or to replace; may start with `~`, end in a slash and lie behind a symbolic link. The
            folders above it are made.
        kind: the kind of artefact that may be replaced there; None: any of HLM's.

    Yields:
        The folder itself: absolute, links followed.

    Raises:
        HlmError: a file lies there, a folder with files that HLM did not write, an artefact of another kind, a place
            that cannot be written to, or another process or thread writes there: the message says which.
    """
    target = resolved(path)
    place, renamed = _place(target)
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    if target.is_file() or not existing.is_dir():
        found = target if target.is_file() else existing
        raise HlmError(f"expected a folder to write at {target}, found a file at {found}; name another output")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise HlmError(
            f"expected a place to write {target}, found a folder that this user cannot write to at {existing}; name "
            "another output, or make it writable"
        )
    with contextlib.ExitStack() as stack:
        with os_errors(target):
            place.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(place / (f".{target.name}.lock" if renamed else ".hlm.lock"), str(target)))
        if target.is_dir():
            _refuse_foreign(target, kind)
        yield target


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to, which takes its name when the block ends without an error: a reader
    never sees half a file. Makes the folder. Of two writers the later one's file stays, whole."""
    path = resolved(path)
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    _sweep_dead(path)
    aside = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        with os_errors(path):
            aside.touch()
            mode = aside.stat().st_mode
        with os_errors(path, FULL_DISK):
            yield aside
        with os_errors(path):
            aside.chmod(mode)  # some libraries write files that only their owner can read
            os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def make_once(path: Path, make: Callable[[Path], None], is_whole: Callable[[], bool]) -> None:
    """Makes an entry of a cache, a file or a folder, where it is not whole. One process at a time makes it, others wait
    for it; what killed processes left half made in the cache is removed.

    Args:
        make: writes the entry to the path that it is given, which takes the name `path` afterwards.
        is_whole: whether `path` can be used as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(_lock_of(path), str(path), wait=True) as alone:
        if is_whole():
            return
        if alone:
            _sweep_cache(path)
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        try:
            make(aside)
            if path.is_dir():  # and not whole
                shutil.rmtree(path)
            os.replace(aside, path)
        finally:
            _remove(aside)


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _sweep_cache(path: Path) -> None:
    """Removes what is half made beside `path`, which this process has locked, and whose maker is gone."""
    for leftover in path.parent.glob(".*.partial"):
        entry = path.with_name(leftover.name[1:].rsplit(".", 2)[0])
        with contextlib.suppress(HlmError), locked(_lock_of(entry), str(entry)):  # HlmError: it is being made
            _remove(leftover)


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON to the disk itself, by `atomic_file`."""
    with atomic_file(path) as aside, open(aside, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_folder(path: str | Path, kind: str | None = None) -> Iterator[Path]:
    """Yields a fresh folder that takes the name `path` when the block ends without an error.

    An older artefact at `path` is replaced once the new one is whole; after an error or a kill it is as it was.
    Files get the modes that the umask asks for. Should the last step fail, the new folder is kept and named.

    Args:
        kind: as for `check_output`.

    Raises:
        HlmError: as `claimed`; or the disk is full or refuses.
    """
    with claimed(path, kind) as target:
        place, renamed = _place(target)
        _sweep(target, place)
        token = f"{_HOST}.{os.getpid()}.{secrets.token_hex(4)}.partial"
        aside = place / (f".{target.name}.{token}" if renamed else f".hlm.{token}")
        try:
            with os_errors(target):
                aside.mkdir()
            with os_errors(target, FULL_DISK):
                yield aside
                _settle(aside)
                if target.is_dir() and (aside / MANIFEST).is_file():
                    _refuse_foreign(target, _kind(aside))
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        try:
            _swap(aside, target) if renamed else _swap_inside(aside, target)
        except OSError as error:
            kept = target.with_name(f"{target.name}.kept-{secrets.token_hex(4)}") if renamed else aside
            with contextlib.suppress(OSError):
                os.rename(aside, kept)
            kept = kept if kept.exists() else aside
            raise HlmError(
                f"expected to put the finished folder at {target}, found {error}; the result is whole at {kept}: move "
                "it to its place by hand"
            ) from error


def recover(path: str | Path) -> None:
    """Puts an older version back that a kill left under `.<name>.retired`, on file systems that cannot exchange two
    folders at once; does nothing where a writer is at work."""
    target = resolved(path)
    if not target.exists() and _retired(target).is_dir():
        with contextlib.suppress(HlmError), claimed(target):
            _sweep(target, target.parent)


def resolved(path: str | Path) -> Path:
    """The path itself: absolute, `~` and links followed; it need not exist.

    Raises:
        HlmError: an empty path, or one that leads nowhere.
    """
    if not str(path):
        raise HlmError("expected a path to write to, found an empty one; name an output")
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, no home, a NUL character
        raise HlmError(f"expected a path to write to, found {str(path)!r} ({error}); correct it") from error


def _place(target: Path) -> tuple[Path, bool]:
    """Where the new version is written before it is put in place, and whether that is done by renaming it."""
    parent = target.parent
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it was removed
        here = None
    stuck = target.is_dir() and (
        str(target) == here or os.path.ismount(target) or not os.access(parent, os.W_OK | os.X_OK)
    )
    return (target, False) if stuck else (parent, True)


def _kind(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    return kind if isinstance(kind, str) else None


def _refuse_foreign(target: Path, kind: str | None) -> None:
    """Refuses a folder that holds what HLM did not write, or another kind of artefact."""
    if (target / _SWAPPING).exists():
        return  # a killed writer's, which `_sweep` clears
    names = sorted(entry.name for entry in os.scandir(target) if not _ours(entry.name))
    if not names:
        return
    found = _kind(target)
    wanted = f"an artefact of kind '{kind}'" if kind else "an artefact of HLM"
    if found is None:
        raise HlmError(
            f"expected an empty folder or {wanted} at {target}, found a folder with other files "
            f"({', '.join(names[:3])}{', ...' if names[3:] else ''}); nothing there was touched: name another output, "
            "or a folder within it"
        )
    if kind is not None and found != kind:
        raise HlmError(
            f"expected an empty folder or {wanted} at {target}, found an artefact of kind '{found}'; nothing there was "
            "touched: name another output"
        )
    if any((target / VERSIONS).glob(f"[0-9]*/{MANIFEST}")):
        return  # what is written becomes a version beside the others, and replaces nothing
    records = json.loads((target / MANIFEST).read_text(encoding="utf-8")).get("files")
    if isinstance(records, dict):
        files = (path.relative_to(target) for path in target.rglob("*") if path.is_file() or path.is_symlink())
        others = sorted(
            str(path)
            for path in files
            if path.as_posix() not in records and str(path) != MANIFEST and not any(_ours(part) for part in path.parts)
        )
        if others:
            raise HlmError(
                f"expected only what HLM wrote in {target}, found {', '.join(others[:3])}"
                f"{', ...' if others[3:] else ''}, which replacing the folder would delete; move them elsewhere, or "
                "name another output"
            )


def _ours(name: str) -> bool:
    """Whether a name in a folder is a lock, a half-written version, or the system's own."""
    return name in IGNORED or (name.startswith(".") and name.endswith((".partial", ".lock"))) or name == _SWAPPING


def _settle(folder: Path) -> None:
    """Files get the modes that the umask asks for, and are on the disk itself before the folder takes its place."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode | (path.stat().st_mode & 0o111))
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _swap(aside: Path, target: Path) -> None:
    if not target.exists():
        os.rename(aside, target)
    elif _exchanged(aside, target):
        shutil.rmtree(aside, ignore_errors=True)  # the old version by now
    else:
        retired = _retired(target)
        os.rename(target, retired)
        try:
            os.rename(aside, target)
        except OSError:
            os.rename(retired, target)
            raise
        shutil.rmtree(retired, ignore_errors=True)


def _retired(target: Path) -> Path:
    return target.with_name(f".{target.name}.retired")


def _exchanged(one: Path, other: Path) -> bool:
    """Exchanges two folders' names in one step, where the system can (renameat2 of Linux, most local file systems)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    at_cwd, exchange = -100, 2
    if rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _swap_inside(aside: Path, target: Path) -> None:
    old = [entry.name for entry in os.scandir(target) if not _ours(entry.name)]
    new = [entry.name for entry in os.scandir(aside)]
    (target / _SWAPPING).write_text(json.dumps(sorted({*old, *new})), encoding="utf-8")
    (target / MANIFEST).unlink(missing_ok=True)  # first to go, last to come: without it nobody reads the rest
    for name in old:
        _remove(target / name)
    for name in sorted(new, key=lambda name: name == MANIFEST):
        os.rename(aside / name, target / name)
    aside.rmdir()
    (target / _SWAPPING).unlink()


def _sweep(target: Path, place: Path) -> None:
    """Removes what killed writers left; only under the lock, where whatever is half written has no writer."""
    retired = _retired(target)
    if retired.is_dir() and not target.exists():
        os.rename(retired, target)  # a kill fell between the two renames of a swap
    _remove(retired)
    prefix = ".hlm." if place == target else f".{target.name}."
    for entry in list(os.scandir(place)):
        if entry.name.startswith(prefix) and entry.name.endswith(".partial") and entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
    swapping = target / _SWAPPING
    if swapping.is_file():
        with contextlib.suppress(ValueError):
            for name in json.loads(swapping.read_text(encoding="utf-8")):
                if name == os.path.basename(name):
                    _remove(target / name)
        swapping.unlink()


def _sweep_dead(path: Path) -> None:
    """Removes the half-written files of `path` whose processes, of this machine, are gone."""
    prefix = f".{path.name}.{_HOST}."
    for entry in os.listdir(path.parent):
        if entry.startswith(prefix) and entry.endswith(".partial"):
            process = entry[len(prefix) :].split(".")[0]
            if process.isdigit() and not _alive(int(process)):
                (path.parent / entry).unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def os_errors(path: Path, codes: Collection[int] = tuple(REMEDIES)) -> Iterator[None]:
    """What the disk refuses becomes an HlmError that names the output and says what to do; `codes` limits it to some,
    where other files than the output may be the cause."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno not in codes:
            raise
        raise HlmError(f"expected to write {path}, found {error.strerror or error}; {REMEDIES[error.errno]}") from error
