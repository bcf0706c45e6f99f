"""The data contract: `corpus`, `queries`, `qrels/{train,dev,test}` and `unlabelled`, from a folder or the Hub.

This is the BEIR/MTEB layout. What a row must look like is in `hlm/tables.py`; here is which tables there are, and how
the judgements tie them together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from hlm.artefacts import HlmError, fingerprint_file, fingerprint_json, fingerprint_texts
from hlm.tables import SUFFIXES, TEXTS, Row, Table, checked_dataset, find_table, identifier, read_rows

_HUB_SPLITS = {"dev": ("dev", "validation", "valid")}

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

    def fingerprint(self, part: str) -> str:
        """16 hex digits over what the encoders read of `part`: "corpus", "queries", "unlabelled" or "qrels/train" ...

        Ids, texts and `oracle` count, file format and further columns do not; row order does, except in qrels.
        """
        if part.startswith("qrels/"):
            qrels = self.qrels[part.removeprefix("qrels/")]
            return fingerprint_texts(
                field
                for query_id in sorted(qrels)
                for document_id, grade in sorted(qrels[query_id].items())
                for field in (query_id, document_id, str(grade))
            )
        if part not in TEXTS:
            raise HlmError(f"expected one of {', '.join(TEXTS)} or qrels/<split>, found '{part}'")
        dataset = getattr(self, part)
        if dataset is None:
            raise HlmError(f"{self.source} has no '{part}' table; add {part}.jsonl or another source")
        columns = [c for c in ("_id", "title", "text", "oracle") if c in dataset.column_names]
        rows = iterate(dataset.select_columns(columns))
        return fingerprint_texts(field for row in rows for field in _encoder_fields(row))

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
) -> RetrievalData:
    """Loads and checks a dataset in the contract's layout.

    Args:
        source: a folder, or a Hub dataset id with the configs `corpus`, `queries` and `default` (or `qrels`).
        revision: the Hub revision; refused for a folder.
        splits: the qrels splits to load where the source has them.
        cache_dir: where the Arrow files go; the datasets library's cache by default.

    Raises:
        HlmError: a table is missing, empty or breaks the contract; names the file, the line, what was expected and
            found, and what to do.
    """
    if Path(source).is_dir():
        tables = _folder_tables(source, revision, splits)
    elif source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).exists():
        raise HlmError(f"expected a folder with corpus, queries and qrels, found none at '{source}'; correct the path")
    else:
        tables = _hub_tables(source, revision, splits)
    cache = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "hlm")
    loaded = {part: checked_dataset(tables[part], part, cache) for part in TEXTS if part in tables}
    qrels = _Splits(source, tables)
    for split in splits:
        if f"qrels/{split}" in tables:
            qrels[split] = _load_qrels(tables[f"qrels/{split}"], loaded["queries"], loaded["corpus"])
    return RetrievalData(source, loaded["corpus"], loaded["queries"], qrels, loaded.get("unlabelled"))


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


def _folder_tables(source: str, revision: str | None, splits: Sequence[str]) -> dict[str, Table]:
    if revision is not None:
        raise HlmError(f"revision '{revision}' was given for the folder {source}; it is for Hub datasets only")
    tables = {}
    for part in (*TEXTS, *(f"qrels/{split}" for split in splits)):
        path = find_table(Path(source), part)
        if path is not None:
            tables[part] = Table(str(path), lambda path=path: read_rows(path), lambda path=path: fingerprint_file(path))
    if (table := _sharded(Path(source), "unlabelled")) is not None:
        if "unlabelled" in tables:
            raise HlmError(f"expected one 'unlabelled' in {source}, found {tables['unlabelled'].name} and {table.name}")
        tables["unlabelled"] = table
    for part in ("corpus", "queries"):
        if part not in tables:
            tried = ", ".join(f"{part}{suffix}" for suffix in SUFFIXES)
            found = ", ".join(sorted(p.name for p in Path(source).iterdir())) or "an empty folder"
            raise HlmError(f"{source}: expected one of {tried}, found {found}; add the file or correct the path")
    return tables


def _sharded(folder: Path, part: str) -> Table | None:
    """A table in many files, streamed: a folder `part` of shards in the order of their names, or `part.urls`, a text
    file with an address a line (hf://datasets/owner/name/*.parquet, https://...)."""
    listed, shards = folder / f"{part}.urls", folder / part
    if listed.is_file():
        return _addressed(listed)
    if not shards.is_dir():
        return None
    paths = sorted(path for path in shards.iterdir() if path.suffix in SUFFIXES)
    if not paths:
        raise HlmError(f"{shards}: expected shards ({', '.join(SUFFIXES)}), found none; add them or remove the folder")

    def rows() -> Iterator[tuple[str, Row]]:
        return ((f"{path.name}, {place}", row) for path in paths for place, row in read_rows(path))

    return Table(str(shards), rows, lambda: fingerprint_json([[path.name, fingerprint_file(path)] for path in paths]))


def _addressed(path: Path) -> Table:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    addresses = [line for line in lines if line and not line.startswith("#")]
    kinds = {{".parquet": "parquet", ".jsonl": "json", ".csv": "csv"}.get(Path(one).suffix) for one in addresses}
    if len(kinds) != 1 or None in kinds:
        raise HlmError(
            f"{path}: expected addresses of .parquet, .jsonl or .csv files, all of one kind, found "
            f"{', '.join(addresses[:3]) or 'none'}; write one a line"
        )
    try:
        builder = datasets.load_dataset_builder(kinds.pop(), data_files={"train": addresses})
        streamed = builder.as_streaming_dataset(split="train")
    except (OSError, ValueError, StopIteration) as error:  # the last: a pattern of JSON Lines that nothing meets
        raise HlmError(f"{path}: expected files at its addresses, found none ({error}); correct them") from error

    def rows() -> Iterator[tuple[str, Row]]:
        return ((f"row {number}", row) for number, row in enumerate(streamed, start=1))

    files = builder.config.data_files["train"]  # origin_metadata: what tells another version of a file
    return Table(str(path), rows, lambda: fingerprint_json([list(files), [list(one) for one in files.origin_metadata]]))


def _hub_tables(source: str, revision: str | None, splits: Sequence[str]) -> dict[str, Table]:
    def configs_of(repo: str) -> list[str]:
        try:
            return datasets.get_dataset_config_names(repo, revision=revision if repo == source else None)
        except (OSError, ValueError) as error:
            raise HlmError(
                f"expected a folder or a Hub dataset id, found '{source}': no such folder here, and the Hub says "
                f"{type(error).__name__}: {error}; correct the path or the id, or check the connection"
            ) from error

    def splits_of(repo: str, config: str) -> datasets.DatasetDict:
        try:
            return datasets.load_dataset(repo, config, revision=revision if repo == source else None)
        except (OSError, ValueError) as error:
            raise HlmError(f"Hub dataset {repo}: config '{config}' does not load ({error})") from error

    def table(repo: str, config: str, split: str, dataset: datasets.Dataset) -> Table:
        def rows() -> Iterator[tuple[str, Row]]:
            return ((f"row {number}", row) for number, row in enumerate(iterate(dataset), start=1))

        return Table(
            f"Hub dataset {repo} (config '{config}', split '{split}')",
            rows,
            lambda: fingerprint_json([repo, config, split, dataset._fingerprint]),
        )

    configs = configs_of(source)
    tables = {}
    for part in TEXTS:
        if part in configs:
            loaded = splits_of(source, part)
            if len(loaded) != 1:
                raise HlmError(f"Hub dataset {source}: config '{part}' has splits {list(loaded)}, expected one")
            tables[part] = table(source, part, *next(iter(loaded.items())))
        elif part != "unlabelled":
            raise HlmError(f"Hub dataset {source}: expected a config '{part}', found {configs}; use the BEIR layout")
    qrels_config = next((name for name in ("qrels", "default") if name in configs), None)
    # BEIR keeps the judgements of `id` in a second repository, `id-qrels`.
    repo = source if qrels_config else f"{source}-qrels"
    config = qrels_config or configs_of(repo)[0]
    loaded = splits_of(repo, config)
    for split in splits:
        for name in _HUB_SPLITS.get(split, (split,)):
            if name in loaded:
                tables.setdefault(f"qrels/{split}", table(repo, config, name, loaded[name]))
    return tables


def _load_qrels(table: Table, queries: datasets.Dataset, corpus: datasets.Dataset) -> Qrels:
    """The judgements of one split, every id checked against the tables."""
    qrels: Qrels = {}
    for place, row in table.rows():
        where = f"{table.name}, {place}"
        absent = [name for name in ("query-id", "corpus-id", "score") if name not in row]
        if absent:
            raise HlmError(
                f"{where}: expected the columns query-id, corpus-id, score, found {', '.join(row)}; rename the columns"
            )
        query_id = identifier(row["query-id"], f"{where}, column query-id")
        document_id = identifier(row["corpus-id"], f"{where}, column corpus-id")
        grade = _grade(row["score"], where)
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
    if lost_queries or lost_documents:
        for place, row in table.rows():  # read again for the place: only the error pays for it
            for column, lost, part in (("query-id", lost_queries, "queries"), ("corpus-id", lost_documents, "corpus")):
                if str(row[column]) in lost:
                    raise HlmError(
                        f"{table.name}, {place}: expected a {column} of the {part} table, found '{row[column]}', which "
                        f"is not there; add it to {part} or remove the line ({len(lost)} such ids in all)"
                    )
    return qrels


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
    known = pc.is_in(ids, value_set=dataset.data.column("_id").combine_chunks())
    return set(ids.filter(pc.invert(known)).to_pylist())


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
