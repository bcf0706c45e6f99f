"""The ad index in Milvus, for a catalogue past one machine: `create_index("milvus://host:19530/ads", store, ...)`.

Every build is a collection of its own, `ads_v1`, `ads_v2`, ...; the alias `ads` names the one that `open_index` opens.
So a new build is filled and indexed aside and takes the alias in one step; whoever has an older one open keeps it.

What is put and deleted is sent when it is committed, to the collection itself: Milvus has no versions of a
collection. A reader may see a commit of many documents half done while it lasts, and sees it without opening anew.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pymilvus import MilvusClient

from hlm.artefacts import HlmError
from hlm.fields import whole_number
from hlm.indexes import milvus_table
from hlm.indexes.filters import Where
from hlm.indexes.index import Index
from hlm.indexes.index_parts import check_encoder, checked_ids, checked_queries, joined, normalised
from hlm.indexes.milvus_filters import NOTHING, expression_of
from hlm.indexes.milvus_table import ID, VECTOR, Address, errors
from hlm.vectors.store import VectorStore

# What is built, by Milvus's own names, and how: its documentation's settings for high recall.
BUILD: dict[str, dict[str, Any]] = {
    "FLAT": {},
    "HNSW": {"M": 32, "efConstruction": 200},
    "IVF_RABITQ": {"nlist": 1024, "refine": True, "refine_type": "SQ8"},
    "DISKANN": {},
}
QUERIES_AT_ONCE, ROWS_PER_BLOCK = 64, 65_536
MOST_CELLS, MOST_CANDIDATES = BUILD["IVF_RABITQ"]["nlist"], 16_384
MORE = 4  # times as many cells or candidates behind a filter: far from a query centroids tell ads apart less well


class MilvusIndex(Index):
    """Maximum-inner-product search by Milvus; made by `create` or `load`, never by hand.

    Its attributes are those of `hlm.indexes.index.Index`; `factory` is "FLAT", which is exact, "HNSW", "IVF_RABITQ" or
    "DISKANN". A forked process has to open it itself.
    """

    engine = "milvus"

    def __init__(self, address: Address, client: MilvusClient, collection: str, facts: dict[str, Any]) -> None:
        self._address, self._client, self._collection, self._facts = address, client, collection, facts
        self._schema = milvus_table.schema_of(client, collection)
        self._process = os.getpid()
        self._pending: dict[str, dict[str, Any] | None] = {}  # id -> the row to put, or None to delete
        self.encoder, self.source, self.factory = facts["encoder"], facts["source"], facts["factory"]
        self.canaries, self.measured, self.made_of = facts["canaries"], facts["measured"], facts["made_of"]

    def __len__(self) -> int:
        return self._facts["count"]

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self._address, self._collection)

    @property
    def dim(self) -> int:
        return self._facts["dim"]

    @property
    def columns(self) -> list[str]:
        """What a search can be filtered by: "_id", and the columns that were kept."""
        return self._schema.names

    @classmethod
    def create(
        cls,
        place: str | Path,
        store: VectorStore,
        factory: str,
        *,
        dim: int | None = None,
        columns: pa.Table | None = None,
        fill: Callable[[str], None] | None = None,
    ) -> MilvusIndex:
        """Fills and indexes a new collection, and gives it the alias; see `Index.create`. The collection that had the
        alias stays, for its readers; those before it, and what a killed build left, are dropped. A build that fails
        leaves what was there. One build at a time.

        Args:
            place: as there.
            store: as there.
            factory: as there.
            dim: as there.
            columns: as there.
            fill: is given the name of the new collection and fills it, in place of sending every row
                (`milvus_import.py`).
        """
        address = Address.of(str(place))
        if factory not in BUILD:
            raise HlmError(f"expected an index of Milvus of {', '.join(BUILD)}, found '{factory}'; choose one of these")
        width = whole_number("dim (the store's width or less)", dim or store.dim, least=1, most=store.dim)
        ads = joined(checked_ids(store.ids), columns)
        client = address.connected()
        with errors(f"build {place}", "mend what Milvus says, and build again"):
            if address.name in client.list_collections():
                raise HlmError(
                    f"expected '{address.name}' to be free for an alias, found a collection; choose another name"
                )
            older, former = milvus_table.versions(client, address), milvus_table.current(client, address)
            collection = address.collection(older[-1] + 1 if older else 1)
            facts = {"encoder": store.encoder, "source": store.source, "factory": factory, "dim": width}
            facts |= {"count": len(store), "canaries": store.canaries, "measured": None, "made_of": store.parts}
            try:
                milvus_table.make(client, collection, pa.schema(list(ads.schema)[1:]), width)
                if fill is not None:
                    fill(collection)
                else:
                    _send(client, collection, store, ads, width)
                client.flush(collection)
                _index(client, collection, factory)
                if (found := milvus_table.count(client, collection)) != len(store):
                    raise HlmError(f"expected {len(store)} ads in {collection}, found {found}; build it again")
                milvus_table.write_facts(client, address, collection, facts)
            except BaseException:
                _drop(client, address, collection)
                raise
            move = client.create_alias if former is None else client.alter_alias
            move(collection_name=collection, alias=address.name)
            for name in map(address.collection, older):
                if name != former:
                    _drop(client, address, name)
        return cls(address, client, collection, facts)

    @classmethod
    def load(cls, folder: str | Path, *, expect_encoder: str | None = None) -> MilvusIndex:
        """Opens the collection that the alias names, and keeps to it; see `open_index`."""
        address = Address.of(str(folder))
        client = address.connected()
        with errors(f"open {folder}", "mend what Milvus says, and open it again"):
            collection = milvus_table.current(client, address)
        if collection is None:
            raise HlmError(
                f"expected an index at {folder}, found no alias '{address.name}'; build it, or correct the name"
            )
        index = _opened(address, collection, client)
        check_encoder(index.encoder, expect_encoder, folder)
        return index

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        where: Where | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> tuple[np.ndarray, list[list[str]] | list[str]]:
        """The `k` documents with the largest inner product for each query; see `Index.search`.

        Args:
            queries: as there.
            k: as there, at most 16,384.
            where: ids, or conditions on columns; see `milvus_filters.py`.
            params: Milvus's own search parameters; default by the kind of index, widened behind a filter.
        """
        self._check_process()
        rows = checked_queries(queries, self.dim)
        k = min(whole_number("k", k, least=1, most=MOST_CANDIDATES), len(self))
        expression, share = "", 1.0
        with errors(f"search {self._collection}", "mend what Milvus says, and search again"):
            if where is not None:
                expression = expression_of(where, self._schema)
                allowed = 0 if expression == NOTHING else milvus_table.count(self._client, self._collection, expression)
                k, share = min(k, allowed), allowed / len(self)
            scores = np.full((len(rows), k), -np.inf, np.float32)
            ids: list[list[str]] = [[] for _ in rows]
            given = params or search_params(self.factory, k, share)
            for start in range(0, len(rows) if k else 0, QUERIES_AT_ONCE):
                part = range(start, min(start + QUERIES_AT_ONCE, len(rows)))
                self._fill(rows, part, expression, given, scores, ids)
            if where is not None:
                for row in [row for row, found in enumerate(ids) if len(found) < k]:
                    self._fill(rows, range(row, row + 1), expression, search_params(self.factory, k, 0), scores, ids)
        return (scores, ids) if np.ndim(queries) == 2 else (scores[0], ids[0])

    def _fill(
        self,
        queries: np.ndarray,
        part: range,
        expression: str,
        params: Mapping[str, Any],
        scores: np.ndarray,
        ids: list[list[str]],
    ) -> None:
        """Searches some of the queries and puts what was found where it belongs."""
        answers = self._client.search(
            self._collection,
            data=list(queries[part.start : part.stop]),
            anns_field=VECTOR,
            limit=scores.shape[1],
            filter=expression,
            output_fields=[ID],
            search_params={"metric_type": "IP", "params": dict(params)},
        )
        for row, answer in zip(part, answers, strict=True):
            ids[row] = [hit[ID] for hit in answer]
            scores[row, : len(answer)] = [hit["distance"] for hit in answer]

    def put(self, ids: Sequence[str], vectors: np.ndarray, columns: pa.Table | None = None) -> None:
        """Adds or replaces documents when `commit` is called; see `Index.put`. They are in memory until then."""
        checked, vectors = checked_ids(list(ids)), np.asarray(vectors)
        if vectors.ndim != 2 or len(vectors) != len(checked) or vectors.shape[1] < self.dim:
            raise HlmError(
                f"expected a vector for each id, of shape ({len(checked)}, {self.dim} or more), found {vectors.shape}"
            )
        ads = joined(checked, columns)
        if sorted(ads.column_names) != sorted(self.columns):
            raise HlmError(
                f"columns: expected {', '.join(self.columns)}, as the index was built, found "
                f"{', '.join(ads.column_names)}"
            )
        for rows in milvus_table.rows_of(ads, normalised(vectors, self.dim, first_row=0)):
            self._pending.update((row[ID], row) for row in rows)

    def delete(self, ids: Sequence[str]) -> None:
        """Removes documents when `commit` is called; see `Index.delete`."""
        self._pending.update(dict.fromkeys(pa.array(list(ids), pa.string()).to_pylist()))

    def commit(self, store: VectorStore | None = None) -> None:
        """Sends what was put and deleted since; see `Index.commit`. A commit that fails is sent again by the next
        one: to put and to delete twice does no harm."""
        self._check_process()
        step = max(1, milvus_table.MESSAGE_BYTES // (4 * self.dim + 1024))
        put = [row for row in self._pending.values() if row is not None]
        gone = [name for name, row in self._pending.items() if row is None]
        with errors(f"commit to {self._collection}", "commit again"):
            for start in range(0, len(put), step):
                self._client.upsert(self._collection, put[start : start + step])
            for start in range(0, len(gone), step):
                self._client.delete(self._collection, ids=gone[start : start + step])
            count = milvus_table.count(self._client, self._collection)
            if store is not None and count != len(store):
                raise HlmError(
                    f"expected the {len(store)} ads of {store.folder}, found {count} in {self._collection}; build the "
                    "index again"
                )
            self._facts = self._facts | {"count": count}
            if store is not None:
                self._facts |= {"source": store.source, "made_of": store.parts}
            milvus_table.write_facts(self._client, self._address, self._collection, self._facts)
        self.source, self.made_of = self._facts["source"], self._facts["made_of"]
        self._pending.clear()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise HlmError("an index in Milvus does not work in a forked process: open it there")


def search_params(factory: str, k: int, share: float) -> dict[str, Any]:
    """Milvus's parameters of a search for `k` documents among this share of all; with 0 the widest."""
    wider = math.inf if not share else 1 if share == 1 else MORE / share
    if factory == "IVF_RABITQ":
        return {"nprobe": int(min(64 * wider, MOST_CELLS)), "refine_k": 4 if wider == 1 else 4 * MORE}
    name = {"HNSW": "ef", "DISKANN": "search_list"}.get(factory)
    return {name: int(min(max(128, 2 * k) * wider, MOST_CANDIDATES))} if name else {}


