"""What an ad index is, whichever engine searches it, and `open_index`, which opens what any of them wrote.

An index holds the teacher's document vectors and the catalogue's own ids. Scores are inner products of L2-normalised
vectors, that is cosines. The index remembers which encoder made its vectors; a query encoder that was not aligned to
that encoder must not be searched against it.

An engine is a module with a subclass of `Index` and a line in `ENGINES`; `index_parts.py` has what engines share. An
index is a folder whose `hlm.json` names the engine, or what a service keeps under a URI, whose scheme names it. A
frozen engine builds an index once, from a store. A living one also puts and deletes documents by the catalogue's own
ids: nobody sees what was put or deleted before `commit`, and who has the index open keeps the version that was opened.
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Mapping, Sequence
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

    from hlm.indexes.filters import Where
    from hlm.vectors.store import VectorStore

KIND = "index"


class Engine(NamedTuple):
    """Where an engine's class is, and the files that it writes beside `hlm.json`: no others are published. `scheme` is
    that of its URIs, such as "milvus" of milvus://host:19530/ads; `lives`: whether `put` and `delete` work."""

    module: str
    name: str
    files: tuple[str, ...] = ()
    scheme: str | None = None
    lives: bool = False


# ids.parquet is that of an index from before ads.arrow.
ENGINES = {
    "faiss": Engine("hlm.indexes.faiss_index", "AdIndex", ("index.faiss", "ads.arrow", "ids.parquet", "tuning.png")),
    "lance": Engine("hlm.indexes.lance_index", "LanceIndex", lives=True),
    "milvus": Engine("hlm.indexes.milvus_index", "MilvusIndex", scheme="milvus", lives=True),
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
        made_of: what of a store it holds, as `VectorStore.parts` names it: {"shards": [...], "gone": ...}; None where
            nothing was recorded.
    """

    engine: ClassVar[str]
    encoder: str
    source: str
    factory: str
    canaries: dict[str, Any] | None
    measured: dict[str, Any] | None = None
    made_of: dict[str, Any] | None = None

    @property
    @abc.abstractmethod
    def dim(self) -> int:
        """Width of the vectors."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many documents there are."""

    @classmethod
    @abc.abstractmethod
    def create(
        cls,
        place: str | Path,
        store: VectorStore,
        factory: str,
        *,
        dim: int | None = None,
        columns: pa.Table | None = None,
    ) -> Self:
        """Builds an index over a store's vectors, block by block, at a folder or URI, and opens it. Who has an older
        index there open keeps it.

        Args:
            factory: what to build, in the engine's own words.
            dim: keep the first `dim` components and normalise again (Matryoshka); None: all.
            columns: what searches can be filtered by: "_id", and columns of plain values; rows in any order.

        Raises:
            HlmError: a factory that the engine does not have, a vector that is not finite or zero, an id that is there
                twice, or a place that holds something else or cannot be written.
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

    def save(self, folder: str | Path) -> None:
        """Writes a copy of the index, of this version alone: the engine's files and `hlm.json` (kind "index").

        Raises:
            HlmError: `folder` holds something else, another process writes there, or it cannot be written. Or the
                engine has no copies: its indexes stay where they were created.
        """
        raise HlmError(
            f"expected an index that can be copied, found one of '{self.engine}', which stays where it was created; "
            "build one by FAISS from the same store"
        )

    def search_harder(self) -> bool:
        """Makes searches find more and take longer, for an index that is being built and finds too little.

        Returns:
            False where it cannot, or no more than that.
        """
        return False

    def put(self, ids: Sequence[str], vectors: np.ndarray, columns: pa.Table | None = None) -> None:
        """Adds documents, and replaces those whose ids the index has.

        Args:
            ids: each once.
            vectors: floating-point (n, width of the index or more); narrowed and normalised as by `create`.
            columns: as of `create`, with a row for each of `ids`; needed where the index has columns.

        Raises:
            HlmError: the engine is frozen, or what `create` refuses.
        """
        raise self._frozen("put into")

    def delete(self, ids: Sequence[str]) -> None:
        """Removes documents; ids that the index lacks are passed over.

        Raises:
            HlmError: the engine is frozen.
        """
        raise self._frozen("deleted from")

    def commit(self, store: VectorStore | None = None) -> None:
        """What was put and deleted since becomes the version that `open_index` opens from now on.

        Args:
            store: what the index equals now: its fingerprints go into the manifest.

        Raises:
            HlmError: the engine is frozen, or the index does not hold as many documents as the store.
        """
        raise self._frozen("committed to")

    @classmethod
    def make_current(cls, folder: Path, manifest: dict[str, Any]) -> None:
        """Makes one of a folder's versions the current one (`versions.py`).

        Args:
            manifest: the version's, whose files have been looked at.
        """
        from hlm.vectors import versions

        versions.point(folder, manifest)

    def _frozen(self, what: str) -> HlmError:
        living = " or ".join(name for name, engine in ENGINES.items() if engine.lives)
        return HlmError(
            f"expected an index of a living engine ({living}), found one of '{self.engine}', which cannot be {what}; "
            "build it again from its store, or build an index of a living engine"
        )

    @classmethod
    @abc.abstractmethod
    def load(cls, folder: str | Path, *, expect_encoder: str | None = None) -> Self:
        """Opens what this engine wrote at a folder or URI; see `open_index`."""


def open_index(folder: str | Path, *, expect_encoder: str | None = None) -> Index:
    """Opens an index with the engine that its manifest, or the scheme of its URI, names.

    Args:
        folder: where `Index.create` wrote: a folder, or the URI of a service.
        expect_encoder: fingerprint of the encoder that the queries' encoder was aligned to.

    Raises:
        HlmError: no index there, one of an engine that this version does not know, one of another encoder, or files
            that are missing, cut short or changed. Or the engine is not installed: the error names the extra.
    """
    scheme, found, _ = str(folder).partition("://")
    if found:
        name = engine_of_scheme(scheme, str(folder))
    else:
        where = Path(folder) / MANIFEST
        name = read_steadily(folder, lambda: engine_of(read_manifest(folder, KIND), where))
    return engine_class(name).load(folder, expect_encoder=expect_encoder)


def create_index(place: str | Path, store: VectorStore, kind: str, **options: Any) -> Index:
    """`Index.create` of the engine that `kind` names: "lance:IVF_RQ", and without a name FAISS's "HNSW32".

    Args:
        options: those of `Index.create`, and those of an engine that keeps versions in a folder: `check` is given the
            index before anybody else sees it, may set `measured`, and leaves in place what was there by raising; `keep`
            is how many versions to keep, this one among them (`versions.py`).

    Raises:
        HlmError: an engine that is not known or not installed, or what `Index.create` refuses.
    """
    name, factory = engine_and_factory(kind)
    return engine_class(name).create(place, store, factory, **options)


def engine_and_factory(kind: str) -> tuple[str, str]:
    """The two parts of "lance:IVF_RQ"; of "HNSW32", "faiss" and itself.

    Raises:
        HlmError: an engine that this version does not know.
    """
    name, found, factory = kind.partition(":")
    if not found:
        return OLDEST, kind
    if name not in ENGINES:
        raise HlmError(f"expected an index of the engine {' or '.join(ENGINES)}, found '{kind}'; correct the name")
    return name, factory


def engine_class(name: str) -> type[Index]:
    """An engine of `ENGINES`.

    Raises:
        HlmError: it is not installed: names the extra.
    """
    with extras_named(f"an index of the engine {name}"):
        found: type[Index] = getattr(importlib.import_module(ENGINES[name].module), ENGINES[name].name)
    return found


def engine_of_scheme(scheme: str, uri: str) -> str:
    """The engine whose URIs begin so.

    Raises:
        HlmError: no engine's do.
    """
    schemes = {engine.scheme: name for name, engine in ENGINES.items() if engine.scheme}
    if scheme not in schemes:
        known = ", ".join(f"{one}://" for one in schemes) or "none"
        raise HlmError(f"expected a folder, or a URI that begins with one of {known}, found '{uri}'; correct it")
    return schemes[scheme]


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
