"""The ad index: a FAISS index over the teacher's document vectors, with the catalogue's own ids beside it.

Scores are inner products of L2-normalised vectors, that is cosines. The index remembers which encoder made its
vectors; a query encoder that was not aligned to that encoder must not be searched against it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hlm.artefacts import HlmError, atomic_folder, fingerprint_file, read_manifest, write_manifest
from hlm.store import VectorStore

logger = logging.getLogger(__name__)

INDEX_FILE = "index.faiss"
IDS_FILE = "ids.parquet"
# Vectors that were normalised and then went through fp16 or bf16 are off by less than this.
NORM_TOLERANCE = 1e-2


class AdIndex:
    """Maximum-inner-product search over a catalogue; made by `build` or `load`, never by hand.

    Attributes:
        encoder: fingerprint of the encoder that made the vectors.
        source: fingerprint of the texts behind them.
        dim: width of the vectors.
        factory: the FAISS factory string.
        canaries: the teacher's vectors of fixed queries (`hlm.canaries`), from the store; None where it had none.
    """

    def __init__(
        self,
        index: faiss.Index,
        ids: pa.Array,
        *,
        encoder: str,
        source: str,
        factory: str,
        nprobe: int | None = None,
        ef_search: int | None = None,
        k_factor: float | None = None,
        on_gpu: bool = False,
        canaries: dict[str, Any] | None = None,
    ) -> None:
        self._index = index
        self._ids = ids
        self._on_gpu = on_gpu
        self.encoder = encoder
        self.source = source
        self.factory = factory
        self.canaries = canaries
        parts = list(_parts(index))
        cells = next((part.nlist for part in parts if _is_ivf(part)), 0)
        # FAISS's own defaults (1, 16 and 1) trade most of the recall away; k_factor=1 even makes refinement a no-op.
        self._defaults: dict[str, float | None] = {
            "nprobe": min(cells, max(8, math.ceil(cells / 16))) if cells else None,
            "ef_search": 128 if any(isinstance(part, faiss.IndexHNSW) for part in parts) else None,
            "k_factor": 10.0 if any(isinstance(part, faiss.IndexRefine) for part in parts) else None,
        }
        self._defaults = self._options(nprobe, ef_search, k_factor)

    def __len__(self) -> int:
        return self._index.ntotal

    @property
    def dim(self) -> int:
        return self._index.d

    @classmethod
    def build(
        cls,
        store: VectorStore,
        factory: str = "Flat",
        *,
        dim: int | None = None,
        train_rows: int = 131_072,
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
                "IVF1024,PQ48x4fs,RFlat", ...
            dim: keep the first `dim` components and normalise again (Matryoshka); all by default.
            train_rows: at most this many rows, drawn without replacement, train an index that needs training; FAISS
                asks for 39 or more for each of an IVF's cells.
            nprobe: cells searched of an IVF; default one in 16, at least 8.
            ef_search: candidates held while walking an HNSW graph; default 128.
            k_factor: candidates re-scored by a refining index (",RFlat"), in multiples of k; default 10.
            gpu: build and search on GPU 0; needs a GPU build of FAISS.

        Raises:
            HlmError: a factory string FAISS does not take, too few rows to train it, an option the index has no part
                for, a vector that is not finite or zero, or no GPU.
        """
        if dim is not None and not 1 <= dim <= store.dim:
            raise HlmError(f"dim: expected 1 to {store.dim} (the store's width), found {dim}; correct it")
        width = dim or store.dim
        try:
            index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
            if gpu:
                index = _to_gpu(index)
            if not index.is_trained:
                rows = np.arange(len(store))
                if len(store) > train_rows:
                    rows = np.sort(np.random.default_rng(seed).choice(len(store), train_rows, replace=False))
                logger.info("training %s on %d of %d vectors", factory, len(rows), len(store))
                index.train(_normalised(store.gather(rows), width, first_row=0))
            for start, block in store.iter_blocks(rows_per_block):
                index.add(_normalised(block, width, first_row=start))
        except RuntimeError as error:
            raise HlmError(
                f"FAISS cannot build '{factory}' over {len(store)} vectors of width {width}: {_reason(error)}; choose "
                "another factory string (ids are kept beside the index: leave IDMap out), or more rows"
            ) from error
        return cls(
            index,
            _flat_strings(store.ids),
            encoder=store.encoder,
            source=store.source,
            factory=factory,
            nprobe=nprobe,
            ef_search=ef_search,
            k_factor=k_factor,
            on_gpu=gpu,
            canaries=store.canaries,
        )

    @classmethod
    def from_vectors(cls, vectors: np.ndarray, ids: Sequence[str], *, encoder: str = "", source: str = "") -> AdIndex:
        """An exact index over float32 (n, dim) vectors in memory, e.g. a dev sample that the model in training encoded.

        Raises:
            HlmError: ids and vectors differ in number, or a vector is not finite or zero.
        """
        if len(vectors) != len(ids):
            raise HlmError(f"expected an id for each of {len(vectors)} vectors, found {len(ids)} ids")
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(_normalised(vectors, vectors.shape[1], first_row=0))
        return cls(index, pa.array(list(ids), pa.string()), encoder=encoder, source=source, factory="Flat")

    def save(self, folder: str | Path) -> None:
        """Writes `index.faiss`, `ids.parquet` and `hlm.json` (kind "index"); an older folder is replaced whole."""
        index = faiss.index_gpu_to_cpu(self._index) if self._on_gpu else self._index
        with atomic_folder(folder, "index") as aside:
            faiss.write_index(index, str(aside / INDEX_FILE))
            pq.write_table(pa.table({"_id": self._ids}), aside / IDS_FILE)
            write_manifest(
                aside,
                "index",
                inputs={"encoder": self.encoder, "source": self.source},
                config={"factory": self.factory, **self._defaults},
                dim=self.dim,
                count=len(self),
                **({"canaries": self.canaries} if self.canaries else {}),
            )

    @classmethod
    def load(cls, folder: str | Path, *, expect_encoder: str | None = None, gpu: bool = False) -> AdIndex:
        """Reads a saved index.

        Args:
            folder: what `save` wrote.
            expect_encoder: fingerprint of the encoder that the queries' encoder was aligned to.
            gpu: search on GPU 0; needs a GPU build of FAISS.

        Raises:
            HlmError: no index there, one of another encoder, or files that are missing, cut short or changed.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, "index")
        try:
            inputs, config, files = manifest["inputs"], manifest["config"], manifest["files"]
            encoder, source = inputs["encoder"], inputs["source"]
            dim, count, factory = manifest["dim"], manifest["count"], config["factory"]
        except (KeyError, TypeError) as error:
            raise HlmError(f"{folder}/hlm.json lacks {error}; build the index again") from error
        if expect_encoder is not None and encoder != expect_encoder:
            raise HlmError(
                f"expected an index of vectors made by encoder {expect_encoder}, found one of encoder {encoder} at "
                f"{folder}; build the index from that encoder's store, or use the student aligned to {encoder}"
            )
        for name in (INDEX_FILE, IDS_FILE):
            path = folder / name
            found = fingerprint_file(path) if path.is_file() else "no file"
            if found != files.get(name):
                raise HlmError(
                    f"{path}: expected content {files.get(name)} as hlm.json says, found {found}; the file was changed "
                    "or cut short: copy or build the index again"
                )
        try:
            index = faiss.read_index(str(folder / INDEX_FILE))
            index = _to_gpu(index) if gpu else index
        except RuntimeError as error:
            raise HlmError(f"FAISS {faiss.__version__} cannot read {folder / INDEX_FILE}: {_reason(error)}") from error
        ids = _flat_strings(pq.read_table(folder / IDS_FILE)["_id"])
        if not index.ntotal == len(ids) == count or index.d != dim:
            raise HlmError(
                f"{folder}: expected {count} vectors of width {dim} as hlm.json says, found {index.ntotal} of width "
                f"{index.d} and {len(ids)} ids; build the index again"
            )
        options = {name: config.get(name) for name in ("nprobe", "ef_search", "k_factor")}
        options["canaries"] = manifest.get("canaries")
        return cls(index, ids, encoder=encoder, source=source, factory=factory, on_gpu=gpu, **options)

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        nprobe: int | None = None,
        ef_search: int | None = None,
        k_factor: float | None = None,
    ) -> tuple[np.ndarray, list[list[str]]]:
        """The `k` documents with the largest inner product for each query. Safe to call from several threads.

        Args:
            queries: float32 (n, dim), L2-normalised, of the encoder that made the index or one aligned to it.
            k: documents for each query; at most as many as there are come back.
            nprobe, ef_search, k_factor: override the index's defaults for this call.

        Returns:
            scores: float32 (n, min(k, len(index))), cosines in descending order.
            ids: n lists of document ids. An approximate index can find fewer than k: then the list is shorter and the
                scores past its end are -inf.

        Raises:
            HlmError: another width, values that are not finite or not normalised, k below 1, or an option the index
                has no part for.
        """
        queries = self._checked(queries)
        if k < 1:
            raise HlmError(f"k: expected 1 or more, found {k}")
        options = self._options(nprobe, ef_search, k_factor)
        k = min(k, len(self))
        if len(queries) == 0:
            return np.zeros((0, k), np.float32), []
        # Parameters go with the call: set on the index they would leak into other threads' searches.
        scores, rows = self._index.search(queries, k, params=_parameters(self._index, options))
        found = rows >= 0
        if not found.all():
            order = np.argsort(~found, axis=1, kind="stable")
            rows, found = np.take_along_axis(rows, order, 1), np.take_along_axis(found, order, 1)
            scores = np.where(found, np.take_along_axis(scores, order, 1), -np.inf).astype(np.float32)
        texts = self._ids.take(pa.array(rows[found])).to_pylist()
        ends = np.cumsum(found.sum(axis=1))
        return scores, [texts[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def _options(self, nprobe: int | None, ef_search: int | None, k_factor: float | None) -> dict[str, float | None]:
        given = {"nprobe": nprobe, "ef_search": ef_search, "k_factor": k_factor}
        parts = {"nprobe": "IVF", "ef_search": "HNSW graph", "k_factor": "refinement such as ',RFlat'"}
        for name, value in given.items():
            if value is not None and self._defaults[name] is None:
                raise HlmError(f"{name}={value} was given, but '{self.factory}' has no {parts[name]}; leave {name} out")
            if value is not None and value < 1:
                raise HlmError(f"{name}: expected 1 or more, found {value}")
        return {name: default if given[name] is None else given[name] for name, default in self._defaults.items()}

    def _checked(self, queries: np.ndarray) -> np.ndarray:
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise HlmError(
                f"expected query vectors of shape (n, {self.dim}), found {queries.shape}; use the student of this "
                "index's teacher, or build the index with dim= the student's width"
            )
        norms = np.linalg.norm(queries, axis=1)
        wrong = ~(np.abs(norms - 1) <= NORM_TOLERANCE)  # written so that NaN is wrong
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise HlmError(
                f"expected finite, L2-normalised query vectors, found norm {norms[row]:.4g} in row {row} "
                f"({int(wrong.sum())} of {len(queries)} rows); normalise them, or check the encoder"
            )
        return queries


def _parts(index: faiss.Index) -> Iterator[faiss.Index]:
    """The index and those it wraps, outermost first."""
    index = faiss.downcast_index(index)
    yield index
    if isinstance(index, faiss.IndexPreTransform):
        yield from _parts(index.index)
    elif isinstance(index, faiss.IndexRefine):
        yield from _parts(index.base_index)
    elif _is_ivf(index):
        yield from _parts(index.quantizer)


def _is_ivf(index: faiss.Index) -> bool:
    # GpuIndexIVF exists only in GPU builds.
    return isinstance(index, (faiss.IndexIVF, *([faiss.GpuIndexIVF] if hasattr(faiss, "GpuIndexIVF") else [])))


def _parameters(index: faiss.Index, options: dict[str, float | None]) -> faiss.SearchParameters | None:
    """Search parameters nested as the index is; None where it has none."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _parameters(index.index, options)
        return faiss.SearchParametersPreTransform(index_params=inner) if inner is not None else None
    if isinstance(index, faiss.IndexRefine):
        inner = _parameters(index.base_index, options)
        nested = {"base_index_params": inner} if inner is not None else {}
        return faiss.IndexRefineSearchParameters(k_factor=options["k_factor"], **nested)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=options["ef_search"])
    if _is_ivf(index):
        inner = _parameters(index.quantizer, options)
        nested = {"quantizer_params": inner} if inner is not None else {}
        return faiss.SearchParametersIVF(nprobe=options["nprobe"], **nested)
    return None


