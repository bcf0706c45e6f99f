"""Many queries in one call: batches of similar length, computed side by side, a core each."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import numpy as np

from hlm.forks import tell_after_fork

Run = Callable[[np.ndarray, np.ndarray | None], np.ndarray]  # int64 ids and mask, as in `Batch` -> float32 (n, dim)
ENOUGH = 8  # a batch of an eighth of the tokens that it may hold takes no longer a token than a full one


@dataclass(frozen=True)
class Batch:
    """Texts that are computed together; `rows` are their places in the call."""

    rows: np.ndarray  # int64 (n,)
    ids: np.ndarray  # int64 (n, tokens), zeros on the right
    mask: np.ndarray | None  # int64 (n, tokens), 1 where there is a token; None: everywhere


def cut_by_length(ids: Sequence[Sequence[int]], tokens: int, *, pads: bool = True) -> Iterator[Batch]:
    """Every text once, the longest first, in batches of at most `tokens`, padding counted (a longer text is alone).

    A text that would be padded opens the next batch, once this one holds an `ENOUGH`-th of `tokens`; without `pads`
    it always does.
    """
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    order = np.argsort(-lengths, kind="stable")
    lengths = lengths[order]
    flat = np.fromiter(chain.from_iterable(ids[row] for row in order), dtype=np.int64, count=lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    shorter = np.searchsorted(-lengths, -lengths, side="right")  # where the first text shorter than this one is
    start = 0
    while start < len(ids):
        longest = max(1, int(lengths[start]))
        most = start + max(1, tokens // longest)
        enough = start + -(-tokens // ENOUGH // longest) if pads else start
        stop = min(most, max(enough, int(shorter[start])), len(ids))
        here = flat[offsets[start] : offsets[stop]]
        if lengths[start] == lengths[stop - 1]:
            yield Batch(order[start:stop], here.reshape(stop - start, -1), None)
        else:
            mask = np.arange(lengths[start]) < lengths[start:stop, None]
            padded = np.zeros(mask.shape, dtype=np.int64)
            padded[mask] = here
            yield Batch(order[start:stop], padded, mask.astype(np.int64))
        start = stop


class SideBySide:
    """Batches on several cores at once, each on one: no core waits for the others after every step of the graph. Safe
    to call from several threads, and in a forked child.

    Args:
        load: gives a `Run` that computes on one core; called before the first batch.
        threads: cores.
    """

    def __init__(self, load: Callable[[], Run], threads: int) -> None:
        self.threads = threads
        self._load = load
        self._run: Run | None = None
        self.after_fork()
        tell_after_fork(self)

    def after_fork(self) -> None:
        """The lock may have been held, and the threads are not there; `Run` renews itself."""
        self._lock = threading.Lock()
        self._helpers = ThreadPoolExecutor(max(1, self.threads - 1), thread_name_prefix="hlm-bulk")

    def __call__(self, work: Iterator[Batch], out: np.ndarray) -> None:
        """Puts the vectors of `work` into their rows of `out`; an error of any batch is raised."""
        with self._lock:
            run = self._run = self._run or self._load()
        waiting = deque(work)

        def compute() -> None:
            while True:
                try:
                    batch = waiting.popleft()
                except IndexError:
                    return
                try:
                    out[batch.rows] = run(batch.ids, batch.mask)
                except BaseException:
                    waiting.clear()  # nobody begins another
                    raise

        helpers = [self._helpers.submit(compute) for _ in range(min(self.threads, len(waiting)) - 1)]
        compute()
        for helper in helpers:
            if not helper.cancel():  # one that other calls kept from starting is not missed
                helper.result()
