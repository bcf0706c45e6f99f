"""`hlm prepare`: a shop's own files become the data contract."""

import gzip
import itertools
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hlm
from hlm.artefacts import HlmError, read_manifest
from hlm.data.contract import load
from hlm.data.words import fold
from hlm.evaluation.metrics import length_slice
from results.measure import raw_logs

ADS = "sku,name,description\n" + "".join(
    f"A{n},{colour} {thing},good {thing}\n" for n, (colour, thing) in enumerate(
        (colour, thing) for colour in ("red", "blue", "green") for thing in ("shoe", "lamp", "chair", "tent"))
)  # fmt: skip
THINGS = {
    "red shoe": "A0",
    "red lamp": "A1",
    "blue shoe": "A4",
    "blue lamp": "A5",
    "green tent": "A11",
    "blue chair": "A6",
}


def write(folder: Path, **files: str) -> list[str]:
    """Files by their names less the ending; the arguments that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.csv").write_text(text, encoding="utf-8")
    return [str(folder / f"{name}.csv") for name in files]


def clicks_of(things=THINGS, users=6, days=30, more=""):
    """Every user clicks the right ad of every query, spread over the days."""
    rows = ["query,sku,user,time"]
    for place, (query, ad) in enumerate(sorted(things.items())):
        rows += [f"{query},{ad},u{user},2024-01-{1 + (place + user * 5) % days:02d} 10:00:00" for user in range(users)]
    return "\n".join(rows) + "\n" + more


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
    assert {"count", "band", "split"} < set(data.queries.column_names)
    assert {"count", "band"} < set(data.unlabelled.column_names)
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


def qrels_of(folder: Path) -> dict[str, dict[tuple[str, str], int]]:
    """Split -> {(query, ad): grade}."""
    texts = {row["_id"]: row["text"] for row in pq.read_table(folder / "queries.parquet").to_pylist()}
    tables = {split: pq.read_table(folder / f"qrels/{split}.parquet") for split in ("train", "dev", "test")}
    return {
        split: {(texts[row["query-id"]], row["corpus-id"]): row["score"] for row in table.to_pylist()}
        for split, table in tables.items()
    }


def prepared(tmp_path, clicks=None, *, ads=ADS, **settings):
    files = write(tmp_path, ads=ads, clicks=clicks or clicks_of())
    shares = {"by_time": False, "dev_share": 0.2, "test_share": 0.2, "min_users": 2} | settings
    return hlm.prepare(tmp_path / "out", files[:1], clicks=files[1:], **shares)


def all_grades(folder):
    return {pair: grade for pairs in qrels_of(folder).values() for pair, grade in pairs.items()}


WORDS = "big small old new cheap best soft hard long wide".split()
MANY = {
    f"{word} {thing}": f"A{n % 12}"
    for n, (word, thing) in enumerate(itertools.product(WORDS, ("shoe", "lamp", "chair", "tent")))
}


def test_test_is_the_future(tmp_path):
    files = write(tmp_path, ads=ADS, clicks=clicks_of(MANY, users=12))
    folder = hlm.prepare(tmp_path / "out", files[:1], clicks=files[1:], dev_share=0.25, test_share=0.25, min_clicks=1)
    assert read_manifest(folder, "dataset")["split"] == "by time and by query"
    qrels = qrels_of(folder)
    rows = [line.split(",") for line in clicks_of(MANY, users=12).splitlines()[1:]]
    days = {split: [time for query, ad, _, time in rows if (query, ad) in qrels[split]] for split in qrels}
    times = sorted(time for *_, time in rows)
    last = times[3 * len(times) // 4]
    for pair in qrels["test"]:  # has a click in the last quarter
        assert any((query, ad) == pair and time >= last for query, ad, _, time in rows)
    assert min(days["train"]) < last


def test_clicks_over_expected_clicks_discount_the_position(tmp_path):
    rows = ["query,sku,clicks,impressions,position,orders"]
    for query in MANY:
        rows.append(f"{query},A0,500,1000,1,0")  # half of those who see the first ad click on it
        rows.append(f"{query},A1,50,1000,5,0")
    rows.append("red shoe,A0,100,1000,1,0")  # a fifth of what its place would bring: 0.2
    rows.append("red shoe,A1,250,1000,5,0")  # five times
    rows.append("red shoe,A2,40,1000,5,0")  # nearly what is expected
    rows.append("red shoe,A3,0,1000,5,0")  # shown and skipped
    rows.append("red shoe,A4,0,10,5,0")  # too seldom shown to say
    rows.append("red shoe,A5,1,1000,5,1")  # bought
    rows.append("red shoe,A6,1,1000,5,0")  # one click is none
    grades = all_grades(prepared(tmp_path, "\n".join(rows)))
    of = {ad: grade for (query, ad), grade in grades.items() if query == "red shoe"}
    assert of == {"A0": 0, "A1": 2, "A2": 1, "A3": 0, "A5": 3}
    grades = all_grades(prepared(tmp_path / "without", re.sub(r"(?m),\w+$", "", "\n".join(rows))))
    assert grades["red shoe", "A1"] == 3  # where nothing tells of orders, clicks may give the best grade


def test_rows_of_impressions_are_counted_by_the_clicked_column(tmp_path):
    rows = ["query,sku,clicked"]
    for query in MANY:
        rows += [f"{query},A0,1", f"{query},A0,1", f"{query},A1,0"] * 3
    grades = all_grades(prepared(tmp_path, "\n".join(rows), min_users=1))
    assert {grade for (_, ad), grade in grades.items() if ad == "A1"} == {0} and grades["big shoe", "A0"] >= 1


def test_without_impressions_the_share_of_the_clicks_grades(tmp_path):
    rows = ["query,sku,clicks"] + [
        f"{query},{ad},{n}" for query in MANY for ad, n in (("A0", 10), ("A1", 3), ("A2", 2), ("A3", 1))
    ]
    grades = all_grades(prepared(tmp_path, "\n".join(rows)))
    assert [grades.get(("big shoe", ad)) for ad in ("A0", "A1", "A2", "A3")] == [3, 2, 2, None]


def test_opensearch_ubi_is_read_as_it_is(tmp_path):
    """Queries and events in one file of a bulk request, and events that name their query by its id alone."""
    lines = []
    for n, query in enumerate(list(MANY) * 4):
        who = {"client_id": f"c{n}", "query_id": f"id{n}", "timestamp": f"2024-12-{1 + n // 6:02d}T00:01:29.378Z"}
        lines += [
            {"index": {"_index": "ubi_queries"}},
            {"application": "x", "user_query": query, "query_attributes": {}, **who},
        ]
        for ad, position, action in (
            ("A0", 1, "impression"),
            ("A1", 2, "impression"),
            ("A1", 2, "click"),
            ("A2", 9, "purchase"),
        ):
            where = {"object": {"object_id": ad, "object_id_field": "sku"}, "position": {"ordinal": position}}
            lines += [{"index": {"_index": "ubi_events"}}, {"action_name": action, "event_attributes": where, **who}]
        lines += [{"action_name": "page_exit", "event_attributes": {}, **who}]
    (tmp_path / "ubi.ndjson").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (ads,) = write(tmp_path, ads=ADS)
    ubi = [tmp_path / "ubi.ndjson"]
    folder = hlm.prepare(
        tmp_path / "out",
        [ads],
        log=ubi,
        clicks=ubi,
        by_time=False,
        dev_share=0.2,
        test_share=0.2,
        min_users=3,
        min_expected=0,
    )
    grades = all_grades(folder)
    assert grades["big shoe", "A2"] == 3 and grades["big shoe", "A1"] >= 1 and grades["big shoe", "A0"] == 0
    assert sum(row["count"] for row in pq.read_table(folder / "queries.parquet").to_pylist()) == 4 * len(MANY)


def test_bid_keywords_are_pairs_and_negative_ones_exclude(tmp_path):
    bids = {"A0": '[red trainers] | ""running shoes"" | sneaker | -kids', "A1": "", "A2": "seats; armchairs"}
    ads = "sku,name,bid_keywords\n" + "".join(f'A{n},thing {n},"{bids.get(f"A{n}", "")}"\n' for n in range(12))
    clicks = clicks_of(MANY | {"kids shoe": "A0", "kidscorner": "A0"})
    folder = prepared(tmp_path, clicks, ads=ads)
    train = qrels_of(folder)["train"]
    assert {
        (query, ad): grade for (query, ad), grade in train.items() if query not in MANY and "kids" not in query
    } == {
        ("red trainers", "A0"): 2,
        ("running shoes", "A0"): 2,
        ("sneaker", "A0"): 1,
        ("seats", "A2"): 1,
        ("armchairs", "A2"): 1,
    }
    assert ("kids shoe", "A0") not in all_grades(folder) and ("kidscorner", "A0") in all_grades(folder)
    assert read_manifest(folder, "dataset")["dropped"]["clicks"]["pairs that negative keywords exclude"] == 1


def test_people_who_judged_are_dev_and_test(tmp_path):
    judged = "search term;product id;grade\n" + "".join(
        f"{query};A{n % 12};{n % 3 + 1}\n" for n, query in enumerate(MANY)
    )
    files = write(tmp_path, ads=ADS, clicks=clicks_of(), judgements=judged)
    folder = hlm.prepare(tmp_path / "out", files[:1], clicks=files[1:2], judgements=files[2:])
    qrels = qrels_of(folder)
    assert {query for query, _ in qrels["train"]} == set(THINGS)
    assert {query for split in ("dev", "test") for query, _ in qrels[split]} == set(MANY)
    assert (qrels["dev"] | qrels["test"])["big lamp", "A1"] == 2


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
    assert "do not publish" in (at_home / "report.txt").read_text()
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
        and rows["red shoe"]["band"] == "head"
    )
    assert rows["blue lamp"]["band"] == "tail"
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
    assert all_grades(found) == expected and length_slice("red lamp") == "2"


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
