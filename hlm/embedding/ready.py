"""Vectors that somebody has computed already: read from Parquet, NumPy, FAISS or LanceDB, put into a dataset's order.

Read as a stream, a block at a time. Nothing is unpickled: NumPy files of objects are refused, and FAISS files are read
within the bounds of `hlm.indexes.faiss_parts.read_index`.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as arrow_dataset

from hlm.artefacts import HlmError, fingerprint_json
from hlm.embedding.unit_length import normalised
from hlm.extras import extras_named
from hlm.indexes import faiss_parts
from hlm.outputs import os_errors
from hlm.progress import progress
from hlm.teacher_settings import ReadySettings

logger = logging.getLogger(__name__)

IDS = ("_id", "id", "doc_id", "docid", "document_id", "product_id", "query_id", "query-id", "sku")
TEXTS = ("text", "query")
VECTORS = ("vector", "vectors", "embedding", "embeddings", "values")
FAISS_SUFFIXES = (".faiss", ".index", ".ivf", ".bin")
ROWS_A_BLOCK = 16384
STAMPED_BYTES = 2**20  # of a file's beginning and end, which tell whether it is another one

Block = tuple[pa.Array, np.ndarray]  # keys as strings, and their vectors as they are, (n, width)


@dataclass
class ReadyVectors:
    """The vectors of one part, still where they lie.

    Attributes:
        path: where, for messages.
        rows, width: of the vectors there.
        by_id: whether they are told apart by ids; else by texts.
        stamp: 16 hex digits that differ for another file.
        blocks: reads them from the beginning.
    """

    path: str
    rows: int
    width: int
    by_id: bool
    stamp: str
    blocks: Callable[[], Iterator[Block]]

    def in_order(self, keys: pa.Array, dim: int, folder: str | Path) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of `keys` (texts): float16 (distinct keys, dim) on the disk of `folder`, in a file that goes with
        the array, sliced to `dim` and L2-normalised; and the row there of each key, int64 (len(keys),).

        Raises:
            HlmError: a key without a vector, an id with two, another width, or a vector that is not finite or 0.
        """
        encoded = keys.cast(pa.large_string()).dictionary_encode()  # a log's texts may be more than 2 GiB
        wanted, what = encoded.dictionary, "id" if self.by_id else "text"
        with os_errors(Path(folder)), tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, 2 * len(wanted) * dim)  # a full disk is no signal later
            found = np.memmap(file, dtype=np.float16, mode="w+", shape=(len(wanted), dim))
        filled, others = np.zeros(len(wanted), dtype=bool), 0
        with progress(what=f"read {Path(self.path).name}", unit="vector", total=self.rows) as bar:
            for names, vectors in self.blocks():
                bar.update(len(names))
                hits = (
                    pc.index_in(names.cast(pa.large_string()), value_set=wanted)
                    .fill_null(-1)
                    .to_numpy(zero_copy_only=False)
                )
                rows, first = np.unique(hits, return_index=True)
                first, rows = first[rows >= 0], rows[rows >= 0]
                if self.by_id and (filled[rows].any() or len(rows) < (hits >= 0).sum()):
                    twice = rows[filled[rows]] if filled[rows].any() else hits[_repeated(hits)]
                    raise HlmError(
                        f"{self.path}: expected one vector of each id, found two of {wanted[int(twice[0])].as_py()!r}; "
                        "keep one"
                    )
                others += len(names) - len(rows)
                first, rows = first[~filled[rows]], rows[~filled[rows]]
                found[rows] = self._checked(vectors[first], names.take(pa.array(first)), dim)
                filled[rows] = True
        if not filled.all():
            missing = wanted[int(np.flatnonzero(~filled)[0])].as_py()
            raise HlmError(
                f"{self.path}: expected a vector of each of {len(wanted):,} {what}s of the dataset, found none of "
                f"{int((~filled).sum()):,} (first {missing!r}); add them, or name the column or file of the right "
                f"{what}s as `ids`"
            )
        if others:
            logger.info("%s: %s vectors are of nothing in the dataset, or there twice", self.path, f"{others:,}")
        return found, encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)

    def _checked(self, vectors: np.ndarray, names: pa.Array, dim: int) -> np.ndarray:
        if vectors.ndim != 2 or vectors.shape[1] != self.width:
            raise HlmError(f"{self.path}: expected vectors of {self.width} values, found {vectors.shape[1:]}")
        return normalised(vectors[:, :dim], lambda row: f"{self.path}, {names[row].as_py()!r}").astype(np.float16)


def _repeated(hits: np.ndarray) -> np.ndarray:
    """Places of the values that came before, but for -1."""
    _, first = np.unique(hits, return_index=True)
    later = np.ones(len(hits), dtype=bool)
    later[first] = False
    return np.flatnonzero(later & (hits >= 0))


