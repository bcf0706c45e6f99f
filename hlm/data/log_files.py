"""Which files the names of a raw table stand for: paths, globs and addresses (`hf://`)."""

from __future__ import annotations

import contextlib
import difflib
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hlm.artefacts import fingerprint_file, fingerprint_json
from hlm.data.readers import not_read
from hlm.errors import HlmError
from hlm.redaction import public_error

TEXT_KINDS = {".csv": "csv", ".tsv": "csv", ".txt": "csv", ".jsonl": "json", ".ndjson": "json", ".json": "json"}
KINDS = TEXT_KINDS | {".parquet": "parquet"}
READ = f"{', '.join(KINDS)}, those of text also with .gz"


class File(NamedTuple):
    """A file that was named."""

    path: str
    shown: str
    remote: Any = None  # of fsspec, to be opened
    content: str | None = None  # a fingerprint of what an address leads to

    def fingerprint(self) -> str:
        """Of its content; of an address, of what its server says about it."""
        return self.content or fingerprint_file(self.path)


def find_files(what: str, names: Sequence[str]) -> list[File]:
    """The files that paths, globs and addresses (`hf://datasets/...`) stand for.

    Args:
        what: the setting that names them, for messages.

    Raises:
        HlmError: no such file, or a folder.
    """
    return [file for name in names for file in (_remote if "://" in name else _local)(what, name)]


def _local(what: str, name: str) -> Iterator[File]:
    path = Path(name).expanduser()
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if suffix_of(p)[0] in KINDS)
        example = f"'{path}/*{suffix_of(Path(inside[0]))[0]}'" if inside else "its files"
        raise HlmError(f"{what}: expected a file, found the folder {path} (with {_few(inside)}); name {example}")
    if path.is_file():
        yield File(str(path), str(path))
        return
    found = [one for one in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(one)]
    if not found:
        folder = next((parent for parent in path.parents if parent.is_dir()), Path())
        there = sorted(os.listdir(folder))
        near = difflib.get_close_matches(path.name, there, n=1)
        hint = f"did you mean '{folder / near[0]}'?" if near else f"{folder.resolve().name}/ has {_few(there)}"
        raise HlmError(f"{what}: expected a file at '{name}', found none; correct the path: {hint}")
    yield from (File(one, one) for one in found)


def _remote(what: str, address: str) -> Iterator[File]:
    """HF_TOKEN is read from the environment by huggingface_hub."""
    import fsspec

    with reachable(what, address):
        files = fsspec.open_files(address, "rb", expand=True)
        if not files:
            raise HlmError(f"{what}: expected files at {address}, found none; correct the address")
        for file in files:
            about = file.fs.info(file.path)
            content = {key: str(about[key]) for key in ("size", "etag", "blob_id", "mtime", "created") if key in about}
            yield File(address, f"{address.split('://')[0]}://{file.path}", file, fingerprint_json(content))


@contextlib.contextmanager
def reachable(what: str, address: str) -> Iterator[None]:
    try:
        yield
    except HlmError:
        raise
    except not_read(ValueError, ImportError) as error:
        raise HlmError(
            f"{what}: expected a file that can be read at {address}, found {type(error).__name__}: "
            f"{' '.join(public_error(str(error)).split())[:200]}; correct the address, check the connection, or set "
            "HF_TOKEN where the repository is private"
        ) from error


def suffix_of(path: Path) -> tuple[str, bool]:
    """(".csv", True) of queries.csv.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] == ".gz"
    suffixes = suffixes[:-1] if packed else suffixes
    return (suffixes[-1] if suffixes else ""), packed


def _few(names: Sequence[str]) -> str:
    return (", ".join(names[:4]) + (", ..." if len(names) > 4 else "")) or "nothing"
