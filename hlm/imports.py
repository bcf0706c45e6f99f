"""Which files of the library a script depends on: read from its imports, without running anything."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path


def sources(script: Path, library: Path) -> list[Path]:
    """The script and the library's files that it imports, directly or through others, in the order of their paths.

    A name that `from hlm import ...` takes from the library's `__init__` leads to its own module there, not to all that
    `__init__` offers.

    Args:
        library: the folder of the package `hlm`.
    """
    found, left = {script}, [script]
    while left:
        path = left.pop()
        if path == library / "__init__.py":
            continue  # it offers everything, lazily; what is taken from it is followed below
        for module in _imported(path.read_text(encoding="utf-8"), library):
            if module not in found:
                found.add(module)
                left.append(module)
    return sorted(found)


@functools.cache  # by the text: eleven steps import much the same
def _imported(text: str, library: Path) -> tuple[Path, ...]:
    return tuple(_modules(text, library))


def _modules(text: str, library: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files(alias.name, library)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from _files(node.module, library)
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if node.module == library.name and not _module(name, library):
                    name = _offered(library).get(alias.name, node.module)
                yield from _files(name, library)


def _files(module: str, library: Path) -> Iterator[Path]:
    """The file of a module of the library and those of the packages around it; nothing for any other name."""
    parts = module.split(".")
    if parts[0] == library.name:
        for end in range(1, len(parts) + 1):
            if path := _module(".".join(parts[:end]), library):
                yield path


def _module(name: str, library: Path) -> Path | None:
    place = library.joinpath(*name.split(".")[1:])
    return next((path for path in (place / "__init__.py", place.with_suffix(".py")) if path.is_file()), None)


def _offered(library: Path) -> dict[str, str]:
    """Public name -> module, from the imports for type checkers in the library's `__init__`."""
    init = library / "__init__.py"
    tree = ast.parse(init.read_text(encoding="utf-8")) if init.is_file() else ast.Module([], [])
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: node.module or "" for node in nodes for alias in node.names}
