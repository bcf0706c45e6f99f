"""The data contract: `corpus`, `queries`, `qrels/{train,dev,test}` and `unlabelled`, from a folder or the Hub.

This is the BEIR/MTEB layout. What a row must look like is in `hlm/data/tables.py`; here is which tables there are, and
how the judgements tie them together.
"""

from __future__ import annotations

import logging
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import constants

from hlm.artefacts import HlmError, atomic_file, fingerprint_texts
from hlm.data.ids import rows_with
from hlm.data.readers import SUFFIXES, Row, qrels_row
from hlm.data.sources import folder_tables, hub_tables
from hlm.data.tables import TEXTS, Table, checked_dataset, checked_file, identifier
from hlm.progress import progress

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

Qrels = dict[str, dict[str, int]]


@dataclass(frozen=True)
class RetrievalData:
    """A loaded dataset.

    Attributes:
        source: the folder or Hub id it came from.
        corpus: columns `_id`, `title` (or None), `text` (or None), and whatever else the source has; Arrow-backed.
            Nested extra columns are JSON strings.
        queries: columns `_id`, `text`, and whatever else the source has (`oracle`, `kind`, ...).
        qrels: split -> query id -> document id -> grade (0 = not relevant); a split that the source lacks raises
            HlmError when it is asked for.
        unlabelled: column `text` and whatever else the source has; None without that table.
    """

    source: str
    corpus: datasets.Dataset
    queries: datasets.Dataset
    qrels: dict[str, Qrels]
    unlabelled: datasets.Dataset | None = None
    # Of the tables, which cannot change; judgements can.
    _fingerprints: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    _kept: dict[str, Path] = field(default_factory=dict, init=False, repr=False, compare=False)  # of checked tables

    def fingerprint(self, part: str) -> str:
        """16 hex digits over what the encoders read of `part`: "corpus", "queries", "unlabelled" or "qrels/train" ...

        Ids, texts and `oracle` count, file format and further columns do not; row order does, except in qrels. A table
        is read for it once, however often it is asked for; what `load` checked, once for all processes.
        """
        if part.startswith("qrels/"):
            qrels = self.qrels[part.removeprefix("qrels/")]
            return fingerprint_texts(
                value
                for query_id in sorted(qrels)
                for document_id, grade in sorted(qrels[query_id].items())
                for value in (query_id, document_id, str(grade))
            )
        if part not in TEXTS:
            raise HlmError(f"expected one of {', '.join(TEXTS)} or qrels/<split>, found '{part}'")
        dataset = getattr(self, part)
        if dataset is None:
            raise HlmError(f"{self.source} has no '{part}' table; add {part}.jsonl or another source")
        if part not in self._fingerprints:
            kept = self._kept.get(part)
            if kept is not None and kept.is_file():
                self._fingerprints[part] = kept.read_text(encoding="ascii")
            else:
                self._fingerprints[part] = _fingerprint(dataset, part)
                if kept is not None and os.access(kept.parent, os.W_OK):
                    with atomic_file(kept) as aside:
                        aside.write_text(self._fingerprints[part], encoding="ascii")
        return self._fingerprints[part]

    def split_queries(self, split: str, *, oracle: bool = False) -> list[tuple[str, str]]:
        """(query id, query text) of the queries that have a judgement in `split`, in file order."""
        judged = self.qrels[split]
        return [(row["_id"], query_text(row, oracle=oracle)) for row in iterate(self.queries) if row["_id"] in judged]


def document_text(row: Row, *, oracle: bool = False) -> str:
    """What the document encoder reads: "title. text" on one line; with `oracle`, that column too where it is filled."""
    return _join(row, ("title", "text", "oracle") if oracle else ("title", "text"))


def query_text(row: Row, *, oracle: bool = False) -> str:
    """What the query encoder reads: the text on one line; with `oracle` (teacher only), that column too."""
    return _join(row, ("text", "oracle") if oracle else ("text",))


def training_pairs(data: RetrievalData, split: str, *, min_score: int = 1) -> list[tuple[str, str, int]]:
    """(query id, document id, grade) of the judgements of `split` with at least `min_score`, in file order."""
    return [
        (query_id, document_id, grade)
        for query_id, documents in data.qrels[split].items()
        for document_id, grade in documents.items()
        if grade >= min_score
    ]


