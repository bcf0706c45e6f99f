"""Teacher and student on the same query and the same index: what each finds, how far they agree, what each costs.

Nothing here draws: `hlm.demo.page` does. Loading is `load_demo`, one query is `Demo.compare`.
"""

from __future__ import annotations

import json
import logging
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypedDict

import numpy as np

from hlm.artefacts import MANIFEST, HlmError, read_manifest
from hlm.data.spelling import match_key, singular, words_of
from hlm.demo.examples import choose_examples
from hlm.hub.cache import local_folder
from hlm.redaction import public
from hlm.report_files import read_latency, read_report
from hlm.report_types import LatencyReport, Report

logger = logging.getLogger(__name__)

DEPTH = 100  # ads fetched from the index, so that a rank can be told for an ad beyond the first k
MAX_K = 50
MAX_QUERY = 1000  # characters; encoders read some tens of tokens
MAX_TYPED = 4 * MAX_QUERY  # characters that are looked at; what follows them costs nothing
SAVED = "as saved"


@dataclass(frozen=True)
class DemoConfig:
    """Where things are: folders (relative to the current one) or Hub ids.

    Attributes:
        student: a folder or model id; of a list, the first folder that is there.
        data: the catalogue, a folder or dataset id.
        vectors: with the teacher's `corpus` and `queries` stores.
        teacher: run on every query; None: its vectors of `data`'s queries are read from `vectors`.
        index: a saved index; None: built in memory from `vectors`, as every further one of `factories`.
        report, latency: JSON of a run; None: not shown. May be dataset ids too.
        revisions: of Hub ids, by the name of the setting: {"student": "<commit>"}.
        examples: queries to click; none: `hlm.demo.examples` chooses them from the judgements.
        precision: of the student, as QueryEncoder takes it.
    """

    student: str | list[str]
    data: str
    vectors: str
    teacher: str | None = None
    index: str | None = None
    factories: list[str] = field(default_factory=lambda: ["Flat"])
    report: str | None = None
    latency: str | None = None
    revisions: dict[str, str] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    precision: str = "auto"

    @classmethod
    def read(cls, path: str | Path) -> DemoConfig:
        """Raises HlmError for a file that is no JSON object, an unknown setting or one that is missing."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise HlmError(f"expected the demo's settings as JSON at {path}, found none ({error})") from error
        known = [item.name for item in fields(cls)]
        if not isinstance(values, dict) or set(values) - set(known):
            found = ", ".join(sorted(set(values) - set(known))) if isinstance(values, dict) else type(values).__name__
            raise HlmError(f"{path}: expected an object with {', '.join(known)}, found {found}; correct it")
        absent = [name for name in ("student", "data", "vectors") if not values.get(name)]
        if absent:
            raise HlmError(f"{path}: expected a value for {', '.join(absent)}, found none; fill it in")
        return cls(**values)

    def chosen(self, name: str) -> str:
        """A setting's folder or Hub id; of a list, the first folder that is there."""
        value = getattr(self, name)
        return next((one for one in value if Path(one).is_dir()), value[0]) if isinstance(value, list) else value

    def place(self, name: str, inside: str | None = None) -> Path:
        """The folder or file of a setting; `inside` is looked for in a folder, and is what is fetched of a Hub id."""
        value = self.chosen(name)
        if Path(value).is_file():
            return Path(value)
        if Path(value).is_dir():
            return Path(value) / inside if inside and (Path(value) / inside).exists() else Path(value)
        kind = "model" if name in ("student", "teacher") else "dataset"
        if name == "vectors" and inside:
            inside = f"vectors/{inside}"  # where a published dataset keeps its stores
        return local_folder(value, revision=self.revisions.get(name), repo_type=kind, subfolder=inside)

    def read_report(self, name: Literal["report", "latency"]) -> Report | LatencyReport | None:
        """The run's report; None where the settings name none, or what they name is not there or no report."""
        value = getattr(self, name)
        if value is None:
            return None
        try:
            path = Path(value) if value.endswith(".json") else self.place(name, "reports") / f"{name}.json"
            return read_report(path) if name == "report" else read_latency(path)
        except HlmError as error:
            logger.warning("%s is not shown: %s", name, error)
            return None


