"""The recipe's scripts and YAML files, of a checkout or of the installed package."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hlm.errors import HlmError
from hlm.outputs import resolved
from hlm.settings import closest

_PACKAGE = Path(__file__).resolve().parent
LAUNCH = "accelerate"  # the folder of launch files, which every set of configs refers to
STUDY = "study"  # the folder of questions about sets


def recipes() -> Path:
    """The folder of the scripts: `hlm/recipes` where HLM is installed, `recipes` beside it in a checkout."""
    places = (_PACKAGE / "recipes", _PACKAGE.parent / "recipes")
    found = next((place for place in places if (place / "configs").is_dir()), None)
    if found is None:
        raise HlmError(f"expected HLM's recipes at {places[0]}, found none; install HLM again")
    return found


def sets() -> dict[str, Path]:
    """The sets of configs that HLM comes with: name -> folder."""
    configs = recipes() / "configs"
    return {path.name: path for path in sorted(configs.iterdir()) if path.is_dir() and path.name not in (LAUNCH, STUDY)}


def init(folder: str | Path, like: str) -> list[Path]:
    """Copies a set of configs, and the launch files of accelerate, into a folder of the user's own.

    What the steps write goes to `runs/<name of the folder>` instead of `runs/<like>`. A path into a checkout of HLM
    that is not here is commented out.

    Args:
        folder: made where it is missing.
        like: the name of the set, such as "quickstart".

    Returns:
        The files, in the order of their names.

    Raises:
        HlmError: no such set, or a file in `folder` that would be overwritten.
    """
    if like not in (known := sets()):
        raise HlmError(f"--like: expected one of {', '.join(known)}, found '{like}'{closest(like, known)}")
    target = resolved(folder)
    paths = {path.name: path for path in known[like].glob("*.yaml")}
    paths |= {f"{LAUNCH}/{path.name}": path for path in (known[like].parent / LAUNCH).glob("*.yaml")}
    texts = {name: _own(path.read_text(encoding="utf-8"), folder, like) for name, path in sorted(paths.items())}
    there = [name for name in texts if os.path.lexists(target / name)]
    if there:
        more = ", ..." if there[3:] else ""
        raise HlmError(
            f"expected a folder without these configs, found {', '.join(there[:3])}{more} in {target}; nothing was "
            "written: name another folder, or move them"
        )
    for name, text in texts.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text, encoding="utf-8")
    return [target / name for name in texts]


def _own(text: str, folder: str | Path, like: str) -> str:
    """The same settings with the paths and commands of somebody who has HLM installed."""
    name = re.sub(r"[^\w.-]+", "-", resolved(folder).name)
    text = text.replace(f"runs/{like}/", f"runs/{name}/")
    text = re.sub(rf"(?m)\bruns/{like}$", f"runs/{name}", text)
    text = text.replace(f"recipes/configs/{like}", str(folder))
    text = text.replace(f"recipes/configs/{LAUNCH}/", f"{folder}/{LAUNCH}/")
    text = re.sub(r"\bpython recipes/(\w+)\.py\b", r"hlm \1", text)
    text = re.sub(r"(?<!\w)recipes/(\w+)\.py(?= --)", r"-m hlm.recipes.\1", text)
    if not Path("spaces").is_dir():
        text = re.sub(r"(?m)^(space: spaces/.*)$", r"# \1  (the demo's folder, in a checkout of HLM)", text)
    return text
