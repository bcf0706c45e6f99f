"""The ad index in LanceDB, for a catalogue that changes: documents are put and deleted while others search.

    hlm.json, versions/     what the version that is current says of itself, and those before it (`versions.py`)
    ads.lance/              the table: "_id", "vector", and the columns that searches can be filtered by

Every change makes a version of the table; a reader is pinned to the one that `hlm.json` named when it was opened. A
commit tags the table's version and replaces `hlm.json`, so that a reader sees all of a commit or nothing of it. The tag
`live` follows, for those who read the table without HLM. What a killed writer left behind its last commit, the next
writer drops.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hlm.artefacts import MANIFEST, HlmError, atomic_folder, claimed, read_manifest
from hlm.fields import REMEDY, field, whole_number
from hlm.integrity import file_state, read_steadily
from hlm.outputs import resolved
from hlm.vectors import lance_filters, lance_table, versions
from hlm.vectors.filters import Where
from hlm.vectors.index import KIND, Index
from hlm.vectors.index_parts import (
    Facts,
    checked_ids,
    checked_queries,
    facts_of,
    joined,
    normalised,
    read_facts,
    write_facts,
)
from hlm.vectors.lance_table import Table, errors
from hlm.vectors.store import VectorStore

QUERIES_AT_ONCE, IDS_AT_ONCE = 64, 10_000
# A filter that so few ads pass is answered by scoring each. Beyond, so many times as many cells are searched, and
# candidates scored again: far from a query, neither centroids nor codes tell ads apart as well as near it.
FEW, MORE = 20_000, 4
# Rows that were put are searched one by one until they are in the index. A commit puts them there from so many on.
NOT_INDEXED = 10_000
# Each commit leaves files, which every search reads: after 200 of them one took several times as long. So many are put
# together, which takes as long as ten commits.
COMMITS = 32
MOST_EFFORT = 16


class LanceIndex(Index):
    """Maximum-inner-product search by LanceDB over documents that change; made by `create` or `load`, never by hand.

    Its attributes are those of `hlm.vectors.index.Index`; `factory` is "FLAT", which is exact, or an IVF with codes:
    "IVF_RQ", "IVF_PQ", "IVF_SQ", "IVF_FLAT" or "IVF_HNSW_SQ". One writer at a time changes it; any number of processes
    and threads search it. A forked process has to open it itself.
    """

    engine = "lance"

    def __init__(self, folder: Path, facts: Facts) -> None:
        self.folder = folder
        self._process = os.getpid()
        self._database = lance_table.connected(folder)  # its cache is kept from version to version
        self._writing: contextlib.ExitStack | None = None
        self._state: list[int] | None = None
        self._pin(facts)

    def _pin(self, facts: Facts) -> None:
        where = f"{self.folder / MANIFEST}, config"
        lance_table.checked_factory(facts.factory)
        self._effort = field(facts.config, int, "effort", where=where, least=1, most=MOST_EFFORT)
        version = field(facts.config, int, "table_version", where=where, least=1)
        table = lance_table.opened(self._database)
        with errors(f"open version {version} of {self.folder}", "pull or build the index again"):
            table.checkout(version)
            schema, count = table.schema, table.count_rows()
        kept = ("_id", "vector")
        if not set(kept) <= set(schema.names) or schema.field("vector").type != pa.list_(pa.float32(), facts.dim):
            raise HlmError(
                f"{self.folder}: expected '_id' and a 'vector' of width {facts.dim}, found {schema}; {REMEDY}"
            )
        if count != facts.count:
            raise HlmError(f"{self.folder}: expected {facts.count} ads as {MANIFEST} says, found {count}; {REMEDY}")
        self.encoder, self.source, self.factory = facts.encoder, facts.source, facts.factory
        self.canaries, self.measured, self.made_of = facts.canaries, facts.measured, facts.made_of
        self._schema = pa.schema([entry for entry in schema if entry.name != "vector"])
        self._facts = facts
        # In one step, for those who search meanwhile: what is open, and how many rows pass which filter.
        passing: dict[str, int] = {}
        self._open = facts, table, passing

    def __len__(self) -> int:
        return self._facts.count

    def __reduce__(self) -> tuple[Any, ...]:
        return LanceIndex, (self.folder, self._facts)

    @property
    def dim(self) -> int:
        return self._facts.dim

    @property
    def version(self) -> int:
        """Of the folder, as `versions.py` counts them."""
        return self._facts.version

    def ads(self) -> pa.Table:
        """The ids of all documents, in no order, and the columns kept beside them."""
        _, table, _ = self._open
        with errors(f"read {self.folder}", "try again"):
            return table.search().select(self.columns).to_arrow()

    @property
    def settings(self) -> Mapping[str, Any]:
        """Those of the manifest: factory, effort, and the version of the table."""
        return {**self._facts.config, "effort": self._effort}

    def search_harder(self) -> bool:
        """Searches twice the cells from now on and scores twice the candidates again, up to 16 times the default; what
        is committed afterwards says so. See `Index.search_harder`."""
        if self.factory == "FLAT" or self._effort == MOST_EFFORT:
            return False
        self._effort *= 2
        return True

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
        check: Callable[[LanceIndex], None] = lambda index: None,
        keep: int = 0,
    ) -> LanceIndex:
        """Builds the table and its index block by block; see `Index.create`. A folder that has an index gets a further
        version."""
        width = whole_number("dim (the store's width or less)", dim or store.dim, least=1, most=store.dim)
        settings: dict[str, Any] = {"factory": lance_table.checked_factory(factory), "effort": 1}
        ads = joined(checked_ids(store.ids), columns)
        lance_filters.check_names(ads.column_names[1:])
        target = resolved(place)
        is_new = not (target / MANIFEST).is_file()
        with atomic_folder(target, KIND) if is_new else claimed(target, KIND) as folder:
            facts = Facts(
                encoder=store.encoder,
                source=store.source,
                factory=factory,
                dim=width,
                count=len(store),
                canaries=store.canaries,
                measured=None,
                made_of=store.parts,
                home=folder,
                version=versions.FIRST if is_new else versions.next_number(folder, KIND),
                config=settings,
            )
            table_version = lance_table.fill(folder, store, ads, facts)
            facts = replace(facts, config={**settings, "table_version": table_version})
            _write(LanceIndex(folder, facts), check, keep or versions.KEEP)
        return cls.load(target)

    @classmethod
    def load(cls, folder: str | Path, *, expect_encoder: str | None = None) -> LanceIndex:
        """Opens the version that is current, and keeps to it; see `open_index`."""
        place = resolved(folder)
        return read_steadily(place, lambda: cls(place, read_facts(place, cls.engine, expect_encoder)))

    def refresh(self) -> bool:
        """Opens the version that is current by now; searches that are running end in the former one. It costs a look at
        a file where nothing has changed, so a server may call it before every search.

        Returns:
            Whether it is another one.
        """
        state = file_state(self.folder / MANIFEST)
        if state is not None and state == self._state:
            return False
        found = read_steadily(self.folder, lambda: read_facts(self.folder, self.engine, self.encoder))
        changed = found.version != self.version
        if changed:
            self._pin(found)
        self._state = state  # of before it was read: what came meanwhile is seen next time
        return changed

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        where: Where | None = None,
        nprobe: int | None = None,
        refine_factor: int | None = None,
    ) -> tuple[np.ndarray, list[list[str]] | list[str]]:
        """The `k` documents with the largest inner product for each query, of the version that is open; see
        `Index.search`. Every list is full: what the cells do not fill is searched one by one.

        Args:
            queries: as there.
            k: as there.
            where: ids, or conditions on columns; see `lance_filters.py`.
            nprobe: cells searched; default one in 16, at least 8, times the index's effort.
            refine_factor: candidates scored by their vectors, in multiples of k; default 4, times the index's effort.
        """
        self._check_process()
        rows, (facts, table, passing) = checked_queries(queries, self.dim), self._open
        k = min(whole_number("k", k, least=1), facts.count)
        cells = lance_table.cells_of(facts.factory, facts.count)
        effort = self._effort
        probed = lance_table.default_nprobe(cells) * effort
        probed = min(cells, probed if nprobe is None else whole_number("nprobe", nprobe, least=1))
        refined = lance_table.REFINE_FACTOR * effort
        refined = refined if refine_factor is None else whole_number("refine_factor", refine_factor, least=1)
        condition, allowed = None, facts.count
        if where is not None:
            condition = lance_filters.sql_of(where, self._schema)
            if condition not in passing:
                with errors("filter the ads", "correct the filter"):
                    passing[condition] = table.count_rows(condition)
            allowed = passing[condition]
            probed = min(cells, math.ceil(MORE * probed * facts.count / max(1, allowed)))
            refined *= MORE
        k = min(k, allowed)
        exact = not cells or (condition is not None and allowed <= FEW)
        scores = np.zeros((len(rows), k), np.float32)
        ids: list[list[str]] = [[] for _ in rows]
        for start in range(0, len(rows) if k else 0, QUERIES_AT_ONCE):
            part = slice(start, start + QUERIES_AT_ONCE)
            scores[part], ids[part] = lance_table.nearest(
                table, rows[part], k, condition, 0 if exact else probed, refined
            )
        for row in [row for row, found in enumerate(ids) if len(found) < k and not exact]:
            part = slice(row, row + 1)
            scores[part], ids[part] = lance_table.nearest(table, rows[part], k, condition, 0, 1)
        return (scores, ids) if np.ndim(queries) == 2 else (scores[0], ids[0])

    def put(self, ids: Sequence[str], vectors: np.ndarray, columns: pa.Table | None = None) -> None:
        """Adds or replaces documents, for whoever opens the index after `commit`; see `Index.put`."""
        checked, vectors = checked_ids(list(ids)), np.asarray(vectors)
        if vectors.ndim != 2 or len(vectors) != len(checked) or vectors.shape[1] < self.dim:
            raise HlmError(
                f"expected a vector for each id, of shape ({len(checked)}, {self.dim} or more), found {vectors.shape}"
            )
        ads = joined(checked, columns)
        if ads.column_names != self.columns:
            raise HlmError(
                f"columns: expected {', '.join(self.columns)}, as the index was built, found "
                f"{', '.join(ads.column_names)}"
            )
        rows = lance_table.rows_of(ads, normalised(vectors, self.dim, first_row=0))
        with self._head() as table, errors(f"put {len(rows)} ads into {self.folder}", "put them again"):
            table.merge_insert("_id").when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def delete(self, ids: Sequence[str]) -> None:
        """Removes documents, for whoever opens the index after `commit`; see `Index.delete`."""
        texts = pa.array(list(ids), pa.string()).to_pylist()
        for start in range(0, len(texts), IDS_AT_ONCE):
            with self._head() as table, errors(f"delete ads from {self.folder}", "delete them again"):
                table.delete(lance_filters.is_one_of(lance_filters.quoted("_id"), texts[start : start + IDS_AT_ONCE]))

    def commit(
        self,
        store: VectorStore | None = None,
        *,
        check: Callable[[Index], None] = lambda index: None,
        keep: int = versions.KEEP,
    ) -> None:
        """Makes what was put and deleted the current version, and opens it here; see `Index.commit`.

        Args:
            store: as there.
            check: is given the new version, opened, before anybody sees it; what it raises leaves the old one in place.
            keep: versions to keep for `hlm rollback`. Others stay readable for an hour.
        """
        with self._head() as table:
            with errors(f"index what was put into {self.folder}", "commit again"):
                many = self.factory != "FLAT" and lance_table.not_indexed(table) > NOT_INDEXED
                if many or (self.version + 1) % COMMITS == 0:
                    table.optimize(cleanup_older_than=lance_table.GRACE)
                count, version = table.count_rows(), table.version
            if store is not None and count != len(store):
                raise HlmError(
                    f"expected the {len(store)} ads of {store.folder}, found {count} in {self.folder}; build the index "
                    "again"
                )
            changed = replace(
                self._facts,
                count=count,
                source=store.source if store else self.source,
                made_of=store.parts if store else None,
                version=versions.next_number(self.folder, KIND),
                config={**self._facts.config, "table_version": version},
            )
            new = LanceIndex(self.folder, changed)
            _write(new, check, keep)
        self._release()
        self._pin(replace(changed, measured=new.measured, made_of=new.made_of, config=new.settings))

    def discard(self) -> None:
        """Lets go of what was put and deleted since the last commit, and lets others write."""
        self._release()

    def compact(self) -> None:
        """Puts every row into the index and small files together, as `commit` does from time to time; the next commit
        makes it current."""
        with self._head() as table, errors(f"compact {self.folder}", "free some space, and compact again"):
            table.optimize(cleanup_older_than=lance_table.GRACE)

    @classmethod
    def make_current(cls, folder: Path, manifest: dict[str, Any]) -> None:
        """See `Index.make_current`; the tag `live` follows, for those who read the table without HLM."""
        version = cls(folder, facts_of(folder, manifest, cls.engine)).settings["table_version"]
        versions.point(folder, manifest)
        lance_table.tag(lance_table.opened(lance_table.connected(folder)), lance_table.LIVE, version)

    @contextlib.contextmanager
    def _head(self) -> Iterator[Table]:
        """The table to change, which this index alone does until `_release`; begins as the version that is current."""
        self._check_process()
        if self._writing is None:
            with contextlib.ExitStack() as stack:
                stack.enter_context(claimed(self.folder, KIND))
                current = versions.number_of(read_manifest(self.folder, KIND))
                if current != self.version:
                    raise HlmError(
                        f"expected version {self.version} of {self.folder}, which was opened, found {current}: another "
                        "process has committed since; open the index again"
                    )
                table = lance_table.opened(self._database)
                version = self.settings["table_version"]
                if table.version != version:  # what a killed writer left, or versions gone back from
                    table.checkout(version)
                    table.restore()
                self._changing, self._writing = table, stack.pop_all()
        yield self._changing

    def _release(self) -> None:
        if self._writing is not None:
            self._writing.close()
            self._writing = None

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise HlmError(
                "an index in LanceDB does not work in a forked process: its threads are not there; open it there, or "
                "start the process by spawn or forkserver"
            )


def _write(index: LanceIndex, check: Callable[[LanceIndex], None], keep: int) -> None:
    """Makes a version whose table is whole the current one: check, tag, manifest, pointer, in this order."""
    folder, version, at = index.folder, index.version, index.settings["table_version"]
    check(index)
    table = lance_table.opened(lance_table.connected(folder))
    lance_table.tag(table, f"v{version}", at)
    own = folder if version == versions.FIRST else versions.new_folder(folder, version)
    write_facts(own, index, index.settings, version=version, records=False)
    if version == versions.FIRST:
        lance_table.tag(table, lance_table.LIVE, at)
        return
    LanceIndex.make_current(folder, read_manifest(own, KIND))
    for number in versions.forget(folder, KIND, keep):
        lance_table.untag(table, f"v{number}")
