"""run.yaml: one file for all steps, from three answers, over a shipped set of configs."""

import builtins
import re
import sys
from pathlib import Path

import pytest
import raw_shop
import yaml

from hlm import cli
from hlm.errors import HlmError
from hlm.planning import run_file as planned
from hlm.planning.plan import make_plan
from hlm.planning.run_file import RUN_FILE, step_settings, write_run_file, write_steps
from hlm.planning.settings import Assumptions
from hlm.recipe_files import sets
from hlm.settings import hints_of
from hlm.step_table import STEPS
from recipes import quickstart
from recipes.quickstart import named_in


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/qrels").mkdir(parents=True)
    (tmp_path / "data/qrels/train.tsv").touch()
    (tmp_path / "ads").mkdir()
    return tmp_path


def run_file(**values) -> Path:
    path = Path("mine", RUN_FILE)
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({"like": "esci_mini", "output": "runs/mine", "data": "data"} | values))
    return path


@pytest.mark.parametrize(
    "answers, like, kept",
    [
        ({}, "quickstart", {"data": None, "p99_ms": 15.0}),
        ({"data": "data", "p99_ms": "2"}, "esci_mini", {"data": "data", "p99_ms": 2.0}),
        ({"data": "ads", "hardware": "CPU", "min_score": "1"}, "esci_mini", {"catalogue": "ads", "min_score": 1}),
        ({"data": "owner/name", "hardware": "8xH100"}, "qwen3-8b-190m", {"data": "owner/name", "p99_ms": None}),
        ({"data": "owner/name", "hardware": "RTX4090"}, "qwen3-0.6b-190m", {"data": "owner/name"}),
    ],
)
def test_three_answers(answers, like, kept):
    path = write_run_file("mine", **answers)
    written = yaml.safe_load(path.read_text())
    assert written["like"] == like and written["output"] == "runs/mine"
    assert {name: written[name] for name in kept} == kept
    assert all("  # " in line for line in path.read_text().splitlines()[1:-1])  # each line says what it is
    steps = step_settings(path)
    assert {"teacher", "embed", "align", "refine", "evaluate"} < set(steps)
    assert not any(text.startswith(f"runs/{like}") for text in named_in(steps))
    assert ("prepare" in steps) == ("catalogue" in kept) and ("make_catalogue" in steps) == (not answers)
    for name, settings in steps.items():
        if (own := STEPS[name].settings) and not STEPS[name].trains:
            assert set(settings) <= set(hints_of(own))


@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_without_bf16_trains_in_fp32(monkeypatch, fast):
    monkeypatch.setattr(planned, "computes_in_bf16", lambda: fast)
    assert step_settings(write_run_file("mine", data="data"))["teacher"]["bf16"] == fast
    assert "steps: {}" in write_run_file("gpus", data="a/b", hardware="8xH100").read_text()


def test_a_rate_of_the_users_own_is_the_only_one():
    assert all(step_settings(run_file())[name]["try_learning_rates"] for name in ("teacher", "refine"))
    steps = step_settings(run_file(steps={"refine": {"learning_rate": 1e-4}, "teacher": {"max_steps": 8}}))
    assert "try_learning_rates" not in steps["refine"] and steps["teacher"]["try_learning_rates"]
    both = {"learning_rate": 1e-4, "try_learning_rates": [1e-3]}
    assert step_settings(run_file(steps={"refine": both}))["refine"]["try_learning_rates"] == [1e-3]


def test_what_is_the_users_own_reaches_every_step():
    path = run_file(
        backbone="bert", min_score=2, p99_ms=3.5, steps={"align": {"learning_rate": 1e-3}, "contrastive_only": None}
    )
    steps, before = step_settings(path), sets()["esci_mini"]
    assert steps["teacher"]["backbone"] == steps["evaluate"]["systems"]["backbone"]["model"] == "bert"
    assert {name for name, settings in steps.items() if settings.get("min_score") == 2} == {"teacher", "refine"}
    assert steps["benchmark"]["budgets"] == {"p99_ms": 3.5}
    assert steps["align"]["data"] == "data" and steps["align"]["output"] == "runs/mine/aligned"
    theirs = yaml.safe_load((before / "align.yaml").read_text())
    same = set(theirs) - {"data", "student", "vectors", "output", "learning_rate"}
    assert all(steps["align"][name] == theirs[name] for name in same) and steps["align"]["learning_rate"] == 1e-3
    assert "contrastive_only" not in steps


def test_what_is_published_is_the_users_own(monkeypatch, capsys):
    for values in ({}, {"backbone": "bert"}):
        settings = step_settings(run_file(**values))["publish"]
        assert settings["name"] == "mine" and settings["student"] == "runs/mine/online"
        assert not {"licence", "language", "space"} & set(settings)  # of the set's data; and there is no such folder
        assert ("base_model" in settings) == ("backbone" not in values)
    Path("spaces/query_to_ad").mkdir(parents=True)
    assert "space" in step_settings(run_file())["publish"]


def test_one_step_is_run_by_its_name_and_the_folder(monkeypatch, capsys):
    run_file(steps={"align": {"learning_rate": 1e-3}})
    started = []
    monkeypatch.setattr("os.execv", lambda program, words: started.append(words))
    cli.run_script("align", "mine", "--seed", "4")
    (words,) = started
    assert Path(words[1]).name == "align.py" and words[2] == "--config" and words[4:] == ["--seed", "4"]
    assert yaml.safe_load(Path(words[3]).read_text())["learning_rate"] == 1e-3
    cli.run_script("prepare", "mine", "--catalogue", "ads.csv")  # of raw files: its first word is where data goes
    assert started[1][2] == "mine"
    assert cli.main(["index", "mine"]) == 2 and "found 'index'" in capsys.readouterr().err


