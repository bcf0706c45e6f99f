"""Checkpoints that a run may go on from: whole, unchanged, of this run, and with the best one beside them.

A checkpoint is a folder `checkpoint-<step>`. Once every process has written its part, a mark names its files with their
sizes and hashes; one without the mark, or with a file lost or changed, is never resumed. Nothing in a mark or in an
identity is a path outside the training folder, so a run that is moved goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import TrainingArguments

from hlm.artefacts import HlmError, claimed, write_json
from hlm.identity import PATHS, without
from hlm.outputs import resolved

logger = logging.getLogger(__name__)

STATE = "state.safetensors"
TRAINER_STATE = "trainer_state.json"
WHOLE = "whole"
IDENTITY = "identity.json"
TAKEN = ".hlm.training"  # says that the folder is a recipe's, which removes it in the end
# Written by each process for itself: states of random generators, and under FSDP its share of weights and optimizer.
_OF_PROCESS = re.compile(r"(?:rng_state_|__)(\d+)[._]")


def take_folder(folder: str | Path) -> None:
    """Makes a training folder, or takes one that a recipe made before.

    Raises:
        HlmError: it holds somebody's files, which the end of the run would remove.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise HlmError(f"expected a folder for checkpoints at {folder}, found a file; move it, or name another output")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if names and not {TAKEN, IDENTITY} & set(names):
        raise HlmError(
            f"expected checkpoints of a recipe, or nothing, in {folder}, found {', '.join(names[:3])}"
            f"{', ...' if names[3:] else ''}; it is removed when the run ends: move these, or name another output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TAKEN).touch()


def leave_folder(folder: str | Path) -> None:
    """Removes a training folder that a run had no use for."""
    folder = Path(folder)
    if folder.is_dir() and [path.name for path in folder.iterdir()] == [TAKEN]:
        (folder / TAKEN).unlink()
        folder.rmdir()


@contextlib.contextmanager
def claimed_output(output: str, kind: str, args: TrainingArguments) -> Iterator[str]:
    """Claims a recipe's output, and the training folder beside it, for as long as the recipe runs: before any work,
    another writer or somebody's files there are told. The first process claims it for all, and no other goes on before.

    Yields:
        The output as every process must write it: absolute, links followed. `args.output_dir` is beside it.

    Raises:
        HlmError: as `hlm.artefacts.claimed`; or the training folder holds somebody's files. Every process raises it.
    """
    target = str(resolved(output))
    args.output_dir = f"{target}.training"
    refusal = None
    with contextlib.ExitStack() as stack:
        if args.process_index == 0:
            try:
                stack.enter_context(claimed(output, kind))
                take_folder(args.output_dir)
                stack.callback(leave_folder, args.output_dir)
            except HlmError as error:
                refusal = error
        # One that went ahead would write into a training folder not yet taken, which then looks like somebody's.
        [refusal] = broadcast_object_list([refusal])
        if refusal is not None:
            raise refusal
        yield target


def checkpoint_folder(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def mark_whole(checkpoint: Path) -> None:
    """Marks a checkpoint that every process has written. Every process must call it and hashes what it wrote itself:
    on a shared disk, one does not see at once what another has written."""
    process = PartialState()
    mine = {
        path.relative_to(checkpoint).as_posix(): _record(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and _writer(path) == process.process_index
    }
    files = dict(gather_object(list(mine.items())))
    if process.is_main_process:
        write_json(checkpoint / WHOLE, {"files": files})
    process.wait_for_everyone()


def fault(checkpoint: Path, names: set[str] | None = None) -> str | None:
    """What is wrong with a checkpoint, or with these of its files; None where it is as it was saved."""
    mark = checkpoint / WHOLE
    if not mark.is_file():
        return "it was not finished" if checkpoint.is_dir() else "it is gone"
    try:
        files = json.loads(mark.read_text(encoding="utf-8"))["files"]
        wanted = {name: record for name, record in files.items() if names is None or name in names}
        for name, record in wanted.items():
            path, size = checkpoint / name, record["bytes"]
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, {size} were saved"
            if _record(path) != record:
                return f"{name} is not what was saved"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{WHOLE}, its list of files, cannot be read"
    if not wanted or not (names or {STATE, TRAINER_STATE}) <= wanted.keys():
        return f"{WHOLE} does not list its files"
    return None


def last_checkpoint(folder: str | Path, *, best: bool = False) -> str | None:
    """The newest checkpoint that a run can go on from; those passed over are named in the log, with the reason.

    Args:
        best: the run ends with its best checkpoint, so that one must be there too.
    """
    found = {int(path.name.rsplit("-", 1)[1]): path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    for _, checkpoint in sorted(found.items(), reverse=True):
        reason = fault(checkpoint)
        if reason is None and best:
            step = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE)).best_global_step
            kept = checkpoint_folder(folder, step) if step else checkpoint
            missing = fault(kept, {STATE})
            reason = missing and f"of {kept.name}, the best until then, {missing}"
        if reason is None:
            return str(checkpoint)
        logger.warning("%s is not resumed: %s", checkpoint, reason)
    if found:
        logger.warning("%s: no whole checkpoint; training starts anew", folder)
    return None


def check_same_run(folder: str | Path, identity: dict[str, Any]) -> None:
    """Refuses checkpoints of another run. A folder without a whole checkpoint holds nothing to lose and is taken over.

    Args:
        identity: {"inputs": fingerprints, "config": values}: what the run is. Where its inputs lie does not count.

    Raises:
        HlmError: names what differs.
    """
    folder = Path(folder)
    path = folder / IDENTITY
    if not path.is_file() or not any(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{WHOLE}")):
        return
    try:
        before = without(PATHS, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise HlmError(f"{path} cannot be read ({error}); delete {folder} to start anew") from error
    now = without(PATHS, json.loads(json.dumps(identity)))
    for part in ("inputs", "config"):
        old, new = before[part], now[part]
        differing = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        if differing:
            name = differing[0]
            raise HlmError(
                f"{folder} holds checkpoints of another run: {part} '{name}' was {old.get(name)!r}, now "
                f"{new.get(name)!r}; set it back to resume, or delete {folder} to start anew"
            )


def _writer(path: Path) -> int:
    match = _OF_PROCESS.match(path.name)
    return int(match[1]) if match else 0


def _record(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
