"""Queries crossed from two others."""

import random

from hlm.data.crossed import cross
from hlm.data.spelling import spellings


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
