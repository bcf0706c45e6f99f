"""A process with the real clients that publishes and pulls on request: their imports take seconds, a fault does not.

It differs from a user's process in two ways, both to save time: waits between retries are a hundredth of what the
clients wait, and what recipes/publish.py checks before it sends anything is checked once for each command line.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import resource
import shutil
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import children

if TYPE_CHECKING:
    from hub_server import HubServer

ROOT = Path(__file__).resolve().parent.parent


class Client:
    """The process, started when it is first needed and again after it had to be killed.

    It runs on a copy of the package, which is part of a published Space: an edit meanwhile changes nothing.

    Attributes:
        said: file of all that it wrote to its standard output and error.
        cache: where it keeps what it pulls.
    """

    def __init__(self, hub: HubServer, folder: Path, *, xet: bool, timeout_s: float = 600.0) -> None:
        for name in ("hlm", "recipes", "model_cards"):
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        self.said, self.cache, self.timeout_s, self._process = folder / "said.txt", folder / "home/hub", timeout_s, None
        own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        own |= hub.environment("acme", home=folder / "home", xet=xet)
        own |= {"PYTHONPATH": os.pathsep.join([str(folder / "source"), str(ROOT / "tests")])}
        self._environment = own | {
            "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
            "HLM_CACHE": str(folder / "hlm"),
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, action: str, **words: Any) -> dict[str, Any]:
        """{"value": ...}, or {"error": kind, "text": ...}; kind "hung" where no answer came in time."""
        if self._process is None:
            self._start()
        print(json.dumps({"action": action} | words), file=self._process.stdin, flush=True)
        try:
            answer = self._answers.get(timeout=self.timeout_s)
        except queue.Empty:
            self.close()
            return {"error": "hung", "text": f"no answer in {self.timeout_s} s"}
        if not answer:
            self.close()
            return {"error": "died", "text": "the process ended"}
        return json.loads(answer)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        with open(self.said, "a") as said:
            self._process = children.Popen(
                [sys.executable, "-P", "-c", "import hub_client; hub_client.serve()"],
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_pass_on, args=(self._process.stdout, self._answers), daemon=True).start()


def _pass_on(lines: Any, answers: queue.Queue[str]) -> None:
    for line in lines:
        answers.put(line)
    answers.put("")


def serve() -> None:
    """Answers one line of JSON for each line of standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    wait = time.sleep
    time.sleep = lambda seconds: wait(seconds / 100)
    from hlm.artefacts import HlmError

    check_once()
    actions = {"publish": publish, "pull": pull}
    for line in sys.stdin:
        words = json.loads(line)
        try:
            answer = {"value": actions[words.pop("action")](**words)}
        except HlmError as error:
            answer = {"error": "HlmError", "text": str(error)}
        except Exception as error:  # whatever else comes is a finding
            answer = {"error": type(error).__name__, "text": traceback.format_exc()[-2000:]}
        print(json.dumps(answer), file=answers, flush=True)


def check_once() -> None:
    from hlm.publishing import release

    known: dict[str, Any] = {}
    lay_out = release.lay_out

    def planned(config: Any, repositories: Any, home: Path, done: dict, *, dry_run: bool) -> dict:
        if not dry_run:
            return lay_out(config, repositories, home, done, dry_run=False)
        if str(config) not in known:
            known[str(config)] = lay_out(config, repositories, home, done, dry_run=True)
        return known[str(config)]

    release.lay_out = planned


def forget() -> None:
    """As a process on another machine: nothing pulled before, nothing known of what was sent before."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _xet

    _xet.abort_xet_session()
    _xet.XET_CONNECTION_INFO_CACHE.clear()
    with contextlib.suppress(ImportError):  # older clients have no such cache
        from huggingface_hub import _tree_cache

        _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    for folder in (constants.HF_HUB_CACHE, Path(constants.HF_HOME) / "xet"):
        shutil.rmtree(folder, ignore_errors=True)


def publish(argv: list[str], fresh: bool) -> dict[str, tuple[str, str]]:
    """(repository, type) of each part."""
    if fresh:
        forget()
    from recipes import publish as recipe

    return {part: (one.repo_id, one.repo_type) for part, one in recipe.main(argv).items()}


def pull(wanted: dict[str, list[str]], fresh: bool, largest: int | None = None) -> dict[str, str]:
    """Folder of each (repository, type) of `wanted`; no file can grow beyond `largest` bytes, as on a full disk."""
    if fresh:
        forget()
    from hlm.publishing.publish import local_folder

    with full_disk(largest):
        return {part: str(local_folder(name, repo_type=kind)) for part, (name, kind) in wanted.items()}


@contextlib.contextmanager
def full_disk(largest: int | None) -> Any:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
