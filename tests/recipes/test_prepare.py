import csv
import json
import random
import unicodedata
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hlm.artefacts import HlmError, read_manifest
from hlm.data.contract import load
from hlm.data.crossed import cross
from hlm.data.keywords import Catalogue
from hlm.data.spelling import canonical, normalise, spellings
from recipes import prepare_catalogue_queries, prepare_esci

# ---------------------------------------------------------------- ESCI


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


# ---------------------------------------------------------------- catalogue


def catalogue_rows():
    """Three brands; every title is "brand model type Colour", laptop bags call themselves two names."""
    kinds = ["notebook", "notebook case", "laser printer", "printer cable", "usb hub"]
    rows = []
    for number in range(150):
        brand, kind = ("Acme", "Bolt", "Corex")[number % 3], kinds[number % 5]
        model, colour = f"XR-{100 + number}", ("Black", "White")[number % 2]
        text = "Laptop case" if kind == "notebook case" else None
        rows.append(
            {
                "_id": f"p{number}",
                "title": f"{brand} {model} {kind} {colour}",
                "text": text,
                "brand": brand,
                "model": model,
                "attrs": {"product_colour": colour, "interface": "USB" if kind == "usb hub" else "LAN"},
            }
        )
    for number, noun in enumerate(("lock", "stand", "battery", "sleeve", "charger")):
        for brand in ("Acme", "Bolt", "Corex"):
            rows.append(
                {
                    "_id": f"{noun}{brand}",
                    "title": f"{brand} ZT-{number} laptop {noun} Black",
                    "text": None,
                    "brand": brand,
                    "model": f"ZT-{number}",
                    "attrs": {},
                }
            )
    return rows


@pytest.fixture
def shop(tmp_path):
    folder = tmp_path / "shop"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in catalogue_rows()))
    queries = [{"_id": "q1", "text": "laptop"}, {"_id": "q2", "text": "black usbhub"}]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tp0\t3\nq1\tp1\t0\nq2\tp4\t3\n")
    return folder


def test_types_are_matched_by_their_head():
    rows = catalogue_rows()
    catalogue = Catalogue(rows)
    titles = {name: {rows[i]["title"].split(" ", 2)[2] for i in found} for name, found in catalogue.of_type.items()}
    assert {t.rsplit(" ", 1)[0] for t in titles["laser printer"]} == {"laser printer"}
    assert {t.rsplit(" ", 1)[0] for t in titles["notebook"]} == {"notebook"}  # and not the cases
    assert all("cable" in t for t in titles["cable"]) and "printer cable" not in titles.get("laser printer", ())
    assert catalogue.synonyms == {"notebook": ["laptop"]}
    assert len(catalogue.of_brand["acme"]) == 55


def test_drawn_queries_are_satisfied_by_their_products():
    rows = catalogue_rows()
    catalogue, rng = Catalogue(rows), random.Random(0)
    kinds = Counter()
    for number, row in enumerate(rows * 4):
        keyword = catalogue.draw(number % len(rows), row, rng)
        if keyword is None:
            continue
        kinds[keyword.kind] += 1
        assert keyword.text == keyword.text.lower() and keyword.text.strip()
        if keyword.kind in ("crop", "word", "brand model"):
            for i in keyword.rows:
                title = normalise(rows[i]["title"])
                assert all(word in title for word in keyword.text.split())
            assert not keyword.rows or number % len(rows) in keyword.rows
    assert {"attribute type", "crop", "brand type", "word", "model", "brand model"} <= set(kinds)


def test_canonical_ignores_order_number_and_spaces():
    assert canonical("USB hubs") == canonical("hub, usb")
    assert canonical("batteries") == canonical("battery")
    assert canonical("usb hub") != canonical("usb hut")
    assert spellings("head sets") & spellings("headset") and not spellings("head set") & spellings("set of heads")


