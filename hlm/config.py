"""Strict YAML and command line -> dataclasses, and the frame every recipe runs in.

A recipe has a small dataclass (`hlm.steps`) and calls `given` or `parse`. Whatever a user mistypes (a key, a flag, a
type) ends in one `HlmError` that names it.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import logging
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from transformers.hf_argparser import HfArgumentParser

from hlm.artefacts import HlmError
from hlm.endings import tell_launcher, told_ending
from hlm.help_text import FLAGS, help_text
from hlm.progress import AboveBars
from hlm.quiet import quiet_others
from hlm.settings import arms, build, check_required, closest, coerce, hints_of, overridden, read_yaml


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
    values = given(*dataclass_types, argv=argv)
    return tuple(build(dataclass_type, values) for dataclass_type in dataclass_types)


def given(*dataclass_types: type, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """What `parse` fills the dataclasses from: the checked values of the file and of the command line, no defaults. For
    a step that takes these settings as plain arguments (`hlm.settings.keywords`)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if asked := set(FLAGS) & set(argv):
        everything = any("all" in flag for flag in asked)
        print(help_text(Path(sys.argv[0]).name, dataclass_types, everything=everything))
        raise SystemExit(0)
    hints = hints_of(*dataclass_types)
    parser = _Parser(dataclass_types, allow_abbrev=False, add_help=False)
    parser.add_argument("--config", help="YAML file with defaults for the fields below; flags win")
    pairs = {action.dest for action in parser._actions if isinstance(action, Pairs)}
    for action in parser._actions:
        if action.dest in pairs:
            action.type = None
        elif action.dest in hints and _needs_json(hints[action.dest]):
            action.type, action.nargs, action.choices = _json_value, None, None
        elif action.dest in hints and _number_or_list(hints[action.dest]):
            action.type, action.nargs, action.choices = _yaml_value, None, None
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
    values = read_yaml(config_path, hints) if config_path else {}
    for name, value in typed.items():
        value = coerce(value, hints[name], f"command line: --{name}")
        typed[name] = {**(values.get(name) or {}), **value} if name in pairs else value
    values = overridden(values, typed)
    for dataclass_type in dataclass_types:
        check_required(dataclass_type, values)
    return values


def run_recipe(main: Callable[[], object]) -> None:
    """Runs a recipe's `main` as a program: logging to stderr, and one line where a user can mend what stopped it.

    The main process (environment variable RANK unset or 0) logs at INFO, the other ranks at ERROR. Exit status: 2 for
    an `HlmError` and for what the system refuses (a full disk, no permission), 130 after Ctrl-C, 141 where the reader
    of the output went away. What other libraries show and a user can do nothing about is switched off.
    """
    log_to_stderr(is_main=os.environ.get("RANK", "0") == "0")
    quiet_others()
    gc.freeze()  # what is imported stays: to visit it all for garbage at the end takes a second
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


def log_to_stderr(*, is_main: bool = True) -> None:
    """Our own loggers speak at INFO, others, which would drown them at that level, at WARNING."""
    logging.basicConfig(
        level=logging.WARNING if is_main else logging.ERROR,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        handlers=[AboveBars()],
        force=True,
    )
    for name in ("hlm", "recipes", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO if is_main else logging.ERROR)


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
        name, _sign, value = values.rpartition("=")
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


def _json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected JSON, found {text!r} ({error})") from error


def _yaml_value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"expected YAML, found {text!r}") from error


def _number_or_list(hint: Any) -> bool:
    choices = arms(hint)
    return bool({int, float} & {*choices}) and any(get_origin(arm) is list for arm in choices)


def _needs_json(hint: Any) -> bool:
    """True for dicts and lists of more than scalars, unless the field takes a plain string as well."""
    choices = [arm for arm in arms(hint) if arm is not type(None)]
    if str in choices:
        return False
    return any(
        arm is dict
        or get_origin(arm) is dict
        or (get_origin(arm) is list and get_args(arm)[0] not in (str, int, float, bool))
        for arm in choices
    )