def open_ready(part: str, settings: ReadySettings, *, has_ids: bool) -> ReadyVectors:
    """Opens the ready vectors of a part of the dataset; reads what describes them, and the ids of a file of ids.

    Args:
        has_ids: whether the rows of the part have ids; else texts tell them apart.

    Raises:
        HlmError: nothing there that can be read, or columns that are not certain; it names what there is.
    """
    where, path = f"ready: {part}", Path(settings.path)
    if settings.table is not None:
        return _of_lance(where, settings, has_ids)
    if path.suffix == ".npy" or path.suffix in FAISS_SUFFIXES:
        if not path.is_file():
            raise HlmError(f"{where}: expected a file at {path}, found none; correct path")
        return (_of_npy if path.suffix == ".npy" else _of_faiss)(where, settings, has_ids)
    files = sorted(glob.glob(f"{settings.path}/**/*.parquet" if path.is_dir() else settings.path, recursive=True))
    if not files or not all(name.endswith(".parquet") for name in files):
        raise HlmError(
            f"{where}: expected Parquet, .npy, FAISS ({', '.join(FAISS_SUFFIXES)}) or a LanceDB database with `table`, "
            f"found {'none of them' if files else 'nothing'} at {settings.path}; correct path"
        )
    return _of_parquet(where, settings, files, has_ids)


def _of_parquet(where: str, settings: ReadySettings, files: list[str], has_ids: bool) -> ReadyVectors:
    try:
        table = arrow_dataset.dataset(files, format="parquet")
        rows = table.count_rows()
    except (pa.ArrowException, OSError) as error:
        raise HlmError(f"{where}: cannot read {settings.path} ({error}); write it again") from error
    key, column, by_id = _columns(where, settings, table.schema, has_ids)

    def blocks() -> Iterator[Block]:
        try:
            for batch in table.to_batches(
                columns=[key, column], batch_size=ROWS_A_BLOCK, batch_readahead=1, fragment_readahead=1
            ):
                yield from _of_batch(batch, key, column, by_id, where)
        except (pa.ArrowException, OSError) as error:
            raise HlmError(f"{where}: cannot read {settings.path} ({error}); write it again") from error

    return _opened(settings, rows, by_id, _stamp(files), blocks, where)


def _of_lance(where: str, settings: ReadySettings, has_ids: bool) -> ReadyVectors:
    """A table of a LanceDB database. The one place here that speaks to LanceDB."""
    with extras_named("vectors of a LanceDB table"):
        import lancedb
    if not Path(settings.path).is_dir():
        raise HlmError(f"{where}: expected the folder of a LanceDB database at {settings.path}, found none")
    try:
        table = lancedb.connect(settings.path).open_table(settings.table)
        rows, schema, version = table.count_rows(), table.schema, table.version
    except (ValueError, OSError, RuntimeError) as error:
        first = str(error).splitlines()[0][:200]
        raise HlmError(f"{where}: expected table '{settings.table}' in {settings.path}, found: {first}") from error
    key, column, by_id = _columns(where, settings, schema, has_ids)

    def blocks() -> Iterator[Block]:
        for batch in table.search().select([key, column]).to_batches(ROWS_A_BLOCK):
            yield from _of_batch(batch, key, column, by_id, where)

    return _opened(settings, rows, by_id, fingerprint_json([settings.table, version]), blocks, where)


def _of_npy(where: str, settings: ReadySettings, has_ids: bool) -> ReadyVectors:
    try:
        vectors = np.load(settings.path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise HlmError(f"{where}: expected a .npy file of numbers, found another ({error}); write it again") from error
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise HlmError(
            f"{where}: expected floating-point vectors, one a row, found {vectors.dtype} of shape {vectors.shape}"
        )
    keys = _ids_file(where, settings, len(vectors), has_ids)

    def blocks() -> Iterator[Block]:
        for start in range(0, len(vectors), ROWS_A_BLOCK):
            yield keys[start : start + ROWS_A_BLOCK], np.asarray(vectors[start : start + ROWS_A_BLOCK])

    return _opened(settings, len(vectors), has_ids, _stamp([settings.path]), blocks, where)


def _of_faiss(where: str, settings: ReadySettings, has_ids: bool) -> ReadyVectors:
    import faiss

    whole = index = faiss_parts.read_index(Path(settings.path))
    own = None
    if isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2):
        own = pa.array(faiss.vector_to_array(index.id_map).astype(str))
        index = faiss.downcast_index(index.index)
    if settings.ids is None and own is not None and has_ids:
        keys = own
    else:
        keys = _ids_file(where, settings, index.ntotal, has_ids)
    if not isinstance(index, faiss.IndexFlat):
        logger.warning(
            "%s: %s may keep less than the vectors: what is read is what it reconstructs", where, type(index).__name__
        )

    def blocks(owner: faiss.Index = whole) -> Iterator[Block]:  # what is inside it lives as long as it does
        try:
            if isinstance(index, faiss.IndexIVF):
                index.make_direct_map()
            for start in range(0, index.ntotal, ROWS_A_BLOCK):
                count = min(ROWS_A_BLOCK, index.ntotal - start)
                yield keys[start : start + count], index.reconstruct_n(start, count)
        except RuntimeError as error:
            raise HlmError(
                f"{where}: expected an index that gives its vectors back, found {type(index).__name__} "
                f"({faiss_parts.reason(error)}); write the vectors as Parquet"
            ) from error

    return _opened(settings, index.ntotal, has_ids, _stamp([settings.path]), blocks, where)


