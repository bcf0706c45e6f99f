"""Which queries the demo shows: chosen from judgements and measured answers by a rule."""

import datasets
import numpy as np
import pytest

from hlm.data.contract import RetrievalData
from hlm.demo.examples import choose_examples
from hlm.indexes.faiss_index import AdIndex

ADS = [f"ad{number:02d}" for number in range(40)]
INDEX = AdIndex.from_vectors(np.eye(40, dtype=np.float32), ADS)


def answer(first: int) -> np.ndarray:
    """The vector whose ten nearest ads are ad<first> ... ad<first + 9>."""
    vector = np.zeros((1, 40), dtype=np.float32)
    vector[0, first : first + 10] = np.arange(20, 10, -1)
    return vector / np.linalg.norm(vector)


def choose(queries: dict[str, tuple[int, int, int | None]], grade: int = 3, split: str | None = "test"):
    """`queries`: text -> (ads of the best grade from ad00 on, where the student's answer starts, the teacher's)."""
    table = datasets.Dataset.from_list([{"_id": text, "text": text} for text in queries])
    judged = {text: {ad: grade for ad in ADS[:best]} | {ADS[39]: 1} for text, (best, _, _) in queries.items()}
    data = RetrievalData("data", table, table, {split: judged} if split else {})
    starts = {text: (student, teacher) for text, (_, student, teacher) in queries.items()}
    return choose_examples(
        data,
        lambda texts: np.concatenate([answer(starts[text][0]) for text in texts]),
        lambda text: None if starts[text][1] is None else answer(starts[text][1]),
        INDEX,
    )


def test_right_and_agreed_answers_come_first():
    label, chosen = choose(
        {
            "wrong kettle": (3, 0, 0),  # three ads of the best grade, seven of none
            "agreed lamp": (9, 0, 0),  # nine right, all ten the teacher's
            "alone tent": (10, 0, 5),  # all right, half the teacher's
            "best shoe": (10, 0, 0),
            "unknown hat": (10, 0, None),  # the teacher has no vector of it
        }
    )
    assert chosen == ["best shoe", "agreed lamp", "alone tent", "unknown hat"]
    assert label == "Examples: the test queries that student and teacher answer best"


def test_the_grade_that_counts_is_the_datas_best():
    queries = {"red shoe": (10, 0, 0), "blue hat": (8, 0, 0)}
    assert choose(queries)[1] == choose(queries, grade=1)[1] == ["red shoe", "blue hat"]
    table = datasets.Dataset.from_list([{"_id": "substitute", "text": "substitute"}, {"_id": "exact", "text": "exact"}])
    judged = {"substitute": dict.fromkeys(ADS[:10], 2), "exact": dict.fromkeys(ADS[:8], 3)}
    data = RetrievalData("data", table, table, {"test": judged})
    found = choose_examples(data, lambda texts: np.repeat(answer(0), len(texts), 0), lambda text: answer(0), INDEX)
    assert found[1] == ["exact"]


def test_no_two_share_a_word_and_six_are_enough():
    queries = {text: (10, 0, 0) for text in ("red shoe", "shoes for kids", "steel pan", "RED tent", *"abcdefgh")}
    assert choose(queries)[1] == ["red shoe", "steel pan", "a", "b", "c", "d"]


def test_where_no_answer_is_good_the_best_are_shown():
    assert choose({"red shoe": (1, 0, 0), "blue hat": (4, 0, 0)})[1] == ["blue hat", "red shoe"]


@pytest.mark.parametrize(
    ("split", "label"),
    [
        ("dev", "Examples: the dev queries that the student answers best"),
        (None, "Examples: the first queries of the data"),
    ],
)
def test_the_label_says_what_was_known(split, label):
    found = choose({"red shoe": (10, 0, None), "blue hat": (9, 0, None)}, split=split)
    assert found == (label, ["red shoe", "blue hat"])
