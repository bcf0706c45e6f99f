"""Whether a student and a catalogue's vectors belong together: by fingerprint, by file content, and by what the student
does to the teacher's canary queries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlm.artefacts import MANIFEST, HlmError, read_manifest
from hlm.encoders.folder import ARCHITECTURE, EncoderFolder
from hlm.fields import field, optional
from hlm.integrity import read_steadily

# torch and faiss are imported where they are used: a refusal by manifest alone comes at once.
if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from hlm.indexes.index import Index
    from hlm.vectors.store import VectorStore


def read_student(folder: str | Path) -> dict[str, Any]:
    """The student's manifest, with "encoder", "dim" and ["inputs"]["teacher"] for certain."""
    manifest, where = read_manifest(folder, "student"), Path(folder) / MANIFEST
    if "teacher" not in manifest["inputs"] or not {"encoder", "dim"} <= set(manifest):
        raise HlmError(
            f"{where} says neither whose student this is nor how wide it is; write the student again with this version"
        )
    field(manifest, str, "inputs", "teacher", where=where)
    field(manifest, str, "encoder", where=where)
    field(manifest, int, "dim", where=where, least=1)
    return manifest


def named_teacher(store: VectorStore) -> dict[str, Any]:
    """What an artefact says of a teacher whose weights nobody here has seen: {"named_teacher": {"model": its name,
    "kind": "openai", "tei" or "ready"}}; {} of one that was loaded."""
    found = store.manifest["config"].get("teacher")
    return {"named_teacher": found} if isinstance(found, dict) else {}


def check_student(folder: str | Path, teacher: str) -> None:
    """Refuses a student that was pruned or aligned for another teacher's space.

    Raises:
        HlmError: the student's manifest is missing or names another teacher.
    """
    found = read_manifest(folder, "student")["inputs"].get("teacher")
    if found != teacher:
        raise HlmError(
            f"expected a student of teacher {teacher} (the vectors'), found {folder}, a student of teacher {found}; "
            "make one from this teacher (recipes/align.py or prune.py), or name the other teacher's vectors"
        )


def open_fitting(folder: str | Path, student: dict[str, Any], kind: str | None = None) -> VectorStore | Index:
    """Opens the vectors or the index at `folder` where its teacher is the student's and its width fits.

    Raises:
        HlmError: another teacher's (both fingerprints are named), another width, not of `kind`, or damaged.
    """
    teacher, dim = student["inputs"]["teacher"], student["dim"]
    kind = kind or kind_of(folder)
    if kind == "index":
        from hlm.indexes.index import open_index

        index = open_index(folder, expect_encoder=teacher)
        if index.dim != dim:
            raise HlmError(
                f"expected an index of width {dim} (the student's), found {index.dim} at {folder}; build it from the "
                f"teacher's store with dim={dim}"
            )
        return index
    from hlm.vectors.store import VectorStore

    store = VectorStore.open(folder)
    store.check(encoder=teacher)
    if store.dim < dim:
        raise HlmError(f"expected vectors at least {dim} wide (the student's), found {store.dim} at {folder}")
    return store


def kind_of(folder: str | Path) -> str:
    """Returns "index" of a service's URI and where the manifest at `folder` says so, else "vectors", whose reader says
    what else is wrong."""
    if "://" in str(folder):
        return "index"
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
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
    from hlm.encoders.loading import encode
    from hlm.vectors.store import VectorStore

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
    from hlm.vectors.canaries import check, texts_of

    texts = texts_of(catalogue.canaries, where=str(target))
    vectors = encode(model, texts, prompt_name="query")
    right, cosine = check(catalogue.canaries, vectors, name=f"the student {student}", where=str(target))
    return facts | {"canaries": right, "of": len(texts), "mean_cosine": cosine}


def verify_student(folder: str | Path) -> SentenceTransformer:
    """Loads the student after comparing its weights, tokenizer, settings and exported graphs with its manifest.

    Raises:
        HlmError: no student there, or a file was cut short or changed after it was written.
    """
    return read_steadily(folder, lambda: _verified(Path(folder)))


def _verified(folder: Path) -> SentenceTransformer:
    from hlm.encoders.loading import fingerprint, load_encoder

    manifest = read_student(folder)
    files = EncoderFolder(folder)
    files.check_all()  # of a student of an older version nothing is told
    config, settings = folder / ARCHITECTURE, files.json(ARCHITECTURE)  # a static student has none
    dtype = optional(settings, str, "dtype", where=config)
    dtype = dtype or optional(settings, str, "torch_dtype", where=config) or "float32"  # before transformers 5
    model = load_encoder(str(folder), dtype=dtype)
    found = fingerprint(model)
    if found != manifest["encoder"]:
        raise HlmError(
            f"{folder}: expected encoder {manifest['encoder']} as {MANIFEST} says, found {found}; its weights, "
            "tokenizer or settings were changed after it was written: copy or pull it again, or write it again"
        )
    return model
