"""Writing a vector store (see `store.py`): shard by shard, aside and renamed, resumable after a kill at any moment.

While a store is being written it has no `hlm.json`. `plan.json`, which the first process puts there, says what is being
written, so that a run of anything else is refused; a record `shard-00000.json` beside each whole shard holds its sizes
and SHA-256. Shards never depend on one another, so that any number of processes can share the work without talking:
whoever finds all shards whole gathers the records into `hlm.json`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hlm.artefacts import MANIFEST, HlmError, read_manifest, write_manifest
from hlm.data.ids import id_there_twice
from hlm.errors import FULL_DISK
from hlm.locks import locked
from hlm.outputs import IGNORED, os_errors, resolved
from hlm.vectors.shard_files import REMEDY, check_ids, files, ids_name, put_shard, quantised, record_name, text_hashes

logger = logging.getLogger(__name__)

KIND = "vectors"
PLAN = "plan.json"
SHARD_ROWS = 65536

Records = Sequence[tuple[str, str]] | Callable[[int, int], Iterable[tuple[str, str]]]


def write_store(
    folder: str | Path,
    records: Records,
    encode: Callable[[list[str]], np.ndarray],
    *,
    dim: int,
    encoder: str,
    source: str,
    n_rows: int,
    shard_rows: int = SHARD_ROWS,
    facts: dict[str, Any] | None = None,
    process_index: int = 0,
    num_processes: int = 1,
) -> None:
    """Encodes `n_rows` texts into `folder`, or goes on where an earlier, killed run of the same call stopped.

    Shard `n` is written by process `n % num_processes`, each shard aside and then renamed; at most one shard is in
    memory. The bytes written depend neither on kills nor on the number of processes. When the call returns and every
    other process has returned too, the store is whole. A whole store is left alone; a missing or truncated shard of
    one is written again.

    Args:
        folder: where the store goes; with several processes, on a file system that all of them see.
        records: (row id, text) of every row, as a sequence, or as `records(start, stop)` yielding those of the rows
            [start, stop), so that a large corpus streams and finished shards cost nothing.
        encode: texts of one whole shard -> floating-point array (n, dim), L2-normalised.
        dim: width of the vectors.
        encoder: fingerprint of the encoder.
        source: fingerprint of the texts.
        n_rows: number of rows, at least 1.
        shard_rows: rows a shard; the last one may be shorter.
        facts: what else shaped the vectors (prompt, dtype, oracle, ...): JSON values, kept as the manifest's `config`.
        process_index: which of the `num_processes` this one is, from 0.

    Raises:
        HlmError: `folder` holds shards of another encoder, source, dim, shard_rows, n_rows or facts, or files that are
            no store's; another run writes there as this process; `records` gives another number of rows, or an id
            twice; `encode` gives another shape, non-finite values or vectors that are not L2-normalised. Nothing of the
            failing shard is kept. An id that is in two shards is found when all are whole, before `hlm.json` is there.
    """
    folder = check_store_output(folder)
    plan = _plan(dim=dim, encoder=encoder, source=source, n_rows=n_rows, shard_rows=shard_rows, facts=facts)
    if not 0 <= process_index < num_processes:
        raise HlmError(f"expected a process index in [0, {num_processes}), found {process_index}")
    if not callable(records) and not isinstance(records, Sequence):
        raise HlmError(
            f"expected records as a sequence of (id, text) or a function (start, stop) -> rows, found a "
            f"{type(records).__name__}; a shard must be able to start at its own row"
        )
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with (
        locked(folder / f".writer-{process_index}.lock", f"{folder} as process {process_index}"),
        os_errors(folder, FULL_DISK),
    ):
        _claim(folder, plan)
        try:
            for shard in _missing_shards(plan, _read_records(folder, plan), folder):
                if shard % num_processes == process_index:
                    start, stop = shard * shard_rows, min((shard + 1) * shard_rows, n_rows)
                    rows = records(start, stop) if callable(records) else records[start:stop]
                    _write_shard(folder, plan, shard, rows, encode)
                    logger.debug("wrote shard %d of %s", shard, folder)
            _finish(folder, plan)
        except BaseException:
            if not any(folder.glob("shard-*.json")):
                (folder / PLAN).unlink(missing_ok=True)  # nothing is begun: any other run may have the folder
            raise


def write_shard(
    folder: str | Path,
    shard: int,
    records: Callable[[int, int], Iterable[tuple[str, str]]],
    encode: Callable[[list[str]], np.ndarray],
    **plan: Any,
) -> None:
    """Writes one shard of a store, unless it is whole: for a scheduler that hands shards out to workers. Looks at no
    other shard. When all are written, `write_store` with the same arguments joins them.

    Args:
        folder: as in `write_store`; `check_store_output` has looked at it before.
        shard: its number, from 0.
        records, encode: as in `write_store`.
        plan: dim, encoder, source, n_rows, shard_rows and facts, as in `write_store`; the last two may be left out.

    Raises:
        HlmError: as `write_store`.
    """
    folder = resolved(folder)
    wanted = _plan(**{"shard_rows": SHARD_ROWS, "facts": None} | plan)
    start = shard * wanted["shard_rows"]
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f".shard-{shard}.lock", f"shard {shard} of {folder}"), os_errors(folder, FULL_DISK):
        _claim(folder, wanted)
        if not _is_whole(folder, shard, _read_records(folder, wanted, only=shard)):
            stop = min(start + wanted["shard_rows"], wanted["n_rows"])
            _write_shard(folder, wanted, shard, records(start, stop), encode)


def check_store_output(folder: str | Path) -> Path:
    """Refuses, before any work, a folder that holds files of anything but a vector store.

    Returns:
        The folder itself: absolute, links followed.

    Raises:
        HlmError: a file lies there, or a folder with other files.
    """
    folder = resolved(folder)
    if folder.exists() and not folder.is_dir():
        raise HlmError(f"expected a folder to write at {folder}, found a file; name another output")
    if (folder / MANIFEST).is_file():
        read_manifest(folder, KIND)
    elif folder.is_dir():
        own = r"vectors-\d{5,}\.safetensors|ids-\d{5,}\.parquet|shard-\d{5,}\.json|plan\.json|\..*\.(lock|partial)"
        others = sorted(p.name for p in folder.iterdir() if not re.fullmatch(own, p.name) and p.name not in IGNORED)
        if others:
            raise HlmError(
                f"expected an empty folder or a vector store at {folder}, found a folder with other files "
                f"({', '.join(others[:3])}{', ...' if others[3:] else ''}); nothing there was touched: name another "
                "output"
            )
    return folder


def pending_shards(
    folder: str | Path,
    *,
    dim: int,
    encoder: str,
    source: str,
    n_rows: int,
    shard_rows: int = SHARD_ROWS,
    facts: dict[str, Any] | None = None,
) -> list[int]:
    """Numbers of the shards that `write_store` with these arguments would still write; [] when all are there.

    Raises:
        HlmError: `folder` holds shards of something else (as in `write_store`).
    """
    plan = _plan(dim=dim, encoder=encoder, source=source, n_rows=n_rows, shard_rows=shard_rows, facts=facts)
    return _missing_shards(plan, _read_records(Path(folder), plan), Path(folder))


def _plan(*, dim: int, encoder: str, source: str, n_rows: int, shard_rows: int, facts: Any) -> dict[str, Any]:
    for name, value in (("dim", dim), ("n_rows", n_rows), ("shard_rows", shard_rows)):
        if value < 1:
            raise HlmError(f"{name}: expected at least 1, found {value}")
    plan = {"encoder": encoder, "source": source, "dim": dim, "shard_rows": shard_rows, "n_rows": n_rows}
    # Through JSON, so that a tuple compares equal to the list it is read back as.
    return {**plan, "facts": json.loads(json.dumps(facts or {}))}


def _read_records(folder: Path, plan: dict[str, Any], only: int | None = None) -> dict[int, dict[str, Any]]:
    """Shard number -> its record, from the manifest and from the files beside the shards, of which only that of shard
    `only` is read where it is given; refuses another plan's."""
    records: dict[int, dict[str, Any]] = {}
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder, KIND)
        found = {
            **manifest["inputs"],
            "dim": manifest["dim"],
            "shard_rows": manifest["shard_rows"],
            "n_rows": manifest["rows"],
            "facts": manifest["config"],
        }
        _refuse_other(folder, plan, found)
        records.update(enumerate(manifest["shards"]))
    for path in sorted(folder.glob("shard-*.json")) if only is None else [folder / record_name(only)]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue  # another process has just finished the store
        except ValueError as error:
            raise HlmError(f"{path} is not valid JSON ({error}); delete it and run the command again") from error
        _refuse_other(folder, plan, found["plan"])
        records[found["shard"]] = found["record"]
    return records


