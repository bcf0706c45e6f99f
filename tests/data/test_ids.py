"""Ids that are there twice, found in blocks of a table that is never in memory whole."""

import numpy as np
import pyarrow as pa
import pytest

from hlm.data import ids
from hlm.data.ids import id_there_twice


def blocks(*ids):
    return lambda: (pa.array(part, pa.string()) for part in ids), sum(map(len, ids))


@pytest.mark.parametrize("held", [2**27, 3])
def test_the_first_id_there_a_second_time(monkeypatch, held):
    monkeypatch.setattr(ids, "HASHES_HELD", held)  # 3: in four passes
    assert id_there_twice(*blocks(["a", "b", "c", "d"], ["e", "f"], ["g", "h", "i", "j"])) is None
    assert id_there_twice(*blocks(["a", "b", "c", "d"], ["e", "f"], ["g", "h", "f", "a"])) == "f"
    assert id_there_twice(*blocks(["a"] * 4, ["b", "c"], ["a"] * 4)) == "a"
    assert id_there_twice(*blocks([])) is None


def test_ids_of_one_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(ids, "_hashes", lambda names: np.zeros(len(names), np.int64))
    assert id_there_twice(*blocks(["a", "b"], ["c"])) is None
    assert id_there_twice(*blocks(["a", "b"], ["c", "b"])) == "b"
