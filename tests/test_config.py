import dataclasses
import logging
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import pytest

from hlm.artefacts import HlmError
from hlm.config import Pairs, parse, run_recipe
from hlm.help_text import SHOWN
from hlm.settings import read_section
from hlm.steps import TeacherConfig
from hlm.training.trainer import TrainingArguments


@dataclass
class Settings:
    corpus: str = field(metadata={"help": "where the products are"})
    layers: list[int] = field(default_factory=lambda: [4])
    cascade: list[dict[str, Any]] | None = None
    sizes: dict[str, float] = field(default_factory=dict)
    kind: Literal["flat", "ivf"] = "flat"
    rate: Optional[float] = None  # noqa: UP045 - both spellings of an optional field must work
    steps: int = 10
    shuffle: bool = True
    note: str | None = None


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_yaml_sets_defaults_and_the_command_line_wins(yaml_file):
    path = yaml_file(
        "corpus: data\nlayers: [4, 2]\ncascade: [{layers: 4, ffn: 1024}, {layers: 2}]\nkind: ivf\nrate: 1e-5\n"
        "shuffle: false\nsizes: {a: 1e-3, b: 2}\n"
    )
    (settings,) = parse(Settings, argv=["--config", path, "--rate", "3e-4", "--layers", "8", "6", "--steps=5"])
    assert settings == Settings(
        corpus="data",
        layers=[8, 6],
        cascade=[{"layers": 4, "ffn": 1024}, {"layers": 2}],
        kind="ivf",
        rate=3e-4,
        steps=5,
        shuffle=False,
        sizes={"a": 1e-3, "b": 2.0},
    )
    (from_file,) = parse(Settings, argv=["--config", path])
    assert from_file.rate == 1e-5 and isinstance(from_file.rate, float)


def test_a_learning_rate_on_the_command_line_is_the_only_one(yaml_file):
    path = yaml_file("backbone: b\ndata: d\noutput: o\nlearning_rate: 1e-4\ntry_learning_rates: [1e-3]\n")

    def rates(*words):
        config, args = parse(TeacherConfig, TrainingArguments, argv=["--config", path, *words])
        return args.learning_rate, config.try_learning_rates

    assert rates() == rates("--max_steps", "3") == (1e-4, [1e-3])
    assert rates("--learning_rate", "5e-4") == (5e-4, [])
    assert rates("--learning_rate", "5e-4", "--try_learning_rates", "1e-2") == (5e-4, [1e-2])


def test_command_line_alone():
    (settings,) = parse(Settings, argv=["--corpus", "x", "--cascade", '[{"layers": 2}]', "--no_shuffle"])
    assert settings.cascade == [{"layers": 2}] and settings.shuffle is False
    assert settings.layers == [4] and settings.rate is None
    assert parse(Settings, argv=["--corpus", "x", "--shuffle", "false"])[0].shuffle is False


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("corpus: x\nlayer: [2]\n", ["line 2", "'layer'", "did you mean 'layers'"]),
        ("corpus: x\nsteps: 3\nsteps: 4\n", ["line 3", "'steps'", "line 2"]),
        ("corpus: x\nsizes:\n  a: 1\n  a: 2\n", ["line 4", "'a'"]),
        ("corpus: x\nsteps: many\n", ["line 2", "steps", "a whole number", "'many'"]),
        ("corpus: x\nsteps: true\n", ["steps", "a whole number", "True"]),
        ("corpus: x\nsteps: 1.5\n", ["steps", "a whole number", "1.5"]),
        ("corpus: x\nrate: fast\n", ["rate", "a number", "'fast'"]),
        ("corpus: x\nlayers: [4, two]\n", ["layers", "a whole number", "two"]),
        ("corpus: x\nkind: tree\n", ["kind", "'flat', 'ivf'", "'tree'"]),
        ("corpus: x\nshuffle: 'yes'\n", ["shuffle", "true or false", "'yes'"]),
        ("corpus: no\n", ["corpus", "text", "False", "quotes"]),
        ("corpus: 7\n", ["corpus", "text", "7", "quotes"]),
        ("steps: 3\n", ["missing required", "corpus", "--corpus"]),
        ("- a\n", ["key: value", "sequence"]),
        ("corpus: [\n", ["not valid YAML"]),
    ],
)
def test_bad_yaml_is_named(yaml_file, text, words):
    with pytest.raises(HlmError) as error:
        parse(Settings, argv=["--config", yaml_file(text)])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--corpus", "x", "--step", "3"], ["--step", "did you mean '--steps'"]),
        (["--corpus", "x", "--steps", "three"], ["--steps", "three"]),
        (["--corpus", "x", "--kind", "tree"], ["--kind", "tree"]),
        (["--corpus", "x", "--cascade", "[1"], ["--cascade", "JSON"]),
        (["--corpus", "x", "--cascade", "[1]"], ["--cascade", "a mapping", "[1]"]),
        (["--config", "nowhere.yaml"], ["--config", "nowhere.yaml"]),
        (["stray", "--corpus", "x"], ["stray"]),
    ],
)
def test_bad_command_line_is_named(argv, words):
    with pytest.raises(HlmError) as error:
        parse(Settings, argv=argv)
    for word in words:
        assert word in str(error.value)


@dataclass
class Share:
    share: float | list[float] | str = 1.0


@pytest.mark.parametrize(("word", "value"), [("auto", "auto"), ("0.5", 0.5), ("1", 1.0), ("[0, 0.5]", [0.0, 0.5])])
def test_a_number_or_a_list_is_read_as_in_the_file(word, value):
    (settings,) = parse(Share, argv=["--share", word])
    assert settings.share == value and type(settings.share) is type(value)
    with pytest.raises(HlmError, match="--share: expected YAML"):
        parse(Share, argv=["--share", "[0.5"])


