"""Every shard falls to one process of one task."""

import pytest

from hlm.embedding.shares import share_of, writer_of


@pytest.mark.parametrize(("tasks", "processes"), [(1, 1), (3, 1), (1, 4), (3, 2)])
def test_every_shard_has_one_writer(tasks, processes):
    writers = [writer_of(f"{task}/{tasks}", one, processes) for task in range(tasks) for one in range(processes)]
    assert sorted(number for number, _ in writers) == list(range(tasks * processes))
    assert {count for _, count in writers} == {tasks * processes}


def test_without_a_share_all_is_one():
    assert share_of(None) == (0, 1) and writer_of(None, 2, 3) == (2, 3)
