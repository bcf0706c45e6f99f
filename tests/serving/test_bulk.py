"""Batches of one call hold every text once, and give the same vectors on any number of cores."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hlm.serving.bulk import ENOUGH, SideBySide, cut_by_length


def token_ids(lengths):
    return [list(range(1, length + 1)) for length in lengths]


@pytest.mark.parametrize("pads", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 64, 512])
def test_every_text_is_in_one_batch_with_its_own_tokens(tokens, pads):
    lengths = np.random.default_rng(tokens).integers(0, 40, 300).tolist()
    ids = token_ids(lengths)
    found = list(cut_by_length(ids, tokens, pads=pads))
    assert any(batch.mask is not None for batch in found) == (pads and tokens == 512)
    assert sorted(np.concatenate([batch.rows for batch in found])) == list(range(300))
    for batch in found:
        masks = np.ones_like(batch.ids) if batch.mask is None else batch.mask
        assert batch.ids.dtype == masks.dtype == np.int64
        assert len(batch.rows) == 1 or batch.ids.size <= tokens
        for row, padded, mask in zip(batch.rows, batch.ids, masks, strict=True):
            assert padded.tolist() == ids[row] + [0] * (len(padded) - len(ids[row]))
            assert mask.tolist() == [1] * len(ids[row]) + [0] * (len(padded) - len(ids[row]))


def test_a_text_that_would_be_padded_opens_the_next_batch_once_this_one_is_large_enough():
    enough, few = 512 // ENOUGH, 3
    lengths = [8] * (enough // 8 + few) + [7] * 2 + [6] * 200
    found = [batch.ids.shape for batch in cut_by_length(token_ids(lengths), 512)]
    assert found[0] == (enough // 8 + few, 8)  # enough without padding
    assert found[1][1] == 7 and 7 * found[1][0] >= enough  # two texts are not: padded ones join them
    assert all(shape[1] == 6 for shape in found[2:]) and max(rows * length for rows, length in found) <= 512


def test_nothing_makes_no_batch():
    assert list(cut_by_length([], 512)) == []


def double(ids, mask):
    return (ids if mask is None else ids * mask).sum(axis=1, keepdims=True).astype(np.float32)


@pytest.mark.parametrize("threads", [2, 5])
def test_calls_from_many_threads_get_their_own_vectors_from_one_run(threads):
    loads = []

    def load():
        time.sleep(0.05)  # all callers are here before it is made
        loads.append(None)
        return double

    compute = SideBySide(load, threads)

    def call(seed):
        lengths = np.random.default_rng(seed).integers(1, 40, 200)
        out = np.full((200, 1), np.nan, np.float32)
        compute(cut_by_length(token_ids(lengths), 64), out)
        np.testing.assert_array_equal(out[:, 0], lengths * (lengths + 1) / 2)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(call, range(40)))
    assert len(loads) == 1


def test_batches_are_computed_at_the_same_time():
    both = threading.Barrier(2, timeout=30)

    def run(ids, mask):
        both.wait()  # alone it would wait for ever
        return double(ids, mask)

    out = np.empty((4, 1), np.float32)
    SideBySide(lambda: run, 2)(cut_by_length(token_ids([4, 4, 4, 4]), 4), out)
    assert (out == 10).all()


@pytest.mark.parametrize("threads", [2, 4])
def test_an_error_of_any_batch_is_raised_and_no_other_is_begun(threads):
    begun = []

    def run(ids, mask):
        begun.append(None)
        time.sleep(0.01)
        if len(begun) >= 3:
            raise MemoryError("no room")
        return double(ids, mask)

    compute = SideBySide(lambda: run, threads)
    with pytest.raises(MemoryError, match="no room"):
        compute(cut_by_length(token_ids([4] * 100), 4), np.empty((100, 1), np.float32))
    time.sleep(0.1)
    assert len(begun) < 3 + threads
