"""Where the tables of a dataset lie: files of a folder, shards, addresses, a repository on the Hub. All of them are
read by `hlm/data/readers.py`, so that a table is the same on every road."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from huggingface_hub import constants

from hlm.artefacts import HlmError, fingerprint_file, fingerprint_json
from hlm.data.readers import READ, Row, is_read, not_read, read_qrels, read_rows
from hlm.data.tables import SPLIT_NAMES, SUFFIXES, TEXTS, Table, find_table
from hlm.extras import extras_named

# datasets takes a second to import: a folder is read without it.
if TYPE_CHECKING:
    from datasets.data_files import DataFilesList

logger = logging.getLogger(__name__)

_NULL = "__HIVE_DEFAULT_PARTITION__"


def folder_tables(source: str, splits: Sequence[str]) -> dict[str, Table]:
    """The tables of a folder: "corpus", "queries", "unlabelled" and "qrels/<split>", those that are there.

    Raises:
        HlmError: corpus or queries are missing, a table is there twice, or what lies there is not read.
    """
    folder, tables = Path(source), {}
    for part in (*TEXTS, *(f"qrels/{split}" for split in splits)):
        path = find_table(folder, part)
        if path is not None:
            reader = read_qrels if part.startswith("qrels/") else read_rows
            tables[part] = Table(str(path), partial(reader, path), partial(content_of, path))
    for part in TEXTS:
        if (table := _sharded(folder, part)) is not None:
            if part in tables:
                raise HlmError(f"expected one '{part}' in {source}, found {tables[part].name} and {table.name}")
            tables[part] = table
    for part in ("corpus", "queries"):
        if part not in tables:
            tried = ", ".join(f"{part}{suffix}" for suffix in SUFFIXES)
            found = ", ".join(sorted(p.name for p in folder.iterdir())) or "an empty folder"
            raise HlmError(
                f"{source}: expected one of {tried}, shards in {part}/ or addresses in {part}.urls, found {found}; add "
                "it or correct the path"
            )
    read = {Path(table.name).name for table in tables.values()}
    beside = [p.name for p in sorted(folder.iterdir()) if p.name.startswith(tuple(TEXTS)) and is_read(p.name)]
    if left := [name for name in beside if name not in read]:
        logger.warning("%s: not read: %s (a table is one file, or shards in a folder)", source, ", ".join(left))
    return tables


def content_of(path: str | Path) -> str:
    """`fingerprint_file` of a source.

    Raises:
        HlmError: the file cannot be read.
    """
    try:
        return fingerprint_file(path)
    except OSError as error:
        raise HlmError(f"{path}: expected a file that can be read, found {error}; correct it") from error


def shards(folder: Path) -> list[Path]:
    """The files of a table in many files, from all folders below, in the order of their paths. Names that begin with
    a dot or an underscore, and README files, are no shards: the log says which were left out.

    Raises:
        HlmError: none, or files that are not read.
    """
    found: list[Path] = []
    left: list[str] = []
    for root, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in map(os.path.realpath, Path(root).parents):  # a link back up
            folders.clear()
            continue
        if "_delta_log" in folders:
            raise HlmError(
                f"{root}: expected shards, found a Delta table, of which its log says what counts; write it as Parquet"
            )
        for name in [*folders, *names]:
            if name.startswith((".", "_")) or (name in names and name.upper().startswith("README")):
                left.append(str((Path(root) / name).relative_to(folder)))
            elif name in names:
                found.append(Path(root) / name)
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
    if left:
        logger.info("%s: left out, being no shards by their names: %s", folder, ", ".join(sorted(left)))
    found.sort(key=lambda path: path.relative_to(folder).parts)
    if unread := [path for path in found if not is_read(path)]:
        raise HlmError(
            f"{folder}: expected shards ({READ}), found {_few(path.relative_to(folder) for path in unread)}; convert "
            "them, or move them elsewhere"
        )
    if not found:
        raise HlmError(f"{folder}: expected shards ({READ}), found none; add them or remove the folder")
    return found


def _sharded(folder: Path, part: str) -> Table | None:
    """A table in many files, streamed: a folder `part` of shards in the order of their paths, or `part.urls`, a text
    file with an address a line (hf://datasets/owner/name/*.parquet, https://...)."""
    listed, inside = folder / f"{part}.urls", folder / part
    if listed.is_file():
        if inside.is_dir():
            raise HlmError(f"expected one '{part}' in {folder}, found {listed.name} and {part}/; keep one")
        lines = [line.strip() for line in listed.read_text(encoding="utf-8-sig").splitlines()]
        return addressed(str(listed), [line for line in lines if line and not line.startswith("#")])
    return None if not inside.is_dir() else shard_table(inside)


def shard_table(folder: Path) -> Table:
    """A folder of shards as one table; what a path says of its rows (`day=2026-01-02/`) is a column."""
    paths = shards(folder)
    names = [path.relative_to(folder).as_posix() for path in paths]

    def rows() -> Iterator[tuple[str, Row]]:
        for name, path in zip(names, paths, strict=True):
            said = (part.partition("=") for part in name.split("/")[:-1] if "=" in part)
            known = {key: None if value == _NULL else unquote(value) for key, _, value in said}
            yield from ((f"{name}, {place}", known | row) for place, row in read_rows(path))

    def digest() -> str:
        return fingerprint_json([[name, content_of(path)] for name, path in zip(names, paths, strict=True)])

    return Table(str(folder), rows, digest)


@extras_named("tables at addresses")
def addressed(name: str, addresses: Sequence[str]) -> Table:
    """A table in files at addresses that fsspec reads, patterns included, streamed.

    Raises:
        HlmError: nothing at an address, or files that are not read.
    """
    from datasets.data_files import DataFilesList

    files = DataFilesList([], [])
    for address in addresses:
        try:
            found = DataFilesList.from_patterns([address])
        except not_read(ValueError) as error:
            raise HlmError(f"{name}: expected files at {address}, found none ({error}); correct it") from error
        if not found:
            raise HlmError(f"{name}: expected files at {address}, found none; correct it")
        # + would forget what tells another version of a file
        files = DataFilesList([*files, *found], [*files.origin_metadata, *found.origin_metadata])
    if not files:
        raise HlmError(f"{name}: expected addresses of files ({READ}), one a line, found none; write them")
    return streamed(name, files)


def streamed(name: str, files: DataFilesList) -> Table:
    """A table in files that `datasets` found, streamed.

    Raises:
        HlmError: files that are not read.
    """
    if unread := [file for file in files if not is_read(file)]:
        raise HlmError(f"{name}: expected files that are read ({READ}), found {_few(unread)}; name others")

    def rows() -> Iterator[tuple[str, Row]]:
        return ((f"{file.rpartition('/')[2]}, {place}", row) for file in files for place, row in read_rows(file))

    # origin_metadata: what tells another version of a file
    return Table(name, rows, lambda: fingerprint_json([list(files), [list(one) for one in files.origin_metadata]]))


@extras_named("a dataset of the Hub")
def hub_tables(source: str, revision: str | None, splits: Sequence[str]) -> dict[str, Table]:
    """The tables of a Hub dataset in the BEIR layout; their files go into the Hub's cache, which is enough offline.

    Args:
        source: the dataset's id, or a local copy of its repository.

    Raises:
        HlmError: no such dataset, other configs, or files that are not read.
    """
    configs = _configs(source, revision)
    tables = {}
    for part in TEXTS:
        if part in configs:
            found = _files(source, part, revision)
            if len(found) != 1:
                raise HlmError(f"Hub dataset {source}: config '{part}' has splits {list(found)}, expected one")
            tables[part] = _hub_table(source, part, *next(iter(found.items())), read_rows)
        elif part != "unlabelled":
            raise HlmError(f"Hub dataset {source}: expected a config '{part}', found {configs}; use the BEIR layout")
    config: str | None = next((name for name in ("qrels", "default") if name in configs), None)
    # BEIR keeps the judgements of `id` in a second repository, `id-qrels`.
    repo, at = (source, revision) if config else (f"{source}-qrels", None)
    config = config or _configs(repo, at)[0]
    found = _files(repo, config, at)
    for split in splits:
        for name in SPLIT_NAMES.get(split, (split,)):
            if name in found:
                tables.setdefault(f"qrels/{split}", _hub_table(repo, config, name, found[name], read_qrels))
    return tables


# What a config may say of its CSV or JSON that the readers here do not follow.
_OPTIONS = (
    "names header skiprows skipfooter nrows usecols quoting quotechar escapechar comment encoding skipinitialspace "
    "lineterminator field"
).split()


def _hub(source: str, revision: str | None, ask: Callable[..., Any], *wanted: str) -> Any:
    """What `datasets` says of a repository: of the Hub's, or where the Hub cannot be asked of the copy in its cache."""
    from huggingface_hub import snapshot_download

    try:
        if not constants.HF_HUB_OFFLINE or Path(source).is_dir():
            return ask(source, *wanted, revision=revision)
        error: Exception = ConnectionError("offline by HF_HUB_OFFLINE")
    except not_read(ValueError) as failed:
        error = failed
    try:
        return ask(snapshot_download(source, repo_type="dataset", revision=revision, local_files_only=True), *wanted)
    except not_read(ValueError):  # no copy, or not of this part: the first error is the user's
        raise HlmError(
            f"expected a folder or a Hub dataset id, found '{source}': no such folder here, and the Hub says "
            f"{type(error).__name__}: {error}; correct the path or the id, or check the connection; where the cache "
            "cannot be written, set HF_HOME to a folder that can"
        ) from error


def _configs(source: str, revision: str | None) -> list[str]:
    import datasets

    return _hub(source, revision, datasets.get_dataset_config_names)


def _files(source: str, config: str, revision: str | None) -> dict[str, tuple[DataFilesList, str | None]]:
    """{split: (files, delimiter)} of a config."""
    import datasets

    builder = _hub(source, revision, datasets.load_dataset_builder, config)
    said, own = builder.config, type(builder.config)()
    unknown = [name for name in _OPTIONS if getattr(said, name, None) != getattr(own, name, None)]
    if unknown or not said.data_files:
        found = f"the options {', '.join(unknown)}" if unknown else "no files"
        raise HlmError(
            f"Hub dataset {source}: expected the config '{config}' to name files, found {found}; publish the table as "
            "JSONL or Parquet"
        )
    delimiter = getattr(said, "sep", ",")
    return {split: (files, None if delimiter == "," else delimiter) for split, files in said.data_files.items()}


def _hub_table(
    source: str, config: str, split: str, found: tuple[DataFilesList, str | None], read: Callable[..., Any]
) -> Table:
    name = f"Hub dataset {source} (config '{config}', split '{split}')"
    addresses, delimiter = found
    if unread := [address for address in addresses if not is_read(address)]:
        raise HlmError(f"{name}: expected files that are read ({READ}), found {_few(unread)}; publish it as JSONL")
    try:
        paths = [_downloaded(address) for address in addresses]
    except not_read(ValueError) as error:
        raise HlmError(
            f"{name}: expected its files, found {type(error).__name__}: {error}; check the connection, and that "
            "HF_HOME is a folder with room that can be written"
        ) from error

    def rows() -> Iterator[tuple[str, Row]]:
        return (
            (f"{Path(path).name}, {place}", row) for path in paths for place, row in read(path, delimiter=delimiter)
        )

    return Table(name, rows, lambda: fingerprint_json([[Path(path).name, content_of(path)] for path in paths]))


def _downloaded(address: str) -> str:
    if not address.startswith("hf://"):
        return address
    from huggingface_hub import HfFileSystem, hf_hub_download

    place = HfFileSystem().resolve_path(address)
    return hf_hub_download(place.repo_id, place.path_in_repo, repo_type="dataset", revision=place.revision)


def _few(names: Any) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
