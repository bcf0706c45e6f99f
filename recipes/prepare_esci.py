"""Turns Amazon's shopping queries (ESCI) into HLM's data layout.

    python recipes/prepare_esci.py --config recipes/configs/qwen3-8b-190m/prepare.yaml

No open set of queries and ads was found; products with graded queries stand in for them, and the "ads" are rendered
from product fields. The README.md of the output and its manifest say so. Rows are streamed; only ids stay in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets

from hlm.artefacts import (
    MANIFEST,
    HlmError,
    atomic_folder,
    claimed,
    fingerprint_file,
    fingerprint_json,
    read_manifest,
    write_manifest,
)
from hlm.config import parse, run_recipe
from hlm.data.readers import not_read
from hlm.data.sources import shards, streamed
from hlm.data.tables import identifier, read_rows
from hlm.progress import progress

logger = logging.getLogger(__name__)

Rows = Iterable[tuple[str, dict[str, Any]]]  # (place, row)
GRADES = {"Exact": 3, "Substitute": 2, "Complement": 1, "Irrelevant": 0, "E": 3, "S": 2, "C": 1, "I": 0}
COLUMNS = ("query", "query_id", "product_id", "product_locale", "esci_label", "product_title")
README = """# Shopping queries in HLM's layout

Source: {source} (Amazon ESCI shopping queries, Apache-2.0), locale `{locale}`{small}.

**The documents are rendered from product fields**, not written by advertisers: `title` is the product's title, `text`
joins brand, colour, bullet points and description, cut to {max_text_chars} characters. Grades: Exact 3, Substitute 2,
Complement 1, Irrelevant 0. `dev` is cut from the source's train queries; `unlabelled` holds the texts of train queries
that are neither dev nor test queries{general}.

