"""Artefacts: folders with a manifest (`hlm.json`), written aside and renamed, recognised by fingerprints.

Every step of the recipe hands a folder to the next. The manifest says what the folder is, which inputs it was made
from (by fingerprint) and with which configuration, so that a step can refuse inputs that do not belong together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hlm import __version__

MANIFEST = "hlm.json"
SCHEMA_VERSION = 1


class HlmError(ValueError):
    """Bad input from the user: the message says what was expected, what was found and what to do."""


def fingerprint_json(value: Any) -> str:
    """16 hex digits of the SHA-256 of `value` written as canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint_texts(texts: Iterable[str]) -> str:
    """16 hex digits over a sequence of texts, order included; streams, so any length fits in memory."""
    digest = hashlib.sha256()
    for text in texts:
        raw = text.encode()
        # The length before each text keeps ["ab", "c"] and ["a", "bc"] apart.
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()[:16]


def fingerprint_file(path: str | Path) -> str:
    """16 hex digits over a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to, which takes its name when the block ends without an error: a reader
    never sees half a file. Makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    yield aside
    os.replace(aside, path)


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON to the disk itself, by `atomic_file`."""
    with atomic_file(path) as aside, open(aside, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yields a fresh folder beside `target` that takes its name when the block ends without an error.

    An older `target` is replaced only once the new one is whole; after an error or a kill it is as it was.
    """
    target = Path(target)
    aside = target.with_name(f".{target.name}.partial")
    retired = target.with_name(f".{target.name}.retired")
    if retired.exists() and not target.exists():
        os.rename(retired, target)  # a kill fell between the two renames below
    for leftover in (aside, retired):
        if leftover.exists():
            shutil.rmtree(leftover)
    aside.mkdir(parents=True)
    yield aside
    if target.exists():
        os.rename(target, retired)
    os.rename(aside, target)
    shutil.rmtree(retired, ignore_errors=True)


def write_manifest(
    folder: str | Path, kind: str, *, inputs: dict[str, str], config: dict[str, Any], **facts: Any
) -> None:
    """Writes `hlm.json`: kind, schema and HLM version, input fingerprints, resolved config and further facts."""
    manifest = {
        "kind": kind,
        "schema_version": SCHEMA_VERSION,
        "hlm_version": __version__,
        "inputs": inputs,
        "config": config,
        **facts,
    }
    write_json(Path(folder) / MANIFEST, manifest)


def read_manifest(folder: str | Path, kind: str) -> dict[str, Any]:
    """Reads `hlm.json` of `folder`.

    Raises:
        HlmError: no manifest, broken JSON, another kind of artefact, or a schema this version cannot read.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise HlmError(
            f"expected an HLM artefact of kind '{kind}' at {folder}, found no {MANIFEST} there; "
            "run the step that writes it, or correct the path"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HlmError(f"{path} is not valid JSON ({error}); delete the folder and run its step again") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        found = manifest.get("kind") if isinstance(manifest, dict) else type(manifest).__name__
        raise HlmError(f"expected an artefact of kind '{kind}' at {folder}, found '{found}'; correct the path")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise HlmError(
            f"{path} has schema version {manifest.get('schema_version')}, this HLM ({__version__}) reads "
            f"{SCHEMA_VERSION}; write the artefact again with this version"
        )
    return manifest


def check_graph(folder: str | Path, record: dict[str, Any]) -> None:
    """Compares an exported graph, and the weights beside it, with what a manifest says of them.

    Args:
        record: "file" and "fingerprint" of the graph, and "data", the same of its weights where they lie beside it.

    Raises:
        HlmError: a file is missing, cut short or changed.
    """
    for part in (record, record.get("data")):
        if not isinstance(part, dict) or not {"file", "fingerprint"} <= set(part):
            continue
        path = Path(folder) / part["file"]
        found = fingerprint_file(path) if path.is_file() else "no file"
        if found != part["fingerprint"]:
            raise HlmError(
                f"{path}: expected content {part['fingerprint']} as {MANIFEST} says, found {found}; it was changed or "
                "cut short: copy or pull the folder again, or export it again"
            )
