"""The ad index in FAISS: exact, or any approximate index that a factory string describes; ids lie beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from hlm.artefacts import MANIFEST, HlmError
from hlm.fields import optional, shown, whole_number
from hlm.indexes import faiss_filters, faiss_parts
from hlm.indexes.filters import Selection, Where, mask_of
from hlm.indexes.index import ENGINES, Index
from hlm.indexes.index_parts import (
    checked_ids,
    checked_queries,
    joined,
    normalised,
    read_ads,
    read_facts,
    write_ads,
    write_facts,
)
from hlm.integrity import read_steadily
from hlm.vectors import versions
from hlm.vectors.store import VectorStore

INDEX_FILE, ADS_FILE, OLDER_IDS_FILE, _ = ENGINES["faiss"].files
KEPT_PARAMETERS = 64


class AdIndex(Index):
    """Maximum-inner-product search over a catalogue by FAISS; made by `build` or `load`, never by hand.

    Its attributes are those of `hlm.indexes.index.Index`; `factory` is the FAISS factory string.
    """

    engine = "faiss"

    def __init__(
        self,
        index: faiss.Index,
        ads: pa.Table,
        *,
        encoder: str,
        source: str,
        factory: str,
        nprobe: int | None = None,
        ef_search: int | None = None,
        k_factor: float | None = None,
        on_gpu: bool = False,
        canaries: dict[str, Any] | None = None,
        measured: dict[str, Any] | None = None,
        made_of: dict[str, Any] | None = None,
    ) -> None:
        self._index = index
        self._ads = ads
        self._ids = ads["_id"].combine_chunks()
        self._on_gpu = on_gpu
        self._process = os.getpid()
        self.encoder, self.source, self.factory = encoder, source, factory
        self.canaries, self.measured, self.made_of = canaries, measured, made_of
        # Building them takes as long as a twentieth of a fast search. They are read alone while FAISS searches.
        self._parameters: dict[tuple[float | None, ...], faiss.SearchParameters | None] = {}
        self._defaults = faiss_parts.default_options(index)
        self.set_options(nprobe=nprobe, ef_search=ef_search, k_factor=k_factor)

    def __len__(self) -> int:
        return self._index.ntotal

    def __reduce__(self) -> tuple[Any, ...]:
        facts: dict[str, Any] = {"encoder": self.encoder, "source": self.source, "factory": self.factory}
        facts |= {"canaries": self.canaries, "measured": self.measured, "made_of": self.made_of}
        return _restored, (faiss.serialize_index(self._on_cpu()), self._ads, facts | self._defaults, self._on_gpu)

    @property
    def dim(self) -> int:
        return self._index.d

    @property
    def columns(self) -> list[str]:
        """What a search can be filtered by: "_id", and the columns that were kept."""
        return self._ads.column_names

    @property
    def options(self) -> dict[str, float]:
        """Those of nprobe, ef_search and k_factor that the index has a part for, and their defaults."""
        return {name: value for name, value in self._defaults.items() if value is not None}

    @property
    def cells(self) -> int:
        """Cells of its IVF; 0 without one."""
        return faiss_parts.cells_in(self._index)

    @classmethod
    def build(
        cls,
        store: VectorStore,
        factory: str = "Flat",
        *,
        dim: int | None = None,
        columns: pa.Table | None = None,
        train_rows: int | None = None,
        rows_per_block: int = 65_536,
        nprobe: int | None = None,
        ef_search: int | None = None,
        k_factor: float | None = None,
        gpu: bool = False,
        seed: int = 0,
    ) -> AdIndex:
        """Builds the index block by block: in memory are FAISS's own copy, one block and the training sample.

        Args:
            store: the document vectors.
            factory: any FAISS factory string: "Flat" (exact), "HNSW32", "IVF1024,PQ48", "IVF256,SQ8",
                "IVF1024,PQ48x4fs,RFlat", ...; graphs are built with efConstruction=200, not FAISS's 40.
            dim: keep the first `dim` components and normalise again (Matryoshka); all by default.
            columns: what searches can be filtered by: an Arrow table with the ads' ids in "_id", and numbers, texts,
                dates or truth values in its other columns; rows in any order.
            train_rows: at most this many rows, drawn without replacement, train an index that needs training; default
                40 for each of an IVF's cells, at least 131,072.
            nprobe: cells searched of an IVF; default one in 16, at least 8.
            ef_search: candidates held while walking an HNSW graph; default 128.
            k_factor: candidates re-scored by a refining index (",RFlat"), in multiples of k; default 10.
            gpu: build and search on GPU 0; needs a GPU build of FAISS.

        Raises:
            HlmError: a factory string FAISS does not take, too few rows to train it, an option the index has no part
                for, a number out of bounds, a vector that is not finite or zero, an id that is there twice, or no GPU.
        """
        from hlm.progress import progress  # not above: a search does without, and would wait for tqdm

        width = (
            store.dim if dim is None else whole_number("dim (the store's width or less)", dim, least=1, most=store.dim)
        )
        if train_rows is None:
            train_rows = faiss_parts.rows_to_train(str(factory))
        train_rows = whole_number("train_rows", train_rows, least=1)
        rows_per_block = whole_number("rows_per_block", rows_per_block, least=1)
        seed = whole_number("seed", seed, least=0)
        factory = faiss_parts.checked_factory(factory, width, min(len(store), train_rows))
        ads = joined(checked_ids(store.ids), columns)
        pa.default_memory_pool().release_unused()  # what looking for an id that is there twice took: 90 bytes an id
        try:
            with faiss_parts.threads(one=False):
                index = faiss_parts.trained(store, factory, width, train_rows, seed, gpu)

                def blocks(what: str) -> Iterator[np.ndarray]:
                    count = -(-len(store) // rows_per_block)
                    stored = store.iter_blocks(rows_per_block)
                    for start, block in progress(stored, what=f"{what} {factory}", unit="block", total=count):
                        yield normalised(block, width, first_row=start)

                faiss_parts.fill(index, blocks, len(store))
        except (RuntimeError, MemoryError) as error:
            raise HlmError(
                f"FAISS cannot build '{factory}' over {len(store)} vectors of width {width}: "
                f"{faiss_parts.reason(error)}; choose another factory string (ids are kept beside the index: leave "
                "IDMap out), or more rows"
            ) from error
        return cls(
            index,
            ads,
            encoder=store.encoder,
            source=store.source,
            factory=factory,
            nprobe=nprobe,
            ef_search=ef_search,
            k_factor=k_factor,
            on_gpu=gpu,
            canaries=store.canaries,
            made_of=store.parts,
        )

    @classmethod
    def create(cls, place: str | Path, store: VectorStore, factory: str, **options: Any) -> AdIndex:
        """What `build` makes of these arguments, given to `check`, written by `save` with `keep`, and opened."""
        check, keep = options.pop("check", bool), options.pop("keep", 0)
        index = cls.build(store, factory, **options)
        check(index)
        index.save(place, keep=keep)
        return cls.load(place)

    @classmethod
    def from_vectors(cls, vectors: np.ndarray, ids: Sequence[str], *, encoder: str = "", source: str = "") -> AdIndex:
        """An exact index over float32 (n, dim) vectors in memory, e.g. a dev sample that the model in training encoded.

        Raises:
            HlmError: no vectors, no id for each, an id that is no text or there twice, or a vector that is not finite
                or zero.
        """
        vectors = np.asarray(vectors)
        if vectors.ndim != 2 or 0 in vectors.shape or vectors.dtype.kind not in "fiu":
            raise HlmError(f"expected vectors of shape (n, dim), found {vectors.dtype} of shape {vectors.shape}")
        if len(vectors) != len(ids):
            raise HlmError(f"expected an id for each of {len(vectors)} vectors, found {len(ids)} ids")
        for name in ids:
            if not isinstance(name, str):
                raise HlmError(f"expected ids that are texts, found {shown(name)}; turn them into str")
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(normalised(vectors, vectors.shape[1], first_row=0))
        return cls(index, joined(checked_ids(list(ids)), None), encoder=encoder, source=source, factory="Flat")

    def set_options(
        self, *, nprobe: int | None = None, ef_search: int | None = None, k_factor: float | None = None
    ) -> None:
        """Sets the defaults of these options, which are saved.

        Raises:
            HlmError: an option that the index has no part for, or a number out of bounds.
        """
        self._defaults = self._options(nprobe=nprobe, ef_search=ef_search, k_factor=k_factor)

    def save(self, folder: str | Path, beside: Callable[[Path], None] = lambda folder: None, *, keep: int = 0) -> None:
        """Writes `index.faiss`, `ads.arrow` and `hlm.json` (kind "index"); an older index is replaced whole.

        Args:
            beside: writes further files of the index into the folder that it is given, before the manifest.
            keep: with a number the older index stays, as a version to go back to, until there are so many; so it does
                where the folder has versions already (`versions.py`).

        Raises:
            HlmError: `folder` holds something else, another process writes there, or it cannot be written.
        """
        with versions.written(folder, "index", keep) as (aside, version):
            try:
                faiss.write_index(self._on_cpu(), str(aside / INDEX_FILE))
            except RuntimeError as error:
                raise HlmError(f"could not write {folder}: {faiss_parts.reason(error)}; free some space") from error
            write_ads(aside / ADS_FILE, self._ads)
            beside(aside)
            write_facts(aside, self, self._defaults, version=version)

    @classmethod
    def load(cls, folder: str | Path, *, expect_encoder: str | None = None, gpu: bool = False) -> AdIndex:
        """Opens a saved index. Its files are mapped into memory, not read, and so never written into.

        Args:
            folder: what `save` wrote.
            expect_encoder: fingerprint of the encoder that the queries' encoder was aligned to.
            gpu: search on GPU 0; needs a GPU build of FAISS.

        Raises:
            HlmError: no index there, one of another encoder, or files that are missing, cut short or changed.
        """
        return read_steadily(folder, lambda: cls._read(Path(folder), expect_encoder, gpu))

    @classmethod
    def _read(cls, folder: Path, expect_encoder: str | None, gpu: bool) -> AdIndex:
        facts = read_facts(folder, cls.engine, expect_encoder)
        options: dict[str, Any] = {
            name: optional(facts.config, kind, name, where=f"{folder / MANIFEST}, config", least=1)
            for name, kind in (("nprobe", int), ("ef_search", int), ("k_factor", float))
        }
        index, ads = faiss_parts.read_index(facts.home / INDEX_FILE), facts.home / ADS_FILE
        if (index.ntotal, index.d, index.metric_type) != (facts.count, facts.dim, faiss.METRIC_INNER_PRODUCT):
            raise HlmError(
                f"{folder}: expected {facts.count} vectors of width {facts.dim} as hlm.json says, for inner products, "
                f"found {index.ntotal} of width {index.d}, metric {index.metric_type}; build the index again"
            )
        return cls(
            faiss_parts.to_gpu(index) if gpu else index,
            read_ads(ads if ads.is_file() else facts.home / OLDER_IDS_FILE, facts.count),
            encoder=facts.encoder,
            source=facts.source,
            factory=facts.factory,
            on_gpu=gpu,
            canaries=facts.canaries,
            measured=facts.measured,
            made_of=facts.made_of,
            **options,
        )

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        where: Where | None = None,
        nprobe: int | None = None,
        ef_search: int | None = None,
        k_factor: float | None = None,
    ) -> tuple[np.ndarray, list[list[str]] | list[str]]:
        """The `k` documents with the largest inner product for each query. Safe to call from several threads, and in a
        forked process, where FAISS computes on one thread.

        Args:
            queries: float32 (n, dim), or (dim,) for one query, L2-normalised, of the encoder that made the index or one
                aligned to it. One query is searched on one thread: a second one would be waited for.
            k: documents for each query; at most as many as there are come back.
            where: which documents may come back: what `select` made, which costs nothing more, or anything that
                `select` takes.
            nprobe, ef_search, k_factor: override the index's defaults for this call; beyond what the index has, they
                mean all of it.

        Returns:
            scores: float32 (n, min(k, len(index))), cosines in descending order; for one query (min(k, len(index)),).
                With `where`, as many columns as documents may come back, where these are fewer.
            ids: n lists of document ids; for one query one list. An approximate index can find fewer than k: then the
                list is shorter and the scores past its end are -inf. With `where` every list is full: options are
                raised until it is, or the selected documents are scored one by one (`faiss_filters.py`).

        Raises:
            HlmError: another width, values that are not finite or not normalised, k or an option that is no number
                from 1 on, an option the index has no part for, or what `select` refuses.
        """
        if self._on_gpu and os.getpid() != self._process:
            raise HlmError("an index on a GPU does not work in a forked process; load it there, or start it by spawn")
        rows = checked_queries(queries, self.dim)
        k = min(whole_number("k", k, least=1), len(self))
        chosen = None if where is None else self.select(where)
        k = k if chosen is None else min(k, chosen.count)
        unchanged = nprobe is None and ef_search is None and k_factor is None
        options = self._defaults if unchanged else self._options(nprobe=nprobe, ef_search=ef_search, k_factor=k_factor)
        if k and options["k_factor"] is not None and options["k_factor"] > len(self) / k:
            options = options | {"k_factor": len(self) / k}
        scores, ids = self._found(rows, k, options, chosen)
        return (scores, ids) if np.ndim(queries) == 2 else (scores[0], ids[0])

    def select(self, where: Where) -> Selection:
        """The rows that a filter lets through, for any number of searches of this index.

        Args:
            where: {"country": "de", "price": {"<": 10}}, a `pyarrow.compute` expression, ids, or one bool a row; see
                `hlm.indexes.filters.mask_of`.

        Raises:
            HlmError: another index's selection, an index on a GPU, or what `mask_of` refuses.
        """
        if self._on_gpu:
            raise HlmError("where: an index on a GPU takes no filter; load it without gpu=True")
        if isinstance(where, Selection):
            if where.index is not self:
                raise HlmError("where: expected a selection of this index, found another's; call select on this one")
            return where
        return Selection(mask_of(where, self._ads), self)

    def _found(
        self, queries: np.ndarray, k: int, options: dict[str, float | None], chosen: Selection | None
    ) -> tuple[np.ndarray, list[list[str]]]:
        if len(queries) == 0 or k == 0:
            return np.zeros((len(queries), k), np.float32), [[] for _ in queries]
        try:
            with faiss_parts.threads(one=len(queries) == 1):
                if chosen is not None:
                    scores, rows = faiss_filters.search_selected(self._index, queries, k, chosen, options)
                else:
                    scores, rows = self._index.search(queries, k, params=self._parameters_of(options))
        except (RuntimeError, MemoryError) as error:
            raise HlmError(
                f"FAISS cannot search {len(queries)} queries for {k} ads each: {faiss_parts.reason(error)}; ask for "
                "fewer at once"
            ) from error
        if len(rows) == 1 and rows[0, -1] >= 0:
            return scores, [self._ids.take(pa.array(rows[0])).to_pylist()]
        found = rows >= 0
        if not found.all():
            order = np.argsort(~found, axis=1, kind="stable")
            rows, found = np.take_along_axis(rows, order, 1), np.take_along_axis(found, order, 1)
            scores = np.where(found, np.take_along_axis(scores, order, 1), -np.inf).astype(np.float32)
        texts = self._ids.take(pa.array(rows[found])).to_pylist()
        ends = np.cumsum(found.sum(axis=1))
        return scores, [texts[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def _parameters_of(self, options: dict[str, float | None]) -> faiss.SearchParameters | None:
        """They go with the call: set on the index they would leak into other threads' searches."""
        key = tuple(options.values())
        if key not in self._parameters:
            if len(self._parameters) >= KEPT_PARAMETERS:
                self._parameters = {}
            self._parameters[key] = faiss_parts.parameters(self._index, options)
        return self._parameters[key]

    def _on_cpu(self) -> faiss.Index:
        return faiss.index_gpu_to_cpu(self._index) if self._on_gpu else self._index

    def _options(self, **given: float | None) -> dict[str, float | None]:
        return faiss_parts.checked_options(given, self._defaults, self.factory, self.cells, len(self))


def _restored(raw: np.ndarray, ads: pa.Table, facts: dict[str, Any], gpu: bool) -> AdIndex:
    """An index out of a pickle."""
    index = faiss.deserialize_index(raw)
    return AdIndex(faiss_parts.to_gpu(index) if gpu else index, ads, on_gpu=gpu, **facts)