def test_queries_are_derived_from_a_catalogue():
    steps = step_settings(run_file(data=None, catalogue="ads"))
    assert steps["prepare"]["source"] == "ads" and "general_queries" not in steps["prepare"]
    assert steps["prepare"]["output"] == steps["align"]["data"] == "runs/mine/data"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"like": "esci_mimi"}, "did you mean 'esci_mini'"),
        ({"catalogue": "ads"}, "expected data or catalogue, found both"),
        ({"data": None}, "expected data or catalogue, found neither"),
        ({"like": "quickstart", "data": None, "catalogue": "ads"}, "expected a set that derives queries"),
        ({"like": "qwen3-8b-190m", "p99_ms": 1}, "expected a set that times its student"),
        ({"steps": {"algin": {}}}, "did you mean 'align'"),
        ({"steps": {"align": 3}}, "expected settings, or null to leave it out, found 3"),
        ({"stepps": {}}, "did you mean 'steps'"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(values, message):
    with pytest.raises(HlmError, match=re.escape(message)):
        step_settings(run_file(**values))


def test_the_runner_reads_it_anew_each_time():
    path = run_file()
    jobs = {job.name: job for job in quickstart.read_jobs(path.parent)}
    config = jobs["align"].config
    assert config.parent == Path("runs/mine/.steps/configs") and f"Written from {path}" in config.read_text()
    before = config.read_bytes()
    write_steps(path, config.parent)
    assert config.read_bytes() == before  # or every step would run again
    run_file(steps={"align": None})
    assert "align" not in {job.name for job in quickstart.read_jobs(path.parent)} and not config.exists()


def test_init_asks_on_a_terminal_alone(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(builtins, "input", lambda question: asked.append(question) or ["data", "", "4"][len(asked) - 1])
    assert cli.main(["init", "silent"]) == 0 and not asked
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert cli.main(["init", "flags", "--data", "data"]) == 0 and not asked
    assert cli.main(["init", "mine"]) == 0 and len(asked) == 3
    assert "hlm run mine" in capsys.readouterr().out
    written = yaml.safe_load(Path("mine", RUN_FILE).read_text())
    assert (written["like"], written["data"], written["p99_ms"]) == ("esci_mini", "data", 4.0)
    assert cli.main(["init", "mine", "--data", "data"]) == 2 and "found one" in capsys.readouterr().err
    assert cli.main(["init", "both", "--like", "quickstart", "--data", "data"]) == 2
    assert cli.main(["init", "fast", "--p99-ms", "fast"]) == 2 and not Path("fast").exists()
    assert cli.main(["init", "good", "--min-score", "good"]) == 2 and "--min-score" in capsys.readouterr().err
    assert cli.main(["init", "gpu", "--hardware", "8xH100"]) == 2 and "--data" in capsys.readouterr().err


def test_init_makes_the_data_of_raw_files(monkeypatch, capsys):
    judged = "query,sku,grade\n" + "".join(f"{query},{ad},3\n" for query, ad in raw_shop.MANY.items())
    files = raw_shop.write(Path("raw"), ads=raw_shop.ADS, clicks=raw_shop.clicks_of(), judgements=judged)
    raw = ["--catalogue", files[0], "--clicks", files[1], "--judgements", files[2]]
    for words, refusal in (
        (["--data", "data", *raw], "leave out --data, or --catalogue --clicks"),
        (["--like", "quickstart", *raw], "leave --like out"),
        (["--p99-ms", "fast", *raw], "--p99-ms"),
        (raw[:4], "more settings: hlm prepare runs/mine/data; then name it with --data"),
        (raw[2:], "catalogue"),
        (["--catalogue", "none.csv", *raw[2:]], "none.csv"),
    ):
        assert cli.main(["init", "mine", *words]) == 2 and refusal in capsys.readouterr().err
        assert not Path("mine").exists() and not Path("runs/mine/data/hlm.json").exists()
    assert cli.main(["init", "mine", *raw, "--columns", "clicks.user=user"]) == 0
    out = capsys.readouterr().out
    assert "What was dropped" in out and "hlm run mine" in out
    written = yaml.safe_load(Path("mine", RUN_FILE).read_text())
    assert (written["data"], written["min_score"], written["like"]) == ("runs/mine/data", 1, "esci_mini")
    assert Path("runs/mine/data/qrels/train.parquet").is_file()
    # A second one finds its data up to date; what people say of grades is theirs; a terminal is asked.
    Path("mine", RUN_FILE).unlink()
    assert cli.main(["init", "mine", *raw, "--columns", "clicks.user=user", "--min-score", "3"]) == 0
    assert yaml.safe_load(Path("mine", RUN_FILE).read_text())["min_score"] == 3
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", lambda question: "n")
    assert cli.main(["init", "other", *raw]) == 2 and "expected the right ones" in capsys.readouterr().err
    assert not Path("other").exists() and not Path("runs/other/data/hlm.json").exists()


def test_a_teacher_elsewhere_leaves_the_backbone_to_the_student():
    path = run_file(like="any_teacher", backbone="bert", steps={"embed": {"model": "m", "ready": {"corpus": "a.npy"}}})
    steps = step_settings(path)
    assert steps["align"]["student"] == steps["prune"]["model"] == steps["evaluate"]["systems"]["backbone"]["model"]
    assert steps["align"]["student"] == "bert" and "teacher" not in steps
    assert steps["embed"]["model"] == "m" and steps["embed"]["ready"] == {"corpus": "a.npy"}
    with pytest.raises(HlmError, match="expected teacher.yaml in .*a teacher elsewhere cannot be planned for"):
        make_plan("mine", {"embed": steps["embed"]}, Assumptions(documents=1, queries=1))