def _index(client: MilvusClient, collection: str, factory: str) -> None:
    wanted = client.prepare_index_params()
    wanted.add_index(VECTOR, index_type=factory, metric_type="IP", params=BUILD[factory])
    client.create_index(collection, wanted)
    client.load_collection(collection)


def _send(client: MilvusClient, collection: str, store: VectorStore, ads: pa.Table, width: int) -> None:
    from hlm.progress import progress  # not above: a search does without

    total = -(-len(store) // ROWS_PER_BLOCK)
    blocks = progress(store.iter_blocks(ROWS_PER_BLOCK), what=f"fill {collection}", unit="block", total=total)
    for start, block in blocks:
        for rows in milvus_table.rows_of(ads.slice(start, len(block)), normalised(block, width, first_row=start)):
            client.insert(collection, rows)


def _drop(client: MilvusClient, address: Address, collection: str) -> None:
    client.drop_collection(collection)
    milvus_table.drop_facts(client, address, collection)


def _opened(address: Address, collection: str, client: MilvusClient | None = None) -> MilvusIndex:
    client = client or address.connected()
    with errors(f"open {collection}", "it may have been dropped since: open the index by its name"):
        facts = milvus_table.read_facts(client, address, collection)
        client.load_collection(collection)
        return MilvusIndex(address, client, collection, facts)
