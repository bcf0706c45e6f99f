"""How a command ends where the machine or the user stopped it: one line and an exit status instead of a traceback."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import time
from collections.abc import Iterator

from hlm.errors import FULL_DISK, REMEDIES, HlmError

_OUTPUTS = (1, 2)  # standard output and standard error
REFUSED, INTERRUPTED, NO_READER = 2, 130, 141  # the last two as a shell counts SIGINT and SIGPIPE

_KEPT = "what was finished before is kept, and the same command goes on from there"
_MIDWAY = (*FULL_DISK, errno.EMFILE, errno.ENFILE, errno.EIO)  # these stop what has begun
# Libraries written in other languages tell the number, or the text, of the system's error within their own.
_NUMBER = re.compile(r"\[errno (\d+)\]|os error (\d+)", re.IGNORECASE)
_WORKER = re.compile(r"Caught \w+ in DataLoader worker process")
# torch names no reason at all where it cannot write.
_TORCH_WRITER = re.compile(r"PytorchStreamWriter failed|inline_container\.cc|basic_ios::clear: iostream error")


def ending(error: BaseException) -> tuple[int, str] | None:
    """(exit status, line for the user) of what a user can mend; the line is empty where nobody reads it.

    None for what is a fault of the program: that one keeps its traceback.
    """
    if isinstance(error, HlmError):
        return REFUSED, f"error: {_words(error)}"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, f"interrupted: {_KEPT}"
    if isinstance(error, BrokenPipeError):
        return (NO_READER, "") if _reader_is_gone() else None
    for link in _chain(error):
        told = _system_error(link)
        if told:
            return REFUSED, f"error: {told}"
    return None


def close_quietly() -> None:
    """To be called after a pipe's reader went away: Python's own flush at exit would complain of it again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in filter(_closed, _OUTPUTS):
        os.dup2(nowhere, descriptor)


def told_ending(error: BaseException) -> tuple[int, str]:
    """`ending` for a program that is about to stop with it; raises `error` again where that is the program's fault.
    Where the output lost its reader the line is empty, and Python will not complain of it at exit."""
    found = ending(error)
    if found is None:
        raise error
    if found[0] == NO_READER:
        close_quietly()
    return found


def tell_launcher(line: str) -> None:
    """Makes torchrun's summary of failed processes, the last thing on the screen, show `line`."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:  # where the disk is full
            json.dump({"message": message}, file)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _words(error: BaseException) -> str:
    """The message in one line; of an error in a worker process that error's own, without the traceback around it."""
    text = str(error)
    if _WORKER.match(text):
        last = text.strip().splitlines()[-1]
        text = last.split(": ", 1)[-1]
    return " ".join(text.split())


def _system_error(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno in REMEDIES:
        path = f" at {os.fsdecode(error.filename)}" if error.filename else ""
        return f"{os.strerror(error.errno)}{path}; {_remedy(error.errno)}"
    text = _words(error)
    match = _NUMBER.search(text)
    number = int(match[1] or match[2]) if match else None
    if number is None:
        number = next((number for number in REMEDIES if os.strerror(number) in text), None)
    if number in REMEDIES:
        return f"{text}; {_remedy(number)}"
    if isinstance(error, RuntimeError) and _TORCH_WRITER.search(text):
        return f"a file could not be written, most often because the disk is full; {_remedy(errno.ENOSPC)}"
    return None


def _remedy(code: int) -> str:
    return f"{REMEDIES[code]}; {_KEPT}" if code in _MIDWAY else REMEDIES[code]


def _reader_is_gone() -> bool:
    """Whether this program's own output has lost its reader; a worker's or a server's pipe breaks the same way."""
    return any(map(_closed, _OUTPUTS))


def _closed(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLERR)
    return any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))
