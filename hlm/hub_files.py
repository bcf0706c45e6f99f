"""Which files of a folder go to the Hub: those that are documented, verified, without paths and tokens of the machine.

Anything else stops the publishing, by name: a checkpoint's optimizer, a pickle or a log has no business there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from hlm.artefacts import MANIFEST, HlmError, read_manifest

CARD, RESULTS = "README.md", ".eval_results/hlm.yaml"
_TABLE = r"\.(jsonl|parquet|tsv|csv)"
_STORE = rf"({re.escape(MANIFEST)}|vectors-\d+\.safetensors|ids-\d+\.parquet)"
_INDEX = rf"({re.escape(MANIFEST)}|index\.faiss|ids\.parquet)"
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
        rf"vectors/(corpus|queries)/{_STORE}", rf"index/{_INDEX}", r"reports/(report|latency)\.(json|png)",
    ],
    "space": [
        r"[\w-]+\.(py|json|txt|png|css|js)", "Dockerfile", r"hlm/([\w-]+/)*[\w.-]+\.(py|json|jinja)",
    ],
}  # fmt: skip
ALWAYS = [re.escape(CARD), r"LICENSE(\.\w+)?", re.escape(RESULTS)]
WORDS = re.compile(r"(tokenizer|vocab)\.json|vocab\.txt|merges\.txt")  # single tokens may look like anything
SECRET = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{16,}")


def release_files(folder: str | Path, kind: str, card: str | None = None) -> dict[str, Path | bytes]:
    """What is uploaded of a verified folder: path in the repository -> a file, or content that differs from the file.

    Absolute paths and tokens in manifests' settings and in reports are cut out, as in the cards.

    Args:
        kind: "student", "teacher" (of whose folder only the LoRA adapter is published), "dataset" or "space".
        card: becomes README.md, in place of the folder's own.

    Raises:
        HlmError: damaged or not of this kind, a file that has no place there, or a secret in one.
    """
    folder = Path(folder)
    _verify(folder, kind)
    files: dict[str, Path | bytes] = {}
    for name, path in sorted(_walk(folder, kind)):
        if not any(re.fullmatch(pattern, name) for pattern in ALLOWED[kind] + ALWAYS):
            raise HlmError(
                f"{path}: expected only the documented files of a {kind}, found '{name}'; move it out of the folder, "
                "nothing of it is published meanwhile"
            )
        files[name] = _public(name, path)
    if card is not None:
        files[CARD] = card.encode()
    for name, content in files.items():
        _refuse_secrets(name, content)
    return files


def size_of(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _walk(folder: Path, kind: str) -> Iterator[tuple[str, Path]]:
    """(path in the repository, file); hidden files are left out, as the Hub's and the system's own marks are hidden."""
    if kind == "teacher":
        manifest, adapter = folder / MANIFEST, folder / "adapter"
        yield MANIFEST, manifest
        yield from ((path.name, path) for path in adapter.iterdir() if path.name != CARD)
        return
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))
        if path.is_file() and (not hidden or name == RESULTS):
            yield name, path


def _public(name: str, path: Path) -> Path | bytes:
    from hlm.card_facts import public

    if path.suffix != ".json" or not (path.name == MANIFEST or name.startswith("reports/") or "adapter_config" in name):
        return path
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HlmError(f"{path}: expected JSON, found none to read ({error}); write the folder again") from error
    # A manifest's further facts are fingerprints, sizes and canary queries: those stay to the letter.
    clean = value | {"config": public(value.get("config"))} if path.name == MANIFEST else public(value)
    return path if clean == value else (json.dumps(clean, indent=2, ensure_ascii=False) + "\n").encode()


def _refuse_secrets(name: str, content: Path | bytes) -> None:
    if not re.search(r"\.(json|md|txt|ya?ml|py|jinja)$", name) or WORDS.fullmatch(name):
        return
    text = (content if isinstance(content, bytes) else content.read_bytes()).decode(errors="replace")
    token, home = get_token(), str(Path.home())
    if SECRET.search(text) or (token and token in text) or (len(home) > 1 and f"{home}/" in text):
        raise HlmError(
            f"{name}: expected nothing secret, found a token or a path of the home folder; take it out there"
        )


def _verify(folder: Path, kind: str) -> None:
    if kind == "student":
        from hlm.lineage import verify_student

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
    from hlm.data import load
    from hlm.index import AdIndex
    from hlm.store import VectorStore
    from hlm.tables import find_table

    stores = {path.parent.name: VectorStore.open(path.parent) for path in sorted(folder.glob(f"vectors/*/{MANIFEST}"))}
    index = AdIndex.load(folder / "index") if (folder / "index").is_dir() else None
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
