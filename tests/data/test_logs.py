"""`hlm prepare`: a shop's own files become the data contract."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer
from raw_shop import ADS, MANY, THINGS, all_grades, clicks_of, prepared, write

import hlm
from hlm.artefacts import HlmError, read_manifest
from hlm.data import log_cleaning
from hlm.data.contract import load
from hlm.data.words import fold
from hlm.evaluation.evaluate import query_kinds
from results.measure import raw_logs


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A dirty log of 20,000 lines, into which 1,000 e-mails and numbers are planted, each by six users; and its "
    "dataset."""
    folder = tmp_path_factory.mktemp("shop")
    secrets = raw_logs.make(folder, total=20_000, ads=400, planted=1000)
    hlm.prepare(
        folder / "data", [folder / "ads.csv"], log=[folder / "queries.csv"], clicks=[folder / "clicks.csv"],
        keep=["brand"], queries_a_day=100, min_users=3, min_clicks=1,
    )  # fmt: skip
    return folder / "data", secrets


def test_the_contract_is_written_and_loads(shop, tmp_path):
    folder, _ = shop
    data = load(str(folder), cache_dir=tmp_path)
    assert len(data.corpus) == 400 and data.corpus.column_names == ["_id", "title", "text", "brand"]
    assert (
        data.corpus[0]["_id"] == "ad0000000"
        and "<p>" not in data.corpus[0]["text"]
        and "& more" in data.corpus[0]["text"]
    )
    assert {"count", "kind", "split"} < set(data.queries.column_names)
    assert {"count", "kind"} < set(data.unlabelled.column_names)
    splits = {name: set(data.qrels[name]) for name in ("train", "dev", "test")}
    assert all(splits.values()) and sum(map(len, splits.values())) == len(set.union(*splits.values())) == len(
        data.queries
    )
    texts = {row["_id"]: fold(row["text"]) for row in data.queries}
    assert len(set(texts.values())) == len(texts)
    held_out = {texts[query] for name in ("dev", "test") for query in splits[name]}
    assert held_out and not held_out & {fold(text) for text in data.unlabelled["text"]}
    grades = [grade for qrels in data.qrels.values() for documents in qrels.values() for grade in documents.values()]
    assert set(grades) <= {0, 1, 2, 3} and {1, 2} <= set(grades)
    assert set(query_kinds(data).values()) == {"head", "torso", "tail"}  # the slices of a report
    manifest = read_manifest(folder, "dataset")
    assert manifest["split"] == "by time and by query" and manifest["robots"] > 0
    dropped = manifest["dropped"]["log"]
    for why in (
        "e-mail",
        "phone number",
        "card number",
        "web address",
        "over-long",
        "users that are robots",
        "repeats of one user",
    ):
        assert dropped[why] > 20, why
    assert 0 < dropped["lines that cannot be read"] < 1000
    assert not list(folder.rglob("*.duckdb")) and not (folder / ".work").exists()


