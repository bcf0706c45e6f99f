"""What a step is: its inputs by fingerprint and its settings. An artefact of the same identity is not made again."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hlm.artefacts import MANIFEST, HlmError, fingerprint_json, read_manifest
from hlm.integrity import check_files

logger = logging.getLogger(__name__)

# Settings that say where an input lies. Its fingerprint says what it is.
PATHS = frozenset({"backbone", "student", "data", "vectors"})


def as_config(config: Any, training: dict[str, Any] | None = None) -> dict[str, Any]:
    """A step's dataclass, and its training arguments as JSON values, as a manifest's `config`."""
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config) if item.name != "output"}
    return values | ({"training": training} if training is not None else {})


def up_to_date(
    folder: str | Path, kind: str, identity: dict[str, Any], *, paths: Collection[str] = frozenset()
) -> bool:
    """Whether `folder` already holds this artefact, made from the same inputs with the same configuration.

    Args:
        paths: settings that do not count, as they say where inputs lie whose fingerprints are in `identity`.
    """
    if not (Path(folder) / MANIFEST).is_file():
        return False
    manifest = read_manifest(folder, kind)
    if fingerprint_json(without(paths, manifest)) != fingerprint_json(without(paths, identity)):
        return False
    records = manifest.get("files") or {}
    try:
        check_files(folder, records, records)
    except HlmError as error:
        logger.warning("%s is made again: %s", folder, error)
        return False
    logger.info("%s: up to date", folder)
    return True


def without(paths: Collection[str], identity: dict[str, Any]) -> dict[str, Any]:
    """What two runs, or a run and an artefact, are compared by: all but where their inputs lie."""
    config = {name: value for name, value in (identity.get("config") or {}).items() if name not in paths}
    return {"inputs": dict(identity.get("inputs") or {}), "config": config}
