"""Filling a collection of Milvus from files in its object store, not row by row: for many millions of ads.

files = write_files(store, "import", columns=columns)     # copy them into Milvus's bucket, under ads/
fill = partial(import_files, "http://host:19530", [f"ads/{path.name}" for path in files])
create_index("milvus://host:19530/ads", store, "milvus:IVF_RABITQ", columns=columns, fill=fill)
"""

from __future__ import annotations

import json
import logging
import os
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hlm.artefacts import HlmError, atomic_file
from hlm.indexes.index_parts import checked_ids, joined, normalised
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)
ROWS_PER_FILE, ROWS_PER_GROUP = 2**20, 2**14
POLL_S, ANSWER_S = 5.0, 60.0


def write_files(
    store: VectorStore, folder: str | Path, *, dim: int | None = None, columns: pa.Table | None = None
) -> list[Path]:
    """Parquet files of a store as Milvus imports them: "_id", "vector" (a list of float32) and the columns.

    Args:
        dim, columns: as of `Index.create`. An index is to be created with the same.

    Returns:
        The files in order, of 1,048,576 rows each. Those that are there already are written again.

    Raises:
        HlmError: as `Index.create`, or the folder cannot be written.
    """
    ads = joined(checked_ids(store.ids), columns)
    width, paths = dim or store.dim, []
    for start in range(0, len(store), ROWS_PER_FILE):
        path = Path(folder) / f"part-{start // ROWS_PER_FILE:05d}.parquet"
        with atomic_file(path) as aside:
            _write(store, ads.slice(start, ROWS_PER_FILE), start, width, aside)
        paths.append(path)
    return paths


def _write(store: VectorStore, ads: pa.Table, start: int, width: int, path: Path) -> None:
    schema = ads.schema.append(pa.field("vector", pa.list_(pa.float32())))
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for first in range(0, len(ads), ROWS_PER_GROUP):
            part = ads.slice(first, ROWS_PER_GROUP)
            rows = np.arange(start + first, start + first + len(part))
            flat = normalised(store.gather(rows), width, first_row=start + first).ravel()
            ends = pa.array(np.arange(0, len(flat) + 1, width, dtype=np.int32))
            writer.write_table(
                part.append_column("vector", pa.ListArray.from_arrays(ends, pa.array(flat))).cast(schema)
            )


def import_files(server: str, files: Sequence[str], collection: str) -> None:
    """Has Milvus import files of its object store into a collection, and waits for it.

    Args:
        server: its REST address, such as "http://host:19530"; a token is in MILVUS_TOKEN.
        files: paths in its bucket.
        collection: its name.

    Raises:
        HlmError: Milvus cannot be asked, or refuses, or the import fails: the message has its reason.
    """
    job = _asked(server, "create", {"collectionName": collection, "files": [[path] for path in files]})["jobId"]
    while True:
        found = _asked(server, "get_progress", {"jobId": job})
        if found.get("state") == "Completed":
            return
        if found.get("state") == "Failed":
            raise HlmError(
                f"expected Milvus to import into {collection}, found: {found.get('reason')}; mend it, and build again"
            )
        logger.info("%s: %s%% imported", collection, found.get("progress", 0))
        time.sleep(POLL_S)


def _asked(server: str, what: str, body: dict[str, Any]) -> dict[str, Any]:
    address = f"{server}/v2/vectordb/jobs/import/{what}"
    headers = {"Content-Type": "application/json"}
    if token := os.environ.get("MILVUS_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            found = json.load(answer)
    except (OSError, ValueError) as error:
        raise HlmError(
            f"expected an answer of Milvus at {address}, found {error}; correct the address or the token"
        ) from error
    if not isinstance(found, dict) or found.get("code") != 0 or not isinstance(found.get("data"), dict):
        reason = found.get("message") if isinstance(found, dict) else found
        raise HlmError(f"expected Milvus to take the import at {address}, found: {reason}; mend it, and build again")
    return found["data"]
