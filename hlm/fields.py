"""Typed fields of a manifest or another JSON file: damaged JSON ends in one error that names the field."""

from __future__ import annotations

import json
import math
import operator
import types
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints, is_typeddict

from hlm.artefacts import HlmError

T = TypeVar("T")

_KINDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    dict: "a mapping",
    list: "a list",
    bool: "true or false",
}
# No file on this earth has more rows or bytes; larger numbers overflow NumPy's and FAISS's 64 bits.
MOST = 2**56
REMEDY = "copy or pull the folder again, or run the step that writes it again"


def field(
    record: Any, kind: type[T], *path: str | int, where: Path | str, least: int | None = None, most: int | None = None
) -> T:
    """The value at `path` (keys of mappings, numbers of list entries) of a value read from JSON.

    Args:
        kind: str, int, float (any finite number), dict, list or bool.
        where: the file, for the message.
        least, most: bounds of a number; a whole number is never above `MOST`.

    Raises:
        HlmError: nothing at `path`, another type, or out of bounds.
    """
    value: Any = record
    for step in path:
        holds = isinstance(value, dict) and step in value
        if not holds and not (isinstance(value, list) and isinstance(step, int) and 0 <= step < len(value)):
            raise _refused(kind, path, where, "nothing", least, most)
        value = value[step]
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise _refused(kind, path, where, shown(value), least, most)
    if isinstance(value, int | float) and kind in (int, float):
        highest = most if most is not None else MOST
        if not (math.isfinite(value) if isinstance(value, float) else abs(value) <= MOST):
            raise _refused(kind, path, where, shown(value), least, most)
        if value > highest or (least is not None and value < least):
            raise _refused(kind, path, where, shown(value), least, highest)
    return value


def optional(record: Any, kind: type[T], *path: str | int, where: Path | str, **bounds: int | None) -> T | None:
    """`field`, or None where the last key of `path` is not there or null."""
    *outer, last = path
    holder = field(record, dict, *outer, where=where)
    return None if holder.get(last) is None else field(record, kind, *path, where=where, **bounds)


def check_type(record: Any, kind: Any, *path: str | int, where: Path | str) -> None:
    """Refuses a value read from JSON that is not what a type says; keys that a TypedDict does not name are let through.

    Args:
        kind: a TypedDict, dict[str, ...], list[...], a type that `field` takes, one of these or None, or Any.
        path: where the value is within `record`.

    Raises:
        HlmError: names the first field that is missing or of another type.
    """
    if kind is Any:
        return
    if is_typeddict(kind):
        found = field(record, dict, *path, where=where)
        for name, inner in get_type_hints(kind).items():
            if name in kind.__required_keys__ or name in found:
                check_type(record, inner, *path, name, where=where)
    elif get_origin(kind) is dict:
        for name in field(record, dict, *path, where=where):
            check_type(record, get_args(kind)[1], *path, name, where=where)
    elif get_origin(kind) is list:
        for place in range(len(field(record, list, *path, where=where))):
            check_type(record, get_args(kind)[0], *path, place, where=where)
    elif isinstance(kind, types.UnionType):
        (inner,) = (one for one in get_args(kind) if one is not types.NoneType)
        holder = field(record, dict, *path[:-1], where=where)
        if path[-1] not in holder or holder[path[-1]] is not None:
            check_type(record, inner, *path, where=where)
    else:
        field(record, kind, *path, where=where)


def whole_number(name: str, value: Any, *, least: int, most: int | None = None) -> int:
    """An argument that counts something, as int: NumPy's integers count as well, True and 1.0 do not.

    Raises:
        HlmError: no whole number, or out of bounds.
    """
    bounds = f"{least} or more" if most is None else f"{least} to {most}"
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least or (most is not None and number > most):
        raise HlmError(f"{name}: expected {bounds}, a whole number, found {shown(value)}; correct it")
    return number


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        HlmError: no file to read, no JSON, or another value than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HlmError(f"{path}: expected a JSON object, found none to read ({error}); {REMEDY}") from error
    if not isinstance(value, dict):
        raise HlmError(f"{path}: expected a JSON object, found {shown(value)}; {REMEDY}")
    return value


def shown(value: Any) -> str:
    """A value as a message shows it, cut to one short line."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _refused(
    kind: type, path: tuple[str | int, ...], where: Path | str, found: str, least: int | None, most: int | None
) -> HlmError:
    bounds = "" if least is None else f" of {least} or more" if most is None else f" from {least} to {most}"
    name = ".".join(map(str, path))
    return HlmError(f"{where}: expected {_KINDS[kind]}{bounds} as '{name}', found {found}; {REMEDY}")
