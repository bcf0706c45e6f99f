"""The files of an encoder's folder that serving reads, each checked: what is used is what `hlm.json` tells of."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from hlm import __version__
from hlm.artefacts import MANIFEST, SCHEMA_VERSION, HlmError, file_records, fingerprint_json, write_json
from hlm.extras import extras_named
from hlm.hub.cache import local_folder
from hlm.integrity import cache_folder, check_files, known_fingerprint
from hlm.outputs import make_once

logger = logging.getLogger(__name__)

# As hlm.json names them. "lookup", of small students: fp32 with fewer multiply-adds.
GRAPHS = {"fp32": "onnx/model.onnx", "lookup": "onnx/model_lookup.onnx", "int8": "onnx/model_quantized.onnx"}
CONFIGURATION = ("*.json", "*.txt")
WEIGHTS = ("*.safetensors", "*.model", "*.jinja")
READ = (
    "modules.json", "tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json", "config.json",
    "config_sentence_transformers.json",
)  # fmt: skip
# What sentence-transformers and transformers may read of a folder, whether it was there when it was written or not.
MODEL_FILES = re.compile(r"(.*\.(json|safetensors|bin|model|jinja)|(.*/)?(vocab|merges)\.txt)")
NO_LIMIT = 2**31  # tokens; transformers writes 10^30 where a tokenizer has no limit
T = TypeVar("T")


class StudentFiles:
    """The folder of an encoder, or a Hub id of which only what is needed is downloaded.

    Attributes:
        folder: where its configuration is.
        manifest: hlm.json; {} of a folder without one.
        records: path -> fingerprint of the folder's files, from hlm.json; None: it has none, and is read unchecked.

    Raises:
        HlmError: no such folder, or one whose configuration is damaged or changed.
    """

    def __init__(self, source: str | Path, revision: str | None = None) -> None:
        self.source, self.revision = source, revision
        self.folder = self.folder_of(source, revision)
        self.manifest = self.json(MANIFEST)
        self.records = self.mapping(self.manifest, "files", MANIFEST) if "files" in self.manifest else None
        if self.manifest.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
            raise HlmError(
                f"{self.folder / MANIFEST} has schema version {self.manifest['schema_version']}, this HLM "
                f"({__version__}) reads {SCHEMA_VERSION}; write the artefact again with this version"
            )
        self.check(READ)
        missing = [name for name in ("modules.json", "tokenizer.json") if not (self.folder / name).is_file()]
        if missing:
            raise HlmError(
                f"expected a sentence-transformers folder with modules.json and tokenizer.json, found no "
                f"{' and no '.join(missing)} at {self.folder}; name the folder of a student or a teacher"
            )

    @staticmethod
    def folder_of(source: str | Path, revision: str | None = None) -> Path:
        return local_folder(source, revision=revision, patterns=CONFIGURATION)

    def check(self, names: Sequence[str]) -> None:
        """Refuses files that are about to be read and are not those that hlm.json tells of."""
        if self.records is not None:
            check_files(self.folder, self.records, names)

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; {} where there is no such file."""
        path = self.folder / name
        try:
            value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise HlmError(f"{path}: expected JSON, found none to read ({error}); copy the folder again") from error
        if not isinstance(value, dict):
            raise HlmError(f"{path}: expected a JSON object, found {type(value).__name__}; copy the folder again")
        return value

    def mapping(self, config: dict[str, Any], name: str, file: str) -> dict[str, Any]:
        """A mapping within a file's; {} where it is null or left out."""
        return self.value(config, name, dict, file) or {}

    def value(self, config: dict[str, Any], name: str, kind: type[T], file: str) -> T | None:
        """A value of a file's mapping, None where it is null or left out."""
        found = config.get(name)
        if found is not None and not isinstance(found, kind):
            kinds = {dict: "a mapping", str: "a text"}
            raise HlmError(
                f"{self.folder / file}: expected {kinds[kind]} for '{name}', found {type(found).__name__}; copy the "
                "folder again, or run the step that writes it"
            )
        return found

    def encoder(self) -> str | None:
        """The encoder's fingerprint."""
        return self.value(self.manifest, "encoder", str, MANIFEST)

    def teacher(self) -> str | None:
        """The fingerprint of the teacher that it was aligned to."""
        return self.value(self.mapping(self.manifest, "inputs", MANIFEST), "teacher", str, MANIFEST)

    def prompt(self) -> str:
        """What goes before every query."""
        file = "config_sentence_transformers.json"
        return self.value(self.mapping(self.json(file), "prompts", file), "query", str, file) or ""

    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer, cutting where sentence-transformers cuts and never padding."""
        path = self.folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no class of its own
            raise HlmError(f"{path}: expected a tokenizer, found {str(error)[:200]}; copy the folder again") from error
        limits = [
            self._limit("sentence_bert_config.json", "max_seq_length"),
            self._limit("tokenizer_config.json", "model_max_length"),
            self._limit("config.json", "max_position_embeddings"),
        ]
        limit = min((limit for limit in limits if limit is not None), default=None)
        file = "tokenizer_config.json"
        side = self.value(self.json(file), "truncation_side", str, file) or "right"
        return cutting(tokenizer, limit, side, where=self.folder / file)

    def _limit(self, file: str, name: str) -> int | None:
        limit = self.json(file).get(name)
        if limit is None or (name == "max_position_embeddings" and limit == -1):  # which stands for none there
            return None
        number = isinstance(limit, int | float) and not isinstance(limit, bool) and limit >= 1
        if not number or (limit < NO_LIMIT and limit != int(limit)):
            raise HlmError(
                f"{self.folder / file}: expected a number of tokens from 1 for '{name}', found {limit!r}; correct it, "
                "or copy the folder again"
            )
        return int(limit) if limit < NO_LIMIT else None

    def body_weights(self) -> int:
        """About how many weights lie outside the embedding tables; 0 where the configuration does not tell."""
        config = self.json("config.json")
        sizes = [config.get(name, 0) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")]
        if not all(isinstance(size, int) for size in sizes):
            return 0
        hidden, ffn, layers = sizes
        return layers * hidden * (4 * hidden + 2 * ffn)

    def weights(self) -> Path:
        """The folder with its safetensors, every file that loading the model may read checked."""
        folder = local_folder(self.source, revision=self.revision, patterns=[*CONFIGURATION, *WEIGHTS])
        if self.records is not None:
            found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
            names = sorted(name for name in found | self.records.keys() if name != MANIFEST and _of_model(name))
            self.check(names)
        return folder

    def graph(self, names: Sequence[str]) -> Path:
        """The first of these graphs (keys of `GRAPHS`, the last one is in every folder that has any) that is there; or
        one from the cache of exports, where the folder has none."""
        graphs = self.mapping(self.manifest, "onnx", MANIFEST)
        name = next((name for name in names if name in graphs), names[-1])
        file = GRAPHS[name]
        folder = local_folder(self.source, revision=self.revision, patterns=[*CONFIGURATION, file, f"{file}_data"])
        if name in graphs:
            self._check_graph(folder, name, graphs[name])
        elif (folder / file).is_file():
            self.check([file, f"{file}_data"])
        else:
            return _exported(self.weights(), names)
        return folder / file

    def _check_graph(self, folder: Path, name: str, record: Any) -> None:
        file = GRAPHS[name]
        try:
            parts = [record, record["data"]] if "data" in record else [record]
            expected = {part["file"]: part["fingerprint"] for part in parts}
        except (KeyError, TypeError) as error:
            raise HlmError(f"{folder / MANIFEST}: its record of {file} is damaged; copy the folder again") from error
        if list(expected) != [file, f"{file}_data"][: len(parts)]:
            raise HlmError(
                f"{folder / MANIFEST}: expected a record of {file} and of its weights in {file}_data, found one of "
                f"{' and '.join(map(str, expected))}; copy the folder again, or export it again"
            )
        check_files(folder, expected if self.records is None else self.records, [file, f"{file}_data"])

    def identity(self, graph: Path | None) -> str:
        """16 hex digits by which another process knows that it loaded the same."""
        names = [name for name in READ if (self.folder / name).is_file()]
        files = self.records or {name: known_fingerprint(self.folder / name) for name in names}
        return fingerprint_json([files, graph.stat().st_size if graph else None])


def cutting(tokenizer: Tokenizer, limit: int | None, side: str, *, where: str | Path) -> Tokenizer:
    """The tokenizer, made to cut texts to so many tokens on this side and to pad none."""
    tokenizer.no_padding()
    if side not in ("right", "left"):
        raise HlmError(f"{where}: expected truncation_side right or left, found {side!r}; correct it")
    if limit is not None:
        special = tokenizer.num_special_tokens_to_add(False)
        if limit <= special:
            raise HlmError(
                f"{where}: expected room for a text in the model's limit of {limit} tokens, found {special} special "
                "ones in every text; correct max_seq_length"
            )
        tokenizer.enable_truncation(limit, direction=side)
    return tokenizer


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
