"""Strict settings: a YAML mapping or keywords -> dataclasses. Whatever a user mistypes (a key, a type) ends in one
`HlmError` that names it, with the closest match.

Loads neither torch nor transformers: a plan, the runner of all steps and `hlm --help` read settings too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import functools
import inspect
import os
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from hlm.errors import HlmError

T = TypeVar("T")

ON_THE_COMMAND_LINE = "set `{0}: ...` in the --config file or --{0} on the command line"


def keywords(*dataclass_types: type) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorates a step that takes dataclasses: it is called with their fields as plain arguments, and they are the one
    place that names the settings and their defaults.

        @keywords(AlignConfig, TrainingArguments)
        def align(config: AlignConfig, args: TrainingArguments) -> Path: ...

        align("bert", "data", "vectors", "aligned", objective="cosine", learning_rate=1e-4)

    Settings of the first dataclass without a default may be given by their place; a path may stand for a text. What
    the step itself takes as keywords only is handed on.

    Raises (the decorated step):
        HlmError: an unknown setting (with the closest match), a missing one, a value of another type, or one that a
            dataclass' own check refuses; each names the step.
    """
    hints = hints_of(*dataclass_types)
    required = [name for name, default in defaults_of(dataclass_types[0]).items() if default is dataclasses.MISSING]

    def decorate(step: Callable[..., T]) -> Callable[..., T]:
        name = step.__name__
        more = {key for key, value in inspect.signature(step).parameters.items() if value.kind is value.KEYWORD_ONLY}

        @functools.wraps(step)
        def call(*places: Any, **settings: Any) -> T:
            twice = [key for key in required[: len(places)] if key in settings]
            if twice or len(places) > len(required):
                raise TypeError(
                    f"{name}() takes {', '.join(required)} by place, each once, found {len(places)} values"
                    + (f" and {twice[0]}=" if twice else "")
                )
            settings |= zip(required, places, strict=False)
            own = {key: settings.pop(key) for key in more & settings.keys()}
            given = {}
            for key, value in settings.items():
                if key not in hints:
                    raise HlmError(f"{name}: unknown setting '{key}'{closest(key, hints)}")
                given[key] = coerce(_as_yaml(value), hints[key], f"{name}: {key}")
            for dataclass_type in dataclass_types:
                check_required(dataclass_type, given, f"{name}: ", "pass {0}=...")
            return step(*(build(dataclass_type, given) for dataclass_type in dataclass_types), **own)

        call.__signature__ = _signature(dataclass_types, step)  # type: ignore[attr-defined]  # what help() shows
        return call

    return decorate