class Hit(TypedDict):
    """An ad that was found; `other_rank` is its rank with the other encoder, None beyond its first 100."""

    id: str
    rank: int
    score: float
    other_rank: int | None
    title: str
    text: str
    brand: str
    price: str
    url: str
    matched: list[str]


class Side(TypedDict):
    """What one encoder found and what that took, in ms; `encode_ms` is None where the vector was read, not made."""

    hits: list[Hit]
    encode_ms: float | None
    search_ms: float
    total_ms: float | None


class Comparison(TypedDict):
    """`overlap` of the k ads are found by both; `ratio` is teacher over student, of encoding and of the total."""

    query: str
    k: int
    index: str
    message: str
    overlap: int | None
    ratio: dict[str, float] | None
    teacher: Side | None
    student: Side | None


def clean(text: object) -> str:
    """One line without control characters: what could turn the page's reading direction or hide text is left out."""
    kept = (" " if c.isspace() else c for c in str(text) if c.isspace() or c in _JOINERS or not _unseen(c))
    return " ".join("".join(kept).split())


def ad_texts(row: dict[str, Any]) -> dict[str, str]:
    """What is shown of an ad, cleaned: title, text, brand, price and url; "" for what its row lacks."""
    price = row.get("price")
    shown = {name: clean(row.get(name) or "") for name in ("title", "text", "brand")}
    shown["price"] = f"{price:,.2f}" if isinstance(price, (int, float)) else clean(price or "")
    return shown | {"url": clean(row.get("display_url") or row.get("url") or "")}


def is_synthetic(data: str, revision: str | None = None) -> bool:
    """Whether the manifest of a folder or dataset id says that HLM's generator made it (kind "catalogue").

    Raises:
        HlmError: a manifest that is no JSON object.
    """
    folder = Path(data) if Path(data).is_dir() else None
    path = (folder or local_folder(data, revision=revision, repo_type="dataset", patterns=[MANIFEST])) / MANIFEST
    if not path.is_file():
        return False
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("kind") == "catalogue"
    except (ValueError, AttributeError) as error:
        raise HlmError(f"{path}: expected a manifest as JSON, found none ({error}); write the data again") from error


def _unseen(character: str) -> bool:
    return unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Cn"}


_JOINERS = "\u200c\u200d"  # Persian and Hindi are misspelt without them


