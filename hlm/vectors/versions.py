"""Versions of a store or an index in one folder: the pointer to the current one, and the way back.

    hlm.json              the current version: a copy of its manifest, which is replaced in one step
    versions/000002/      what belongs to one version alone: its manifest `hlm.json`, and files of its own
    *                     what several versions share, and the files of the first version

Whoever opened a version keeps it: no file of a version that is kept changes or goes. A folder that was never changed
has no `versions`, and its manifest no number: it is version 1.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hlm.artefacts import MANIFEST, HlmError, atomic_folder, claimed, read_manifest, write_json
from hlm.fields import optional
from hlm.outputs import VERSIONS, resolved
from hlm.vectors import shard_files

FIRST = 1
LOCK = ".version.lock"  # in a store's folder: whoever makes a version of it waits for it
KEEP = 3  # versions, the current one among them


def number_of(manifest: dict[str, Any], where: Path | str = MANIFEST) -> int:
    """Which version of its folder a manifest is of."""
    return optional(manifest, int, "version", where=where, least=1) or FIRST


def own_folder(folder: Path, manifest: dict[str, Any]) -> Path:
    """Where the files of a version are that no other version has."""
    number = number_of(manifest, folder / MANIFEST)
    own = folder / VERSIONS / f"{number:06d}"
    return own if number > FIRST and own.is_dir() else folder


def are_kept(folder: str | Path) -> bool:
    """Whether the folder has had more than one version."""
    return (Path(folder) / VERSIONS).is_dir()


def current_files(folder: Path) -> dict[str, Path]:
    """What a folder of the current version alone would hold: name -> file. Such a folder is read as any other."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    own = own_folder(folder, manifest)
    names = {MANIFEST: folder, **dict.fromkeys(manifest.get("files") or (), own)}
    for place, record in enumerate(manifest.get("shards") or ()):
        names |= dict.fromkeys(shard_files.files(place, record), folder)
    if manifest.get("gone"):
        names[shard_files.GONE] = own
    return {name: place / name for name, place in names.items()}


def listed(folder: str | Path, kind: str) -> dict[int, dict[str, Any]]:
    """The manifests of the versions that are there, by number, ascending; the current one among them.

    Raises:
        HlmError: no artefact of that kind, or a manifest that is damaged.
    """
    folder = Path(folder)
    current = read_manifest(folder, kind)
    found = {}
    for place in (folder / VERSIONS).glob("[0-9]*"):
        if (place / MANIFEST).is_file():  # a killed writer's has none
            manifest = read_manifest(place, kind)
            found[number_of(manifest, place / MANIFEST)] = manifest
    return dict(sorted((found | {number_of(current, folder / MANIFEST): current}).items()))


def next_number(folder: str | Path, kind: str) -> int:
    """The number of the version that is written next: 1 in an empty folder."""
    return max(listed(folder, kind), default=0) + 1 if (Path(folder) / MANIFEST).is_file() else FIRST


def new_folder(folder: Path, number: int) -> Path:
    """Makes the folder of a version that nobody reads yet; what a killed writer left there goes."""
    own = folder / VERSIONS / f"{number:06d}"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    return own


def point(folder: Path, manifest: dict[str, Any]) -> None:
    """Makes a version the current one, in one step; that which was it stays.

    Args:
        manifest: the version's, whose files are all in place.
    """
    if (folder / MANIFEST).is_file():
        current = read_manifest(folder, manifest["kind"])
        _keep(folder, current)
    _keep(folder, manifest)
    write_json(folder / MANIFEST, manifest)


def _keep(folder: Path, manifest: dict[str, Any]) -> None:
    place = folder / VERSIONS / f"{number_of(manifest):06d}" / MANIFEST
    if not place.is_file():
        write_json(place, manifest)


@contextlib.contextmanager
def written(folder: str | Path, kind: str, keep: int) -> Iterator[tuple[Path, int]]:
    """Yields a fresh folder, whose files become the current version when the block ends without an error, and that
    version's number. The block writes the manifest last.

    Args:
        keep: how many versions to keep; 0: what is there is replaced, unless it has versions.

    Raises:
        HlmError: as `atomic_folder`.
    """
    target = resolved(folder)
    if not (target / MANIFEST).is_file() or not (keep or are_kept(target)):
        with atomic_folder(target, kind) as aside:
            yield aside, FIRST
        return
    with claimed(target, kind):
        number = next_number(target, kind)
        own = target / VERSIONS / f"{number:06d}"
        own.parent.mkdir(exist_ok=True)
        with atomic_folder(own, kind) as aside:
            yield aside, number
        point(target, read_manifest(own, kind))
        forget(target, kind, keep or KEEP)


def older(folder: str | Path, kind: str, to: int | None = None) -> dict[str, Any]:
    """The manifest of the version to go back to.

    Args:
        to: its number; None: the one before the current one.

    Raises:
        HlmError: there is none; names those that are there.
    """
    folder = Path(folder)
    found = listed(folder, kind)
    current = number_of(read_manifest(folder, kind))
    if to is None:
        to = max((number for number in found if number < current), default=None)
        if to is None:
            raise HlmError(
                f"expected a version before {current} at {folder}, found none; there is nothing to go back to"
            )
    if to not in found or to == current:
        others = ", ".join(str(number) for number in found if number != current) or "no other"
        raise HlmError(f"expected a version other than the current {current} at {folder}, found {others}, not {to}")
    return found[to]


def forget(folder: Path, kind: str, keep: int) -> dict[int, dict[str, Any]]:
    """Removes what belongs to old versions alone; the current one and the newest of the others stay, `keep` in all.

    Returns:
        The manifests of those that went: files that they shared with one another are the caller's to remove.
    """
    found = listed(folder, kind)
    current = number_of(read_manifest(folder, kind))
    others = [number for number in found if number != current]
    gone = others[: max(0, len(others) - (keep - 1))]
    for number in gone:
        if number == FIRST:  # its files are not in a folder of its own
            for name in found[number].get("files") or ():
                (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / VERSIONS / f"{number:06d}")
    return {number: found[number] for number in gone}
