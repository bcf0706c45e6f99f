"""Small stores of vectors for the tests of the indexes, and manifests of indexes that are written anew."""

import json

import numpy as np

from hlm.artefacts import fingerprint_file
from hlm.vectors.store import VectorStore, write_store


def make_store(folder, vectors, *, ids=None, encoder="teacher-a", shard_rows=700):
    vectors = np.asarray(vectors, dtype=np.float32)
    ids = ids or [f"ad-{row}" for row in range(len(vectors))]
    records = [(name, str(row)) for row, name in enumerate(ids)]
    write_store(
        folder,
        records,
        lambda texts: vectors[[int(text) for text in texts]],
        dim=vectors.shape[1],
        encoder=encoder,
        source="catalogue-a",
        n_rows=len(vectors),
        shard_rows=shard_rows,
    )
    return VectorStore.open(folder)


def clustered(rows, dim=32, *, clusters=40, seed=0):
    """Unit vectors around unit centres: like embeddings, unlike pure noise, they have near neighbours."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, dim))
    vectors = centres[rng.integers(clusters, size=rows)] + 0.9 * rng.normal(size=(rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def rewrite(folder, change=lambda manifest: None):
    """Writes the manifest anew, with hashes that fit: only what reads the files can find them wrong."""
    manifest = json.loads((folder / "hlm.json").read_text())
    manifest["files"] = {path.name: fingerprint_file(path) for path in folder.iterdir() if path.name != "hlm.json"}
    change(manifest)
    (folder / "hlm.json").write_text(json.dumps(manifest))
