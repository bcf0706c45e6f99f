"""Who a teacher is whose weights cannot be read: what it is called, and what it does.

`teacher.json` beside its stores holds its name, kind, width and prompts, and its vectors of canary queries. A
fingerprint over these stands for it in every artefact. A later run compares what the teacher does then, with some room:
endpoints do not answer twice to the bit.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

from hlm.artefacts import HlmError, fingerprint_json, write_json
from hlm.embedding.endpoint import Endpoint
from hlm.embedding.ready import ReadyVectors
from hlm.encoders.loading import encode, fingerprint
from hlm.fields import field, optional
from hlm.steps import EmbedConfig
from hlm.vectors import canaries

logger = logging.getLogger(__name__)

IDENTITY = "teacher.json"
SAME_TEACHER = 0.99  # least cosine of a canary to itself: other batches and kernels move a vector by far less
CANDIDATES, CANARIES = 4096, 12  # ready queries looked at for canaries; how many become some


def prompt_name(part: str) -> str:
    """The role of a part's texts, whose prompt goes before each."""
    return "document" if part == "corpus" else "query"


class Source(Protocol):
    """What answers with vectors of texts."""

    @property
    def width(self) -> int: ...

    def encode(self, texts: list[str], *, prompt_name: str, bar: tqdm | None = None) -> np.ndarray: ...


@dataclass
class Loaded:
    """A model in memory, as a source beside ready vectors."""

    model: SentenceTransformer
    batch_tokens: int

    @property
    def width(self) -> int:
        return int(self.model.get_embedding_dimension())

    def encode(self, texts: list[str], *, prompt_name: str, bar: tqdm | None = None) -> np.ndarray:
        return encode(self.model, texts, prompt_name=prompt_name, batch_tokens=self.batch_tokens, bar=bar)


@dataclass
class Part:
    """One table of the dataset."""

    records: Callable[[int, int], Iterator[tuple[str, str]]]  # (start, stop) -> (row id, text)
    rows: int
    source: str  # fingerprint of its texts
    ids: pa.ChunkedArray | None  # of its rows, as texts; None where these have none

    def keys(self, ready: ReadyVectors) -> pa.Array:
        """What each row is called among ready vectors."""
        if ready.by_id and self.ids is not None:
            return self.ids.cast(pa.large_string()).combine_chunks()
        return pa.array((text for _, text in self.records(0, self.rows)), type=pa.large_string())


@dataclass
class Teacher:
    """Whose vectors are written, and how."""

    encoder: str
    width: int
    canaries: dict[str, Any] | None  # as wide as the teacher
    facts: dict[str, Any]  # what every store says of it


def identify(
    config: EmbedConfig,
    source: Source | None,
    ready: Mapping[str, ReadyVectors],
    parts: Mapping[str, Part],
    width: int,
) -> Teacher:
    """Who the teacher is: as `teacher.json` says, of this output or of `same_as`, where what it does has not changed;
    else anew."""
    if isinstance(source, Loaded):
        return Teacher(fingerprint(source.model), width, canaries.made_by(source.model), {})
    kind = source.settings.kind if isinstance(source, Endpoint) else "ready"
    described = {"model": config.model, "kind": kind, "width": width}
    if isinstance(source, Endpoint):
        names = ("query_prompt", "document_prompt", "query_fields", "document_fields", "max_characters")
        described |= {name: getattr(source.settings, name) for name in names}
    facts = {"teacher": {"model": config.model, "kind": kind}}
    made: dict[str, Any] | None
    known = next((one for one in (config.output, config.same_as) if one and (Path(one) / IDENTITY).is_file()), None)
    if known is None and config.same_as:
        raise HlmError(f"same_as: expected {IDENTITY} in {config.same_as}, found none; name stores of such a teacher")
    if known is not None:
        encoder, made = _read_identity(Path(known) / IDENTITY, described)
        if isinstance(source, Endpoint) or known != config.output:
            _check_same(made, source, ready, parts, Path(known) / IDENTITY)
    else:
        made = _canaries(source, ready, parts, config, width)
        encoder = fingerprint_json([described, made or {part: one.stamp for part, one in ready.items()}])
    if known != config.output:
        write_json(Path(config.output) / IDENTITY, {"encoder": encoder, "teacher": described, "canaries": made})
        logger.info("teacher %s: '%s', %s, %d wide", encoder, config.model, kind, width)
    return Teacher(encoder, width, made, facts)