def load(
    source: str,
    *,
    revision: str | None = None,
    splits: Sequence[str] = ("train", "dev", "test"),
    cache_dir: str | Path | None = None,
    skip_bad_rows: bool = False,
) -> RetrievalData:
    """Loads and checks a dataset in the contract's layout.

    Args:
        source: a folder, or a Hub dataset id with the configs `corpus`, `queries` and `default` (or `qrels`).
        revision: the Hub revision; refused for a folder.
        splits: the qrels splits to load where the source has them.
        cache_dir: where the Arrow files go; the datasets library's cache by default.
        skip_bad_rows: leave out documents and queries without a text, and judgements of documents or queries that
            are not there, as public datasets have them; the log says how many. Everything else that breaks the
            contract is refused all the same.

    Raises:
        HlmError: a table is missing, empty or breaks the contract; names the file, the line, what was expected and
            found, and what to do. Or the cache cannot be written.
    """
    tables = _tables(source, revision, splits)
    cache = _cache(cache_dir)
    loaded = {
        part: checked_dataset(tables[part], part, cache, skip_bad_rows=skip_bad_rows)
        for part in TEXTS
        if part in tables
    }
    qrels = _Splits(source, tables)
    for split in splits:
        if f"qrels/{split}" in tables:
            qrels[split] = _load_qrels(
                tables[f"qrels/{split}"], loaded["queries"], loaded["corpus"], skip_bad_rows=skip_bad_rows
            )
    data = RetrievalData(source, loaded["corpus"], loaded["queries"], qrels, loaded.get("unlabelled"))
    # The name of a checked table's file says which content it has.
    data._kept.update({part: Path(table.cache_files[0]["filename"] + ".fingerprint") for part, table in loaded.items()})
    return data


def titles(source: str, ids: Sequence[str], *, cache_dir: str | Path | None = None) -> list[str]:
    """The title of each of these documents, or its text where it has no title. Reads no table but the corpus, a block
    at a time, and does not load the datasets library where `source` is a folder.

    Raises:
        HlmError: an id that is not in the corpus, or what `load` raises of it.
    """
    path = checked_file(_tables(source, None, ())["corpus"], "corpus", _cache(cache_dir), skip_bad_rows=True)
    wanted = pa.array(ids, pa.string())
    shown: dict[str, str] = {}
    with pa.memory_map(str(path)) as stored:
        for block in pa.ipc.open_stream(stored):
            shown.update(
                (row["_id"], row.get("title") or row.get("text"))
                for row in block.filter(pc.is_in(block["_id"], value_set=wanted)).to_pylist()
            )
    missing = [name for name in ids if name not in shown]
    if missing:
        raise HlmError(
            f"expected the ads of the index in {source}, found no {missing[0]!r}; name the dataset that was embedded"
        )
    return [shown[name] for name in ids]


def _tables(source: str, revision: str | None, splits: Sequence[str]) -> dict[str, Table]:
    if Path(source).is_dir():
        if revision is not None:
            raise HlmError(f"revision '{revision}' was given for the folder {source}; it is for Hub datasets only")
        return folder_tables(source, splits)
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).exists():
        raise HlmError(f"expected a folder with corpus, queries and qrels, found none at '{source}'; correct the path")
    return hub_tables(source, revision, splits)


def _cache(folder: str | Path | None) -> Path:
    """The folder of checked tables: in the datasets library's cache where none is given."""
    home = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
    return Path(folder or Path(home) / "hlm")


class _Splits(dict[str, Qrels]):
    """A dict whose missing key is the user's missing file, not a bare KeyError."""

    def __init__(self, source: str, tables: dict[str, Table]) -> None:
        super().__init__()
        self._where = source
        self._found = [name for name in tables if name.startswith("qrels/")]

    def __missing__(self, split: str) -> Qrels:
        raise HlmError(
            f"{self._where}: expected judgements for split '{split}', found {', '.join(self._found) or 'none'}; add "
            f"qrels/{split}{{{','.join(SUFFIXES)}}} with columns query-id, corpus-id, score"
        )


def _load_qrels(
    table: Table, queries: datasets.Dataset, corpus: datasets.Dataset, *, skip_bad_rows: bool = False
) -> Qrels:
    """The judgements of one split, every id checked against the tables."""
    qrels: Qrels = {}
    for place, row in table.rows():
        where = f"{table.name}, {place}"
        query_id, document_id, grade = _judgement(qrels_row(row), where)
        documents = qrels.setdefault(query_id, {})
        if documents.setdefault(document_id, grade) != grade:
            raise HlmError(
                f"{where}: expected one grade for query '{query_id}' and document '{document_id}', found {grade} here "
                f"and {documents[document_id]} before; keep one"
            )
    if not qrels:
        raise HlmError(f"{table.name}: expected at least one judgement, found an empty split; fill or remove the file")
    document_ids = pa.array({document_id for documents in qrels.values() for document_id in documents}, pa.string())
    lost_queries = _not_in(pa.array(list(qrels), pa.string()), queries)
    lost_documents = _not_in(document_ids, corpus)
    if skip_bad_rows:
        return _without(qrels, lost_queries, lost_documents, table.name)
    if lost_queries or lost_documents:
        for place, row in table.rows():  # read again for the place: only the error pays for it
            query_id, document_id, _ = _judgement(qrels_row(row), table.name)
            for column, value, lost, part, known in (
                ("query-id", query_id, lost_queries, "queries", queries),
                ("corpus-id", document_id, lost_documents, "corpus", corpus),
            ):
                if value in lost:
                    raise HlmError(
                        f"{table.name}, {place}: expected a {column} of the {part} table, found "
                        f"{_beside(value, known)}; correct it, add it to {part}, remove the line, or leave all such "
                        f"judgements out with skip_bad_rows ({len(lost)} such ids in all)"
                    )
    return qrels


