"""Work in a forked process that kills itself at a chosen call."""

import os
import signal
import sys
import traceback


def kill_at(calls, number):
    """Replaces functions by ones that kill this process before their call of that number, from 0, all counted together.

    Args:
        calls: (owner, name) of each.
    """
    left = [number]

    def killing(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    for owner, name in calls:
        setattr(owner, name, killing(getattr(owner, name)))


def forked(work):
    """Runs `work` in a fork.

    Returns:
        True where it ended by itself, False where it was killed.
    """
    process = os.fork()
    if process == 0:
        status = 1
        try:
            signal.alarm(60)
            work()
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(status)
    _, status = os.waitpid(process, 0)
    assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGKILL, status
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFEXITED(status)


def killed_at_each(calls, prepare, work, check):
    """Kills `work` at its first call of `calls`, then at its second, ..., until it ends before it is killed.

    Args:
        prepare: called before each run; makes what `work` and `check` are given.
        check: called after each run, killed or not.

    Returns:
        How often it was killed.
    """
    number = 0
    while True:
        place = prepare(number)

        def run(place=place, number=number):
            kill_at(calls, number)
            work(place)

        ended = forked(run)
        check(place)
        if ended:
            return number
        number += 1
