"""Clicks, bids and judgements become graded pairs, and the pairs splits."""

import json
import re

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_shop import ADS, MANY, THINGS, all_grades, clicks_of, prepared, qrels_of, write

import hlm
from hlm.artefacts import HlmError, read_manifest
from hlm.data.click_model import examine


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


def by_rank(folder, model, **settings):
    """Grades of ads that mostly stand in one order, the best first; the first position is looked at by all, each next
    by half of those."""
    attraction, rows = (0.4, 0.2, 0.2, 0.2), ["query,sku,clicks,impressions,position"]
    for query in MANY:
        for order, shown in (((0, 1, 2, 3), 3000), ((1, 0, 3, 2), 1000), ((0, 2, 1, 3), 1000)):
            for position, ad in enumerate(order):
                clicks = round(shown * attraction[ad] / 2**position)
                rows.append(f"{query},A{ad},{clicks},{shown},{position + 1}")
    return all_grades(prepared(folder, "\n".join(rows), click_model=model, **settings))


def test_a_position_based_model_does_not_take_the_best_ads_for_the_position(tmp_path):
    """Three ads are equally good: the one that mostly stands second gets the grade of the others."""
    coec, pbm = (by_rank(tmp_path / model, model) for model in ("coec", "pbm"))
    grades = {name: [found["big shoe", f"A{ad}"] for ad in range(4)] for name, found in (("coec", coec), ("pbm", pbm))}
    assert grades["pbm"] == [2, 1, 1, 1] and grades["coec"] != grades["pbm"]
    reports = {model: next((tmp_path / model).rglob("report.txt")).read_text() for model in ("coec", "pbm")}
    assert {model: "position-based" in text for model, text in reports.items()} == {"coec": False, "pbm": True}


def test_positions_that_no_ad_links_are_not_compared():
    """Ads that move between 1 and 2, and fewer between 5 and 6: the latter take what the next position above has."""
    rows = [("q", "A", 1, 80.0, 100.0), ("q", "A", 2, 40.0, 100.0), ("q", "B", 5, 9.0, 10.0), ("q", "B", 6, 1.0, 10.0)]
    names = ("key", "doc", "position", "clicks", "impressions")
    with duckdb.connect() as connection:
        connection.register("clicked", pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows]))
        assert examine(connection, "SELECT * FROM clicked") == {1: 1.0, 2: pytest.approx(0.5, abs=1e-3)}
        rates = dict(connection.execute("SELECT * FROM rates").fetchall())
    assert rates[5] == rates[6] == rates[2] == pytest.approx(rates[1] / 2, rel=1e-2)


def test_a_position_based_model_needs_ads_that_move(tmp_path):
    rows = [f"{query},A{ad},{9 - ad},100,{ad + 1}" for query in MANY for ad in range(4)]
    log = "\n".join(["query,sku,clicks,impressions,position", *rows])
    with pytest.raises(HlmError, match="click_model: expected ads that were shown at several positions .* take coec"):
        prepared(tmp_path, log, click_model="pbm")


def test_examinations_are_found_where_rank_follows_attraction():
    """Against the model that made the clicks, in its notation: P(click) = examination x attraction."""
    examination, draw = np.array([1, 0.6, 0.4, 0.25]), np.random.default_rng(0)
    rows = []
    for query in range(200):
        attraction = draw.beta(1, 3, size=4)
        for _ in range(5):
            for place, ad in enumerate(np.argsort(-(attraction + draw.normal(scale=0.1, size=4)))):
                clicks = draw.binomial(100, examination[place] * attraction[ad])
                rows.append((f"q{query}", f"A{ad}", place + 1, float(clicks), 100.0))
    table = pa.Table.from_pylist(
        [dict(zip(("key", "doc", "position", "clicks", "impressions"), r, strict=True)) for r in rows]
    )
    with duckdb.connect() as connection:
        connection.register("clicked", table)
        found = examine(connection, "SELECT * FROM clicked")
        np.testing.assert_allclose(list(found.values()), examination, atol=0.03)
        sums = "SELECT sum(rate * impressions), sum(clicks) FROM clicked JOIN rates USING (position)"
        expected, clicks = connection.execute(sums).fetchone()
    assert expected == pytest.approx(clicks)


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


def test_log_queries_that_a_bid_keyword_matches_are_pairs(tmp_path):
    """A phrase as it stands, broad words in any order, neither within another word; the commonest first, and none that
    a negative keyword forbids."""
    bids = {
        "A1": '""big shoe"" | -cheap',
        "A2": "shoe big",
        "A3": "[big shoe]",
        "A4": '""shoe big""',
        "A5": "zebra shoe",
    }
    ads = "sku,name,bid_keywords\n" + "".join(f'A{n},thing {n},"{bids.get(f"A{n}", "")}"\n' for n in range(12))
    typed = {"a big shoe": 9, "cheap big shoe": 8, "shoe big and red": 7, "big shoehorn": 6, "big red shoe": 5}
    log = "query,count\n" + "".join(f"{query},{count}\n" for query, count in (dict.fromkeys(MANY, 3) | typed).items())
    files = write(tmp_path, ads=ads, clicks=clicks_of(MANY, users=12), log=log)

    def pairs(name, **settings):
        folder = hlm.prepare(tmp_path / name, files[:1], clicks=files[1:2], log=files[2:], min_users=2, **settings)
        return {(query, ad): grade for (query, ad), grade in qrels_of(folder)["train"].items() if query in typed}

    assert pairs("none") == {}
    found = pairs("all", bid_queries=10)
    assert {ad for query, ad in found if query == "a big shoe"} == {"A1", "A2"} and set(found.values()) == {1}
    assert {ad for query, ad in found if query == "cheap big shoe"} == {"A2"}
    assert {ad for query, ad in found if query == "shoe big and red"} == {"A2", "A4"}
    assert {ad for query, ad in found if query == "big red shoe"} == {"A2"}
    assert not any(query == "big shoehorn" for query, _ in found)
    assert "with up to 10 log queries that it matches" in (tmp_path / "all/report.txt").read_text()
    assert {query for query, ad in pairs("two", bid_queries=2) if ad == "A2"} == {"a big shoe", "cheap big shoe"}
