"""Sharing the shards of a store among tasks that never talk to one another: job arrays, and workers of Ray."""

from __future__ import annotations

import re

from hlm.artefacts import HlmError


def share_of(text: str | None) -> tuple[int, int]:
    """(i, n) of a setting "i/n": this task writes what falls to it among n, counted from 0; (0, 1) without.

    Raises:
        HlmError: no such text, or an i that is not below n.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text or "0/1")
    if found is None or int(found[1]) >= int(found[2]):
        raise HlmError(
            f"shard: expected i/n with i from 0 to n - 1, such as 0/16, found {text!r}; number the tasks from 0"
        )
    return int(found[1]), int(found[2])


def writer_of(text: str | None, process_index: int, num_processes: int) -> tuple[int, int]:
    """(number, count) of a process among all that write a store: those of every task, of `num_processes` each."""
    share, tasks = share_of(text)
    return share * num_processes + process_index, tasks * num_processes
