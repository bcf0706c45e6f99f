"""Strict YAML and command line -> dataclasses, and the frame every recipe runs in.

A recipe declares a small dataclass and calls `parse`; the library itself takes plain arguments and never sees a
config. Whatever a user mistypes (a key, a flag, a type) ends in one `HlmError` that names it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import enum
import io
import json
import logging
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from transformers.hf_argparser import HfArgumentParser

from hlm.artefacts import HlmError
from hlm.endings import tell_launcher, told_ending
from hlm.help_text import FLAGS, help_text
from hlm.progress import AboveBars
from hlm.quiet import quiet_others


def parse(*dataclass_types: type, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Fills the dataclasses from `--config file.yaml` and from flags; a flag wins over the file.

    Fields are flat keys of one YAML mapping and `--field value` on the command line. Fields that are a dict or a list
    of anything but scalars are given as JSON on the command line, or entry by entry (see `Pairs`). `--help` prints the
    fields of the first dataclass and exits, `--help-all` those of all.

    Args:
        dataclass_types: dataclasses without a field in common, e.g. a recipe's own and
            `SentenceTransformerTrainingArguments`.
        argv: the command line without the program's name; `sys.argv[1:]` by default.

    Returns:
        One instance for each dataclass, in the order given.

    Raises:
        HlmError: unknown key or flag (with the closest match), duplicate key, wrong type, missing required field,
            unreadable file, or a value that a dataclass' own check refuses.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if asked := set(FLAGS) & set(argv):
        everything = any("all" in flag for flag in asked)
        print(help_text(Path(sys.argv[0]).name, dataclass_types, everything=everything))
        raise SystemExit(0)
    hints: dict[str, Any] = {}
    for dataclass_type in dataclass_types:
        resolved = get_type_hints(dataclass_type)
        hints |= {field.name: resolved[field.name] for field in dataclasses.fields(dataclass_type) if field.init}

    parser = _Parser(dataclass_types, allow_abbrev=False, add_help=False)
    parser.add_argument("--config", help="YAML file with defaults for the fields below; flags win")
    pairs = {action.dest for action in parser._actions if isinstance(action, Pairs)}
    for action in parser._actions:
        if action.dest in pairs:
            action.type = None
        elif action.dest in hints and _needs_json(hints[action.dest]):
            action.type, action.nargs, action.choices = _json_value, None, None
    # Only what was typed may come back from argparse: defaults are filled in by the dataclasses themselves, so that
    # "given on the command line" and "left at its default" stay apart.
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    namespace, rest = parser.parse_known_args(argv)
    for word in rest:
        flag = word.split("=")[0]
        known = flag.lstrip("-").replace("-", "_")
        near = closest(known, [*hints, "config"], prefix="--")
        raise HlmError(f"command line: unknown argument '{flag}'{near}; --help-all lists all")

    typed = vars(namespace)
    config_path = typed.pop("config", None)
    given = _read_yaml(config_path, hints) if config_path else {}
    for name, value in typed.items():
        value = _coerce(value, hints[name], f"command line: --{name}")
        given[name] = {**(given.get(name) or {}), **value} if name in pairs else value
    return tuple(_build(dataclass_type, given) for dataclass_type in dataclass_types)


def read_section(dataclass_type: type, given: dict[str, Any], where: str) -> Any:
    """An instance of `dataclass_type` from a mapping within a field, e.g. one of a recipe's systems.

    Raises:
        HlmError: unknown key (with the closest match), wrong type or missing key, each after `where`.
    """
    hints = get_type_hints(dataclass_type)
    for key in given:
        if key not in hints:
            raise HlmError(f"{where}: unknown key '{key}'{closest(str(key), hints)}; it takes {', '.join(hints)}")
    return _build(dataclass_type, {key: _coerce(value, hints[key], f"{where}: {key}") for key, value in given.items()})


def run_recipe(main: Callable[[], object]) -> None:
    """Runs a recipe's `main` as a program: logging to stderr, and one line where a user can mend what stopped it.

    The main process (environment variable RANK unset or 0) logs at INFO, the other ranks at ERROR. Exit status: 2 for
    an `HlmError` and for what the system refuses (a full disk, no permission), 130 after Ctrl-C, 141 where the reader
    of the output went away. What other libraries show and a user can do nothing about is switched off.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.WARNING if is_main else logging.ERROR,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        handlers=[AboveBars()],
        force=True,
    )
    # Our own loggers speak at INFO; HTTP clients and the like would drown them at that level.
    for name in ("hlm", "recipes", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO if is_main else logging.ERROR)
    quiet_others()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
    try:
        main()
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        status, line = told_ending(error)
        if line:
            tell_launcher(line)
            print(line, *_of_the_launcher(), sep="\n", file=sys.stderr, flush=True)
        raise SystemExit(status) from error


