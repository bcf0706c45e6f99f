"""What an ad index is, whichever engine searches it, and `open_index`, which opens what any of them saved.

An index holds the teacher's document vectors and the catalogue's own ids. Scores are inner products of L2-normalised
vectors, that is cosines. The index remembers which encoder made its vectors; a query encoder that was not aligned to
that encoder must not be searched against it.

An engine is a module with a subclass of `Index` and a line in `ENGINES`; `index_parts.py` has what engines share.
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from hlm.artefacts import MANIFEST, HlmError, read_manifest
from hlm.extras import extras_named
from hlm.fields import optional
from hlm.integrity import read_steadily

# NumPy, PyArrow and FAISS come with the engine: what may be published is known without them.
if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from hlm.vectors.filters import Where
    from hlm.vectors.store import VectorStore

KIND = "index"


class Engine(NamedTuple):
    """Where an engine's class is, and the files that it writes beside `hlm.json`: no others are published."""

    module: str
    name: str
    files: tuple[str, ...]


# ids.parquet is that of an index from before ads.arrow.
ENGINES = {
    "faiss": Engine("hlm.vectors.faiss_index", "AdIndex", ("index.faiss", "ads.arrow", "ids.parquet", "tuning.png"))
}
OLDEST = "faiss"  # the engine of indexes whose manifests name none


class Index(abc.ABC):
    """Maximum-inner-product search over a catalogue.

    Attributes:
        engine: its name in `ENGINES` and in `hlm.json`.
        encoder: fingerprint of the encoder that made the vectors, the teacher.
        source: fingerprint of the texts behind them.
        factory: what was built, in the engine's own words, e.g. FAISS's factory string "Flat".
        canaries: the teacher's vectors of fixed queries (`canaries.py`), from the store; None where it had none.
        measured: how much of exact search a sample of queries found, and what was measured with it (`recall.py`); None
            where nothing was measured, as of an exact index.
    """

    engine: ClassVar[str]
    encoder: str
    source: str
    factory: str
    canaries: dict[str, Any] | None
    measured: dict[str, Any] | None = None

    @property
    @abc.abstractmethod
    def dim(self) -> int:
        """Width of the vectors."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many documents there are."""

    @classmethod
    @abc.abstractmethod
    def build(
        cls, store: VectorStore, factory: str, *, dim: int | None = None, columns: pa.Table | None = None
    ) -> Self:
        """Builds an index over a store's vectors; with `dim` over their first components, normalised again.

        Args:
            columns: what searches can be filtered by: "_id", and columns of plain values; rows in any order.
        """

    @abc.abstractmethod
    def search(
        self, queries: np.ndarray, k: int, *, where: Where | None = None
    ) -> tuple[np.ndarray, list[list[str]] | list[str]]:
        """The `k` documents with the largest inner product for each query. Safe to call from several threads.

        Args:
            queries: float32 (n, dim), or (dim,) for one query, L2-normalised, of the encoder that made the index or one
                aligned to it.
            k: documents for each query; at most as many as there are come back.
            where: which documents may come back (`filters.py`); None: all.

        Returns:
            scores: float32 (n, min(k, len(index))), cosines in descending order; for one query (min(k, len(index)),).
                With `where`, as many columns as documents may come back, where these are fewer.
            ids: n lists of document ids; for one query one list. An approximate index can find fewer than k: then the
                list is shorter and the scores past its end are -inf. With `where` every list is full.

        Raises:
            HlmError: another width, values that are not finite or not normalised, a k below 1, or a filter that does
                not fit the index.
        """

    @abc.abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes the engine's files and `hlm.json` (kind "index"); an older index is replaced whole.

        Raises:
            HlmError: `folder` holds something else, another process writes there, or it cannot be written.
        """

    @classmethod
    @abc.abstractmethod
    def load(cls, folder: str | Path, *, expect_encoder: str | None = None) -> Self:
        """Reads what `save` of this engine wrote; see `open_index`."""


def open_index(folder: str | Path, *, expect_encoder: str | None = None) -> Index:
    """Opens a saved index with the engine that its manifest names.

    Args:
        folder: what `Index.save` wrote.
        expect_encoder: fingerprint of the encoder that the queries' encoder was aligned to.

    Raises:
        HlmError: no index there, one of an engine that this version does not know, one of another encoder, or files
            that are missing, cut short or changed. Or the engine is not installed: the error names the extra.
    """
    where = Path(folder) / MANIFEST
    name = read_steadily(folder, lambda: engine_of(read_manifest(folder, KIND), where))
    with extras_named(f"an index of the engine {name}"):
        opened: type[Index] = getattr(importlib.import_module(ENGINES[name].module), ENGINES[name].name)
    return opened.load(folder, expect_encoder=expect_encoder)


def engine_of(manifest: Mapping[str, Any], where: Path) -> str:
    """The engine that the manifest of an index names.

    Raises:
        HlmError: this version does not know it.
    """
    name = optional(manifest, str, "engine", where=where) or OLDEST
    if name not in ENGINES:
        raise HlmError(
            f"{where}: expected an index of the engine {' or '.join(ENGINES)}, found one of '{name}'; use the version "
            "of HLM that wrote it, or build the index again"
        )
    return name