@dataclass
class Gate:
    limits: dict[str, float] = field(default_factory=dict, metadata={"aliases": ["--limit"], "action": Pairs})


def test_a_dict_entry_by_entry(yaml_file):
    path = yaml_file("limits: {p99_ms: 15, recovery: 0.9}\n")
    (gate,) = parse(Gate, argv=["--config", path, "--limit", "recovery=0.98", "--limit=a=b=2", "--limits", "c=1e-3"])
    assert gate.limits == {"p99_ms": 15.0, "recovery": 0.98, "a=b": 2.0, "c": 1e-3}
    assert parse(Gate, argv=[])[0].limits == {}
    for argv, words in (
        (["--limit", "p99_ms"], "name=value, found 'p99_ms'"),
        (["--limit", "a=x"], "--limits.*'x'"),
        (["--limit", "a=1", "--limit", "a=2"], "'a' was given before"),
    ):
        with pytest.raises(HlmError, match=words):
            parse(Gate, argv=argv)


def test_a_section_is_as_strict_as_the_file():
    assert read_section(Settings, {"corpus": "x", "rate": "1e-3"}, "here").rate == 1e-3
    for given, words in (
        ({"corpus": "x", "step": 1}, "here: unknown key 'step'; did you mean 'steps'"),
        ({"corpus": "x", "steps": "1"}, "here: steps: expected a whole number, found '1'"),
        ({}, "missing required setting: corpus"),
    ):
        with pytest.raises(HlmError, match=words):
            read_section(Settings, given, "here")


def test_a_dataclass_own_check_becomes_one_error():
    @dataclass
    class Checked:
        size: int = 1

        def __post_init__(self):
            if self.size < 1:
                raise ValueError(f"size must be positive, not {self.size}")

    with pytest.raises(HlmError, match="Checked: size must be positive, not 0"):
        parse(Checked, argv=["--size", "0"])


def printed_help(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(*arguments[:-1], argv=[arguments[-1]])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_shows_every_field_with_its_type_and_default(capsys):
    printed = printed_help(capsys, Settings, "--help")
    assert "--config FILE" in printed
    for field_, value, text in (
        ("corpus", "TEXT", "where the products are (required)"),
        ("layers", "N ...", "(default: 4)"),
        ("cascade", "JSON", ""),
        ("sizes", "JSON", ""),
        ("kind", "flat|ivf", "(default: flat)"),
        ("rate", "X", ""),
        ("steps", "N", "(default: 10)"),
        ("shuffle", "true|false", "(default: true)"),
    ):
        assert f"  --{field_} {value}\n" + (f"        {text}\n" if text else "") in printed, field_
    assert printed_help(capsys, Settings, "-h") == printed_help(capsys, Settings, "--help-all") == printed
    assert "--limits, --limit NAME=VALUE" in printed_help(capsys, Gate, "--help")


def test_help_leaves_the_trainers_settings_to_help_all(capsys):
    short = printed_help(capsys, Settings, TrainingArguments, "--help")
    assert "--corpus TEXT" in short and "--help-all lists all 1" in short and "--weight_decay" not in short
    assert short.index("--corpus") < short.index("--learning_rate") and len(short.splitlines()) < 40
    long = printed_help(capsys, Settings, TrainingArguments, "--help-all")
    for field_ in dataclasses.fields(TrainingArguments):
        assert (f"\n  --{field_.name} " in long) is field_.init
    assert long.index("--corpus") < long.index("--learning_rate")
    for name in re.findall(r"--(\w+)", SHOWN):
        assert f"\n  --{name} " in long


def test_trainer_arguments_share_the_file(yaml_file, tmp_path):
    from sentence_transformers import SentenceTransformerTrainingArguments

    path = yaml_file(
        f"corpus: x\nlearning_rate: 1e-4\neval_strategy: 'no'\nreport_to: none\nuse_cpu: true\noutput_dir: {tmp_path}\n"
        "accelerator_config: {use_seedable_sampler: true}\n"
    )
    settings, trainer = parse(
        Settings, SentenceTransformerTrainingArguments, argv=["--config", path, "--num_train_epochs", "2"]
    )
    assert settings.corpus == "x"
    assert trainer.learning_rate == 1e-4 and trainer.num_train_epochs == 2.0 and trainer.report_to == []
    assert trainer.accelerator_config.use_seedable_sampler is True
    with pytest.raises(HlmError, match="did you mean '--learning_rate'"):
        parse(Settings, SentenceTransformerTrainingArguments, argv=["--corpus", "x", "--lerning_rate", "1"])


def test_run_recipe_prints_one_line_and_exits_2(capsys):
    def broken():
        raise HlmError("expected this,\n  found that")

    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        with pytest.raises(SystemExit) as stop:
            run_recipe(broken)
    finally:
        root.handlers[:], root.level = before
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: expected this, found that\n"


@pytest.mark.parametrize(("rank", "expected"), [("0", ["hello", "careful"]), ("1", [])])
def test_only_the_main_process_logs(rank, expected):
    code = (
        "import logging; from hlm.config import run_recipe\n"
        "log = logging.getLogger('hlm.data.contract')\n"
        "run_recipe(lambda: (log.info('hello'), log.warning('careful')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"RANK": rank, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert [line.split(": ")[1] for line in done.stderr.splitlines()] == expected
