"""Whether a student and a catalogue's vectors belong together: by fingerprint, by file content, and by what the student
does to the teacher's canary queries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlm.artefacts import MANIFEST, HlmError, check_graph, read_manifest

# torch and faiss are imported where they are used: a refusal by manifest alone comes at once.
if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from hlm.index import AdIndex
    from hlm.store import VectorStore


def read_student(folder: str | Path) -> dict[str, Any]:
    """The student's manifest, with "encoder", "dim" and ["inputs"]["teacher"] for certain."""
    manifest = read_manifest(folder, "student")
    inputs = manifest.get("inputs")
    if not isinstance(inputs, dict) or "teacher" not in inputs or not {"encoder", "dim"} <= set(manifest):
        raise HlmError(
            f"{Path(folder) / MANIFEST} says neither whose student this is nor how wide it is; write the student again "
            "with this version"
        )
    return manifest


def open_fitting(folder: str | Path, student: dict[str, Any], kind: str | None = None) -> VectorStore | AdIndex:
    """Opens the vectors or the index at `folder` where its teacher is the student's and its width fits.

    Raises:
        HlmError: another teacher's (both fingerprints are named), another width, not of `kind`, or damaged.
    """
    teacher, dim = student["inputs"]["teacher"], student["dim"]
    kind = kind or kind_of(folder)
    if kind == "index":
        from hlm.index import AdIndex

        index = AdIndex.load(folder, expect_encoder=teacher)
        if index.dim != dim:
            raise HlmError(
                f"expected an index of width {dim} (the student's), found {index.dim} at {folder}; build it from the "
                f"teacher's store with dim={dim}"
            )
        return index
    from hlm.store import VectorStore

    store = VectorStore.open(folder)
    store.check(encoder=teacher)
    if store.dim < dim:
        raise HlmError(f"expected vectors at least {dim} wide (the student's), found {store.dim} at {folder}")
    return store


def kind_of(folder: str | Path) -> str:
    """Returns "index" where the manifest at `folder` says so, else "vectors", whose reader says what else is wrong."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "vectors"
    return "index" if isinstance(manifest, dict) and manifest.get("kind") == "index" else "vectors"


def verify(student: str | Path, target: str | Path) -> dict[str, Any]:
    """Whether the student's folder is whole and searches the store or index at `target`, whose files are all read.

    Returns:
        {"encoder", "teacher", "dim", "vectors": how many, "canaries": how many find their own or None where the target
        has none, "of": of how many, "mean_cosine" or None}.

    Raises:
        HlmError: the two do not belong together, or a file of either was cut short or changed after it was written.
    """
    manifest = read_student(student)
    catalogue = open_fitting(target, manifest)  # an index's files are compared with its manifest here
    from hlm.encoders import encode
    from hlm.store import VectorStore

    if isinstance(catalogue, VectorStore):
        catalogue.verify()
    model = verify_student(student)
    facts = {
        "encoder": manifest["encoder"],
        "teacher": catalogue.encoder,
        "dim": manifest["dim"],
        "vectors": len(catalogue),
    }
    if catalogue.canaries is None:
        return facts | {"canaries": None, "of": 0, "mean_cosine": None}
    from hlm.canaries import check

    texts = catalogue.canaries.get("texts", [])
    vectors = encode(model, texts, prompt_name="query")
    right, cosine = check(catalogue.canaries, vectors, name=f"the student {student}", where=str(target))
    return facts | {"canaries": right, "of": len(texts), "mean_cosine": cosine}


def verify_student(folder: str | Path) -> SentenceTransformer:
    """Loads the student after comparing its weights, tokenizer, settings and exported graphs with its manifest.

    Raises:
        HlmError: no student there, or a file was cut short or changed after it was written.
    """
    from safetensors import SafetensorError

    from hlm.encoders import fingerprint, load_encoder

    manifest = read_student(folder)
    for record in (manifest.get("onnx") or {}).values():
        if isinstance(record, dict):
            check_graph(folder, record)
    try:
        model = load_encoder(str(folder), dtype=_dtype_of(folder))
    except SafetensorError as error:
        raise HlmError(
            f"{folder}: expected whole weights, found damaged ones ({error}); copy or pull it again, or write it again"
        ) from error
    found = fingerprint(model)
    if found != manifest["encoder"]:
        raise HlmError(
            f"{folder}: expected encoder {manifest['encoder']} as {MANIFEST} says, found {found}; its weights, "
            "tokenizer or settings were changed after it was written: copy or pull it again, or write it again"
        )
    return model


def _dtype_of(folder: str | Path) -> str:
    """The dtype that the weights were saved in: a fingerprint covers it."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return config.get("dtype") or config.get("torch_dtype") or "float32"