def _of_the_launcher() -> list[str]:
    """`accelerate launch` of one process adds a traceback of its own, unless it is told not to."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return []
    return ["(a traceback that follows this line is accelerate launch's own; its flag --quiet leaves it out)"]


def check_processes(found: int) -> None:
    """Refuses a launch that silently fell back to fewer processes than it was asked for.

    Args:
        found: the processes that work together in this run.

    Raises:
        HlmError: another number was started, or `accelerate launch` was asked for several and started one.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if found != started:
        raise HlmError(
            f"expected {started} processes (WORLD_SIZE), found {found} working together; start the "
            "recipe with accelerate launch or torchrun, once"
        )
    # `accelerate launch` names a port where it was asked for several processes, but without GPUs it starts only one.
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        raise HlmError(
            "expected the several processes that accelerate launch was asked for, found 1, as it starts several on "
            "GPUs alone; on CPUs start them with torchrun --nproc_per_node N, or ask for --num_processes 1"
        )


class Pairs(argparse.Action):
    """For a dict field, as its metadata's "action": one `--flag name=value` for each entry, beside the file's; an entry
    that the file has as well is the command line's."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        name, sign, value = values.rpartition("=")
        entries = getattr(namespace, self.dest, {})
        if not name:
            parser.error(f"argument {option}: expected name=value, found {values!r}")
        if name in entries:
            parser.error(f"argument {option}: '{name}' was given before; keep one")
        setattr(namespace, self.dest, entries | {name: value})


class _Parser(HfArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        # argparse would print the usage (hundreds of flags with the trainer's) and exit.
        raise HlmError(f"command line: {message}; --help-all lists all")


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


def _read_yaml(path: str, hints: dict[str, Any]) -> dict[str, Any]:
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
        checked[key] = _coerce(value, hints[key], f"{where}: {key}")
    return checked


def _build(dataclass_type: type, given: dict[str, Any]) -> Any:
    fields = [field for field in dataclasses.fields(dataclass_type) if field.init]
    missing = [
        field.name
        for field in fields
        if field.name not in given
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise HlmError(
            f"missing required setting{'s' if len(missing) > 1 else ''}: {', '.join(missing)}; set "
            f"`{missing[0]}: ...` in the --config file or --{missing[0]} on the command line"
        )
    values = {field.name: given[field.name] for field in fields if field.name in given}
    try:
        return dataclass_type(**values)
    except HlmError:
        raise
    except ValueError as error:  # the trainer's arguments check themselves and each other
        raise HlmError(f"{dataclass_type.__name__}: {error}") from error


def closest(word: str, known: Iterable[str], *, prefix: str = "", cutoff: float = 0.5) -> str:
    """The end of an error message, `; did you mean '...'?`, or "" where nothing known is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean '{prefix}{matches[0]}'?" if matches else ""


def _json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected JSON, found {text!r} ({error})") from error


def _arms(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _needs_json(hint: Any) -> bool:
    """True for dicts and lists of more than scalars, unless the field takes a plain string as well."""
    arms = [arm for arm in _arms(hint) if arm is not type(None)]
    if str in arms:
        return False
    return any(
        arm is dict
        or get_origin(arm) is dict
        or (get_origin(arm) is list and get_args(arm)[0] not in (str, int, float, bool))
        for arm in arms
    )


class _WrongType(Exception):
    pass


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the field's type; only loss-free readings are made (int -> float, "1e-5" -> float)."""
    try:
        return _fit(value, hint)
    except _WrongType:
        note = ""
        if isinstance(value, bool) and any(arm is str or get_origin(arm) is Literal for arm in _arms(hint)):
            note = " (YAML reads a bare yes, no, on or off as a boolean: put it in quotes)"
        elif isinstance(value, (int, float)) and str in _arms(hint):
            note = " (put it in quotes)"
        raise HlmError(f"{where}: expected {_describe(hint)}, found {value!r} ({type(value).__name__}){note}") from None


def _fit(value: Any, hint: Any) -> Any:
    arms = _arms(hint)
    if len(arms) > 1:
        if type(value) in arms:  # an exact fit goes before any reading: "1" stays text for `float | str`
            return value
        for arm in arms:
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
    for arm in _arms(hint):
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