def prepare(shop, output, *more):
    prepare_catalogue_queries.main(
        ["--source", str(shop), "--output", str(output), "--train_queries", "150", "--dev_queries", "20"]
        + ["--unlabelled_queries", "200", "--max_positives", "4", "--dev_max_relevant", "60", *more]
    )


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


def test_a_catalogue_becomes_training_data(shop, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    general = tmp_path / "general.jsonl"
    general.write_text('{"text": "garden chair"}\n{"text": "Laptops"}\n')
    output = tmp_path / "out"
    prepare(shop, output, "--general_queries", str(general))
    data = load(str(output), cache_dir=tmp_path / "cache")

    assert (output / "corpus.jsonl").read_bytes() == (shop / "corpus.jsonl").read_bytes()
    assert data.qrels["test"] == {"q1": {"p0": 3, "p1": 0}, "q2": {"p4": 3}}
    train, dev = dict(data.split_queries("train")), dict(data.split_queries("dev"))
    unlabelled = data.unlabelled["text"]
    assert len(train) == 150 and len(unlabelled) == len(set(unlabelled))
    assert "garden chair" in unlabelled and "Laptops" not in unlabelled
    everything = {normalise(text) for text in [*train.values(), *dev.values(), *unlabelled]}
    assert not {"laptop", "laptops", "black usb hub", "black usb hubs", "usbhub black"} & everything
    assert any("usb hub" in text for text in everything)
    held_out = {canonical(text) for text in dev.values()}
    assert held_out and not held_out & {canonical(text) for text in [*train.values(), *unlabelled]}
    assert set(train.values()) <= set(unlabelled)
    assert all(1 <= len(documents) <= 4 for documents in data.qrels["train"].values())
    assert set(data.queries["kind"]) >= {None, "type", "brand", "attribute type"}

    before = (output / "hlm.json").stat().st_mtime_ns
    prepare(shop, output, "--general_queries", str(general))
    assert (output / "hlm.json").stat().st_mtime_ns == before


def test_queries_are_crossed_for_small_students(shop, tmp_path, caplog):
    general = tmp_path / "general.jsonl"
    general.write_text('{"text": "garden chair of oak"}\n{"text": "tall oak lamp"}\n')
    output = tmp_path / "out"
    prepare(shop, output, "--general_queries", str(general), "--crossed_queries", "300")
    data = load(str(output))
    crossed = [row["text"] for row in data.unlabelled if row["kind"] == "crossed"]
    others = {normalise(row["text"]) for row in data.unlabelled if row["kind"] != "crossed"}
    assert len(crossed) == len(set(crossed)) == 300 and not set(crossed) & others
    assert {row["derived"] for row in data.unlabelled if row["kind"] == "crossed"} == {True}
    # Each begins with words of what people typed; most have a word of a derived query as well.
    typed = set("garden chair of oak tall lamp".split())
    assert all(set(text.split()) & typed for text in crossed) and "oak lamp" in crossed
    assert sum(bool(set(text.split()) - typed) for text in crossed) > 150
    held_out = {
        spelling for split in ("dev", "test") for _, text in data.split_queries(split) for spelling in spellings(text)
    }
    assert not held_out & {spelling for text in crossed for spelling in spellings(text)}
    assert read_manifest(output, "dataset")["queries"]["crossed"] == 300
    with pytest.raises(HlmError, match="crossed_queries: expected 0 or more"):
        prepare(shop, tmp_path / "none", "--crossed_queries", "-1")


def test_crossing_ends_where_there_is_nothing_new():
    found = cross(["red lamp"], [], 50, known={"red lamp"}, judged=spellings("lamps"), rng=random.Random(0))
    assert set(found) <= {
        "red",
        "lamp red",
        "red red",
        "lamp lamp",
        "red lamp lamp",
        "red red lamp",
        "red lamp red lamp",
    }
    assert 3 < len(found) < 50 and "lamp" not in found
    assert cross([], [], 5, known=set(), judged=set(), rng=random.Random(0)) == []
    assert cross([], ["a b", "c d"], 5, known=set(), judged=set(), rng=random.Random(0)) != []


def test_dev_judgements_and_queries_of_ones_own_stay(shop, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (shop / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq2\tp4\t3\nq2\tp9\t0\n")
    (shop / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tp0\t3\n")
    (shop / "unlabelled.jsonl").write_text('{"text": "Notebook Sleeve"}\n{"text": "Laptops"}\n')
    prepare(shop, tmp_path / "out")
    data = load(str(tmp_path / "out"), cache_dir=tmp_path / "cache")
    assert data.qrels["dev"] == {"q2": {"p4": 3, "p9": 0}} and len(data.qrels["train"]) == 150
    derived = {row["_id"]: row["derived"] for row in data.queries}
    assert not derived["q1"] and not derived["q2"] and derived["train-0"]
    assert [row["text"] for row in data.unlabelled if not row["derived"]] == ["Notebook Sleeve"]
    assert read_manifest(tmp_path / "out", "dataset")["queries"] == {
        "train": 150,
        "dev": 0,
        "unlabelled": len(data.unlabelled) - 1,
        "log": 1,
        "general": 0,
    }


SHOPS = {
    "Hindi": (["लाल", "नीला", "हरा", "सफ़ेद"], ["किताब", "जूता", "कुर्सी", "मेज़", "घड़ी"], ["टाटा", "बाटा", "गोदरेज"]),
    "Thai": (["สีแดง", "สีเขียว", "สีน้ำเงิน", "สีขาว"], ["รองเท้า", "เก้าอี้", "กาต้มน้ำ"], ["ช้าง", "สิงห์", "น้ำทิพย์"]),
    "Japanese": (["赤", "青い", "ｸﾞﾘｰﾝ", "白"], ["防水イヤホン", "木製テーブル", "革靴"], ["ソニー", "無印", "象印"]),
    "Tamil": (["சிவப்பு", "நீலம்", "பச்சை"], ["காலணி", "குடை", "நாற்காலி"], ["டாடா", "பாடா", "கோத்ரெஜ்"]),
    "Arabic": (["أحمر", "أزرق", "أخضر"], ["كِتاب", "كرسي", "ساعة"], ["سامسونغ", "توشيبا", "شارب"]),
}


def test_a_catalogue_of_plain_texts_has_queries_as_well(shop, tmp_path):
    rows = [{"_id": row["_id"], "text": f"{row['title']}, {row['text'] or 'sold here'}"} for row in catalogue_rows()]
    (shop / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(shop, tmp_path / "out", "--train_queries", "40", "--dev_queries", "5", "--unlabelled_queries", "60")
    data = load(str(tmp_path / "out"), cache_dir=tmp_path / "cache")
    assert len(data.qrels["train"]) > 20 and data.qrels["dev"]
    texts = {row["_id"]: row["text"] for row in data.queries}
    words = {row["_id"]: normalise(row["text"]) for row in rows}
    for query, documents in data.qrels["train"].items():
        assert all(set(normalise(texts[query]).split()) <= set(words[document].split()) for document in documents)


def test_of_long_texts_the_first_telling_words_are_taken(shop, tmp_path):
    """Without a title a text is named by how it begins, and not by the words that all texts have."""
    things = "kettle bicycle lantern blanket ladder whistle basket hammer pillow mirror candle teapot".split()
    kinds = "copper folding wool garden signal paper winter double marble pocket silver square".split()
    rest = "and then it is of use to all who have it here " * 3
    rows = [
        f"The {kind} {thing} is for the {thing} lover, {rest}afterwards {kind}x" for kind in kinds for thing in things
    ]
    lines = [json.dumps({"_id": f"p{number}", "text": text}) for number, text in enumerate(rows)]
    (shop / "corpus.jsonl").write_text("\n".join(lines))
    prepare(shop, tmp_path / "out", "--train_queries", "30", "--dev_queries", "2", "--unlabelled_queries", "60")
    data = load(str(tmp_path / "out"), cache_dir=tmp_path / "cache")
    words = {word for text in data.unlabelled["text"] for word in text.split()}
    assert len(data.qrels["train"]) > 10 and words <= {*kinds, *things}


@pytest.mark.parametrize("language", SHOPS)
def test_derived_queries_are_words_of_the_catalogue_in_every_script(tmp_path, language):
    colours, things, brands = SHOPS[language]
    rows = [
        {
            "_id": f"d{colour}{thing}{brand}",
            "title": f"{brand} M{len(thing)} {thing}",
            "text": f"{colour} {thing}",
            "brand": brand,
            "model": f"M{len(thing)}",
            "attrs": {"product_type": thing, "colour": colour},
        }
        for colour in colours
        for thing in things
        for brand in brands
    ]
    folder = tmp_path / "shop"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q1", "text": things[0]}) + "\n")
    (folder / "qrels/test.tsv").write_text(f"query-id\tcorpus-id\tscore\nq1\t{rows[0]['_id']}\t1\n")
    prepare(folder, tmp_path / "out", "--train_queries", "25", "--dev_queries", "3", "--unlabelled_queries", "30")
    data = load(str(tmp_path / "out"), cache_dir=tmp_path / "cache")
    words = {word for row in rows for word in normalise(f"{row['title']} {row['text']}").split()}
    written = {unicodedata.normalize("NFKC", f"{row['title']} {row['text']}".lower()) for row in rows}
    assert words <= {word for text in written for word in text.split()}
    found = data.unlabelled["text"][:]
    assert len(found) >= 15 and {word for text in found for word in text.split()} <= words


def test_a_catalogue_that_gives_few_queries_says_why(shop, tmp_path, caplog):
    prepare(shop, tmp_path / "out", "--unlabelled_queries", "5000", "--passes", "2")
    assert "of 165 products 165 a brand, 165 a model, 150 attributes in 'attrs'" in caplog.text
    assert "gave a query that was there" in caplog.text and "ask for fewer queries" in caplog.text
    (shop / "corpus.jsonl").write_text('{"_id": "p0", "title": "防水"}\n')
    (shop / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tp0\t3\n")
    with pytest.raises(HlmError, match="of 1 products 0 a brand.* 0 a title of more than one word.*put spaces between"):
        prepare(shop, tmp_path / "other")


def test_bad_rows_are_left_out_of_what_is_prepared(shop, tmp_path):
    with open(shop / "corpus.jsonl", "a") as file:
        file.write('{"_id": "empty", "title": ""}\n')
    with pytest.raises(HlmError, match="skip_bad_rows"):
        prepare(shop, tmp_path / "out")
    prepare(shop, tmp_path / "out", "--skip_bad_rows", "true")
    assert len(load(str(tmp_path / "out"), cache_dir=tmp_path / "cache").corpus) == 165


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


def test_the_same_seed_gives_the_same_files(shop, tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        prepare(shop, tmp_path / name, "--seed", seed)
    for file in ("queries.jsonl", "unlabelled.jsonl", "qrels/train.jsonl"):
        first, second, other = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert first == second != other


def test_refusals(shop, tmp_path):
    with pytest.raises(HlmError, match="general_queries.*nowhere"):
        prepare(shop, tmp_path / "out", "--general_queries", "nowhere.jsonl")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(HlmError, match="a folder with other files .thesis.txt"):
        prepare(shop, tmp_path / "mine")
    with pytest.raises(HlmError, match="a folder with other files .thesis.txt"):
        prepare_esci.main(["--source", str(tmp_path), "--output", str(tmp_path / "mine")])
    (shop / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tp0\t3\n")
    with pytest.raises(HlmError, match="has a train split"):
        prepare(shop, tmp_path / "out")
