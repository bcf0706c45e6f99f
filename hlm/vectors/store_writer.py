"""Writing a vector store (see `store.py`): shard by shard, aside and renamed, resumable after a kill at any moment.

While a store is being written it has no `hlm.json`. `plan.json`, which the first process puts there, says what is being
written, so that a run of anything else is refused; a record `shard-00000.json` beside each whole shard holds its sizes
and SHA-256. Shards never depend on one another, so that any number of processes can share the work without talking:
whoever finds all shards whole gathers the records into `hlm.json`.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
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

from hlm.artefacts import MANIFEST, HlmError, read_manifest, write_json, write_manifest
from hlm.errors import FULL_DISK
from hlm.locks import locked
from hlm.outputs import IGNORED, os_errors, resolved

logger = logging.getLogger(__name__)

KIND = "vectors"
PLAN = "plan.json"
KEY = "vectors"
REMEDY = "run the command that writes the store again, it writes missing and truncated shards anew"
_NORM_TOLERANCE = 1e-2  # normalising in bf16 is off by up to 0.4%; a vector nobody normalised is off by far more

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
    shard_rows: int = 65536,
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
            twice in a shard; `encode` gives another shape, non-finite values or vectors that are not L2-normalised.
            Nothing of the failing shard is kept.
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
    shard_rows: int = 65536,
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


def _read_records(folder: Path, plan: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Shard number -> its record, from the manifest and from the files beside the shards; refuses another plan's."""
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
    for path in sorted(folder.glob("shard-*.json")):
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
    def whole(shard: int) -> bool:
        return shard in records and all(
            (path := folder / name).is_file() and path.stat().st_size == entry["bytes"]
            for name, entry in files(shard, records[shard]).items()
        )

    return [shard for shard in range(-(-plan["n_rows"] // plan["shard_rows"])) if not whole(shard)]


def _finish(folder: Path, plan: dict[str, Any]) -> None:
    """Writes `hlm.json` if every shard is whole; another process may be doing the same, with the same bytes."""
    records = _read_records(folder, plan)
    if _missing_shards(plan, records, folder):
        return
    leftovers = [*folder.glob("shard-*.json"), *folder.glob(".*.partial"), *folder.glob(PLAN)]
    if leftovers or not (folder / MANIFEST).is_file():
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


def vectors_name(shard: int) -> str:
    return f"vectors-{shard:05d}.safetensors"


def ids_name(shard: int) -> str:
    return f"ids-{shard:05d}.parquet"


def files(shard: int, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """File name -> {"bytes", "sha256"} of a shard's two files."""
    return {vectors_name(shard): record["vectors"], ids_name(shard): record["ids"]}


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
    _check_ids(ids, expected, where)
    # A GPU is idle while a shard is checked, hashed and synced: one second in 65,536 ads of 4,096 values, which an 8B
    # teacher takes minutes for.
    vectors = _quantised(encode(texts), (expected, plan["dim"]), where)
    for stale in folder.glob(f".*-{shard:05d}.*.partial"):
        stale.unlink(missing_ok=True)
    try:
        _put_shard(folder, plan, shard, ids, vectors)
    except FileNotFoundError as error:
        raise HlmError(
            f"{error.filename} went away while {folder} was being written: another run writes the same store; let one "
            "of them finish, and start several processes through accelerate or torchrun only"
        ) from error


def _put_shard(folder: Path, plan: dict[str, Any], shard: int, ids: list[str], vectors: np.ndarray) -> None:
    names = {"vectors": vectors_name(shard), "ids": ids_name(shard)}
    asides = {kind: folder / f".{name}.{os.getpid()}.partial" for kind, name in names.items()}
    digests = {"vectors": _write_vectors(asides["vectors"], vectors)}
    pq.write_table(pa.table({"_id": pa.array(ids, type=pa.string())}), asides["ids"], compression="zstd")
    digests["ids"] = sha256(asides["ids"])
    record: dict[str, Any] = {"rows": len(ids)}
    for kind, aside in asides.items():
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        record[kind] = {"bytes": aside.stat().st_size, "sha256": digests[kind]}
    for kind, aside in asides.items():
        os.replace(aside, folder / names[kind])
    # Last, so that a shard counts as whole only when both of its files are in place.
    write_json(folder / f"shard-{shard:05d}.json", {"shard": shard, "plan": plan, "record": record})


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_vectors(path: Path, vectors: np.ndarray) -> str:
    """Writes a safetensors file and returns its SHA-256.

    By hand, because `safetensors.numpy.save_file` writes through a temporary file with a random name, which a kill
    leaves lying in the store (half a gigabyte and more), and makes the result readable by its owner alone.
    """
    entry = {"dtype": "F16", "shape": list(vectors.shape), "data_offsets": [0, vectors.nbytes]}
    header = json.dumps({KEY: entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format aligns the data to 8 bytes
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for piece in (len(header).to_bytes(8, "little"), header, vectors.data.cast("B")):
            file.write(piece)
            digest.update(piece)
    return digest.hexdigest()


def _check_ids(ids: list[str], expected: int, where: str) -> None:
    if len(ids) != expected:
        raise HlmError(f"{where}: expected {expected} records, found {len(ids)}; n_rows does not fit the data")
    if wrong := [row_id for row_id in ids if not isinstance(row_id, str) or not row_id]:
        raise HlmError(f"{where}: expected ids that are non-empty text, found {wrong[0]!r}; correct the data's ids")
    if len(set(ids)) != len(ids):
        twice = collections.Counter(ids).most_common(1)[0][0]
        raise HlmError(f"{where}: expected distinct ids, found {twice!r} twice; make the ids of the data unique")


def _quantised(vectors: np.ndarray, shape: tuple[int, int], where: str) -> np.ndarray:
    """The checked vectors as contiguous little-endian fp16."""
    vectors = np.asarray(vectors)
    if vectors.shape != shape or vectors.dtype.kind != "f":
        raise HlmError(
            f"{where}: expected floating-point vectors of shape {shape} from the encoder, found {vectors.dtype} of "
            f"shape {vectors.shape}; check dim against the encoder's dimension"
        )
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float32))
    first = f"row {int(np.argmax(~np.isfinite(norms)))} of the shard"
    if not np.isfinite(norms).all():
        raise HlmError(
            f"{where}: expected finite vectors, found NaN or infinity in {first}; check the encoder's weights, or load "
            "it in bfloat16 or float32 where it overflows in float16"
        )
    off = np.abs(norms - 1)
    if (off > _NORM_TOLERANCE).any():
        row = int(np.argmax(off))
        raise HlmError(
            f"{where}: expected L2-normalised vectors, found norm {norms[row]:.4g} in row {row} of the shard; "
            "normalise what the encoder gives (a norm of 0 has no direction: look at that row's text)"
        )
    return np.ascontiguousarray(vectors, dtype="<f2")
