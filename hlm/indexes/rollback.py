"""Going back to an older version of a store or an index, in one step, while others read it."""

from __future__ import annotations

from pathlib import Path

from hlm.artefacts import MANIFEST, claimed, read_manifest
from hlm.fields import field
from hlm.indexes import index
from hlm.indexes.index_parts import facts_of
from hlm.indexes.lineage import kind_of
from hlm.locks import locked
from hlm.outputs import resolved
from hlm.vectors import store, versions


def roll_back(folder: str | Path, to: int | None = None) -> int:
    """Makes an older version current, after looking at its files. Who opens the folder next has it, and who has another
    open keeps that. The newer versions stay, to go forward to.

    Args:
        to: the number of the version; None: the one before the current one.

    Returns:
        Its number.

    Raises:
        HlmError: no such version, or one whose files are damaged: the current one stays.
    """
    place, kind = resolved(folder), kind_of(folder)
    with claimed(place, kind), locked(place / versions.LOCK, f"a version of {place}", wait=True):
        manifest = versions.older(place, kind, to)
        if kind == index.KIND:
            engine = index.engine_of(manifest, place / MANIFEST)
            facts_of(place, manifest, engine)
            index.engine_class(engine).make_current(place, manifest)
        else:
            store.VectorStore.of(place, manifest)
            versions.point(place, manifest)
    return versions.number_of(manifest)


def shown_versions(folder: str | Path) -> str:
    """The versions of a store or an index, one a line; the current one has an asterisk."""
    place, kind = resolved(folder), kind_of(folder)
    current = versions.number_of(read_manifest(place, kind))
    lines = []
    for number, manifest in versions.listed(place, kind).items():
        source = field(manifest, str, "inputs", "source", where=place)
        rows = field(manifest, int, "count" if kind == index.KIND else "rows", where=place)
        lines.append(f"{'*' if number == current else ' '} {number:>4}  {rows:>12,} rows  texts {source}")
    return "\n".join(lines)
