"""Steps called in Python: settings as keywords, with the command line's defaults and refusals."""

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hlm.errors import HlmError
from hlm.settings import keywords


@dataclass
class Own:
    data: str
    output: str
    layers: list[int] = field(default_factory=lambda: [4])
    systems: dict[str, Any] = field(default_factory=dict)
    rate: float = 0.5


@dataclass
class More:
    seed: int = 0
    batch: int = 8

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError("batch: expected at least 1")


@keywords(Own, More)
def step(config: Own, more: More, *, command: str = "none") -> tuple[Own, More, str]:
    """What it does."""
    return config, more, command


def test_settings_of_all_dataclasses_are_plain_arguments():
    assert step("d", "o") == (Own("d", "o"), More(), "none")
    assert step("d", output="o", rate=1, seed=3, command="c") == (Own("d", "o", rate=1.0), More(3), "c")
    given = step(Path("d"), Path("o"), layers=(1, 2), systems={"a": Path("x"), "b": {"corpus": Path("y")}})
    assert given[0] == Own("d", "o", [1, 2], {"a": "x", "b": {"corpus": "y"}})


def test_help_shows_the_settings_with_their_defaults():
    shown = str(inspect.signature(step))
    assert "data: str, output: str, *, layers: list[int] = [4], systems: " in shown
    assert "rate: float = 0.5, command: " in shown
    assert "**More" in shown and step.__doc__ == "What it does." and step.__name__ == "step"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "o", "rat": 1.0}, "step: unknown setting 'rat'; did you mean 'rate'"),
        ({"output": "o", "sed": 1}, "step: unknown setting 'sed'; did you mean 'seed'"),
        ({}, "step: missing required setting: output; pass output=..."),
        ({"output": "o", "rate": "fast"}, "step: rate: expected a number, found 'fast'"),
        ({"output": "o", "seed": True}, "step: seed: expected a whole number, found True"),
        ({"output": "o", "batch": 0}, "More: batch: expected at least 1"),
    ],
)
def test_what_is_wrong_is_named(settings, message):
    with pytest.raises(HlmError, match=message.replace("(", "\\(")):
        step("d", **settings)


def test_a_setting_given_twice_is_pythons_error():
    with pytest.raises(TypeError, match="data, output by place, each once, found 1 values and data="):
        step("d", data="e", output="o")
    with pytest.raises(TypeError, match="found 3 values"):
        step("d", "o", "x")
