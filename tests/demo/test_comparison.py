"""What the demo compares, on encoders that are made up, and the settings that it reads."""

from pathlib import Path

import numpy as np
import pytest

from hlm.artefacts import HlmError
from hlm.demo.comparison import Demo, DemoConfig, clean
from hlm.demo.page import results, shown
from hlm.indexes.faiss_index import AdIndex

ROOT = Path(__file__).resolve().parents[2]


def test_ranks_and_overlap_of_two_that_disagree():
    names = [f"ad{number}" for number in range(4)]
    index = AdIndex.from_vectors(np.eye(4, dtype=np.float32), names)
    near = {"teacher": [0.8, 0.6, 0, 0], "student": [0, 0.8, 0.6, 0]}
    vectors = {name: np.array([row], np.float32) for name, row in near.items()}
    corpus = load_corpus([{"_id": n, "title": f"Red shoes {n}", "text": None, "price": "cheap"} for n in names])
    demo = Demo(
        student=lambda _: vectors["student"],
        teacher=lambda _: vectors["teacher"],
        live=True,
        corpus=corpus,
        indexes={"Flat": lambda: index},
        facts=[],
    )
    found = demo.compare("red shoe", 2)
    assert [(hit["id"], hit["other_rank"]) for hit in found["teacher"]["hits"]][1] == ("ad1", 1)
    assert [hit["id"] for hit in found["student"]["hits"]] == ["ad1", "ad2"]
    assert found["student"]["hits"][0]["other_rank"] == 2 and found["student"]["hits"][1]["other_rank"] in (3, 4)
    assert found["overlap"] == 1 and found["student"]["hits"][0]["matched"] == ["red", "shoe"]
    page = results(found)
    assert page.index("<h2>Student</h2>") < page.index("<h2>Teacher</h2>")  # on a phone one stands below the other
    assert "1 of 2" in page and "▲1 · teacher’s no. 2" in page and "<mark>shoes</mark>" in page and "cheap" in page


def load_corpus(rows):
    import datasets

    return datasets.Dataset.from_list(rows)


def test_text_is_cleaned_and_cut():
    assert clean(" a\u202eb\u0007\n\tc ") == "ab c" and clean("می\u200cخواهم") == "می\u200cخواهم"
    assert shown("abcdef", 4) == "<bdi>abc…</bdi>"
    assert shown("Shoes & <b>", 40, ["shoe"]) == "<bdi><mark>Shoes</mark> &amp; &lt;b&gt;</bdi>"


@pytest.mark.parametrize(
    ("text", "said"),
    [("[]", "found list"), ("{", "found none"), ('{"stduent": 1}', "found stduent"), ('{"data": "d"}', "for student")],
)
def test_settings_are_checked(tmp_path, text, said):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(HlmError, match=said):
        DemoConfig.read(tmp_path / "c.json")


def test_the_shipped_settings_name_what_the_quickstart_writes():
    config = DemoConfig.read(ROOT / "spaces/query_to_ad/config.json")
    assert config.teacher == "runs/quickstart/teacher" and not config.examples  # chosen by a rule, never by hand
    assert config.student == ["runs/quickstart/online", "runs/quickstart/student"]
