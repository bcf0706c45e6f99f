"""Artefacts: folders with a manifest (`hlm.json`), written aside and renamed, recognised by fingerprints.

Every step of the recipe hands a folder to the next. The manifest says what the folder is, which inputs it was made
from (by fingerprint) and with which configuration, so that a step can refuse inputs that do not belong together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hlm import __version__
from hlm.errors import HlmError
from hlm.integrity import fingerprint_file
from hlm.outputs import MANIFEST, atomic_file, atomic_folder, check_output, claimed, recover, write_json

SCHEMA_VERSION = 1

__all__ = [
    "MANIFEST",
    "HlmError",
    "amend_manifest",
    "atomic_file",
    "atomic_folder",
    "check_output",
    "claimed",
    "file_records",
    "fingerprint_file",
    "fingerprint_json",
    "fingerprint_texts",
    "read_manifest",
    "write_json",
    "write_manifest",
]


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


def file_records(folder: str | Path) -> dict[str, str]:
    """Path within the folder -> `fingerprint_file` of every file there except the manifest and what is half written."""
    folder = Path(folder)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
    return {path.relative_to(folder).as_posix(): fingerprint_file(path) for path in paths if path.suffix != ".partial"}


def write_manifest(
    folder: str | Path,
    kind: str,
    *,
    inputs: dict[str, str],
    config: dict[str, Any],
    records: bool = True,
    **facts: Any,
) -> None:
    """Writes `hlm.json`, the last file of a folder: kind, schema and HLM version, input fingerprints, resolved config,
    `file_records` of the folder (without `records` none: for a folder that keeps records of its own), further facts."""
    manifest = {
        "kind": kind,
        "schema_version": SCHEMA_VERSION,
        "hlm_version": __version__,
        "inputs": inputs,
        "config": config,
        **({"files": file_records(folder)} if records else {}),
        **facts,
    }
    write_json(Path(folder) / MANIFEST, manifest)


def amend_manifest(folder: str | Path, subfolder: str, **facts: Any) -> None:
    """Adds facts to the manifest of an artefact whose `subfolder` was written again, and records that one's files anew;
    what it says of the others stays, so that a change among them is still found."""
    path = Path(folder) / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    kept = {
        name: found for name, found in (manifest.get("files") or {}).items() if not name.startswith(f"{subfolder}/")
    }
    new = {f"{subfolder}/{name}": found for name, found in file_records(Path(folder) / subfolder).items()}
    write_json(path, manifest | {"files": dict(sorted((kept | new).items()))} | facts)


def read_manifest(folder: str | Path, kind: str) -> dict[str, Any]:
    """Reads `hlm.json` of `folder`.

    Raises:
        HlmError: no manifest, broken JSON, another kind of artefact, or a schema this version cannot read.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        recover(folder)
    if not path.is_file():
        raise HlmError(
            f"expected an HLM artefact of kind '{kind}' at {folder}, found no {MANIFEST} there; "
            "run the step that writes it, or correct the path"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HlmError(f"expected to read {path}, found {error.strerror}; make it readable for this user") from error
    except (ValueError, RecursionError) as error:
        raise HlmError(f"{path} is not valid JSON ({error}); delete the folder and run its step again") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        found = manifest.get("kind") if isinstance(manifest, dict) else type(manifest).__name__
        raise HlmError(f"expected an artefact of kind '{kind}' at {folder}, found '{found}'; correct the path")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise HlmError(
            f"{path} has schema version {manifest.get('schema_version')}, this HLM ({__version__}) reads "
            f"{SCHEMA_VERSION}; write the artefact again with this version"
        )
    for name in ("inputs", "config"):
        if not isinstance(manifest.get(name), dict):
            found = type(manifest.get(name)).__name__
            raise HlmError(f"{path}: expected a mapping '{name}', found {found}; run the step that writes it again")
    return manifest
