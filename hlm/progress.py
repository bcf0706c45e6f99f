"""How far a step is that takes long: a bar on a terminal, elsewhere a line of the log now and then."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm as plain_tqdm
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

SHOWN_AFTER_S = 1.0  # of a bar: what is done sooner shows none
LINE_EVERY_S = 30.0  # without a terminal


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    what: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    shown: bool = True,
) -> tqdm:
    """A tqdm over `iterable`, or one to be used with `with` and `update(number)`; it leaves nothing behind.

    Where stderr is no terminal, such as in a file of logs, it logs a line every half a minute instead.

    Args:
        what: the step, such as "embed corpus".
        unit: what is counted, in the singular, such as "text".
        total: how many there are; by default the length of `iterable`, where it has one.
        initial: how many were done before, by a run that this one goes on from.
        shown: False shows nothing; nor does any process but the first (environment variable RANK).
    """
    settings: dict[str, Any] = {
        "desc": what,
        "unit": f" {unit}",
        "total": total,
        "initial": initial,
        "leave": False,
        "disable": not shown or os.environ.get("RANK", "0") != "0",
    }
    if shows_bars():
        return tqdm(iterable, dynamic_ncols=True, delay=SHOWN_AFTER_S, **settings)
    return _Lines(iterable, file=io.StringIO(), delay=LINE_EVERY_S, mininterval=LINE_EVERY_S, **settings)


def shows_bars() -> bool:
    """Whether there is a terminal or a notebook to show a bar on."""
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())


class _Lines(plain_tqdm):
    """What a bar would show, as lines of the log."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is not None:
            return  # it would be wiped off the screen
        units = f"{self.unit[:-1]}ies" if self.unit.endswith("y") else f"{self.unit}s"
        line = f"{{desc}}: {{n_fmt}} of {{total_fmt}}{units}, {{remaining}} left"
        if not self.total:
            line = f"{{desc}}: {{n_fmt}}{units} in {{elapsed}}"
        logger.info(self.format_meter(**self.format_dict | {"bar_format": line}))


class AboveBars(logging.StreamHandler):
    """Writes records above the bars that are on the screen, not through them."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self.process = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        if os.getpid() != self.process:  # a worker has no bars, and must not wait for a lock that was held as it forked
            return super().emit(record)
        with tqdm.external_write_mode(self.stream):
            super().emit(record)
