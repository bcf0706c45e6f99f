"""`run` and `Popen` as `subprocess` has them, for Python programs that import torch and transformers, which costs
seconds: such a program is a fork of a process that has imported them before, and then runs as if it were new.

A first process imports torch and what never looks at the Hub's settings. For each set of those settings it forks a
second, which imports the libraries that read them, and forks a process for each program. Neither knows HLM. What a fork
cannot be, it is not: under other flags of Python than -P, other variables that Python reads at its start, `preexec_fn`,
or on another system than Linux, a process is started as ever.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

FIRST = ("torch.distributed.tensor", "torch._dynamo.convert_frame", "torch.onnx", "scipy.stats", "sklearn.metrics",
         "pandas", "pyarrow.dataset")  # fmt: skip
SECOND = (
    "sentence_transformers", "accelerate", "datasets", "peft", "transformers.models.bert.modeling_bert",
    "transformers.models.qwen3.modeling_qwen3", "transformers.trainer",
)  # fmt: skip
READ_AT_IMPORT = ("HF_", "HUGGING", "TRANSFORMERS", "DATASETS", "TORCH_", "PYTORCH", "OMP", "MKL", "XDG_", "HOME")
READ_AT_START = ("PYTHON", "LC_", "LANG", "LD_")
SUBREAPER, DEATH_SIGNAL = 36, 1  # of prctl

AT_ONCE = 4  # of the second kind, which have some 100 MiB each of their own

seconds: dict[int, str] = {}  # in the first process: the second's ids and sockets, the oldest first
folder: Path | None = None  # with the processes' sockets, once they run
forks_itself = False  # this process is a fork, and what it starts shall be one


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


started_as_ever = subprocess.Popen._execute_child


class Popen(subprocess.Popen):
    """`forks`: the Python programs that this one starts by `subprocess.Popen` are forks of it."""

    def __init__(self, args: Any, *rest: Any, forks: bool = False, **named: Any) -> None:
        self._forks = forks
        super().__init__(args, *rest, **named)

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any,
                       env: Any, *rest: Any) -> None:  # fmt: skip
        variables = dict(os.environ if env is None else env)
        program = None if isinstance(args, (str, bytes)) else program_of([os.fsdecode(word) for word in args])
        plain = not (preexec_fn or pass_fds or executable) and close_fds and sys.platform == "linux"
        if not (plain and program and read_at_start(variables) == read_at_start(dict(os.environ))):
            started_as_ever(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
            return
        stdin, written_in, read_out, stdout, read_err, stderr = rest[3:9]
        fds = [
            number if number != -1 else default
            for number, default in zip((stdin, stdout, stderr), range(3), strict=True)
        ]
        job = program | {"cwd": os.fspath(cwd or os.getcwd()), "env": variables, "session": bool(rest[13])}
        try:
            self.pid = fork(job | {"fds": fds}) if forks_itself else ask_for_fork(job | {"forks": self._forks}, fds)
        finally:  # as the original does
            for fd, kept in ((stdin, written_in), (stdout, read_out), (stderr, read_err)):
                if fd != -1 and kept != -1:
                    os.close(fd)
            if getattr(self, "_devnull", None) is not None:
                os.close(self._devnull)
        self._child_created = True


def run(args: Any, *, input: Any = None, capture_output: bool = False, timeout: float | None = None,
        check: bool = False, **named: Any) -> subprocess.CompletedProcess:  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} if capture_output else {}
    if input is not None:
        pipes["stdin"] = subprocess.PIPE
    with Popen(args, **pipes, **named) as process:
        try:
            stdout, stderr = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
    if check:
        done.check_returncode()
    return done


def program_of(words: list[str]) -> dict[str, Any] | None:
    """What Python is asked to run; None where a fork cannot be asked for it."""
    if not words or words[0] != sys.executable:
        return None
    flags = list(itertools.takewhile(("-P", "-u").__contains__, words[1:]))
    words = words[1 + len(flags) :]
    kind = {"-c": "code", "-m": "module"}.get(words[0], "script") if words else ""
    given = words if kind == "script" else words[1:]
    if not given or (kind != "code" and given[0].startswith("-")):
        return None
    return {"kind": kind, "words": given, "safe_path": "-P" in flags, "unbuffered": "-u" in flags}


def read_at_start(variables: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name.startswith(READ_AT_START) and name != "PYTHONPATH"}


def ask_for_fork(job: dict[str, Any], fds: list[int]) -> int:
    """The id of a process that is a child of this one: those between end, and this one takes it over."""
    if folder is None:
        start()
    settings = {name: value for name, value in job["env"].items() if name.startswith(READ_AT_IMPORT)}
    server = folder / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    if not server.exists():
        asked(folder / "first", {"server": str(server), "env": job["env"]}, [])
    prctl(SUBREAPER, 1)
    try:
        return asked(server, job | {"parent": os.getpid()}, fds)
    finally:
        prctl(SUBREAPER, 0)


def fork(job: dict[str, Any]) -> int:
    process = multiprocessing.get_context("fork").Process(target=execute, args=(job | {"forks": False},))
    process.start()
    return process.pid


def start() -> None:
    global folder
    folder = Path(tempfile.mkdtemp(prefix="children."))
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n"
    code += f"import children; children.first({str(folder)!r})"
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code], env=own, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
        )
    atexit.register(stop, process, os.getpid())
    if process.stdout.readline() != b"ready\n":
        raise RuntimeError((folder / "log").read_text())


def stop(process: subprocess.Popen, owner: int) -> None:
    if os.getpid() == owner:
        process.kill()
        process.wait()
        process.stdout.close()
        shutil.rmtree(folder)


def asked(path: Path, request: dict[str, Any], fds: list[int]) -> int:
    """The answer of the process behind this socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        content = json.dumps(request).encode()
        socket.send_fds(connection, [len(content).to_bytes(8, "big")], fds)
        connection.sendall(content)
        answer = connection.makefile("rb").readline()
    if not answer:
        raise RuntimeError((path.parent / "log").read_text())
    return int(answer)