def _normalised(block: np.ndarray, width: int, *, first_row: int) -> np.ndarray:
    """float32 (rows, width), L2-normalised: half precision and slicing both leave norms off 1."""
    block = np.ascontiguousarray(block[:, :width], dtype=np.float32)
    norms = np.linalg.norm(block, axis=1, keepdims=True)
    wrong = ~((norms > 0) & np.isfinite(norms))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise HlmError(
            f"expected finite vectors other than zero, found norm {norms[row, 0]} in row {first_row + row} "
            "of the store; embed the catalogue again"
        )
    return block / norms


def _to_gpu(index: faiss.Index) -> faiss.Index:
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        raise HlmError(
            f"gpu=True needs a GPU build of FAISS and a GPU; found FAISS {faiss.__version__} that sees "
            f"{faiss.get_num_gpus()} GPUs; install faiss-gpu in place of faiss-cpu, or leave gpu out"
        )
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)


def _flat_strings(ids: Any) -> pa.Array:
    """One contiguous Arrow string array (64-bit offsets: ids of a large catalogue pass 2 GiB)."""
    if isinstance(ids, pa.ChunkedArray):
        return ids.cast(pa.large_string()).combine_chunks()
    return ids.cast(pa.large_string()) if isinstance(ids, pa.Array) else pa.array(ids, pa.large_string())


def _reason(error: RuntimeError) -> str:
    # "Error in <C++ signature> at <file>:<line>: <reason>"
    return re.sub(r"^Error in .* at \S+:\d+: ", "", str(error), flags=re.DOTALL).strip()
