"""What an index in Milvus is made of: an address, collections of ads under an alias, and a collection of facts."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.types as pt
from pymilvus import DataType, MilvusClient, MilvusException

from hlm.artefacts import HlmError

logging.getLogger("pymilvus.decorators").setLevel(logging.CRITICAL)  # it logs what it raises as well
ID, VECTOR = "_id", "vector"
MESSAGE_BYTES = 2**24  # of rows that are sent at once: Milvus takes 64 MiB
LONGEST_ID, LONGEST_TEXT = 512, 65_535  # bytes
FACT_CHARACTERS = 16_000  # of facts in one row: no character takes more than four bytes
TYPES = {
    DataType.VARCHAR: pa.string(),
    DataType.INT64: pa.int64(),
    DataType.DOUBLE: pa.float64(),
    DataType.BOOL: pa.bool_(),
}


@dataclass(frozen=True)
class Address:
    """Where an index is: "milvus://host:19530/ads", with "?tls=true" by TLS, or "milvus:///path/to/file.db/ads", a file
    of Milvus Lite. A user's token or "name:password" is in MILVUS_TOKEN.

    Attributes:
        server: what pymilvus connects to.
        name: the alias that readers open; its collections are `name_v1`, `name_v2`, ...
    """

    server: str
    name: str

    @classmethod
    def of(cls, uri: str) -> Address:
        """Reads a URI.

        Raises:
            HlmError: it names no server or no index.
        """
        parts = urlsplit(uri)
        path, _, name = parts.path.rpartition("/")
        tls = parse_qs(parts.query).get("tls") == ["true"]
        server = f"{'https' if tls else 'http'}://{parts.netloc}" if parts.netloc else path
        if parts.scheme != "milvus" or not server or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or "@" in server:
            raise HlmError(
                f"expected milvus://host:port/name, or milvus:///path/to/file.db/name, found '{_hidden(uri)}'; a name "
                "has letters, digits and _, and a password goes into MILVUS_TOKEN"
            )
        return cls(server, name)

    def connected(self) -> MilvusClient:
        """A client; each process needs its own."""
        with errors(f"connect to {self.server}", "start Milvus there, or correct the address and MILVUS_TOKEN"):
            return MilvusClient(uri=self.server, token=os.environ.get("MILVUS_TOKEN", ""))

    def collection(self, version: int) -> str:
        return f"{self.name}_v{version}"

    @property
    def facts(self) -> str:
        return f"{self.name}_hlm"


def _hidden(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//...@", uri)


@contextlib.contextmanager
def errors(what: str, remedy: str) -> Iterator[None]:
    """What Milvus refuses becomes an HlmError."""
    try:
        yield
    except MilvusException as error:
        raise HlmError(f"expected to {what}, found {error.message or error}; {remedy}") from error


def versions(client: MilvusClient, address: Address) -> list[int]:
    """The versions that are there, whole or not, ascending."""
    names = (re.fullmatch(rf"{re.escape(address.name)}_v(\d+)", name) for name in client.list_collections())
    return sorted(int(found[1]) for found in names if found)


def current(client: MilvusClient, address: Address) -> str | None:
    """The collection that the alias names; None where there is none."""
    for version in versions(client, address):
        name = address.collection(version)
        if address.name in client.list_aliases(collection_name=name)["aliases"]:
            return name
    return None


def make(client: MilvusClient, name: str, columns: pa.Schema, dim: int) -> None:
    """An empty collection with "_id", "vector" and these columns.

    Raises:
        HlmError: a column that Milvus has no name or type for.
    """
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field(ID, DataType.VARCHAR, is_primary=True, max_length=LONGEST_ID)
    schema.add_field(VECTOR, DataType.FLOAT_VECTOR, dim=dim)
    for column in columns:
        if not re.fullmatch(r"[A-Za-z]\w*", column.name, re.ASCII) or column.name in (ID, VECTOR):
            raise HlmError(
                f"columns: expected names of letters, digits and _, other than '{VECTOR}', found {column.name!r}; "
                "rename it"
            )
        kind = type_of(column.type)
        if kind is None:
            raise HlmError(
                f"columns: expected numbers, texts or truth values in '{column.name}', found {column.type}; write "
                "dates as numbers"
            )
        more = {"max_length": LONGEST_TEXT} if kind == DataType.VARCHAR else {}
        schema.add_field(column.name, kind, nullable=True, **more)
    client.create_collection(name, schema=schema, consistency_level="Session")  # who commits sees it


def type_of(kind: pa.DataType) -> DataType | None:
    if pt.is_integer(kind):
        return DataType.INT64
    if pt.is_floating(kind):
        return DataType.DOUBLE
    if pt.is_boolean(kind):
        return DataType.BOOL
    return DataType.VARCHAR if pt.is_string(kind) or pt.is_large_string(kind) else None


def schema_of(client: MilvusClient, name: str) -> pa.Schema:
    """Of the ads: "_id", and the columns that searches can be filtered by."""
    fields = client.describe_collection(name)["fields"]
    return pa.schema([(one["name"], TYPES[one["type"]]) for one in fields if one["name"] != VECTOR])


def rows_of(ads: pa.Table, vectors: np.ndarray) -> Iterator[list[dict[str, Any]]]:
    """Rows as Milvus takes them, as many at a time as go into a message.

    Args:
        ads: "_id" and columns.
        vectors: float32 (len(ads), dim).
    """
    step = max(1, MESSAGE_BYTES // (4 * vectors.shape[1] + 1024))
    for start in range(0, len(ads), step):
        rows = ads.slice(start, step).to_pylist()
        yield [row | {VECTOR: vector} for row, vector in zip(rows, vectors[start : start + step], strict=True)]


def count(client: MilvusClient, name: str, expression: str = "") -> int:
    """The rows that pass, what was written last included."""
    (row,) = client.query(name, filter=expression, output_fields=["count(*)"], consistency_level="Strong")
    return int(row["count(*)"])


def write_facts(client: MilvusClient, address: Address, collection: str, facts: dict[str, Any]) -> None:
    """Keeps what is known of a collection in the collection of facts, which has one text of JSON in some rows."""
    if not client.has_collection(address.facts):
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field(ID, DataType.VARCHAR, is_primary=True, max_length=LONGEST_ID)
        schema.add_field("collection", DataType.VARCHAR, max_length=LONGEST_ID)
        schema.add_field("text", DataType.VARCHAR, max_length=LONGEST_TEXT)
        schema.add_field(VECTOR, DataType.FLOAT_VECTOR, dim=2)  # Milvus has no collection without one
        index = client.prepare_index_params()
        index.add_index(VECTOR, index_type="FLAT", metric_type="IP")
        client.create_collection(address.facts, schema=schema, index_params=index)
    text = json.dumps(facts)
    parts = [text[start : start + FACT_CHARACTERS] for start in range(0, len(text), FACT_CHARACTERS)]
    rows: list[dict[str, Any]] = [
        {ID: f"{collection}/{number:04d}/{len(parts)}", "collection": collection, "text": part, VECTOR: [1.0, 0.0]}
        for number, part in enumerate(parts)
    ]
    drop_facts(client, address, collection, {row[ID] for row in rows})
    client.upsert(address.facts, rows)


def read_facts(client: MilvusClient, address: Address, collection: str) -> dict[str, Any]:
    """What `write_facts` kept.

    Raises:
        HlmError: nothing, or half of it.
    """
    rows = sorted(_fact_rows(client, address, collection), key=lambda row: row[ID])
    total = int(rows[0][ID].rpartition("/")[2]) if rows else -1
    if len(rows) != total:
        raise HlmError(
            f"expected what HLM keeps of {collection} in {address.facts}, found {len(rows)} rows; build it again"
        )
    return json.loads("".join(row["text"] for row in rows))


def drop_facts(client: MilvusClient, address: Address, collection: str, but: Iterable[str] = ()) -> None:
    stale = sorted({row[ID] for row in _fact_rows(client, address, collection)} - set(but))
    if stale:
        client.delete(address.facts, ids=stale)


def _fact_rows(client: MilvusClient, address: Address, collection: str) -> list[dict[str, Any]]:
    if not client.has_collection(address.facts):
        return []
    return client.query(
        address.facts,
        filter=f'collection == "{collection}"',
        output_fields=[ID, "text"],
        consistency_level="Strong",
    )
