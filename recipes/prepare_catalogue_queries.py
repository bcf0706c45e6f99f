"""Derives training pairs and unlabelled queries from a catalogue that has none, as bid keywords are derived.

    python recipes/prepare_catalogue_queries.py --config recipes/configs/electronics/prepare.yaml

Reads a dataset in HLM's layout without a `train` split; writes the same layout with train and dev queries, their
judgements, and `unlabelled.jsonl`. Judged queries of the input stay out of all three, also in another word order,
in the plural, or with and without a space. What the input has of its own stays: a `dev` split as it is, with no
derived query added to it, and its `unlabelled` queries. Derived queries say so in the column `derived`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hlm.artefacts import MANIFEST, HlmError, atomic_folder, claimed, fingerprint_file, read_manifest, write_manifest
from hlm.config import parse, run_recipe
from hlm.data.contract import RetrievalData, iterate, load
from hlm.data.crossed import cross
from hlm.data.keywords import Catalogue, Keyword
from hlm.data.spelling import canonical, normalise, spellings, words_of
from hlm.data.tables import find_table, read_rows
from hlm.progress import progress

logger = logging.getLogger(__name__)

GIVEN = ("log", "general")  # kinds of unlabelled queries that people typed
CROSSED = "crossed"


@dataclass
class PrepareConfig:
    source: str = field(metadata={"help": "catalogue in HLM's layout: folder or Hub dataset id"})
    output: str = field(metadata={"help": "folder to write"})
    revision: str | None = field(default=None, metadata={"help": "revision of a Hub dataset"})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "leave out rows without text, and judgements of what is not there"}
    )
    general_queries: str | None = field(
        default=None, metadata={"help": "table with a `text` column of general queries, mixed into unlabelled"}
    )
    attributes_column: str = field(default="attrs", metadata={"help": "column with the attributes (dict or JSON)"})
    type_attribute: str = field(default="product_type", metadata={"help": "attribute that names the product's type"})
    train_queries: int = field(default=20_000, metadata={"help": "derived queries with judgements for training"})
    dev_queries: int = field(
        default=500,
        metadata={"help": "derived queries to choose checkpoints by; none where the source has dev"},
    )
    unlabelled_queries: int = field(default=40_000, metadata={"help": "distinct derived queries for alignment"})
    crossed_queries: int = field(
        default=0,
        metadata={"help": "further unlabelled queries, each crossed from two that are there; for small students"},
    )
    max_positives: int = field(default=16, metadata={"help": "products judged relevant to one training query"})
    dev_max_relevant: int = field(
        default=200, metadata={"help": "a dev query lists all its products; those with more are left out"}
    )
    passes: int = field(default=20, metadata={"help": "most rounds over the catalogue, one drawn query a product each"})
    seed: int = field(default=0, metadata={"help": "the same seed derives the same queries"})

    def __post_init__(self) -> None:
        for name in ("train_queries", "dev_queries", "unlabelled_queries", "max_positives", "passes"):
            if getattr(self, name) < 1:
                raise HlmError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.crossed_queries < 0:
            raise HlmError(f"crossed_queries: expected 0 or more, found {self.crossed_queries}")


class _Rows:
    """The corpus as an iterable that can be gone through again."""

    def __init__(self, data: RetrievalData) -> None:
        self._corpus = data.corpus

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iterate(self._corpus)


def main(argv: list[str] | None = None) -> None:
    (config,) = parse(PrepareConfig, argv=argv)
    with claimed(config.output, "dataset") as output:
        prepare(config, output)


def prepare(config: PrepareConfig, output: Path) -> None:
    """Writes the dataset to `output`, unless it is there already."""
    data = load(config.source, revision=config.revision, skip_bad_rows=config.skip_bad_rows)
    if "train" in data.qrels:
        raise HlmError(f"{config.source} has a train split: expected a catalogue without one; train on it as it is")
    parts = ["corpus", "queries", *(f"qrels/{s}" for s in data.qrels), *(["unlabelled"] if data.unlabelled else [])]
    inputs = {name: data.fingerprint(name) for name in parts}
    if config.general_queries:
        inputs["general_queries"] = fingerprint_file(_existing(config.general_queries))
    if _up_to_date(config, output, inputs):
        logger.info("%s is up to date", config.output)
        return

    catalogue = Catalogue(_Rows(data), attributes_column=config.attributes_column, type_attribute=config.type_attribute)
    logger.info("%d product types, synonyms %s", len(catalogue.types), catalogue.synonyms or "none")
    train, dev, unlabelled = derive(catalogue, data, config)
    given = dict(zip(GIVEN, (_log_queries(data), _general_queries(config, data)), strict=True))
    queries = [*unlabelled, *itertools.chain(*given.values())]
    crossed = _crossed(config, data, queries, dev)
    with atomic_folder(output, "dataset") as folder:
        _write(folder, data, config, train, dev, [*queries, *crossed])
        counts = {"train": len(train), "dev": len(dev), "unlabelled": len(unlabelled)}
        counts |= {CROSSED: len(crossed)} if config.crossed_queries else {}
        counts |= {name: len(found) for name, found in given.items() if found or name == "general"}
        write_manifest(folder, "dataset", inputs=inputs, config=asdict(config), queries=counts)
    logger.info("wrote %s: %s", config.output, counts)


def derive(
    catalogue: Catalogue, data: RetrievalData, config: PrepareConfig
) -> tuple[list[Keyword], list[Keyword], list[Keyword]]:
    """Distinct (train, dev, unlabelled) queries; train is part of unlabelled, dev of neither, in any spelling."""
    judged = judged_spellings(data)
    dev_queries = 0 if "dev" in data.qrels else config.dev_queries
    dev_share = 2 * dev_queries / config.unlabelled_queries  # twice: many of them satisfy too many products
    seen: set[str] = set()
    train: list[Keyword] = []
    dev: list[Keyword] = []
    unlabelled: list[Keyword] = []
    tries: Counter[str] = Counter()
    with progress(what="derive queries", unit="query", total=config.unlabelled_queries) as bar:
        for keyword in _keywords(catalogue, data, config):
            tries["all"] += 1
            if keyword is None:
                tries["met a product without the fields"] += 1
                continue
            if keyword.text in seen or not keyword.text:
                tries["gave a query that was there"] += 1
                continue
            if spellings(keyword.text) & judged:
                tries["gave a judged query"] += 1
                continue
            seen.add(keyword.text)
            # By canonical form, so that "usb hubs" is on the same side as "usb hub".
            if _share(canonical(keyword.text), config.seed) < dev_share:
                if 0 < len(keyword.rows) <= config.dev_max_relevant and len(dev) < dev_queries:
                    dev.append(keyword)
                continue
            if keyword.rows and len(train) < config.train_queries:
                train.append(keyword)
            if len(unlabelled) < config.unlabelled_queries:
                unlabelled.append(keyword)
                bar.update()
            elif len(train) == config.train_queries and len(dev) == dev_queries:
                return train, dev, unlabelled
    found = f"{len(train)} train, {len(dev)} dev, {len(unlabelled)} unlabelled queries"
    why = _why_few(catalogue, data, config, tries)
    if not train or len(dev) < min(1, dev_queries):
        raise HlmError(f"{config.source}: expected queries for train and dev, found {found}: {why}")
    logger.warning("the catalogue gave only %s: %s", found, why)
    return train, dev, unlabelled


def _why_few(catalogue: Catalogue, data: RetrievalData, config: PrepareConfig, tries: Counter[str]) -> str:
    """What of a catalogue leaves little to derive queries from, with numbers, and what to do."""
    shows: Counter[str] = Counter()
    for row in iterate(data.corpus):
        shows["a brand"] += bool(row.get("brand"))
        shows["a model"] += bool(row.get("model"))
        shows[f"attributes in '{config.attributes_column}'"] += bool(catalogue.attributes(row))
        shows["a product type"] += bool(catalogue.types_of(row))
        shows["a title of more than one word"] += len(words_of(row.get("title") or row.get("text") or "")) > 1
    counts = ", ".join(f"{shows[name]:,} {name}" for name in shows)
    of_tries = ", ".join(f"{count:,} {name}" for name, count in tries.items() if name != "all")
    return (
        f"of {len(data.corpus):,} products {counts}; of {tries['all']:,} tries {of_tries or 'all gave new queries'}. "
        "Give more products, fill those fields or name their columns (attributes_column, type_attribute), put spaces "
        "between words where the script writes none, or ask for fewer queries"
    )


def judged_spellings(data: RetrievalData) -> frozenset[str]:
    """All spellings of the judged queries: what must not be trained on."""
    return frozenset(key for text in data.queries["text"] for key in spellings(text))


def _keywords(catalogue: Catalogue, data: RetrievalData, config: PrepareConfig) -> Iterator[Keyword | None]:
    yield from catalogue.head_keywords()
    rng = random.Random(config.seed)
    for _ in range(config.passes):
        # Shuffled, so that a last round cut short does not favour the catalogue's beginning.
        order = data.corpus.add_column("_row", range(len(data.corpus))).shuffle(seed=rng.randrange(1 << 30))
        for row in iterate(order):
            yield catalogue.draw(row["_row"], row, rng)


def _share(text: str, seed: int) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8], "big") / 2**64


def _general_queries(config: PrepareConfig, data: RetrievalData) -> list[Keyword]:
    if not config.general_queries:
        return []
    texts = []
    for place, row in read_rows(_existing(config.general_queries)):
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            raise HlmError(f"{config.general_queries}, {place}: expected a filled column 'text', found {list(row)}")
        texts.append(row["text"])
    return _distinct(texts, "general", data)


def _log_queries(data: RetrievalData) -> list[Keyword]:
    return _distinct(data.unlabelled["text"], "log", data) if data.unlabelled else []


def _crossed(config: PrepareConfig, data: RetrievalData, queries: list[Keyword], dev: list[Keyword]) -> list[Keyword]:
    typed = [query.text for query in queries if query.kind in GIVEN]
    found = cross(
        typed,
        [query.text for query in queries if query.kind not in GIVEN],
        config.crossed_queries,
        known={normalise(query.text) for query in queries},
        judged=judged_spellings(data).union(*(spellings(query.text) for query in dev)),
        rng=random.Random(f"crossed {config.seed}"),
    )
    if len(found) < config.crossed_queries:
        logger.warning("the queries gave only %d crossed ones", len(found))
    return [Keyword(text, CROSSED, ()) for text in found]


def _distinct(texts: Iterable[str], kind: str, data: RetrievalData) -> list[Keyword]:
    judged = judged_spellings(data)
    found: dict[str, Keyword] = {}
    for text in texts:
        if not spellings(text) & judged:
            found.setdefault(normalise(text) or text, Keyword(text, kind, ()))
    return list(found.values())


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise HlmError(f"general_queries: expected a table file, found nothing at '{path}'; correct the path")
    return Path(path)


def _up_to_date(config: PrepareConfig, output: Path, inputs: dict[str, str]) -> bool:
    if not (output / MANIFEST).is_file():
        return False
    manifest = read_manifest(output, "dataset")
    return manifest["config"] == asdict(config) and manifest["inputs"] == inputs


def _write(
    folder: Path,
    data: RetrievalData,
    config: PrepareConfig,
    train: list[Keyword],
    dev: list[Keyword],
    unlabelled: list[Keyword],
) -> None:
    original = find_table(Path(config.source), "corpus") if Path(config.source).is_dir() else None
    if original and not config.skip_bad_rows:
        shutil.copyfile(original, folder / original.name)
    else:
        data.corpus.to_parquet(folder / "corpus.parquet")
    rng = random.Random(config.seed)
    ids = data.corpus.data.column("_id")
    qrels = {split: dict(judged) for split, judged in data.qrels.items()}
    with open(folder / "queries.jsonl", "w", encoding="utf-8") as file:
        for row in iterate(data.queries):
            _line(file, row)
        for split, keywords in (("train", train), ("dev", dev)):
            judgements = qrels.setdefault(split, {})
            for number, keyword in enumerate(keywords):
                query_id = f"{split}-{number}"
                _line(file, {"_id": query_id, "text": keyword.text, "kind": keyword.kind, "derived": True})
                rows = keyword.rows
                if split == "train" and len(rows) > config.max_positives:
                    rows = tuple(sorted(rng.sample(rows, config.max_positives)))
                judgements[query_id] = {ids[row].as_py(): 3 for row in rows}
    with open(folder / "unlabelled.jsonl", "w", encoding="utf-8") as file:
        for keyword in unlabelled:
            _line(file, {"text": keyword.text, "kind": keyword.kind, "derived": keyword.kind not in GIVEN})
    (folder / "qrels").mkdir()
    for split, judgements in qrels.items():
        with open(folder / "qrels" / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for query_id, documents in judgements.items():
                for document_id, grade in documents.items():
                    _line(file, {"query-id": query_id, "corpus-id": document_id, "score": grade})


def _line(file: Any, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run_recipe(main)
