"""The pages under docs/ say nothing that does not run: commands, settings, links."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from test_readme import COMMANDS as README_COMMANDS
from test_readme import commands_of, config_types

from hlm import cli
from hlm.embedding.given import needs_model, read_settings
from hlm.planning.run_file import RunFile
from hlm.recipe_files import init, sets
from hlm.step_table import STEPS
from hlm.steps import PARTS, EmbedConfig
from hlm.teacher_settings import EndpointSettings, ReadySettings
from recipes.quickstart import named_in

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
OWN = {"your-data"}  # tests/test_your_data.py runs its commands, one after the other
COMMANDS = sorted(
    {
        command.strip()
        for page in PAGES
        if page.stem not in OWN
        for command in commands_of(page.read_text().replace("   ", ""))
    }
)
RUN = {"init", "plan", "doctor"}  # what ends in seconds is run; the others run elsewhere, as the README's


def test_there_are_pages_and_the_readme_names_each():
    assert len(PAGES) >= 2
    assert set(re.findall(r"\(docs/([\w-]+\.md)\)", (ROOT / "README.md").read_text())) == {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_and_columns_exist(page):
    """What is written as `name: value` is a setting of a step, and what is written as hlm <name> is a command."""
    known = {
        name for step in STEPS.values() for kind in config_types(step.script) for name in kind.__dataclass_fields__
    } | {*EndpointSettings.__dataclass_fields__, *ReadySettings.__dataclass_fields__}
    text = page.read_text()
    for name in re.findall(r"`(\w+): [^`]+`", text):
        assert name in known, name
    for name in re.findall(r"`hlm ([a-z_]+)[ `]", text):
        assert name in cli.SCRIPTS or re.search(rf'add_parser\("{name}"', (ROOT / "hlm/cli.py").read_text()), name


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_or_are_the_readmes(command, tmp_path, monkeypatch, capsys):
    program, name, *words = shlex.split(command)
    assert program == "hlm"
    monkeypatch.chdir(tmp_path)
    if name in RUN:
        if name != "init":
            init("mine", "quickstart")
        assert cli.main([name, *words]) == 0, capsys.readouterr().err
    elif name in cli.SCRIPTS:
        init("mine", "quickstart")
        config, flags = words[words.index("--config") + 1], [word for word in words if word.startswith("--")]
        assert Path(config).is_file()
        known = {field for kind in config_types(name) for field in kind.__dataclass_fields__} | {"config", "budget"}
        assert {flag.removeprefix("--") for flag in flags} <= known
    else:
        assert command.split()[:2] in [one.split()[:2] for one in README_COMMANDS]
        cli.parser().parse_args([name, *words])


def test_the_settings_of_any_teacher_are_those_that_there_are():
    page = (ROOT / "docs/any-teacher.md").read_text()
    (table,) = re.findall(r"^\| setting \| meaning \|\n(.*?)\n\n", page, re.M | re.S)
    told = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines()[1:]))
    assert {*told, "kind"} == set(EndpointSettings.__dataclass_fields__)
    one, ready = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", page, re.S))
    assert set(one) <= set(RunFile.__dataclass_fields__)
    for settings in (one["steps"]["embed"], ready):
        config = EmbedConfig(**{"data": "data", "output": "output"} | settings)
        endpoint, files = read_settings(config)
        assert not needs_model(config) and (endpoint or set(files) == set(PARTS))


def test_the_set_of_any_teacher_fits_together():
    """What a step reads under runs/ another writes before it, and the settings are fields."""
    written = {"runs/any_teacher/data"}
    steps = {name: yaml.safe_load(path.read_text()) for path in sets()["any_teacher"].iterdir() if (name := path.stem)}
    for name in [name for name in STEPS if name in steps]:
        for read in named_in([steps[name].get(setting) for setting in STEPS[name].reads]):
            home = Path(read)
            assert not read.startswith("runs/") or written & {read, str(home.parent)}, (name, read)
        output = steps[name].get("output", "")  # publishing writes on the Hub
        written |= {f"{output}/{STEPS[name].writes}" if STEPS[name].is_report else output}
    read_settings(EmbedConfig(**steps["embed"]))
