"""Which files of a folder go to the Hub: those that are documented, verified, without paths and tokens of the machine.

Anything else stops the publishing, by name: a checkpoint's optimizer, a pickle, a log or a link to somewhere else has
no business there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hlm.artefacts import MANIFEST, HlmError, read_manifest
from hlm.hub.changes import CARD
from hlm.indexes.index import ENGINES
from hlm.integrity import known_fingerprint
from hlm.redaction import machine_names, public, public_manifest, refuse_secrets
from hlm.vectors.shard_files import GONE

RESULTS = ".eval_results/hlm.yaml"
_TABLE = r"\.(jsonl|parquet|tsv|csv)"
_STORE = rf"({re.escape(MANIFEST)}|vectors-\d+\.safetensors|ids-\d+\.parquet|{re.escape(GONE)})"
_INDEX = "|".join(map(re.escape, [MANIFEST, *(file for engine in ENGINES.values() for file in engine.files)]))
ALLOWED = {
    "student": [
        re.escape(MANIFEST), r"(\d+_\w+/)?config\.json", r"\d+_\w+/model\.safetensors", r"modules\.json",
        r"(config_sentence_transformers|sentence_bert_config|generation_config)\.json",
        r"model(-\d+-of-\d+)?\.safetensors", r"model\.safetensors\.index\.json",
        r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json", r"vocab\.txt", r"merges\.txt",
        r"[\w.-]+\.model", r"chat_template\.jinja", r"onnx/model(_\w+)?\.onnx(_data)?",
    ],
    "teacher": [re.escape(MANIFEST), r"adapter_config\.json", r"adapter_model\.safetensors"],
    "dataset": [
        re.escape(MANIFEST), rf"(corpus|queries|unlabelled){_TABLE}", rf"qrels/(train|dev|test){_TABLE}",
        rf"vectors/(corpus|queries)/{_STORE}", rf"index/({_INDEX})", r"reports/(report|latency)\.(json|png)",
    ],
    "space": [
        r"[\w-]+\.(py|json|txt|png|css|js)", "Dockerfile", r"hlm/([\w-]+/)*[\w.-]+\.(py|json|jinja)",
    ],
}  # fmt: skip
ALWAYS = [re.escape(CARD), r"LICENSE(\.\w+)?", re.escape(RESULTS)]
BINARY = re.compile(r".*\.(safetensors|parquet|arrow|faiss|onnx|onnx_data|png)")  # nothing is searched in them
DATA = re.compile(rf".*{_TABLE}|.*/?(tokenizer|vocab)\.json|.*/?(vocab|merges)\.txt|.*\.model|LICENSE.*")
ADAPTER = "adapter_config.json"


def release_files(
    folder: str | Path,
    kind: str,
    card: str | None = None,
    *,
    sources: Sequence[str | Path] = (),
    public_names: Iterable[str] = (),
) -> dict[str, Path | bytes]:
    """What is uploaded of a verified folder: path in the repository -> a file, or content that differs from the file.

    Paths and tokens in manifests' settings and in reports are cut out, as in the cards (`hlm.redaction.public`).

    Args:
        kind: "student", "teacher" (of whose folder only the LoRA adapter is published), "dataset" or "space".
        card: becomes README.md, in place of the folder's own.
        sources: folders and files that links in `folder` may point to, as those of `link_files` do.
        public_names: what may be published though it names this machine, its user or the home folder.

    Raises:
        HlmError: damaged or not of this kind, a file that has no place there, a link that leads out of the folder, or a
            secret, the home folder, the user's or this machine's name in a text.
    """
    folder = Path(folder)
    found = sorted(_walk(folder, kind, sources))
    _verify(folder, kind)
    files: dict[str, Path | bytes] = {}
    for name, path in found:
        if not any(re.fullmatch(pattern, name) for pattern in ALLOWED[kind] + ALWAYS):
            raise HlmError(
                f"{path}: expected only the documented files of a {kind}, found '{name}'; move it out of the folder, "
                "nothing of it is published meanwhile"
            )
        files[name] = _public(name, path)
    if card is not None:
        files[CARD] = card.encode()
    for name in [name for name in files if name.split("/")[-1] == MANIFEST]:
        files[name] = _recorded(name, files)
    known = list(public_names)
    in_data, in_texts = machine_names(known, in_data=True), machine_names(known)
    for name, content in files.items():
        if not BINARY.fullmatch(name):
            refuse_secrets(name, content, in_data if DATA.fullmatch(name) else in_texts)
    return files


def size_of(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def folder_files(folder: str | Path, sources: Sequence[str | Path] = ()) -> Iterator[tuple[str, Path]]:
    """(path inside the folder, file) of all files that are not hidden; `.eval_results/hlm.yaml` is one of them.

    Hidden are names with a leading dot, as the marks of the Hub and of the system, and `__pycache__`.

    Args:
        sources: folders and files outside that links may point to.

    Raises:
        HlmError: a link to something outside the folder or to nothing, a linked folder, or what is no file.
    """
    folder = Path(folder)
    for root, folders, names in os.walk(folder, onerror=_unreadable):
        for name in [*folders, *names]:
            path = Path(root) / name
            short = path.relative_to(folder).as_posix()
            hidden = any(part.startswith(".") or part == "__pycache__" for part in short.split("/"))
            if hidden and short not in (RESULTS, RESULTS.split("/")[0]):
                continue
            own_file(path, [folder, *sources])
            if path.is_file():
                yield short, path
            elif not path.is_dir():
                raise HlmError(f"{path}: expected a file, found none that can be read; move it out of the folder")
        folders[:] = [name for name in folders if not name.startswith(".") or name == RESULTS.split("/")[0]]


def _unreadable(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # that nothing is there at all is told by what looks for its files
        raise HlmError(f"{error.filename}: expected a folder that can be read, found {error.strerror}") from error


def own_file(path: Path, roots: Iterable[str | Path]) -> None:
    """Refuses a link that leads out of all `roots`, over however many other links, and a linked folder."""
    inside = [Path(os.path.realpath(root)) for root in roots]
    # A snapshot in the Hub's cache consists of links to the repository's blobs beside it.
    inside += [root.parent.parent / "blobs" for root in inside if root.parent.name == "snapshots"]
    target = Path(os.path.realpath(path))
    if path.is_symlink() and (path.is_dir() or not any(target.is_relative_to(root) for root in inside)):
        raise HlmError(
            f"{path}: expected a file or folder of its own, found a link to {os.readlink(path)}; put a copy of what "
            "belongs there in its place, nothing is published meanwhile"
        )


def _walk(folder: Path, kind: str, sources: Sequence[str | Path]) -> Iterator[tuple[str, Path]]:
    """(path in the repository, file)."""
    if kind != "teacher":
        yield from folder_files(folder, sources)
        return
    for name, path in folder_files(folder, sources):
        if name == MANIFEST:
            yield name, path
        elif name.startswith("adapter/") and name != f"adapter/{CARD}":
            yield name.removeprefix("adapter/"), path


def _public(name: str, path: Path) -> Path | bytes:
    if name not in (ADAPTER, MANIFEST) and not name.endswith(f"/{MANIFEST}") and not re.match(r"reports/.*json", name):
        return path
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HlmError(f"{path}: expected JSON, found none to read ({error}); write the folder again") from error
    if not isinstance(value, dict):
        raise HlmError(f"{path}: expected a JSON object, found {type(value).__name__}; write the folder again")
    if name == ADAPTER:  # its patterns of layers are no paths, whatever they begin with
        clean = value | {key: public(item, key) for key, item in value.items() if not re.search("module|pattern", key)}
    else:
        clean = public_manifest(value) if path.name == MANIFEST else public(value)
    return path if clean == value else _json(clean)


def _recorded(name: str, files: dict[str, Path | bytes]) -> Path | bytes:
    """A manifest whose records of files are of what is published: of a teacher the adapter alone, without paths."""
    content = files[name]
    value = json.loads(content if isinstance(content, bytes) else content.read_text(encoding="utf-8"))
    records = value.get("files")
    if not isinstance(records, dict):
        return content
    found = {}
    for path in records:
        short = path.removeprefix("adapter/")
        beside = name.removesuffix(MANIFEST) + short
        if (one := files.get(beside)) is not None:
            found[short] = hashlib.sha256(one).hexdigest()[:16] if isinstance(one, bytes) else known_fingerprint(one)
    return content if found == records else _json(value | {"files": found})


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _verify(folder: Path, kind: str) -> None:
    if kind == "student":
        from hlm.indexes.lineage import verify_student

        verify_student(folder)
    elif kind == "teacher":
        _verify_adapter(folder)
    elif kind == "dataset":
        _verify_dataset(folder)
    elif not (folder / "app.py").is_file():
        raise HlmError(f"expected a Space at {folder}, found no app.py; correct the path")


def _verify_adapter(folder: Path) -> dict[str, Any]:
    """The manifest of a teacher whose adapter is whole; an adapter changed to other numbers of the same shape has no
    fingerprint to be told by."""
    from safetensors import SafetensorError, safe_open

    manifest = read_manifest(folder, "teacher")
    path = folder / "adapter" / "adapter_model.safetensors"
    if not path.is_file() or not path.with_name("adapter_config.json").is_file():
        raise HlmError(
            f"expected a LoRA adapter at {path.parent}, found none; tune the teacher with LoRA, or leave it out"
        )
    try:
        with safe_open(path, framework="numpy") as tensors:
            names = list(tensors.keys())
    except SafetensorError as error:
        raise HlmError(
            f"{path}: expected safetensors, found {error}; copy it again or tune the teacher again"
        ) from error
    if not any("lora_" in name for name in names):
        raise HlmError(f"{path}: expected LoRA weights, found {', '.join(names[:3]) or 'none'}; tune the teacher again")
    return manifest


def _verify_dataset(folder: Path) -> None:
    """Tables are read and checked row by row, stores and index against their checksums, and all against each other."""
    from hlm.data.contract import load
    from hlm.data.tables import find_table
    from hlm.indexes.index import open_index
    from hlm.vectors.store import VectorStore

    stores = {path.parent.name: VectorStore.open(path.parent) for path in sorted(folder.glob(f"vectors/*/{MANIFEST}"))}
    index = open_index(folder / "index") if (folder / "index").is_dir() else None
    for store in stores.values():
        store.verify()
    made = {store.encoder for store in stores.values()} | ({index.encoder} if index else set())
    if len(made) > 1:
        raise HlmError(
            f"{folder}: expected vectors and index of one teacher, found {', '.join(sorted(made))}; embed again"
        )
    if find_table(folder, "corpus") is None:
        if not made:
            raise HlmError(f"{folder}: expected a corpus, vectors or an index, found none; correct the path")
        sources = {"corpus": stores["corpus"].source} if "corpus" in stores else {}
    else:
        splits = [split for split in ("train", "dev", "test") if find_table(folder / "qrels", split)]
        data = load(str(folder), splits=splits)
        sources = {part: data.fingerprint(part) for part in ("corpus", "queries")}
    for part, store in stores.items():
        store.check(source=sources.get(part))
    if index is not None and sources.get("corpus") not in (None, index.source):
        raise HlmError(
            f"{folder}: expected an index of the texts {sources['corpus']}, found one of {index.source}; build it "
            "again from the store of these ads"
        )