def _opened(
    settings: ReadySettings, rows: int, by_id: bool, stamp: str, blocks: Callable[[], Iterator[Block]], where: str
) -> ReadyVectors:
    if not rows:
        raise HlmError(f"{where}: expected vectors in {settings.path}, found none")
    _, vectors = next(blocks())
    return ReadyVectors(settings.path, rows, vectors.shape[1], by_id, stamp, blocks)


def _columns(where: str, settings: ReadySettings, schema: pa.Schema, has_ids: bool) -> tuple[str, str, bool]:
    """The column of ids or texts, that of vectors, and whether the first has ids."""
    names = schema.names
    for name in (settings.ids, settings.vectors):
        if name is not None and name not in names:
            raise HlmError(f"{where}: expected a column '{name}' in {settings.path}, found {', '.join(names)}")
    lists = [item.name for item in schema if _is_list(item.type)]
    named = [name for name in VECTORS if name in lists]
    vectors = settings.vectors or (lists[0] if len(lists) == 1 else named[0] if len(named) == 1 else None)
    if vectors is None or vectors not in lists:
        raise HlmError(
            f"{where}: expected one column of lists of numbers in {settings.path}, found {', '.join(lists) or 'none'} "
            f"among {', '.join(names)}; name it as `vectors`"
        )
    ids = next((name for name in IDS if name in names), None) if has_ids else None
    key = settings.ids or ids or next((name for name in TEXTS if name in names), None)
    if key is None:
        raise HlmError(
            f"{where}: expected a column {'_id' if has_ids else 'text'} in {settings.path}, found {', '.join(names)}; "
            "name it as `ids`"
        )
    return key, vectors, has_ids and key not in TEXTS


def _is_list(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_one(kind) for is_one in lists) and pa.types.is_floating(kind.value_type)


def _of_batch(batch: pa.RecordBatch, key: str, column: str, by_id: bool, where: str) -> Iterator[Block]:
    if not batch.num_rows:
        return
    keys, lists = batch.column(key), batch.column(column)
    if keys.null_count or lists.null_count:
        raise HlmError(f"{where}: expected filled columns '{key}' and '{column}', found an empty cell; fill or drop it")
    values = lists.flatten()
    width, left = divmod(len(values), len(lists))
    if left or not width or not pc.all(pc.equal(pc.list_value_length(lists), width)).as_py():
        raise HlmError(f"{where}: expected vectors of one width in '{column}', found several; see what wrote them")
    if values.null_count:
        raise HlmError(f"{where}: expected numbers in '{column}', found an empty value; see what wrote them")
    if by_id and not (pa.types.is_integer(keys.type) or pa.types.is_string(keys.type) or _is_long_text(keys.type)):
        raise HlmError(f"{where}: expected ids that are texts or whole numbers in '{key}', found {keys.type}")
    yield _keys(keys.cast(pa.string()), by_id), values.to_numpy(zero_copy_only=False).reshape(-1, width)


def _is_long_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _keys(names: pa.Array, by_id: bool) -> pa.Array:
    """Texts as `hlm.data.contract.query_text` has them: on one line."""
    return names if by_id else pa.array([" ".join(text.split()) for text in names.to_pylist()], type=pa.string())


def _ids_file(where: str, settings: ReadySettings, rows: int, has_ids: bool) -> pa.Array:
    what = "ids" if has_ids else "texts"
    if settings.ids is None:
        raise HlmError(f"{where}: expected a file of {what} beside {settings.path}, one a line, found none; name it as "
                       "`ids`")  # fmt: skip
    try:
        lines = Path(settings.ids).read_text(encoding="utf-8").removesuffix("\n").split("\n")  # as a text editor does
    except (OSError, UnicodeDecodeError) as error:
        raise HlmError(f"{where}: cannot read the {what} in {settings.ids} ({error}); correct ids") from error
    if len(lines) != rows:
        raise HlmError(f"{where}: expected {rows} {what} in {settings.ids}, one a vector, found {len(lines)} lines")
    return _keys(pa.array([line.strip() for line in lines], type=pa.string()), has_ids)


def _stamp(files: Sequence[str]) -> str:
    found: list[Any] = []
    for name in files:
        with open(name, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            digest = hashlib.sha256(file.read(STAMPED_BYTES))
            file.seek(max(0, size - STAMPED_BYTES))
            digest.update(file.read(STAMPED_BYTES))
        found.append([size, digest.hexdigest()])
    return fingerprint_json(found)
