"""What `--help` of a recipe prints: its own settings first; `--help-all` adds those of the trainer."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import os
import re
import shutil
import sys
import textwrap
import types
import typing
from typing import Any

FLAGS = ("-h", "--help", "--help-all", "--help_all")
# Of the trainer's settings, named where the others are left out.
SHOWN = "--learning_rate, --num_train_epochs, --max_steps, --per_device_train_batch_size, --eval_steps, --seed"
PLACEHOLDERS = {int: "N", float: "X", str: "TEXT", bool: "true|false", type(None): "null"}


def help_text(program: str, dataclass_types: tuple[type, ...], *, everything: bool) -> str:
    """The help of a recipe whose settings are the fields of `dataclass_types`, the recipe's own first.

    Args:
        program: how the recipe was started, e.g. "align.py".
        everything: lists the fields of all dataclasses, not only of the first.
    """
    own, *others = dataclass_types
    width = min(shutil.get_terminal_size().columns, 110)
    parts = [
        f"usage: {program} --config FILE [--SETTING VALUE ...]",
        _about(program, own),
        "settings, as `name: value` in the file or as flags, which win:\n" + _settings(own, width),
    ]
    for other in others:
        where = f"settings of the trainer ({other.__name__})"
        if everything:
            parts.append(f"{where}:\n" + _settings(other, width))
        else:
            count = sum(field.init for field in dataclasses.fields(other))
            parts.append(f"{where}: --help-all lists all {count}. Often set:\n  {SHOWN}")
    return "\n\n".join(part.strip("\n") for part in parts if part)


def _about(program: str, dataclass_type: type) -> str:
    """What the script says of itself; without one, as in a test, what the dataclass says."""
    main = sys.modules["__main__"]
    if os.path.basename(getattr(main, "__file__", None) or "") == program:
        return inspect.cleandoc(main.__doc__ or "")
    text = dataclass_type.__doc__ or ""
    return "" if text.startswith(f"{dataclass_type.__name__}(") else inspect.cleandoc(text)  # that is the signature


def _settings(dataclass_type: type, width: int) -> str:
    hints = typing.get_type_hints(dataclass_type)
    lines = []
    for field in dataclasses.fields(dataclass_type):
        if not field.init:
            continue
        flags = [f"--{field.name}", *field.metadata.get("aliases", [])]
        # An alias stands for one entry of a mapping, see `hlm.config.Pairs`.
        value = "NAME=VALUE" if len(flags) > 1 else placeholder(hints[field.name])
        lines.append(f"  {', '.join(flags)} {value}")
        text = re.sub(r"\s+", " ", str(field.metadata.get("help") or "")).strip()
        wrap = textwrap.TextWrapper(width=max(40, width), initial_indent=" " * 8, subsequent_indent=" " * 8)
        wrap.break_on_hyphens = False
        lines += wrap.wrap(f"{text} {_default(field)}".strip())
    return "\n".join(lines)


def placeholder(hint: Any) -> str:
    """What stands for a value of this type: int -> N, Literal["a", "b"] -> a|b, a mapping or list of them -> JSON."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        shown = [placeholder(arm) for arm in arguments if arm is not type(None)]
        return "|".join(dict.fromkeys(shown))
    if origin is typing.Literal:
        return "|".join(map(str, arguments))
    if origin is list and arguments[0] in PLACEHOLDERS:
        return f"{placeholder(arguments[0])} ..."
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "|".join(str(member.value) for member in hint)
    return PLACEHOLDERS.get(hint, "JSON")


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        default = field.default
    elif field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    else:
        return "(required)"
    if default in (None, [], {}, ""):
        return ""
    if isinstance(default, enum.Enum):
        default = default.value
    if isinstance(default, list):
        default = " ".join(map(str, default))
    return f"(default: {str(default).lower() if isinstance(default, bool) else default})"