class Demo:
    """Loaded models, index and catalogue; made by `load_demo`. Safe to call from several threads.

    Args:
        student: float32 (1, dim) of a query.
        teacher: the same, or None for a query whose vector it does not have.
        live: whether the teacher computes.
        indexes: name -> what makes the index, called once, when it is first asked for.
        facts: what is shown, as (name, value), for the page.
        synthetic: whether a generator made the ads.
    """

    def __init__(
        self,
        *,
        student: Callable[[str], np.ndarray],
        teacher: Callable[[str], np.ndarray | None],
        live: bool,
        corpus: Any,
        indexes: dict[str, Callable[[], Any]],
        facts: list[tuple[str, str]],
        synthetic: bool = False,
    ) -> None:
        self.facts, self.live, self.synthetic = facts, live, synthetic
        self.examples: tuple[str, list[str]] = ("", [])  # a label, and queries to click
        self.names = list(indexes)
        self._student, self._teacher = student, teacher
        self._corpus, self._rows = corpus, {name: row for row, name in enumerate(corpus["_id"])}
        self._make, self._lock = indexes, Lock()
        self._indexes: dict[str, Any] = {}

    def index(self, name: str | None = None) -> Any:
        """The index of this name; the first by default.

        Raises:
            HlmError: no index of this name.
        """
        name = name or self.names[0]
        if name not in self._make:
            raise HlmError(f"index: expected one of {', '.join(self.names)}, found {name!r}")
        with self._lock:
            if name not in self._indexes:
                self._indexes[name] = self._make[name]()
            return self._indexes[name]

    def compare(self, query: str, k: int = 10, index: str | None = None) -> Comparison:
        """Encodes and searches with both, one after the other, measured now.

        Raises:
            HlmError: k outside 1 ... 50, or no such index.
        """
        if isinstance(k, bool) or not isinstance(k, (int, float)) or not 1 <= k <= MAX_K or k != int(k):
            raise HlmError(f"k: expected a whole number from 1 to {MAX_K}, found {k!r}")
        found: Comparison = {
            "query": clean(str(query or "")[:MAX_TYPED]), "k": int(k), "index": index or self.names[0], "message": "",
            "overlap": None, "ratio": None, "teacher": None, "student": None,
        }  # fmt: skip
        searched = self.index(index)
        if not found["query"]:
            return found | {"message": "Type a query first: a few words, as a shopper would."}
        if len(found["query"]) > MAX_QUERY:
            found["message"] = f"Cut to its first {MAX_QUERY:,} characters."
            found["query"] = found["query"][:MAX_QUERY]
        text = found["query"]
        teacher, student = self._measured(self._teacher, text, searched), self._measured(self._student, text, searched)
        if teacher is not None and not self.live:
            teacher[1]["encode_ms"] = teacher[1]["total_ms"] = None
        if teacher is None:
            found["message"] += (
                " The teacher does not run here: its vectors are stored for the queries of the data only, such as "
                "the examples. The student answers everything."
            )
        for name, one, other in (("teacher", teacher, student), ("student", student, teacher)):
            if one is not None:
                ranks = {ad: rank for rank, (ad, _) in enumerate(other[0], 1)} if other else {}
                one[1]["hits"] = self._hits(one[0][: int(k)], ranks, text)
                found[name] = one[1]  # type: ignore[literal-required]
        if teacher is not None and student is not None:
            first, second = ({hit["id"] for hit in side[1]["hits"]} for side in (teacher, student))
            found["overlap"] = len(first & second)
            if self.live:
                both: tuple[dict[str, Any], ...] = ({**teacher[1]}, {**student[1]})
                found["ratio"] = {part: both[0][f"{part}_ms"] / both[1][f"{part}_ms"] for part in ("encode", "total")}
        return found | {"message": found["message"].strip()}

    def _measured(self, encode: Callable, text: str, index: Any) -> tuple[list[tuple[str, float]], Side] | None:
        started = time.perf_counter()
        vector = encode(text)
        encoded = time.perf_counter()
        if vector is None:
            return None
        scores, (ids,) = index.search(vector, DEPTH)
        ended = time.perf_counter()
        ms = {"encode_ms": encoded - started, "search_ms": ended - encoded, "total_ms": ended - started}
        side: Any = {"hits": [], **{name: seconds * 1e3 for name, seconds in ms.items()}}
        return list(zip(ids, scores[0].tolist(), strict=False)), side

    def _hits(self, found: list[tuple[str, float]], ranks: dict[str, int], query: str) -> list[Hit]:
        rows = self._corpus[[self._rows[ad] for ad, _ in found]]
        wanted = {singular(word) for word in words_of(query)}
        hits: list[Hit] = []
        for place, (ad, score) in enumerate(found):
            row = {name: column[place] for name, column in rows.items()}
            shown = ad_texts(row)
            words = match_key(" ".join(shown[name] for name in ("title", "text", "brand"))).split()
            matched = list(dict.fromkeys(word for word in words if word in wanted))
            hit: Any = {"id": ad, "rank": place + 1, "score": score, "other_rank": ranks.get(ad), "matched": matched}
            hits.append(hit | shown)
        return hits


