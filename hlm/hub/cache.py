"""A Hub repository as a folder: downloaded into the Hub's cache and compared with its checksums."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from hlm.artefacts import HlmError
from hlm.hub.changes import same_content
from hlm.hub.repository import AGAIN, TIMEOUT_S, check_id, hub_errors


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
    is downloaded now is compared with the Hub's checksums.

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
    if subfolder is not None and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise HlmError(f"subfolder: expected a folder inside {name}, found {subfolder!r}; correct the path")
    if not os.path.isdir(name):
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise HlmError(
                f"expected a folder or a Hub id (owner/name) at {name}, found neither; run the step that writes it, or "
                "correct the path"
            )
        try:
            check_id(name, repo_type)
        except HlmError as error:
            raise HlmError(f"expected a folder or a Hub id (owner/name) at {name!r}, found neither: {error}") from error
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.file_download import repo_folder_name

        wanted_files = [f"{subfolder}/*"] if subfolder else None if patterns is None else list(patterns)
        wanted = f"a folder or a Hub {repo_type} at {name}" + (f", revision {revision}" if revision else "")
        started = time.time()
        try:
            with hub_errors(f"expected {wanted}, found neither"):
                root = Path(
                    snapshot_download(name, repo_type=repo_type, revision=revision, allow_patterns=wanted_files)
                )
        finally:  # after an error too: the next call would take what is there as it is
            cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=repo_type)
            damaged = _remove_damaged(cache, started)
        if damaged:
            raise HlmError(
                f"{repo_type} {name}: expected {damaged[0]} as the Hub has it, found it damaged on arrival and removed "
                f"it{f', and {len(damaged) - 1} more' if damaged[1:] else ''}; {AGAIN}"
            )
    folder = root / subfolder if subfolder else root
    if not folder.is_dir():
        raise HlmError(f"expected a folder '{subfolder}' in {name}, found none; name a repository that has it")
    return folder


def hub_file(repo_id: str, file: str, *, revision: str | None = None) -> Path | None:
    """One file of a model's repository on the Hub, in the Hub's cache; None where the repository has no such file.

    The Hub is asked once: where it is out of reach, an older copy in the cache is taken at once. huggingface_hub alone
    would ask six times, for half a minute.

    Raises:
        HlmError: no such repository, or out of reach and not in the cache.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url

    with hub_errors(f"{file} of the model {repo_id} could not be read"):
        try:
            get_hf_file_metadata(hf_hub_url(repo_id, file, revision=revision), timeout=TIMEOUT_S)
        except errors.EntryNotFoundError:
            return None
        except (errors.HTTPError, OSError) as refused:
            try:
                return Path(hf_hub_download(repo_id, file, revision=revision, local_files_only=True))
            except errors.LocalEntryNotFoundError:
                raise refused from None
        return Path(hf_hub_download(repo_id, file, revision=revision))


def _remove_damaged(cache: Path, since: float) -> list[str]:
    """Removes what came into a repository's cache since then and differs from the hash it is named by;
    huggingface_hub compares sizes alone.

    Returns:
        The files' names in the repository. Nothing on a system whose cache has no links: there names are all it has.
    """
    blobs = [path for path in cache.glob("blobs/*") if not path.name.endswith(".incomplete")]
    new = [path for path in blobs if path.exists() and path.stat().st_mtime >= since - 0.1]  # coarse clocks
    damaged = {path.resolve() for path in new if not same_content(path, path.name)}
    if not damaged:
        return []
    links = [path for path in cache.glob("snapshots/*/**/*") if path.resolve() in damaged]
    for path in (*links, *damaged):
        path.unlink()
    return sorted({"/".join(path.relative_to(cache).parts[2:]) for path in links})