def _claim(folder: Path, plan: dict[str, Any]) -> None:
    """Puts `plan.json` there in one step, unless a manifest or an earlier process has said already what this store is.

    Raises:
        HlmError: it is another plan's.
    """
    path = folder / PLAN
    if not (folder / MANIFEST).is_file() and not path.is_file():
        aside = folder / f".{PLAN}.{os.getpid()}.{secrets.token_hex(4)}.partial"
        aside.write_text(json.dumps(plan), encoding="utf-8")
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
        aside.unlink()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return  # the store is whole, or another process has just finished it: its manifest is compared next
    except ValueError as error:
        raise HlmError(f"{path} is not valid JSON ({error}); delete it and run the command again") from error
    _refuse_other(folder, plan, found if isinstance(found, dict) else {})


def _refuse_other(folder: Path, plan: dict[str, Any], found: dict[str, Any]) -> None:
    differing = [name for name in plan if plan[name] != found.get(name)]
    if differing:
        sides = "; ".join(f"{name}: this run has {plan[name]!r}, the folder {found.get(name)!r}" for name in differing)
        raise HlmError(
            f"{folder} holds vectors of another run ({sides}); delete the folder, choose another one, or go back to "
            "the settings it was begun with"
        )


def _missing_shards(plan: dict[str, Any], records: dict[int, dict[str, Any]], folder: Path) -> list[int]:
    return [shard for shard in range(-(-plan["n_rows"] // plan["shard_rows"])) if not _is_whole(folder, shard, records)]


def _is_whole(folder: Path, shard: int, records: dict[int, dict[str, Any]]) -> bool:
    return shard in records and all(
        (path := folder / name).is_file() and path.stat().st_size == entry["bytes"]
        for name, entry in files(shard, records[shard]).items()
    )


def _finish(folder: Path, plan: dict[str, Any]) -> None:
    """Writes `hlm.json` if every shard is whole; another process may be doing the same, with the same bytes."""
    records = _read_records(folder, plan)
    if _missing_shards(plan, records, folder):
        return
    leftovers = [*folder.glob("shard-*.json"), *folder.glob(".*.partial"), *folder.glob(PLAN)]
    if leftovers or not (folder / MANIFEST).is_file():
        _refuse_ids_there_twice(folder, plan)
        try:
            write_manifest(
                folder,
                KIND,
                inputs={"encoder": plan["encoder"], "source": plan["source"]},
                config=plan["facts"],
                records=False,
                dim=plan["dim"],
                rows=plan["n_rows"],
                shard_rows=plan["shard_rows"],
                shards=[records[shard] for shard in sorted(records)],
            )
        except FileNotFoundError:
            # Another process was first and has swept our half-written manifest away with the other leftovers.
            if not (folder / MANIFEST).is_file():
                raise
        for path in leftovers:
            path.unlink(missing_ok=True)


def _refuse_ids_there_twice(folder: Path, plan: dict[str, Any]) -> None:
    """Of all shards: each knows of its own ids alone."""

    def blocks() -> Iterable[pa.Array]:
        for shard in range(-(-plan["n_rows"] // plan["shard_rows"])):
            try:
                yield pq.read_table(folder / ids_name(shard), columns=["_id"])["_id"].combine_chunks()
            except (pa.ArrowException, OSError) as error:
                path = folder / ids_name(shard)
                raise HlmError(f"{path} is not readable ({error}); delete it, and {REMEDY}") from error

    twice = id_there_twice(blocks, plan["n_rows"])
    if twice is not None:
        raise HlmError(
            f"{folder}: expected distinct ids over all shards, found {twice!r} twice; make the ids of the data unique, "
            "delete the folder and run the command again"
        )


def _write_shard(
    folder: Path,
    plan: dict[str, Any],
    shard: int,
    rows: Iterable[tuple[str, str]],
    encode: Callable[[list[str]], np.ndarray],
) -> None:
    """Encodes and writes one shard of the store that `plan` describes.

    Raises:
        HlmError: another number of rows than the plan's, an id that is empty or there twice, or vectors of another
            shape, not finite or not L2-normalised; nothing is written then.
    """
    start = shard * plan["shard_rows"]
    expected = min(plan["shard_rows"], plan["n_rows"] - start)
    where = f"{folder}, rows {start} to {start + expected - 1}"
    ids, texts = [], []
    for row_id, text in rows:
        ids.append(row_id)
        texts.append(text)
    check_ids(ids, expected, where)
    # A GPU is idle while a shard is checked, hashed and synced: one second in 65,536 ads of 4,096 values, which an 8B
    # teacher takes minutes for.
    vectors = quantised(encode(texts), (expected, plan["dim"]), where)
    for stale in folder.glob(f".*-{shard:05d}.*.partial"):
        stale.unlink(missing_ok=True)
    try:
        put_shard(folder, plan, shard, ids, vectors, text_hashes(texts))
    except FileNotFoundError as error:
        raise HlmError(
            f"{error.filename} went away while {folder} was being written: another run writes the same store; let one "
            "of them finish, and start several processes through accelerate or torchrun only"
        ) from error
