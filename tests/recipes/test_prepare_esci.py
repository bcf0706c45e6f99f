"""ESCI's table becomes the data contract."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hlm.artefacts import HlmError, read_manifest
from hlm.data.contract import load
from recipes import prepare_esci


def esci_rows():
    rows = []
    for number in range(60):
        for rank, label in enumerate(("Exact", "Substitute", "Complement", "Irrelevant")):
            product = (number + rank * 7) % 40
            rows.append(
                {
                    "example_id": len(rows),
                    "query": f"query number {number}",
                    "query_id": number,
                    "product_id": f"B{product:03d}",
                    "product_locale": "us",
                    "esci_label": label,
                    "small_version": 1,
                    "large_version": 1,
                    "split": "test" if number % 5 == 0 else "train",
                    "product_title": f"Product {product}",
                    "product_description": "<p>Long <b>text</b></p>",
                    "product_bullet_point": "first\nsecond.",
                    "product_brand": "Acme",
                    "product_color": None,
                    "product_text": "ignored",
                }
            )
    spanish = rows[0] | {"query_id": 900, "query": "consulta", "product_locale": "es", "product_id": "ES1"}
    large_only = rows[0] | {"query_id": 901, "query": "large only", "small_version": 0, "product_id": "L1"}
    textless = rows[4] | {f"product_{name}": None for name in ("title", "description", "bullet_point", "brand")}
    return [*rows, spanish, large_only, textless | {"product_id": "EMPTY"}]


@pytest.fixture
def esci(tmp_path):
    path = tmp_path / "esci.parquet"
    pq.write_table(pa.Table.from_pylist(esci_rows()), path)
    return path


def test_esci_becomes_the_contract(esci, tmp_path):
    general = tmp_path / "general.jsonl"
    general.write_text('{"text": "garden chair"}\n{"text": "Query number 0"}\n')
    output = tmp_path / "out"
    argv = ["--source", str(esci), "--output", str(output), "--dev_fraction", "0.2", "--general_queries", str(general)]
    prepare_esci.main(argv)
    data = load(str(output), cache_dir=tmp_path / "cache")

    assert len(data.corpus) == 40 and len(data.queries) == 60
    row = data.corpus[0]
    assert (row["_id"], row["title"], row["text"]) == ("B000", "Product 0", "Acme. first second. Long text")
    assert data.qrels["test"]["0"] == {"B000": 3, "B007": 2, "B014": 1, "B021": 0}
    splits = {split: set(qrels) for split, qrels in data.qrels.items()}
    assert splits["test"] == {str(n) for n in range(0, 60, 5)}
    assert splits["dev"] and not splits["dev"] & splits["train"]
    assert len(splits["dev"] | splits["train"]) == 48
    texts = data.unlabelled["text"]
    assert "garden chair" in texts
    assert set(texts) - {"garden chair"} == {text for _, text in data.split_queries("train")}

    manifest = read_manifest(output, "dataset")
    assert "rendered from product fields" in manifest["documents"]
    assert manifest["counts"]["judgements of products without any text, left out"] == 1
    assert "rendered from product fields" in (output / "README.md").read_text()

    before = (output / "hlm.json").stat().st_mtime_ns
    prepare_esci.main(argv)
    assert (output / "hlm.json").stat().st_mtime_ns == before


def test_esci_locale_and_version_choose_rows(esci, tmp_path):
    prepare_esci.main(["--source", str(esci), "--output", str(tmp_path / "all"), "--small_version", "false"])
    assert "L1" in load(str(tmp_path / "all"), cache_dir=tmp_path / "cache").corpus["_id"]
    with pytest.raises(HlmError, match="locale 'jp'"):
        prepare_esci.main(["--source", str(esci), "--output", str(tmp_path / "jp"), "--locale", "jp"])
    assert not (tmp_path / "jp").exists()


def test_esci_refuses_another_schema(tmp_path):
    pq.write_table(pa.table({"query": ["a"], "label": ["E"]}), tmp_path / "other.parquet")
    with pytest.raises(HlmError, match="row 1.*esci_label.*found"):
        prepare_esci.main(["--source", str(tmp_path / "other.parquet"), "--output", str(tmp_path / "out")])


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_general_queries_stream_from_shards(esci, tmp_path, suffix):
    """The way of a Hub id, with a folder in its place."""
    shards = tmp_path / "massive"
    for split, texts in {"train": ["wake me at nine", "Query number 0", "garden chair"], "test": ["never"]}.items():
        (shards / split).mkdir(parents=True)
        for number, text in enumerate(texts):
            path = shards / split / f"{number:04}.{suffix}"
            if suffix == "parquet":
                pq.write_table(pa.table({"utt": [text], "locale": ["en"]}), path)
            else:
                path.write_text(json.dumps({"utt": text, "locale": "en"}) + "\n")
    argv = ["--source", str(esci), "--output", str(tmp_path / "out"), "--dev_fraction", "0.2"]
    argv += ["--general_queries", str(shards), "--general_files", f"train/*.{suffix}", "--general_column"]
    prepare_esci.main([*argv, "utt"])
    data = load(str(tmp_path / "out"), cache_dir=tmp_path / "cache")
    held_out = {text.lower() for split in ("dev", "test") for _, text in data.split_queries(split)}
    found = data.unlabelled["text"]
    assert {"wake me at nine", "garden chair"} <= set(found) and "never" not in found
    assert not held_out & {text.lower() for text in found}
    before = (tmp_path / "out/hlm.json").stat().st_mtime_ns
    prepare_esci.main([*argv, "utt"])
    assert (tmp_path / "out/hlm.json").stat().st_mtime_ns == before
    with pytest.raises(HlmError, match="massive, train/0000.*expected a filled column 'query'.*general_column"):
        prepare_esci.main([*argv, "query"])
    with pytest.raises(HlmError, match="general_queries: .*general_files"):
        prepare_esci.main([*argv, "utt", "--general_files", "nothing/*.parquet"])


def test_esci_in_csv_reads_its_flags_and_ids_as_they_are_meant(esci, tmp_path):
    table = pq.read_table(next(esci.rglob("*.parquet")) if esci.is_dir() else esci)
    rows = table.to_pylist()
    with open(tmp_path / "esci.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for name, source in (("csv", tmp_path / "esci.csv"), ("parquet", esci)):
        prepare_esci.main(["--source", str(source), "--output", str(tmp_path / name), "--dev_fraction", "0.2"])
    first, second = (load(str(tmp_path / name), cache_dir=tmp_path / "cache") for name in ("csv", "parquet"))
    assert first.corpus["_id"][:] == second.corpus["_id"][:] and first.qrels == second.qrels
