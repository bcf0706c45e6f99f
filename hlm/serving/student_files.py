"""The files of an encoder's folder that serving reads, each checked: what is used is what `hlm.json` tells of."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from hlm import __version__
from hlm.artefacts import MANIFEST, HlmError, file_records, fingerprint_json, write_json
from hlm.encoders.folder import GRAPHS, MODULES, READ, TOKENIZER, EncoderFolder
from hlm.extras import extras_named
from hlm.hub.cache import local_folder
from hlm.integrity import cache_folder, check_files, known_fingerprint
from hlm.outputs import make_once

logger = logging.getLogger(__name__)

CONFIGURATION = ("*.json", "*.txt")
WEIGHTS = ("*.safetensors", "*.model", "*.jinja")
# What sentence-transformers and transformers may read of a folder, whether it was there when it was written or not.
MODEL_FILES = re.compile(r"(.*\.(json|safetensors|bin|model|jinja)|(.*/)?(vocab|merges)\.txt)")


class StudentFiles(EncoderFolder):
    """The folder of an encoder, or a Hub id of which only what is needed is downloaded; each file is checked before it
    is read.

    Raises:
        HlmError: no such folder, or one whose configuration is damaged or changed.
    """

    def __init__(self, source: str | Path, revision: str | None = None) -> None:
        self.source, self.revision = source, revision
        super().__init__(self.folder_of(source, revision))
        self.check(READ)
        missing = [name for name in (MODULES, TOKENIZER) if not (self.folder / name).is_file()]
        if missing:
            raise HlmError(
                f"expected a sentence-transformers folder with {MODULES} and {TOKENIZER}, found no "
                f"{' and no '.join(missing)} at {self.folder}; name the folder of a student or a teacher"
            )

    @staticmethod
    def folder_of(source: str | Path, revision: str | None = None) -> Path:
        return local_folder(source, revision=revision, patterns=CONFIGURATION)

    def weights(self) -> Path:
        """The folder with its safetensors, every file that loading the model may read checked."""
        self._download(WEIGHTS)
        found = {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}
        self.check(sorted(name for name in found | (self.records or {}).keys() if name != MANIFEST and _of_model(name)))
        return self.folder

    def graph(self, names: Sequence[str]) -> Path:
        """The first of these graphs (keys of `GRAPHS`, the last one is in every folder that has any) that is there; or
        one from the cache of exports, where the folder has none."""
        graphs = self.graphs()
        name = next((name for name in names if name in graphs), names[-1])
        file = GRAPHS[name]
        self._download((file, f"{file}_data"))
        if name in graphs:
            self.check_graph(name)
        elif (self.folder / file).is_file():
            self.check([file, f"{file}_data"])
        else:
            return _exported(self.weights(), names)
        return self.folder / file

    def _download(self, patterns: Sequence[str]) -> None:
        """More of a repository, of the same commit: its folder in the Hub's cache is named by it."""
        if not os.path.isdir(self.source):
            local_folder(self.source, revision=self.folder.name, patterns=patterns)

    def identity(self, graph: Path | None) -> str:
        """16 hex digits by which another process knows that it loaded the same."""
        names = [name for name in READ if (self.folder / name).is_file()]
        files = self.records or {name: known_fingerprint(self.folder / name) for name in names}
        return fingerprint_json([files, graph.stat().st_size if graph else None])


def _of_model(name: str) -> bool:
    return MODEL_FILES.fullmatch(name) is not None and not name.startswith(("onnx/", "."))


def _exported(folder: Path, names: Sequence[str]) -> Path:
    """The first of these graphs that there is of a folder that has none, from the cache or made now."""
    digest = hashlib.sha256(__version__.encode())
    for path in sorted([*folder.rglob("*.json"), *folder.rglob("*.safetensors")]):
        digest.update(f"{path.relative_to(folder)} {known_fingerprint(path)}".encode())
    kept = cache_folder() / digest.hexdigest()[:16]
    graph = _kept_graph(kept, names)
    if graph is None:
        try:
            make_once(kept, lambda aside: _export(folder, aside), lambda: _kept_graph(kept, names) is not None)
        except OSError as error:
            raise HlmError(
                f"{folder} has no ONNX files, and they cannot be kept in the cache {kept.parent} "
                f"({error.strerror or error}); set HLM_CACHE to a folder that can be written to, or write the files "
                "beforehand with recipes/export.py"
            ) from error
        graph = _kept_graph(kept, names)
    if graph is None:
        raise HlmError(f"{kept}: expected the ONNX files that were just written, found others; load it again")
    return graph


def _kept_graph(kept: Path, names: Sequence[str]) -> Path | None:
    """The first of these graphs in a folder of the cache; None where that is not whole: it can be made again."""
    try:
        records = json.loads((kept / MANIFEST).read_text(encoding="utf-8"))["files"]
        file = next(GRAPHS[name] for name in names if GRAPHS[name] in records)
        check_files(kept, records, [file, f"{file}_data"])
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None
    return kept / file


def _export(folder: Path, aside: Path) -> None:
    with extras_named(f"the export of {folder}, which has no ONNX files"):
        from hlm.serving.export import export

    aside.mkdir()
    logger.warning(
        "%s has no ONNX files: exporting them, once, takes some ten seconds; recipes/export.py does it beforehand",
        folder,
    )
    export(str(folder), aside)
    write_json(aside / MANIFEST, {"files": file_records(aside)})
