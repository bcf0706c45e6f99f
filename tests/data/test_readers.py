import bz2
import gzip
import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hlm.artefacts import HlmError
from hlm.data.readers import read_qrels, read_rows


def rows(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [row for _, row in read_rows(path)]


def texts(path, content):
    return [row["text"] for row in rows(path, content)]


WORDS = ["null", "NA", "n/a", "NaN", "None", "007", "4711", "1e3", "1.0", "true", "2026-01-02", "-", "inf", " usb hub "]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
def test_text_stays_text(tmp_path, suffix):
    lines = WORDS if suffix in ("csv", "tsv") else [json.dumps({"text": word}) for word in WORDS]
    header = ["text"] if suffix in ("csv", "tsv") else []
    assert texts(tmp_path / f"log.{suffix}", "\n".join(header + lines) + "\n") == WORDS


def zstd(raw):
    sink = pa.BufferOutputStream()
    with pa.output_stream(sink, compression="zstd") as file:
        file.write(raw)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("zst", zstd)])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_compressed_files(tmp_path, kind, suffix, pack):
    wanted = [f"query {number}" for number in range(2000)]
    lines = [json.dumps({"text": text}) for text in wanted] if kind == "jsonl" else ["text", *wanted]
    raw = ("\n".join(lines) + "\n").encode()
    path = tmp_path / f"LOG.{kind}.{suffix}".upper()  # suffixes count in either case
    assert texts(path, pack(raw)) == wanted
    assert texts(path, pack(raw[:500]) + pack(raw[500:])) == wanted  # as appended logs are
    with pytest.raises(HlmError, match=f"{path.name}.*read to its end"):
        rows(path, pack(raw)[:-20])


QUOTES = ['"exact phrase drill', 'tv 55"', "lamp", 'kettle 1.7 l"', '5" x 7" frame', '"a" "b"', '"', "tent", '"last']


def test_a_stray_quote_in_tsv_is_text(tmp_path, caplog):
    path = tmp_path / "log.tsv"
    assert texts(path, "text\n" + "\n".join(QUOTES)) == QUOTES
    assert texts(path, "text\r\n" + "\r\n".join(QUOTES) + "\r\n") == QUOTES
    two = "".join(f"{quote}\t{number}\n" for number, quote in enumerate(QUOTES))
    assert texts(path, "text\tn\n" + two) == QUOTES
    assert caplog.text.count("quotes that open a cell of TSV and are not closed are text") == 1


def test_a_quote_on_both_sides_of_a_tab_is_text_where_the_header_says_so(tmp_path):
    assert rows(tmp_path / "a.tsv", '_id\ttext\n"5 inch\tfoo"\n') == [{"_id": '"5 inch', "text": 'foo"'}]


def test_proper_quoting_in_tsv(tmp_path):
    path = tmp_path / "a.tsv"
    assert texts(path, 'text\n"a\tb"\n"say ""hi"""\n""\n') == ["a\tb", 'say "hi"', ""]
    assert rows(path, '_id\ttext\nd1\t"two\nlines"\nd2\t"one\n\nblank\nmore"\nd3\t"x"\n') == [
        {"_id": "d1", "text": "two\nlines"},
        {"_id": "d2", "text": "one\n\nblank\nmore"},
        {"_id": "d3", "text": "x"},
    ]
    assert rows(path, '_id\ttext\tn\nd1\t"two\nlines"\t1\n') == [{"_id": "d1", "text": "two\nlines", "n": "1"}]
    for lost in ('_id\ttext\nd0\tx\nd1\t"two\nlines\n', '_id\ttext\nd0\tx\nd1\t"two\nlines\nd2\ty\n'):
        with pytest.raises(HlmError, match="line 3: expected 2 cells"):
            rows(path, lost)


def test_a_quote_in_csv_that_closes_nowhere_is_named(tmp_path):
    path = tmp_path / "a.csv"
    assert texts(path, 'text,n\n"two\nlines",1\ntv 55",2\n') == ["two\nlines", 'tv 55"']
    with pytest.raises(HlmError, match="line 3: broken quoting"):
        rows(path, 'text\nlamp\n"open\nb\nc\n')
    with pytest.raises(HlmError, match="line 2: broken quoting"):
        rows(path, 'text\n"a" b\n')


