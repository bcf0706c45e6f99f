"""The pages under docs/ say nothing that does not run: commands, settings, links."""

import re
import shlex
from pathlib import Path

import pytest
from test_readme import COMMANDS as README_COMMANDS
from test_readme import commands_of, config_types

from hlm import cli
from hlm.recipe_files import init
from hlm.step_table import STEPS

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
    }
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