def _as_yaml(value: Any) -> Any:
    """The same value in the types that YAML has: text for a path, a list for a tuple."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {_as_yaml(key): _as_yaml(one) for key, one in value.items()}
    return [_as_yaml(one) for one in value] if isinstance(value, list | tuple) else value


def _signature(dataclass_types: tuple[type, ...], step: Callable[..., Any]) -> inspect.Signature:
    """The first dataclass's fields by name; further ones, of hundreds of fields, as `**` and their name."""
    first, *others = dataclass_types
    hints = hints_of(first)
    parameters = []
    for name, default in defaults_of(first).items():
        place = default is dataclasses.MISSING
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if place else inspect.Parameter.KEYWORD_ONLY
        default = inspect.Parameter.empty if place else default
        parameters.append(inspect.Parameter(name, kind, default=default, annotation=hints[name]))
    own = inspect.signature(step)
    parameters += [one for one in own.parameters.values() if one.kind is one.KEYWORD_ONLY]
    parameters.sort(key=lambda one: one.kind)
    for other in others:
        parameters.append(inspect.Parameter(other.__name__, inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters, return_annotation=own.return_annotation)


def hints_of(*dataclass_types: type) -> dict[str, Any]:
    """Field -> type of everything that can be set in these dataclasses."""
    hints: dict[str, Any] = {}
    for dataclass_type in dataclass_types:
        resolved = get_type_hints(dataclass_type)
        hints |= {item.name: resolved[item.name] for item in dataclasses.fields(dataclass_type) if item.init}
    return hints


def read_section(dataclass_type: type, given: dict[str, Any], where: str) -> Any:
    """An instance of `dataclass_type` from a mapping within a field, e.g. one of a recipe's systems.

    Raises:
        HlmError: unknown key (with the closest match), wrong type or missing key, each after `where`.
    """
    hints = get_type_hints(dataclass_type)
    for key in given:
        if key not in hints:
            raise HlmError(f"{where}: unknown key '{key}'{closest(str(key), hints)}; it takes {', '.join(hints)}")
    return build(dataclass_type, {key: coerce(value, hints[key], f"{where}: {key}") for key, value in given.items()})


def defaults_of(dataclass_type: type) -> dict[str, Any]:
    """Field -> default; `dataclasses.MISSING` for a setting that has none."""
    return {
        item.name: item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        for item in dataclasses.fields(dataclass_type)
        if item.init
    }


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that refuses a key given twice (plain YAML silently keeps the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise HlmError(
                    f"{self.name}, line {line}: key '{key.value}' was given before on line {seen[key.value]}; keep one"
                )
            seen[str(key.value)] = line
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str, hints: dict[str, Any]) -> dict[str, Any]:
    """Reads a flat mapping of fields, every value checked against its field's type."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HlmError(f"--config: cannot read '{path}' ({error}); give the path of a YAML file") from error
    loader = _UniqueKeyLoader(text)
    loader.name = path
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise HlmError(f"{path}: expected `key: value` lines, found a {node.id}; write one key for each field")
        lines = {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
        values = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise HlmError(f"{path} is not valid YAML: {error}") from error
    finally:
        loader.dispose()
    checked = {}
    for key, value in values.items():
        where = f"{path}, line {lines.get(str(key), '?')}"
        if key not in hints:
            raise HlmError(f"{where}: unknown key '{key}'{closest(str(key), hints)}; --help-all lists all")
        checked[key] = coerce(value, hints[key], f"{where}: {key}")
    return checked


def build(dataclass_type: type[T], given: dict[str, Any]) -> T:
    """An instance from values that fit its fields; keys of others are left alone.

    Raises:
        HlmError: a missing setting, or a value that the dataclass' own check refuses.
    """
    check_required(dataclass_type, given)
    values = {name: given[name] for name in defaults_of(dataclass_type) if name in given}
    try:
        return dataclass_type(**values)
    except HlmError:
        raise
    except ValueError as error:  # the trainer's arguments check themselves and each other
        raise HlmError(f"{dataclass_type.__name__}: {error}") from error


def check_required(
    dataclass_type: type, given: dict[str, Any], where: str = "", remedy: str = ON_THE_COMMAND_LINE
) -> None:
    """Refuses to go on without a setting that has no default; `remedy` says {0} for its name."""
    defaults = defaults_of(dataclass_type)
    missing = [name for name, default in defaults.items() if default is dataclasses.MISSING and name not in given]
    if missing:
        s = "s" if len(missing) > 1 else ""
        raise HlmError(f"{where}missing required setting{s}: {', '.join(missing)}; {remedy.format(missing[0])}")


def closest(word: str, known: Iterable[str], *, prefix: str = "", cutoff: float = 0.5) -> str:
    """The end of an error message, `; did you mean '...'?`, or "" where nothing known is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean '{prefix}{matches[0]}'?" if matches else ""


def arms(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


class _WrongType(Exception):
    pass


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the field's type; only loss-free readings are made (int -> float, "1e-5" -> float)."""
    try:
        return _fit(value, hint)
    except _WrongType:
        note = ""
        if isinstance(value, bool) and any(arm is str or get_origin(arm) is Literal for arm in arms(hint)):
            note = " (YAML reads a bare yes, no, on or off as a boolean: put it in quotes)"
        elif isinstance(value, (int, float)) and str in arms(hint):
            note = " (put it in quotes)"
        raise HlmError(f"{where}: expected {_describe(hint)}, found {value!r} ({type(value).__name__}){note}") from None


def overridden(settings: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A step's settings with others over them. A learning rate of one's own is not one of several to try."""
    if "learning_rate" in own:
        settings = {name: value for name, value in settings.items() if name != "try_learning_rates"}
    return {**settings, **own}


def _fit(value: Any, hint: Any) -> Any:
    choices = arms(hint)
    if len(choices) > 1:
        if type(value) in choices:  # an exact fit goes before any reading: "1" stays text for `float | str`
            return value
        for arm in choices:
            with contextlib.suppress(_WrongType):
                return _fit(value, arm)
        raise _WrongType
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or (hint is type(None) and value is None):
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-5, without a dot, as a string
        except ValueError as error:
            raise _WrongType from error
    if hint in (int, bool, str) and type(value) is hint:
        return value
    if origin is Literal and any(value == choice and type(value) is type(choice) for choice in args):
        return value
    if isinstance(hint, type) and issubclass(hint, Path) and isinstance(value, (str, Path)):
        return hint(value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        if isinstance(value, hint):
            return value
        if value in [member.value for member in hint]:
            return hint(value)
    if (hint is list or origin is list) and isinstance(value, list):
        return [_fit(item, args[0]) for item in value] if args else value
    if (hint is dict or origin is dict) and isinstance(value, dict):
        return {_fit(k, args[0]): _fit(v, args[1]) for k, v in value.items()} if args else value
    raise _WrongType


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    words = []
    for arm in arms(hint):
        if get_origin(arm) is Literal:
            words.append("one of " + ", ".join(repr(choice) for choice in get_args(arm)))
        elif get_origin(arm) is list:
            words.append(f"a list, each {_describe(get_args(arm)[0])}")
        elif isinstance(arm, type) and issubclass(arm, enum.Enum):
            words.append("one of " + ", ".join(repr(member.value) for member in arm))
        elif arm is dict or get_origin(arm) is dict:
            words.append("a mapping")
        else:
            words.append(names.get(arm, str(arm)))
    return " or ".join(words)