def _judgement(row: Row, where: str) -> tuple[str, str, int]:
    absent = [name for name in ("query-id", "corpus-id", "score") if name not in row]
    if absent:
        raise HlmError(
            f"{where}: expected the columns query-id, corpus-id, score, found {', '.join(row)}; rename the columns, or "
            "add the header line if the file has none"
        )
    query_id = identifier(row["query-id"], f"{where}, column query-id")
    return query_id, identifier(row["corpus-id"], f"{where}, column corpus-id"), _grade(row["score"], where)


def _without(qrels: Qrels, lost_queries: set[str], lost_documents: set[str], name: str) -> Qrels:
    """The judgements whose query and document are there; the log says how many are not."""
    kept = {
        query_id: left
        for query_id, documents in qrels.items()
        if query_id not in lost_queries
        and (left := {document: grade for document, grade in documents.items() if document not in lost_documents})
    }
    of_queries = sum(len(qrels[query_id]) for query_id in lost_queries)
    of_documents = sum(map(len, qrels.values())) - sum(map(len, kept.values())) - of_queries
    if of_queries or of_documents:
        logger.warning(
            "%s: left out %d judgements of queries that are not in queries, %d of documents that are not in corpus; "
            "%d of %d queries are left",
            name,
            of_queries,
            of_documents,
            len(kept),
            len(qrels),
        )
    if not kept:
        raise HlmError(f"{name}: expected judgements of this data, found none; choose the judgements that belong to it")
    return kept


def _beside(value: str, dataset: datasets.Dataset) -> str:
    """An id that is not there, for an error: beside the one that looks like it, or else the table's first ones."""
    wanted, ids = _look(value), dataset.data.column("_id")
    alike = [known for chunk in ids.chunks for known in chunk.to_pylist() if _look(known) == wanted]
    if alike:
        return f"{value!a}, which is not there, but {alike[0]!a} is"
    first = ", ".join(f"'{known}'" for known in ids[:3].to_pylist())
    return f"'{value}', which is not there (its first ids are {first})"


def _look(value: str) -> str:
    """The same for ids that look alike: spaces, invisible characters, forms of Unicode, case, 7, 007 and 7.0."""
    shown = "".join(c for c in unicodedata.normalize("NFKC", value) if unicodedata.category(c) not in ("Cf", "Cc"))
    shown = "".join(shown.split()).casefold()
    return re.sub(r"^0+(?=\d)|(?<=\d)\.0+$", "", shown)


def _grade(value: Any, where: str) -> int:
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not math.isfinite(number) or number < 0 or number != int(number):
        raise HlmError(
            f"{where}: expected a score that is a whole number from 0 (not relevant) up, found {value!r}; correct it"
        )
    return int(number)


def _not_in(ids: pa.Array, dataset: datasets.Dataset) -> set[str]:
    return set(ids.filter(pa.array(rows_with(dataset.data.column("_id"), ids) < 0)).to_pylist())


def _fingerprint(dataset: datasets.Dataset, part: str) -> str:
    columns = [c for c in ("_id", "title", "text", "oracle") if c in dataset.column_names]
    table = iterate(dataset.select_columns(columns))
    rows = progress(table, what=f"fingerprint {part}", unit="row", total=len(dataset))
    return fingerprint_texts(value for row in rows for value in _encoder_fields(row))


def iterate(dataset: datasets.Dataset) -> Iterator[Row]:
    """Rows in order, read in batches: ten times faster than one row at a time."""
    for batch in dataset.iter(batch_size=1024):
        yield from (dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True))


def _encoder_fields(row: Row) -> tuple[str, str, str]:
    # Empty and absent are the same to an encoder, and the same in every file format.
    return str(row.get("_id") or ""), _join(row, ("title", "text")), _join(row, ("oracle",))


def _join(row: Row, columns: Sequence[str]) -> str:
    joined = ""
    for column in columns:
        part = " ".join((row.get(column) or "").split())
        if joined and part:
            joined += " " if joined[-1] in ".!?:;," else ". "
        joined += part
    return joined