def test_lines_that_a_quote_of_csv_joins_are_not_joined_in_silence(tmp_path, caplog):
    with pytest.raises(HlmError, match="line 3: .*opened here and closed below .2 lines"):
        rows(tmp_path / "a.csv", 'text\nlamp\n"exact phrase drill\ntv 55"\ntent\n')
    assert texts(tmp_path / "b.csv", '_id,text\nq1,"exact, phrase\n2"\n') == ["exact, phrase\n2"]
    assert not caplog.records
    assert len(texts(tmp_path / "c.csv", '_id,text\nq1,"exact phrase\nq2,tv 55"\nq3,tent\n')) == 2
    assert "c.csv, line 2: a quote joins lines that look like rows" in caplog.text


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "csv.gz"])
def test_a_long_cell(tmp_path, suffix):
    long = "manual page " * 50_000
    content = json.dumps({"text": long}) if suffix == "jsonl" else f'text\n"{long}"\n'
    raw = content.encode()
    assert texts(tmp_path / f"a.{suffix}", gzip.compress(raw) if suffix.endswith("gz") else raw) == [long]


def test_bytes_of_parquet_are_text_where_they_are_utf8(tmp_path):
    ids, blobs = pa.array(["é1".encode(), None]), pa.array([b"\xff", b"a"], pa.large_binary())
    pq.write_table(pa.table({"_id": ids, "blob": blobs}), tmp_path / "a.parquet")
    assert [row for _, row in read_rows(tmp_path / "a.parquet")] == [
        {"_id": "é1", "blob": b"\xff"},
        {"_id": None, "blob": b"a"},
    ]


@pytest.mark.parametrize("name", ["a.xlsx", "a.parquet.gz", "a.txt", "a", "a.jsonl.xz", "a.zip"])
def test_other_formats_are_named(tmp_path, name):
    with pytest.raises(HlmError, match=rf"{name}.*expected one of .jsonl.*convert"):
        rows(tmp_path / name, b"x")


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    for name in ("a.jsonl", "a.csv.gz", "a.parquet"):
        (tmp_path / name).mkdir()
        with pytest.raises(HlmError, match=name):
            list(read_rows(tmp_path / name))


JUDGED = [{"query-id": "q1", "corpus-id": "d1", "score": "2"}, {"query-id": "q 2", "corpus-id": "d2", "score": "0"}]
FORMS = {
    "test.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t2\nq 2\td2\t0\n",
    "names.tsv": "query_id\tdoc_id\trelevance\nq1\td1\t2\nq 2\td2\t0\n",
    "capitals.csv": "QID,Document ID,Label\nq1,d1,2\nq 2,d2,0\n",
    "bare.tsv": "q1\td1\t2\nq 2\td2\t0\n",
    "trec.tsv": "q1\t0\td1\t2\nq 2\tQ0\td2\t0\n",
    "trec.txt": "q1\t0\td1\t2\n\nq 2\t0\td2\t0\n",
    "bare.csv": "q1,0,d1,2\nq 2,0,d2,0\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_judgements_in_every_form(tmp_path, name):
    (tmp_path / name).write_text(FORMS[name])
    found = [{key: row[key] for key in JUDGED[0]} for _, row in read_qrels(tmp_path / name)]
    assert found == JUDGED


def test_trec_judgements_with_spaces(tmp_path):
    (tmp_path / "a.trec").write_text("q1 0  d1 2\nq2\t0 d2 -1\n")
    assert [tuple(row.values()) for _, row in read_qrels(tmp_path / "a.trec")] == [
        ("q1", "d1", "2"),
        ("q2", "d2", "-1"),
    ]
    (tmp_path / "a.trec").write_text("q1 d1\n")
    with pytest.raises(HlmError, match="expected TREC judgements .*found 2 cells"):
        list(read_qrels(tmp_path / "a.trec"))


def test_nothing_is_logged_of_clean_tsv(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    assert texts(tmp_path / "a.tsv", 'text\n"quoted"\nplain 5"\n') == ["quoted", 'plain 5"']
    assert not caplog.records
