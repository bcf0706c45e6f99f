"""The sample catalogue: deterministic, judged by its own rule, split by intent."""

import json
import random
import re

import pytest

from hlm.artefacts import HlmError, fingerprint_file
from hlm.data.contract import load
from hlm.data.sample_catalogue import CATEGORIES, DISTRACTOR, Intent, ad, misspell, split_of, write_catalogue
from hlm.data.sample_vocabulary import AXES, DEPARTMENTS

SIZES = {"ads": 400, "unlabelled": 300, "train_queries": 100, "dev_queries": 15, "test_queries": 30}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "data"
    write_catalogue(folder, **SIZES, seed=1)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    names = ["corpus.jsonl", "queries.jsonl", "unlabelled.jsonl", "qrels/train.tsv", "qrels/dev.tsv", "qrels/test.tsv"]
    write_catalogue(tmp_path / "again", **SIZES, seed=1)
    write_catalogue(tmp_path / "other", **SIZES, seed=2)
    for name in names:
        assert fingerprint_file(tmp_path / "again" / name) == fingerprint_file(folder / name)
        assert fingerprint_file(tmp_path / "other" / name) != fingerprint_file(folder / name)


def test_an_ad_is_the_same_in_a_larger_catalogue(folder, tmp_path):
    write_catalogue(tmp_path / "larger", **SIZES | {"ads": 500}, seed=1)
    assert lines(tmp_path / "larger/corpus.jsonl")[:400] == lines(folder / "corpus.jsonl")


def test_it_loads_with_all_that_was_asked(folder):
    data = load(str(folder))
    assert len(data.corpus) == 400 and len(data.unlabelled) == 300
    assert {split: len(qrels) for split, qrels in data.qrels.items()} == {"train": 100, "dev": 15, "test": 30}
    assert len(CATEGORIES) >= 50


def test_splits_share_neither_intents_nor_texts(folder):
    queries = lines(folder / "queries.jsonl")
    texts = [query["text"] for query in queries] + [row["text"] for row in lines(folder / "unlabelled.jsonl")]
    assert len(set(texts)) == len(texts)
    for query in queries:
        department, category, brand, values = json.loads(query["intent"])
        intent = Intent(department, category, brand, tuple(values))
        assert query["_id"].startswith(split_of(intent, 1))


def test_grades_follow_from_the_attributes_that_the_corpus_states(folder):
    corpus = lines(folder / "corpus.jsonl")
    queries = {query["_id"]: query for query in lines(folder / "queries.jsonl")}
    data = load(str(folder))
    seen = set()
    for name, judged in data.qrels["test"].items():
        department, category, brand, values = json.loads(queries[name]["intent"])
        axes, _brands, _ = DEPARTMENTS[department]
        wanted = {axis: list(AXES[axis])[value] for axis, value in zip(axes, values, strict=True) if value >= 0}
        for row in corpus:
            place = row["department"] == department and (category < 0 or row["category"] == CATEGORIES[category][1])
            offset = [b for d in DEPARTMENTS.values() for b in d[1]]
            right_brand = brand < 0 or row["brand"] == offset[brand]
            missed = sum(row["attributes"][axis] != value for axis, value in wanted.items()) if place else 9
            grade = 0
            if place and missed == 0:
                grade = 3 if right_brand else (2 if category >= 0 else 0)
            elif place and right_brand and missed == 1 and category >= 0 and len(wanted) + (brand >= 0) > 1:
                grade = 1
            assert judged.get(row["_id"], 0) == grade, (queries[name], row)
            seen.add(grade)
    assert seen == {0, 1, 2, 3}


def test_no_two_queries_of_different_splits_ask_for_the_same(folder):
    """By axis name, not by department: an attribute query must not stand for two departments."""
    splits = {}
    for query in lines(folder / "queries.jsonl"):
        department, category, brand, values = json.loads(query["intent"])
        axes = DEPARTMENTS[department][0]
        wanted = frozenset((axis, value) for axis, value in zip(axes, values, strict=True) if value >= 0)
        if query["kind"] == "attribute":
            assert sum({axis for axis, _ in wanted} <= set(a) for a, _, _ in DEPARTMENTS.values()) == 1, query
        splits.setdefault((category, brand, wanted), set()).add(query["_id"].rstrip("0123456789"))
    assert all(len(found) == 1 for found in splits.values())


def test_every_ad_states_its_values_in_words_of_the_vocabulary(folder):
    for row in lines(folder / "corpus.jsonl"):
        stated = f"{row['title']}. {row['text']}".lower()
        for axis, value in row["attributes"].items():
            forms = [form.lower() for side in AXES[axis][value] for form in side]
            assert any(re.search(rf"(?<!\w){re.escape(form)}(?!\w)", stated) for form in forms), (axis, value, row)


def test_a_slip_changes_one_word():
    for number in range(300):
        slipped = misspell("yellow kettle red", random.Random(number)).split(" ")
        assert [a == b for a, b in zip(slipped, ["yellow", "kettle", "red"], strict=True)].count(False) == 1


def test_distractors_differ_in_one_attribute_and_repeats_in_none():
    for group in range(0, 200, 5):
        original, altered = ad(1, group + 1), ad(1, group + DISTRACTOR)
        assert ad(1, group + 3) == ad(1, group)
        assert (altered.category, altered.brand) == (original.category, original.brand)
        assert sum(a != b for a, b in zip(original.values, altered.values, strict=True)) == 1


def test_too_much_for_too_few_ads(tmp_path):
    with pytest.raises(HlmError, match="expected 60 distinct queries, found"):
        write_catalogue(tmp_path / "data", **SIZES | {"ads": 1, "test_queries": 60})
    with pytest.raises(HlmError, match="ads: expected at least 1, found 0"):
        write_catalogue(tmp_path / "data", **SIZES | {"ads": 0})
    assert not (tmp_path / "data").exists()
