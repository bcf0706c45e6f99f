"""Batches: every row once an epoch, rows of one key together, the same order after a kill."""

import numpy as np
import pytest

from hlm.artefacts import HlmError
from hlm.batches import GroupedBatches


@pytest.mark.parametrize("keys, group", [(None, None), (np.arange(103) % 7, None), (np.arange(103) % 7, 5)])
@pytest.mark.parametrize("drop_last", [True, False])
def test_an_epoch_holds_every_row_once(keys, group, drop_last):
    batches = GroupedBatches(103, 10, 0, keys=keys, group=group, drop_last=drop_last)
    found = list(batches)
    assert len(found) == len(batches) == (10 if drop_last else 11)
    rows = [row for batch in found for row in batch]
    assert len(rows) == len(set(rows)) == (100 if drop_last else 103)
    assert all(len(batch) == 10 for batch in found[:10])


def test_batches_follow_from_seed_and_epoch_alone():
    first, second = (GroupedBatches(64, 8, 3, keys=np.arange(64) // 4) for _ in range(2))
    list(first)  # an epoch that was seen must not matter
    for batches in (first, second):
        batches.set_epoch(2)
    assert list(first) == list(second)
    second.set_epoch(1)
    assert list(first) != list(second)


def test_groups_bring_one_key_together():
    keys = np.random.default_rng(0).permutation(np.repeat(np.arange(16), 16))
    whole = [keys[batch] for batch in GroupedBatches(256, 16, 0, keys=keys)]
    assert all(len(set(batch)) == 1 for batch in whole)
    grouped = [keys[batch] for batch in GroupedBatches(256, 16, 0, keys=keys, group=4)]
    assert all(len(set(batch)) <= 4 for batch in grouped) and any(len(set(batch)) > 1 for batch in grouped)


def test_a_group_must_divide_the_batch():
    with pytest.raises(HlmError, match="expected a group that divides the batch of 10, found 4"):
        GroupedBatches(100, 10, 0, keys=np.zeros(100), group=4)
    with pytest.raises(HlmError, match="at least one whole batch of 10, found 9"):
        GroupedBatches(9, 10, 0)
