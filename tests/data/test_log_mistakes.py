"""What people get wrong with their files: each ends in one sentence that names the remedy, within seconds."""

import io
import json
import time
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hlm
from hlm.artefacts import HlmError

ADS = "sku,name\n" + "".join(f"{1000 + n},lamp {n}\n" for n in range(12))
CLICKS = "query,sku,user,time\n" + "".join(
    f"red lamp {n % 4},{1000 + n % 12},u{n % 7},2024-01-{1 + n % 28:02d}\n" for n in range(200)
)


def spreadsheet() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return made.getvalue()


def changed(old: str, new: str, text: str = CLICKS) -> str:
    assert old in text
    return text.replace(old, new)


def column(n: int, value, text: str = CLICKS) -> str:
    """The table with another text in column n of each row."""
    lines = [line.split(",") for line in text.splitlines()]
    for number, cells in enumerate(lines[1:]):
        cells[n] = value(number, cells[n])
    return "\n".join(map(",".join, lines)) + "\n"


def parquet(rows: list[dict]) -> bytes:
    made = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), made)
    return made.getvalue()


# What it is: (files beside ads.csv and clicks.csv, or in their place; settings; what the sentence says).
MISTAKES = {
    "wrong path": ({}, {"clicks": ["clics.csv"]}, "did you mean .*clicks.csv"),
    "wrong folder": ({}, {"clicks": ["nowhere/clicks.csv"]}, "found none; correct the path"),
    "folder in place of a file": ({"logs/a.csv": CLICKS}, {"clicks": ["logs"]}, "found the folder .*name '.*/\\*.csv'"),
    "empty folder": ({"logs/note.md": "x"}, {"clicks": ["logs"]}, "found the folder .*name its files"),
    "glob without files": ({}, {"clicks": ["*.tsv"]}, "found none; correct the path"),
    "no table at all": ({}, {"clicks": []}, "expected clicks or judgements"),
    "no catalogue": ({}, {"catalogue": []}, "name it with --catalogue"),
    "empty file": ({"clicks.csv": ""}, {}, "found an empty file; export it again"),
    "blank lines": ({"clicks.csv": "\n \n\n"}, {}, "found blank lines alone"),
    "header alone": ({"clicks.csv": "query,sku\n"}, {}, "expected rows under the header"),
    "no header": ({"clicks.csv": CLICKS.partition("\n")[2]}, {}, "add the header line if the file has none"),
    "spreadsheet": ({"clicks.xlsx": spreadsheet()}, {"clicks": ["clicks.xlsx"]}, "save it as CSV"),
    "spreadsheet called csv": (
        {"clicks.csv": spreadsheet()},
        {},
        "found a spreadsheet or a ZIP archive; save it as CSV",
    ),
    "old spreadsheet": ({"clicks.csv": b"\xd0\xcf\x11\xe0" + b"\0" * 99}, {}, "old Excel; save it as CSV"),
    "archive": ({"clicks.zip": spreadsheet()}, {"clicks": ["clicks.zip"]}, "expected one of .csv"),
    "gzip without its ending": ({"clicks.csv": b"\x1f\x8b\x08\0"}, {}, "found gzip; name it .gz"),
    "text called gzip": ({"clicks.csv.gz": CLICKS}, {"clicks": ["clicks.csv.gz"]}, "copy it again"),
    "web page": ({"clicks.csv": "<!doctype html><p>Sign in"}, {}, "found HTML or XML; download"),
    "parquet called csv": ({"clicks.csv": b"PAR1" + b"\0" * 9}, {}, "found Parquet; name it .parquet"),
    "csv called parquet": (
        {"clicks.parquet": CLICKS},
        {"clicks": ["clicks.parquet"]},
        "expected Parquet, found what is none",
    ),
    "array of json": ({"clicks.json": "[{}]"}, {"clicks": ["clicks.json"]}, "found an array; write one object a line"),
    "text called json": ({"clicks.jsonl": CLICKS}, {"clicks": ["clicks.jsonl"]}, "expected one JSON object a line"),
    "latin-1": (
        {"clicks.csv": changed("red lamp 1", "rote Schürze").encode("latin-1")},
        {},
        "line 3: expected UTF-8.*--encoding cp1252",
    ),
    "unknown encoding": ({}, {"encoding": "utf-88"}, "expected one that Python knows"),
    "wrong encoding": (
        {"clicks.csv": changed("red lamp 1", "rote Schürze").encode("cp1252")},
        {"encoding": "ascii"},
        "expected text in ascii",
    ),
    "binary": ({"clicks.csv": b"query,sku\nred\0\0\0lamp,1\n"}, {}, "found NUL bytes"),
    "long separator": ({}, {"separator": "||"}, "expected one character or 'tab'"),
    "wrong separator": ({}, {"separator": ";"}, "clicks.query=COLUMN|catalogue._id=COLUMN"),
    "another separator in the rows": (
        {"clicks.csv": "query,sku\n" + CLICKS.partition("\n")[2].replace(",", ";")},
        {},
        "pass --separator",
    ),
    "column named twice": (
        {"clicks.csv": changed("query,sku,user,time", "query,sku,sku,time")},
        {},
        "found 'sku' twice; rename one",
    ),
    "columns that differ in case": (
        {"clicks.csv": changed("query,sku,user,time", "query,sku,SKU,time")},
        {},
        "more than case",
    ),
    "unknown names": (
        {"clicks.csv": changed("query,sku,user,time", "a,b,c,d")},
        {},
        "found a, b, c, d; name it with --columns clicks.query=COLUMN",
    ),
    "two ids": (
        {"clicks.csv": changed("query,sku,user,time", "query,sku,product_id,time")},
        {},
        "found sku and product_id; choose with --columns clicks._id=sku",
    ),
    "lines that end in two ways": (
        {"clicks.csv": CLICKS * 60 + CLICKS.replace("\n", "\r\n")},
        {},
        "convert it with dos2unix",
    ),
    "no ids in the catalogue": (
        {"ads.csv": changed("sku", "number of the ad", ADS)},
        {},
        "--columns catalogue._id=COLUMN",
    ),
    "neither title nor text": ({"ads.csv": changed("name", "price", ADS)}, {}, "title or text"),
    "unknown column": ({}, {"columns": ["title=nmae"]}, "expected 'nmae' in one of the tables"),
    "unknown column of a table": ({}, {"columns": ["clicks.query=qerry"]}, "expected 'qerry'.*did you mean 'query'"),
    "unknown role": ({}, {"columns": ["titel=name"]}, "found 'titel'.*did you mean 'title'"),
    "unknown table": ({}, {"columns": ["click.query=query"]}, "expected a table of catalogue, log"),
    "half of columns": ({}, {"columns": ["title"]}, "expected role=column"),
    "columns of a table that is not read": ({}, {"columns": ["log.query=query"]}, "give --log"),
    "unknown column to keep": ({}, {"keep": ["brandd"]}, "found no 'brandd'"),
    "days and months": (
        {"clicks.csv": column(3, lambda n, _: f"0{1 + n % 5}/0{1 + n % 7}/2024")},
        {},
        " --day_first true or false",
    ),
    "two orders of dates": (
        {"clicks.csv": column(3, lambda n, _: "13/01/2024" if n % 2 else "01/13/2024")},
        {},
        " write them as 2024-12-31",
    ),
    "no dates": ({"clicks.csv": column(3, lambda n, _: "yesterday")}, {}, "write them as 2024-12-31 23:59:59"),
    "counts that are none": (
        {"log.csv": "query,count\n" + "red lamp,many\n" * 9},
        {"log": ["log.csv"]},
        " expected numbers in 'count'",
    ),
    "ids that a spreadsheet rounded": (
        {"ads.csv": column(0, lambda n, _: f"{n},00123E+12".replace(",", "."), ADS)},
        {},
        "format the column as text",
    ),
    "ids without their zeros": (
        {"ads.csv": column(0, lambda n, sku: f"00{sku}", ADS)},
        {},
        "the catalogue writes it '001000'.*export ids as text",
    ),
    "ids of another catalogue": (
        {"ads.csv": column(0, lambda n, _: f"B{n}", ADS)},
        {},
        "the catalogue's are like 'B0'",
    ),
    "empty ids": ({"ads.csv": column(0, lambda n, _: "", ADS)}, {}, "found 12 without an id"),
    "empty texts": ({"ads.csv": column(1, lambda n, _: " ", ADS)}, {}, "found 12 without a text"),
    "empty queries": ({"clicks.csv": column(0, lambda n, _: "")}, {}, "expected rows with a query"),
    "grades of another scale": (
        {"j.csv": "query,sku,grade\nred lamp,1000,5\n"},
        {"judgements": ["j.csv"]},
        " grades of 0, 1, 2 and 3 in 'grade', found '5'",
    ),
    "grades in words": (
        {"j.csv": "query,sku,grade\nred lamp,1000,so so\n"},
        {"judgements": ["j.csv"]},
        "found 'so so'; rescale",
    ),
    "judgements of other ads": (
        {"j.csv": "query,sku,grade\nred lamp,X,3\n"},
        {"judgements": ["j.csv"]},
        " judgements._id=COLUMN",
    ),
    "ids of queries without the log": (
        {"clicks.csv": changed("query,", "query_id,")},
        {},
        "give the log that has the ids",
    ),
    "too many users asked for": ({}, {"min_users": 1000}, "lower --min_users \\(1000\\)"),
    "no user at all": ({}, {"min_users": 0}, "min_users: expected 1 or more"),
    "share": ({}, {"test_share": 0.9}, "between 0 and 0.5"),
    "memory in words": ({}, {"memory": "much"}, "memory: expected a size such as 1GB"),
    "empty parquet": (
        {"c.parquet": parquet([{"query": "a", "sku": None}])},
        {"clicks": ["c.parquet"]},
        "expected rows with a query",
    ),
    "unknown address": (
        {},
        {"clicks": ["nowhere://bucket/clicks.csv"]},
        "clicks: expected a file that can be read at nowhere://",
    ),
    "hub without a connection": (
        {},
        {"clicks": ["hf://datasets/owner/name/clicks.csv"]},
        "check the connection, or set HF_TOKEN",
    ),
    "json without the columns": (
        {"c.jsonl": json.dumps({"a": {"b": 1}}) + "\n"},
        {"clicks": ["c.jsonl"]},
        "found a.b; name it",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_with_its_remedy(mistake, tmp_path, monkeypatch):
    files, settings, said = MISTAKES[mistake]
    for name, text in {"ads.csv": ADS, "clicks.csv": CLICKS, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    with pytest.raises(HlmError, match=said) as caught:
        hlm.prepare("out", **{"catalogue": ["ads.csv"], "clicks": ["clicks.csv"], **settings})
    message = str(caught.value)
    assert time.perf_counter() - start < 3 and len(message) < 450
    assert "\n" not in message and "Traceback" not in message and "expected" in message
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*")), "nothing is left behind"


def test_there_are_many():
    assert len(MISTAKES) >= 40


@pytest.mark.parametrize(
    "clicks",
    [
        CLICKS.encode("utf-16"), CLICKS.encode("utf-16-le"), CLICKS.encode("utf-8-sig"),
        changed("query,sku,user,time", "Search Term;SKU;User ID;Date").replace(",", ";").encode(),
        column(1, lambda n, sku: f"{sku}.0").encode(), CLICKS.replace("\n", "\r\n").encode(),
        (CLICKS[:99] + CLICKS[99:].replace("\n", "\r\n")).encode(), CLICKS.replace("\n", "\r").encode(),
        column(3, lambda n, _: f"{1 + n % 28}.1.2024 10:00").encode(),
        column(3, lambda n, _: f"{1704067200 + n * 40_000}").encode(),
        column(3, lambda n, _: f"{1704067200000 + n * 40_000_000}").encode(),
        column(3, lambda n, _: f"{1 + n % 28}/1/2024").encode(),
        (CLICKS + "\n\n").encode(), changed("query,", '"query",').encode(), changed("query,", " Query ,").encode(),
    ],
)  # fmt: skip
def test_what_is_certain_is_read_without_a_word(clicks, tmp_path):
    (tmp_path / "ads.csv").write_text(ADS)
    (tmp_path / "clicks.csv").write_bytes(clicks)
    folder = hlm.prepare(
        tmp_path / "out", [tmp_path / "ads.csv"], clicks=[tmp_path / "clicks.csv"],
        by_time=False, min_users=3, min_clicks=1, test_share=0.45, dev_share=0.25, seed=2,
    )  # fmt: skip
    queries = pq.read_table(folder / "queries.parquet").to_pylist()
    assert {row["text"] for row in queries} == {f"red lamp {n}" for n in range(4)}
