"""Processes that end together: a child ends with its parent, and a signal for the parent reaches what it started."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

ENDING = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM")
GRACE_S = 5.0  # for what a command leaves running in its group, between SIGTERM and SIGKILL
_PR_SET_PDEATHSIG = 1
_prctl = None
if sys.platform == "linux":  # loaded here, as nothing should be looked up between fork and exec
    _prctl = ctypes.CDLL(None).prctl
    _prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


def end_with_parent(parent: int) -> None:
    """From now on this process gets SIGTERM when the process that started it ends, were it by SIGKILL.

    Linux alone has this; elsewhere nothing happens.

    Args:
        parent: the id of that process. If it has ended before this call, this process ends at once.
    """
    if _prctl is None:
        return
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


class Supervisor:
    """Runs one command at a time, in a process group of its own, and hands it the signals that are meant to end this
    process; SIGTSTP (Ctrl-Z) stops both.

        with Supervisor() as supervisor:
            status, usage = supervisor.run(["python", "step.py"])

    A signal that was ignored before (nohup, a shell's background job) stays ignored. To be entered in the main thread.

    Attributes:
        signals: numbers of the signals that came, in their order. The caller is to end once there is one.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Supervisor:
        handlers = dict.fromkeys(ENDING, self._forward) | {"SIGTSTP": self._stop}
        for name, handler in handlers.items():
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, words: Sequence[str]) -> tuple[int, Any]:
        """Starts the command and waits until it has ended, with what is left of its group where it failed.

        Returns:
            exit status (negative: the signal), and the child's `resource.struct_rusage`.
        """
        parent = os.getpid()
        self._process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=lambda: end_with_parent(parent)
        )
        if self.signals:  # it came while the command was being started
            self._send(self.signals[-1])
        _, status, usage = os.wait4(self._process.pid, 0)  # unlike Popen.wait, it tells this child's peak from others'
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if self._process.returncode:
            self._end_group()
        found, self._process = self._process.returncode, None
        return found, usage

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)
        self._send(number)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send(signal.SIGCONT)  # somebody has sent it to this process

    def _send(self, number: int) -> bool:
        """False where nothing is left in the group."""
        if self._process is None:
            return False
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
            return False
        return True

    def _end_group(self) -> None:
        end = time.monotonic() + GRACE_S
        self._send(signal.SIGTERM)
        while self._send(0):
            if time.monotonic() > end:
                self._send(signal.SIGKILL)
                return
            time.sleep(0.02)
