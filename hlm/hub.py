"""Folders <-> the Hub."""

from __future__ import annotations

from pathlib import Path

from hlm.artefacts import HlmError


def local_folder(
    id_or_folder: str | Path, *, revision: str | None = None, repo_type: str = "model", subfolder: str | None = None
) -> Path:
    """A folder as it is, or a Hub repository (`owner/name`) downloaded into the Hub's cache.

    Args:
        id_or_folder: an existing folder wins over a repository of the same name.
        revision: branch, tag or commit of the repository; None: its main branch.
        repo_type: "model" or "dataset".
        subfolder: what is wanted of it; nothing else is downloaded.

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
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        patterns = None if subfolder is None else [f"{subfolder}/*"]
        try:
            root = Path(snapshot_download(name, repo_type=repo_type, revision=revision, allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise HlmError(
                f"expected a folder or a Hub {repo_type} at {name}"
                + (f", revision {revision}" if revision else "")
                + f", found neither ({type(error).__name__}: {str(error).splitlines()[0]}); correct the name, run the "
                "step that writes the folder, or log in with `hf auth login` where the repository is private"
            ) from error
    folder = root / subfolder if subfolder else root
    if not folder.is_dir():
        raise HlmError(f"expected a folder '{subfolder}' in {name}, found none; name a repository that has it")
    return folder