# In the processes that fork:


def first(sockets: str) -> None:
    for name in FIRST:
        importlib.import_module(name)
    prctl(DEATH_SIGNAL, signal.SIGKILL)
    gc.freeze()  # or the end of each process visits all of it
    with listening(f"{sockets}/first") as listener:
        os.write(1, b"ready\n")
        job = serve(listener)
    execute(job)


@contextlib.contextmanager
def listening(path: str) -> Any:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(16)
        yield listener


def serve(listener: socket.socket) -> dict[str, Any]:
    """Returns in a forked process, with what it is to run."""
    while True:
        connection, _ = listener.accept()
        with connection:
            size, fds, _, _ = socket.recv_fds(connection, 8, 3)
            with connection.makefile("rb") as file:
                request = json.loads(file.read(int.from_bytes(size, "big")))
            if "server" in request:
                answer = second(request, inherited=(connection, listener))
            else:
                answer = program(request, fds)
            if isinstance(answer, dict):
                return answer
            connection.sendall(b"%d\n" % answer)
        for fd in fds:
            os.close(fd)


def second(request: dict[str, Any], inherited: tuple[socket.socket, ...]) -> int | dict[str, Any]:
    """Forks a process with these settings: its id once it listens, or in a fork of it what is to run."""
    if len(seconds) == AT_ONCE:
        oldest = next(iter(seconds))
        os.kill(oldest, signal.SIGKILL)
        os.waitpid(oldest, 0)
        os.unlink(seconds.pop(oldest))
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(writer)
        ready = os.read(reader, 1)
        os.close(reader)
        if not ready:
            raise RuntimeError("the libraries could not be imported")
        seconds[pid] = request["server"]
        return pid
    os.close(reader)
    for one in inherited:
        one.close()
    prctl(DEATH_SIGNAL, signal.SIGKILL)
    os.environ.clear()
    os.environ.update(request["env"])
    for name in SECOND:
        importlib.import_module(name)
    # Made at the first model that is loaded, of a thousand regular expressions, and kept.
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("bert")
    gc.freeze()
    with listening(request["server"]) as listener:
        os.write(writer, b"1")
        os.close(writer)
        return serve(listener)


def program(job: dict[str, Any], fds: list[int]) -> int | dict[str, Any]:
    """The id of a fork of a fork, whose parent is the one who asked when the first of them ends."""
    reader, writer = os.pipe()
    between = os.fork()
    if between:
        os.close(writer)
        pid = int(os.read(reader, 20))
        os.close(reader)
        os.waitpid(between, 0)
        return pid
    os.close(reader)
    if os.fork():
        os._exit(0)
    if job["session"]:
        os.setsid()  # before its id is known: who has it may signal the whole session
    os.write(writer, str(os.getpid()).encode())
    os.close(writer)
    for _ in range(5000):
        if os.getppid() == job["parent"]:
            return job | {"fds": fds}
        time.sleep(0.001)
    os._exit(97)


def execute(job: dict[str, Any]) -> None:
    """This process becomes the program."""
    prctl(DEATH_SIGNAL, 0)
    for number, fd in enumerate(job["fds"]):
        os.dup2(fd, number)
    os.closerange(3, 1024)
    if job["session"] and os.getsid(0) != os.getpid():
        os.setsid()
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, name)
        lines = 1 if number == 2 or job["unbuffered"] or os.isatty(number) else -1
        new = open(number, old.mode, lines, encoding=old.encoding, errors=old.errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    sys.modules["numpy"].random.seed()
    if job["forks"]:
        global forks_itself
        forks_itself, subprocess.Popen._execute_child = True, Popen._execute_child
    before = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    script = str(Path(job["words"][0]).resolve().parent) if job["kind"] == "script" else job["cwd"]
    own = [] if job["safe_path"] else ["" if job["kind"] == "code" else script]
    sys.path[:] = [*own, *before, *(path for path in sys.path if path != str(Path(__file__).parent))]
    importlib.invalidate_caches()
    sys.argv = ["-c", *job["words"][1:]] if job["kind"] == "code" else job["words"]
    if job["kind"] == "code":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(job["words"][0], "<string>", "exec"), main.__dict__)
    elif job["kind"] == "module":
        runpy.run_module(job["words"][0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(job["words"][0], run_name="__main__")