def _read_identity(path: Path, described: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HlmError(f"cannot read {path} ({error}); copy it again, or name another output") from error
    encoder, before = field(found, str, "encoder", where=path), field(found, dict, "teacher", where=path)
    if differing := [name for name in described | before if described.get(name) != before.get(name)]:
        sides = "; ".join(f"{name}: here {described.get(name)!r}, there {before.get(name)!r}" for name in differing)
        raise HlmError(f"{path} is of another teacher ({sides}); name another output, or that teacher")
    return encoder, optional(found, dict, "canaries", where=path)


def _check_same(
    made: dict[str, Any] | None,
    source: Source | None,
    ready: Mapping[str, ReadyVectors],
    parts: Mapping[str, Part],
    path: Path,
) -> None:
    """Refuses a teacher that puts the canaries elsewhere than `path` says it did."""
    if made is None:
        raise HlmError(f"{path}: expected canaries to know the teacher by, found none; embed into a new folder")
    texts = canaries.texts_of(made, where=str(path))
    if source is not None:
        now, kept = source.encode(texts, prompt_name="query"), np.arange(len(texts))
    else:
        now, kept = _ready_of(texts, ready, parts)
        if 2 * len(kept) < len(texts):
            raise HlmError(
                f"{path}: expected ready vectors of at least half of its {len(texts)} canary queries, found "
                f"{len(kept)}; add vectors of the queries that it names, or take same_as out"
            )
    before = canaries.vectors_of(made, now.shape[1], where=str(path))[kept]
    least = float((now * before).sum(axis=1).min())
    if not least > SAME_TEACHER:
        raise HlmError(
            f"expected the teacher of {path}, found one that puts a canary query at cosine {least:.3f} to where it "
            "was: the model behind the name has changed; name another output and make its students anew"
        )


def _ready_of(
    texts: list[str], ready: Mapping[str, ReadyVectors], parts: Mapping[str, Part]
) -> tuple[np.ndarray, np.ndarray]:
    """The ready vectors of those of `texts` that are among the queries: float32 (found, width), and which they are."""
    found: dict[str, np.ndarray] = {}
    for part in ("queries", "unlabelled"):
        if part not in ready:
            continue
        wanted = {text for text in texts if text not in found}
        keys = {
            (name if ready[part].by_id else text): text
            for name, text in parts[part].records(0, parts[part].rows)
            if text in wanted
        }
        for names, vectors in ready[part].blocks() if keys else ():
            for row, name in enumerate(names.to_pylist()):
                if name in keys:
                    found[keys[name]] = vectors[row].astype(np.float32)
    kept = np.array([number for number, text in enumerate(texts) if text in found], dtype=np.int64)
    rows = [found[texts[number]] / np.linalg.norm(found[texts[number]]) for number in kept]
    width = next(iter(ready.values())).width
    return np.array(rows, dtype=np.float32).reshape(-1, width), kept


def _canaries(
    source: Source | None,
    ready: Mapping[str, ReadyVectors],
    parts: Mapping[str, Part],
    config: EmbedConfig,
    width: int,
) -> dict[str, Any] | None:
    """The teacher's canaries, as wide as it is: of the fixed queries where it can be asked, else of some that are
    ready, far from one another. These come from `queries`, which may be published, never from a log."""
    if source is not None:
        return canaries.record(source.encode(list(canaries.QUERIES), prompt_name="query"))
    if "queries" not in ready:
        logger.warning("no ready queries: nothing will tell whether a student is this teacher's but its manifest")
        return None
    part, keys = parts["queries"], dict[str, str]()
    for name, text in islice(part.records(0, part.rows), CANDIDATES):
        keys.setdefault(text, name if ready["queries"].by_id else text)
    vectors, places = ready["queries"].in_order(pa.array(list(keys.values())), width, config.output)
    chosen = _far_apart(vectors[places].astype(np.float32), CANARIES)
    texts = list(keys)
    return canaries.record(vectors[places[chosen]], [texts[number] for number in chosen])


def _far_apart(vectors: np.ndarray, count: int) -> list[int]:
    """Rows that are far from one another: each next is the one whose nearest among those before is farthest."""
    chosen = [0]
    nearest = vectors @ vectors[0]
    while len(chosen) < min(count, len(vectors)):
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, vectors @ vectors[chosen[-1]])
    return chosen