def test_a_log_that_is_grouped_in_parts_gives_the_same_data(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(log_cleaning, "LINES_A_PART", 1500)
    folder, raw = shop[0], shop[0].parent
    hlm.prepare(
        tmp_path / "data", [raw / "ads.csv"], log=[raw / "queries.csv"], clicks=[raw / "clicks.csv"],
        keep=["brand"], queries_a_day=100, min_users=3, min_clicks=1,
    )  # fmt: skip
    for path in folder.rglob("*.parquet"):
        assert pq.read_table(tmp_path / "data" / path.relative_to(folder)).equals(pq.read_table(path)), path.name
    assert read_manifest(tmp_path / "data", "dataset")["dropped"] == read_manifest(folder, "dataset")["dropped"]


def test_nothing_that_was_planted_is_in_any_file(shop):
    folder, secrets = shop
    written = b"".join(
        path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".parquet"
    )
    text = written.decode() + "\n".join(
        json.dumps(row, ensure_ascii=False)
        for path in folder.rglob("*.parquet")
        if path.stem != "corpus"
        for row in pq.read_table(path).to_pylist()
    )
    digits = re.sub(r"[ .\-()/]", "", text)
    assert len(secrets) == 1000
    for secret in secrets:
        numbers = re.findall(r"\d[\d ().\-/]{7,}\d", secret)
        assert fold(secret) not in fold(text)
        assert not [number for number in numbers if re.sub(r"\D", "", number) in digits], secret


def test_the_report_is_one_page_of_its_own(shop):
    page, text = ((shop[0] / f"report.{kind}").read_text() for kind in ("html", "txt"))
    assert page.count("<svg") == 2 and "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert not re.search(r"<script|https?://|src=|@import|url\(", page)
    for said in ("What was dropped", "Head, torso and tail", "Words of a query", "Pairs drawn from train"):
        assert said in page and said in text
    assert str(shop[0].parent) not in page + text


def test_the_same_files_give_the_same_bytes_and_are_left_alone(tmp_path):
    (ads, clicks) = write(tmp_path, ads=ADS, clicks=clicks_of())
    settings = {"clicks": [clicks], "by_time": False, "dev_share": 0.3, "test_share": 0.3, "min_users": 2}
    folder = hlm.prepare(tmp_path / "a", [ads], **settings)
    before = (folder / "hlm.json").stat().st_mtime_ns
    hlm.prepare(tmp_path / "a", [ads], **settings)
    assert (folder / "hlm.json").stat().st_mtime_ns == before
    other = hlm.prepare(tmp_path / "b", [ads], **settings)
    assert read_manifest(folder, "dataset")["files"].keys() == read_manifest(other, "dataset")["files"].keys()
    for path in folder.rglob("*.parquet"):
        assert path.read_bytes() == (other / path.relative_to(folder)).read_bytes()
    hlm.prepare(tmp_path / "a", [ads], **settings, seed=1)
    assert (folder / "hlm.json").stat().st_mtime_ns != before


def test_a_query_of_few_users_is_kept_nowhere(tmp_path):
    more = (
        "secret lamp,A1,u1,2024-01-02 10:00:00\nsecret lamp,A1,u2,2024-01-02 10:00:00\n"
        + "spam lamp,A1,u1,2024-01-03 10:00:00\n" * 50
    )
    folder = prepared(tmp_path, clicks_of(MANY, more=more), min_users=3)
    text = (
        (folder / "report.txt").read_text()
        + str(pq.read_table(folder / "queries.parquet"))
        + str(pq.read_table(folder / "unlabelled.parquet"))
    )
    assert "secret" not in text and "spam" not in text
    at_home = prepared(tmp_path / "home", clicks_of(MANY, more=more), min_users=3, unlabelled_min_users=1)
    assert "secret lamp" in pq.read_table(at_home / "unlabelled.parquet")["text"].to_pylist()
    assert "too few to publish" in (at_home / "report.txt").read_text()
    assert read_manifest(at_home, "dataset")["fewest_users"] == {"queries": 3, "unlabelled": 1}


def test_frequencies_are_kept_and_the_commonest_spelling(tmp_path):
    log = (
        "query,count\n"
        + "".join(f"{query},{n + 5}\n" for n, query in enumerate(THINGS))
        + "Red  Shoe,100\nRED SHOE,7\n"
    )
    files = write(tmp_path, ads=ADS, clicks=clicks_of(), log=log)
    folder = hlm.prepare(
        tmp_path / "out", files[:1], clicks=files[1:2], log=files[2:], by_time=False, dev_share=0.2, test_share=0.3
    )
    rows = {fold(row["text"]): row for row in pq.read_table(folder / "queries.parquet").to_pylist()}
    assert (
        rows["red shoe"]["text"] == "Red Shoe"
        and rows["red shoe"]["count"] == 112
        and rows["red shoe"]["kind"] == "head"
    )
    assert rows["blue lamp"]["kind"] == "tail"
    assert read_manifest(folder, "dataset")["fewest_users"] is None
    assert "no k-anonymity" in (folder / "report.txt").read_text()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    files = write(tmp_path_factory.mktemp("expected"), ads=ADS, clicks=clicks_of())
    folder = Path(files[0]).with_name("out")
    return all_grades(hlm.prepare(folder, files[:1], clicks=files[1:], by_time=False, dev_share=0.2, test_share=0.3))


@pytest.mark.parametrize("kind", ["csv.gz", "tsv", "jsonl", "parquet", "utf-16", "semicolon", "glob", "memory"])
def test_every_kind_of_file_is_the_same_table(tmp_path, kind, expected):
    files = write(tmp_path, ads=ADS)
    lines = clicks_of().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    path = tmp_path / f"other.{kind if kind in ('csv.gz', 'tsv', 'jsonl', 'parquet') else 'csv'}"
    named = str(path)
    if kind == "csv.gz":
        path.write_bytes(gzip.compress(clicks_of().encode()))
    elif kind == "tsv":
        path.write_text(clicks_of().replace(",", "\t").replace("red lamp", '"red lamp"'))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "utf-16":
        path.write_bytes(clicks_of().encode("utf-16"))
    elif kind == "semicolon":
        path.write_text(
            "sep=;\r\n" + clicks_of().replace(",", ";").replace("\n", "\r\n"), encoding="utf-8-sig", newline=""
        )
    elif kind == "glob":
        for part in range(2):
            (tmp_path / f"part-{part}.csv").write_text("\n".join([lines[0], *lines[1 + part :: 2]]))
        named = str(tmp_path / "part-*.csv")
    else:
        import fsspec

        named = f"memory://{tmp_path.name}/clicks.csv"
        with fsspec.open(named, "wb") as file:
            file.write(clicks_of().encode())
    found = hlm.prepare(tmp_path / "out", files[:1], clicks=[named], by_time=False, dev_share=0.2, test_share=0.3)
    assert all_grades(found) == expected


def test_on_a_terminal_it_asks(tmp_path):
    files = write(tmp_path, ads=ADS, clicks=clicks_of())
    asked = []
    with pytest.raises(HlmError, match="columns: expected the right ones"):
        hlm.prepare(tmp_path / "out", files[:1], clicks=files[1:], ask=lambda question: asked.append(question) or "n")
    assert len(asked) == 1 and not (tmp_path / "out").exists()
    hlm.prepare(
        tmp_path / "out",
        files[:1],
        clicks=files[1:],
        by_time=False,
        dev_share=0.2,
        test_share=0.3,
        ask=lambda question: "",
    )


def test_lines_without_a_user_do_not_make_a_query_known(tmp_path):
    """Neither as one user, nor by their number, where others have one."""
    more = "".join(f"lone lamp,A1,{user},2024-01-03 1{n % 10}:00:00\n" for n in range(20) for user in ("", "null"))
    folder = prepared(tmp_path, clicks_of(MANY, more=more), min_users=2)
    texts = pq.read_table(folder / "queries.parquet")["text"].to_pylist()
    assert "lone lamp" not in texts and "big lamp" in texts
    bare = "query,sku\n" + "".join(f"{query},{ad}\n" for query, ad in MANY.items()) * 3
    assert pq.read_table(prepared(tmp_path / "bare", bare, min_users=3) / "queries.parquet").num_rows == len(MANY)


def test_a_stray_quote_costs_its_own_line_alone(tmp_path):
    lines = clicks_of(MANY).splitlines()
    lines.insert(30, '"big lamp,A1,u1,2024-01-02 10:00:00')
    lines.insert(90, '"soft ""big"" lamp",A1,u1,2024-01-02 10:00:00')
    folder = prepared(tmp_path, "\n".join(lines) + "\n")
    assert read_manifest(folder, "dataset")["dropped"]["clicks"] == {"lines that cannot be read": 1}
    clean = prepared(tmp_path / "clean", "\n".join(line for n, line in enumerate(lines) if n != 30))
    assert all_grades(folder) == all_grades(clean)
    ads = ADS.splitlines()
    ads = "\n".join(
        [ads[0] + ",place", *(f"{ad},x" for ad in ads[1:4]), '"A99,stray,quote,x', *(f"{ad},x" for ad in ads[4:])]
    )
    folder = prepared(tmp_path / "ads", clicks_of(MANY), ads=ads + '\n"A98",a,b,x\n', keep=["place", "name"])
    corpus = pq.read_table(folder / "corpus.parquet").to_pylist()
    assert {row["_id"] for row in corpus} == {f"A{n}" for n in (*range(12), 98)} and corpus[0]["place"] == "x"


ON_THE_HUB = """
import sys
from pathlib import Path
import pyarrow.parquet as pq
from huggingface_hub import HfApi
import hlm
from hlm.data.contract import load

api, home = HfApi(), Path(sys.argv[1])
api.create_repo("acme/logs", repo_type="dataset", private=True)
api.upload_folder(repo_id="acme/logs", repo_type="dataset", folder_path=home, allow_patterns=["*.csv"])
address = "hf://datasets/acme/logs"
shares = {"by_time": False, "dev_share": 0.2, "test_share": 0.2}
for _ in range(2):  # the second time it is up to date
    hlm.prepare(home / "out", [f"{address}/ads.csv"], clicks=[f"{address}/part-*.csv"], **shares)
try:
    hlm.prepare(home / "other", [f"{address}/nothing.csv"], clicks=[f"{address}/part-*.csv"])
except hlm.HlmError as error:
    print(error)
ads = pq.read_table(home / "out/corpus.parquet")
for part in range(2):
    pq.write_table(ads.slice(part * 5, 5 + part * len(ads)), home / f"corpus-{part}.parquet")
api.create_repo("acme/ads", repo_type="dataset", private=True)
api.upload_folder(repo_id="acme/ads", repo_type="dataset", folder_path=home, allow_patterns=["corpus-*.parquet"])
(home / "listed").mkdir()
(home / "listed/queries.jsonl").write_text('{"_id": "q", "text": "lamp"}')
(home / "listed/corpus.urls").write_text("hf://datasets/acme/ads/corpus-*.parquet")
corpus = load(str(home / "listed"), splits=()).corpus
print(len(corpus), "streamed", corpus["_id"][:] == ads["_id"].to_pylist())
"""


def test_files_on_the_hub_are_read_with_the_token_of_the_environment(tmp_path):
    lines = clicks_of(MANY).splitlines()
    parts = {f"part-{part}": "\n".join([lines[0], *lines[1 + part :: 2]]) for part in range(2)}
    write(tmp_path, ads=ADS, **parts)
    with HubServer(tmp_path / "hub") as hub:
        variables = os.environ | hub.environment("acme", home=tmp_path / "home", xet=False)
        command = [sys.executable, "-c", ON_THE_HUB, str(tmp_path)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
        assert hub.tokens["acme"].encode() not in written
    assert "expected a file that can be read at hf://datasets/acme/logs/nothing.csv" in done.stdout
    assert done.stdout.endswith("12 streamed True\n")  # the catalogue, in two files of Parquet
    assert {query for query, _ in all_grades(tmp_path / "out")} == set(MANY)
