"""What a forked child makes anew: the threads of its parent do not run there."""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    def after_fork(self) -> None:
        """Called in the child; takes no lock and waits for nothing."""


_alive: weakref.WeakSet[Forkable] = weakref.WeakSet()


def tell_after_fork(forkable: Forkable) -> None:
    """Calls `forkable.after_fork()` in every child that this process forks, for as long as it lives."""
    _alive.add(forkable)


def keep_for_ever(value: object) -> None:
    """Never destroys `value`, not at exit either: what has threads waits for them, and in a child for ever."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def _in_child() -> None:
    if _alive:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # whatever it was: the threads are not there
    for forkable in list(_alive):
        forkable.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