{counts}
"""


@dataclass
class PrepareEsciConfig:
    output: str = field(metadata={"help": "folder to write"})
    source: str = field(default="tasksource/esci", metadata={"help": "Hub dataset id, table file, or folder of shards"})
    revision: str | None = field(default=None, metadata={"help": "revision of a Hub dataset"})
    locale: str = field(default="us", metadata={"help": "product_locale to keep: us, es or jp"})
    small_version: bool = field(default=True, metadata={"help": "keep the rows of the reduced task only"})
    dev_fraction: float = field(default=0.05, metadata={"help": "share of train queries that becomes dev"})
    max_text_chars: int = field(default=1000, metadata={"help": "longest rendered text, in characters"})
    general_queries: str | None = field(
        default=None,
        metadata={
            "help": "general queries, mixed into unlabelled: a table file, a folder of shards or a Hub dataset id"
        },
    )
    general_column: str = field(default="text", metadata={"help": "their column"})
    general_files: str | None = field(
        default=None, metadata={"help": "glob of the files to read of a folder or Hub id"}
    )
    general_revision: str | None = field(default=None, metadata={"help": "revision of a Hub dataset"})

    def __post_init__(self) -> None:
        if not 0 < self.dev_fraction < 1:
            raise HlmError(f"dev_fraction: expected a share between 0 and 1, found {self.dev_fraction}")
        if self.max_text_chars < 1:
            raise HlmError(f"max_text_chars: expected at least 1, found {self.max_text_chars}")


def main(argv: list[str] | None = None) -> None:
    (config,) = parse(PrepareEsciConfig, argv=argv)
    with claimed(config.output, "dataset") as output:
        prepare(config, output)


def prepare(config: PrepareEsciConfig, output: Path) -> None:
    """Writes the dataset to `output`, unless it is there already."""
    inputs, rows = open_source(config)
    general: Rows = ()
    if config.general_queries:
        inputs["general_queries"], general = open_general(config)
    if (output / MANIFEST).is_file():
        manifest = read_manifest(output, "dataset")
        if manifest["config"] == asdict(config) and manifest["inputs"] == inputs:
            logger.info("%s is up to date", config.output)
            return
    with atomic_folder(output, "dataset") as folder:
        counts = write_tables(rows, folder, config)
        counts["unlabelled"] = write_unlabelled(folder, general)
        also = f", and {config.general_queries}" if config.general_queries else ""
        small = ", reduced version" if config.small_version else ""
        lines = "\n".join(f"- {name}: {count:,}" for name, count in counts.items())
        text = README.format(**asdict(config) | {"small": small, "general": also}, counts=lines)
        (folder / "README.md").write_text(text, encoding="utf-8")
        write_manifest(
            folder,
            "dataset",
            inputs=inputs,
            config=asdict(config),
            documents="rendered from product fields; no advertiser wrote them",
            counts=counts,
        )
    logger.info("wrote %s: %s", config.output, dict(counts))


def open_source(config: PrepareEsciConfig) -> tuple[dict[str, str], Rows]:
    """(input fingerprints, (place, row) of the whole source, streamed)."""
    path = Path(config.source)
    if path.exists():
        files = [path] if path.is_file() else shards(path)
        inputs = {str(file): fingerprint_file(file) for file in files}
        rows = ((f"{file}, {place}", row) for file in files for place, row in read_rows(file))
    else:
        try:
            builder = datasets.load_dataset_builder(config.source, revision=config.revision)
            splits = builder.as_streaming_dataset()
        except (OSError, ValueError) as error:
            raise HlmError(
                f"expected a Parquet file, a folder or a Hub dataset id, found '{config.source}' ({error}); "
                "correct it or check the connection"
            ) from error
        inputs = {config.source: fingerprint_json([builder.hash, config.revision])}
        rows = (
            (f"{config.source} ({split}), row {number}", {"split": split} | row)
            for split, streamed in splits.items()
            for number, row in enumerate(streamed, start=1)
        )
    return inputs, rows


def open_general(config: PrepareEsciConfig) -> tuple[str, Rows]:
    """(input fingerprint, (place, row) of the general queries, streamed)."""
    source, column = str(config.general_queries), config.general_column
    path = Path(source)
    if path.is_file():
        rows: Rows = read_rows(path)
        found = fingerprint_file(path)
    elif path.is_dir():
        chosen = config.general_files
        files = sorted(filter(Path.is_file, path.glob(chosen))) if chosen else shards(path)
        if not files:
            raise HlmError(f"general_queries: expected shards in {path}, found none; correct general_files")
        rows = ((f"{file.relative_to(path)}, {place}", row) for file in files for place, row in read_rows(file))
        found = fingerprint_json([[str(file.relative_to(path)), fingerprint_file(file)] for file in files])
    else:
        wanted = {"train": config.general_files} if config.general_files else None
        try:
            builder = datasets.load_dataset_builder(source, data_files=wanted, revision=config.general_revision)
            table = streamed(source, builder.config.data_files["train"])
        except not_read(ValueError, KeyError, TypeError) as error:  # the last two: no files, or none of train
            raise HlmError(
                f"general_queries: expected a table file, a folder of shards or a Hub dataset id, found '{source}' "
                f"({error}); correct it, general_files or general_revision, or check the connection"
            ) from error
        rows, found = table.rows(), table.digest()
    return found, ((f"{source}, {place}", {"text": row.get(column), "column": column}) for place, row in rows)


def write_tables(rows: Rows, folder: Path, config: PrepareEsciConfig) -> Counter[str]:
    """Writes corpus, queries and qrels in one pass; returns the row counts."""
    (folder / "qrels").mkdir()
    counts: Counter[str] = Counter()
    products: set[str] = set()
    empty: set[str] = set()
    queries: set[str] = set()
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(open(folder / f"{name}.jsonl", "w", encoding="utf-8"))
            for name in ("corpus", "queries", "qrels/train", "qrels/dev", "qrels/test")
        }
        for place, row in progress(rows, what="read the source", unit="row"):
            absent = [name for name in (*COLUMNS, "split") if name not in row]
            if config.small_version and "small_version" not in row:
                absent.append("small_version")
            if absent:
                raise HlmError(f"{place}: expected the columns {absent} of ESCI, found {list(row)}; correct the source")
            if row["product_locale"] != config.locale or (config.small_version and not _is_true(row["small_version"])):
                continue
            grade, split = GRADES.get(row["esci_label"]), row["split"]
            if grade is None or split not in ("train", "test"):
                raise HlmError(
                    f"{place}: expected esci_label {list(GRADES)} and split train or test, found "
                    f"{row['esci_label']!r} and {split!r}; correct the source"
                )
            product_id, query_id = (identifier(row[name], f"{place}, {name}") for name in ("product_id", "query_id"))
            if product_id not in products and product_id not in empty:
                document = {
                    "_id": product_id,
                    "title": row["product_title"],
                    "text": render(row, config.max_text_chars),
                }
                if not (document["title"] or document["text"] or "").strip():
                    empty.add(product_id)
                else:
                    products.add(product_id)
                    _line(files["corpus"], document | {"brand": row.get("product_brand")})
            if product_id in empty:
                counts["judgements of products without any text, left out"] += 1
                continue
            if split == "train" and _share(query_id) < config.dev_fraction:
                split = "dev"
            if query_id not in queries:
                queries.add(query_id)
                _line(files["queries"], {"_id": query_id, "text": row["query"], "split": split})
            _line(files[f"qrels/{split}"], {"query-id": query_id, "corpus-id": product_id, "score": grade})
            counts[f"qrels/{split}"] += 1
    if not counts["qrels/train"] or not counts["qrels/test"]:
        raise HlmError(
            f"{config.source}: expected train and test rows for locale '{config.locale}', found {dict(counts)}; "
            "correct locale or small_version"
        )
    if not counts["qrels/dev"]:
        raise HlmError(f"no train query fell into dev: raise dev_fraction (now {config.dev_fraction})")
    return counts + Counter({"corpus": len(products), "queries": len(queries)})


def _is_true(value: Any) -> bool:
    return str(value).lower() in ("1", "1.0", "true")  # CSV says it in text


def render(row: dict[str, Any], max_chars: int) -> str:
    """The ad's text from the product's fields; HTML tags and line breaks become spaces."""
    parts = [row.get(f"product_{name}") for name in ("brand", "color", "bullet_point", "description")]
    plain = (" ".join(re.sub(r"<[^>]*>", " ", part).split()) for part in parts if part)
    return ". ".join(part.rstrip(".") for part in plain if part)[:max_chars].strip()


def write_unlabelled(folder: Path, general: Rows) -> int:
    """Distinct texts of train queries and general queries, without those of held-out queries; returns their number."""
    held_out = {
        row["text"].lower().strip() for _, row in read_rows(folder / "queries.jsonl") if row["split"] != "train"
    }
    seen: set[str] = set()
    with open(folder / "unlabelled.jsonl", "w", encoding="utf-8") as file:
        for kind, rows in (("domain", read_rows(folder / "queries.jsonl")), ("general", general)):
            for place, row in progress(rows, what=f"write the {kind} queries", unit="query"):
                if not isinstance(row.get("text"), str) or not row["text"].strip():
                    column = row.get("column", "text")
                    raise HlmError(
                        f"{place}: expected a filled column '{column}', found {row['text']!r}; correct the row, or "
                        "name the column with general_column"
                    )
                key = row["text"].lower().strip()
                if key not in held_out and key not in seen:
                    seen.add(key)
                    _line(file, {"text": row["text"], "kind": kind})
    return len(seen)


def _share(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _line(file: Any, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run_recipe(main)
