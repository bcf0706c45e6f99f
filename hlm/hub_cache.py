"""A Hub repository as a folder: downloaded into the Hub's cache and compared with its checksums."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from hlm.artefacts import HlmError
from hlm.hub_repository import AGAIN, Repository, hub_errors, same_content


def local_folder(
    id_or_folder: str | Path,
    *,
    revision: str | None = None,
    repo_type: str = "model",
    subfolder: str | None = None,
    patterns: Sequence[str] | None = None,
) -> Path:
    """A folder as it is, or a Hub repository (`owner/name`) downloaded into the Hub's cache.

    A file takes its name in the cache once it is whole: after an error the next call fetches what is missing. What
    was downloaded now is compared with the Hub's checksums.

    Args:
        id_or_folder: an existing folder wins over a repository of the same name.
        revision: branch, tag or commit of the repository; None: its main branch.
        repo_type: "model", "dataset" or "space".
        subfolder: what is wanted of it; nothing else is downloaded.
        patterns: the same as shell patterns of files' paths.

    Returns:
        The folder, with `subfolder` appended.

    Raises:
        HlmError: neither a folder nor a repository that can be read, or `subfolder` is not in it.
    """
    name = str(id_or_folder)
    root = Path(name)
    if not root.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise HlmError(
                f"expected a folder or a Hub id (owner/name) at {name}, found neither; run the step that writes it, or "
                "correct the path"
            )
        from huggingface_hub import snapshot_download

        wanted_files = [f"{subfolder}/*"] if subfolder else None if patterns is None else list(patterns)
        wanted = f"a folder or a Hub {repo_type} at {name}" + (f", revision {revision}" if revision else "")
        started = time.time()
        with hub_errors(f"expected {wanted}, found neither"):
            root = Path(snapshot_download(name, repo_type=repo_type, revision=revision, allow_patterns=wanted_files))
            _refuse_damaged(root, Repository(name, repo_type), started)
    folder = root / subfolder if subfolder else root
    if not folder.is_dir():
        raise HlmError(f"expected a folder '{subfolder}' in {name}, found none; name a repository that has it")
    return folder


def _refuse_damaged(root: Path, repository: Repository, since: float) -> None:
    """Compares the files of a snapshot that came since then with the Hub's checksums and removes those that differ;
    huggingface_hub compares their sizes alone.

    Raises:
        HlmError: there was one.
    """
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    new = {name: path for name, path in paths.items() if path.stat().st_mtime >= since - 0.1}  # coarse clocks
    damaged = sorted(new)  # until the opposite is shown
    try:
        hashes = repository.hashes(root.name) if new else {}  # a snapshot's folder is named by its commit
        damaged = [name for name in damaged if not same_content(new[name], hashes.get(name))]
    finally:
        for path in {one for name in damaged for one in (new[name], new[name].resolve())}:
            path.unlink(missing_ok=True)
    if damaged:
        raise HlmError(
            f"{repository.name}: expected {damaged[0]} as the Hub has it, found it damaged on arrival and removed it"
            f"{f', and {len(damaged) - 1} more' if damaged[1:] else ''}; {AGAIN}"
        )