def load_demo(config: DemoConfig) -> Demo:
    """Loads the catalogue, both encoders and the index, and checks that they belong together.

    Raises:
        HlmError: something is missing, or the index is of another teacher than the student's.
    """
    from hlm.data.contract import load
    from hlm.indexes.faiss_index import AdIndex
    from hlm.indexes.index import open_index
    from hlm.serving.query_encoder import QueryEncoder
    from hlm.vectors.store import VectorStore

    student = QueryEncoder.from_pretrained(config.place("student"), precision=config.precision)
    source = str(config.data)
    revision = None if Path(source).is_dir() else config.revisions.get("data")
    splits = () if config.examples else ("test", "dev")
    data = load(source, revision=revision, splits=splits, skip_bad_rows=True)
    indexes: dict[str, Callable[[], Any]] = {}
    if config.index:
        saved = open_index(config.place("index", "index"), expect_encoder=student.teacher)
        indexes[f"{saved.factory}, {SAVED}"] = lambda: saved
        teacher_print, source_print = saved.encoder, saved.source
    else:
        store = VectorStore.open(config.place("vectors", "corpus"))
        store.check(encoder=student.teacher)
        for factory in config.factories:
            indexes[factory] = partial(AdIndex.build, store, factory, dim=student.dim)
        teacher_print, source_print = store.encoder, store.source
    live = config.teacher is not None
    teach: Callable[[str], np.ndarray | None]
    if live:
        teach = _live_teacher(config.place("teacher"), teacher_print, student.dim)
        said = f"{public(config.teacher)}, run on every query"
    else:
        queries = VectorStore.open(config.place("vectors", "queries"))
        queries.check(encoder=teacher_print)
        teach = stored_teacher(queries, data.queries, student.dim)
        said = f"not run here: its stored vectors of {len(queries):,} queries are read"
    facts = [
        ("Student", f"{public(config.chosen('student'))}, {student.backend} {student.precision}, width {student.dim}"),
        ("Student's fingerprint", student.fingerprint or "none"),
        ("Teacher", said),
        ("Teacher's fingerprint", f"{teacher_print}, the same in the student and in the vectors"),
        ("Catalogue", f"{public(config.data)}, {data.corpus.num_rows:,} ads"),
        ("Fingerprint of the ads' texts", source_print),
        ("Indexes", ", ".join(indexes)),
        *((f"Revision of {name}", revision) for name, revision in config.revisions.items()),
    ]

    def encode_student(texts: str | list[str]) -> np.ndarray:  # (1, dim) of one text, as the teacher's
        return student.encode([texts] if isinstance(texts, str) else texts)

    demo = Demo(
        student=encode_student,
        teacher=teach,
        live=live,
        corpus=data.corpus,
        indexes=indexes,
        facts=facts,
        synthetic=is_synthetic(source, revision),
    )
    demo.examples = ("Examples", config.examples)
    if not config.examples:
        demo.examples = choose_examples(data, encode_student, teach, demo.index())
    demo.compare(demo.examples[1][0])  # the first call of a model is its slowest
    return demo


def _live_teacher(folder: Path, fingerprint: str, dim: int) -> Callable[[str], np.ndarray]:
    from hlm.encoders.loading import encode, load_encoder

    if (folder / MANIFEST).is_file():
        found = read_manifest(folder, "teacher").get("encoder")
        if found != fingerprint:
            raise HlmError(
                f"expected the teacher {fingerprint} that made the ads' vectors, found {found} at {folder}; name that "
                "teacher, or embed the ads again"
            )
    model = load_encoder(str(folder))
    width = model.get_embedding_dimension()
    return lambda text: encode(model, [text], prompt_name="query", dim=dim if dim < width else None)


def stored_teacher(store: Any, queries: Any, dim: int) -> Callable[[str], np.ndarray | None]:
    """A teacher that does not run: query -> its vector in `store`, float32 (1, dim), L2-normalised; None for a text
    that none of `queries` has, letter case and control characters aside."""
    from hlm.data.contract import iterate, query_text

    texts = {row["_id"]: clean(query_text(row)).casefold() for row in iterate(queries)}
    rows = {texts[name]: row for row, name in enumerate(store.ids.to_pylist()) if name in texts}

    def teach(text: str) -> np.ndarray | None:
        row = rows.get(clean(text).casefold())
        if row is None:
            return None
        vector = store.gather([row])[:, :dim]
        return vector / np.linalg.norm(vector, axis=1, keepdims=True)

    return teach
