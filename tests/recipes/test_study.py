"""recipes/study.py on tiny models: every variant once, goes on after an interruption, and says what was run."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from hlm.artefacts import HlmError
from hlm.evaluation.study_page import write_page
from hlm.recipe_files import recipes
from recipes import study

TRAIN = {"per_device_train_batch_size": 32, "learning_rate": 1e-5, "num_train_epochs": 1, "disable_tqdm": True}
TRAIN |= {"eval_strategy": "epoch", "save_strategy": "epoch"}
QUESTION = {
    "question": "Is alignment needed?",
    "sets": ["tiny"],
    "reference": "aligned",
    "variants": {
        "aligned": {"align": {}},
        "pruned": {"prune": {}},
        "chosen": [{"align": {"learning_rate": 3e-3}}, {"align": {}}],
        "elsewhere": {"align": {"student": "package:no_such_package/model"}},
    },
    "claims": [
        {"text": "Alignment beats the cut", "better": "aligned", "than": "pruned"},
        {"text": "A foreign student does as well", "better": "elsewhere", "than": "aligned"},
    ],
}


@pytest.fixture
def lab(tmp_path, tiny_bert, monkeypatch):
    """A home with one set of tiny configs and one question about it."""
    home = tmp_path / "recipes"
    tiny = home / "configs/tiny"
    tiny.mkdir(parents=True)
    (home / "configs/study/quick").mkdir(parents=True)
    for path in recipes().glob("*.py"):
        (home / path.name).symlink_to(path)
    steps = {
        "make_catalogue": {"ads": 200, "unlabelled": 300, "train_queries": 60, "dev_queries": 20, "test_queries": 80},
        "teacher": {"backbone": tiny_bert, "min_score": 3, "lora_rank": 4, "max_steps": 2, "save_strategy": "no"}
        | {key: TRAIN[key] for key in ("per_device_train_batch_size", "disable_tqdm")},
        "embed": {},
        "prune": {"keep": 1},
        "align": {"cascade": [{"layers": 1}], **TRAIN},
        "evaluate": {"systems": {}, "bootstrap_samples": 10},
    }
    for name, settings in steps.items():
        (tiny / f"{name}.yaml").write_text(yaml.safe_dump(settings | {"output": f"runs/tiny/{name}"}))
    (home / "configs/study/quick/tiny.yaml").write_text("make_catalogue: {unlabelled: 100}\n")
    monkeypatch.setattr(study, "recipes", lambda: home)
    monkeypatch.setattr("hlm.evaluation.study.SAMPLES", 100)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "need.yaml").write_text(yaml.safe_dump(QUESTION))
    return tmp_path


def test_a_study_goes_on_where_it_was_and_says_what_was_run(lab, monkeypatch):
    ask = ["--config", "need.yaml", "--quick", "--seeds", "0", "1"]
    real, scored = study.evaluate, []

    def interrupted(**settings):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(settings["output"])
        return real(**settings)

    monkeypatch.setattr(study, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.main(ask)
    assert len(scored) == 2 and not (lab / "results/study/quick/need.json").exists()
    monkeypatch.setattr(study, "evaluate", lambda **settings: scored.append(settings["output"]) or real(**settings))
    refusal = "need: elsewhere: .*expected an installed package 'no_such_package'"
    with pytest.raises(HlmError, match=refusal):
        study.main(ask)
    # A cut is the same at both seeds, and what dev chose is the reference itself: test is searched once for each.
    assert len(scored) == len(set(scored)) == 3
    found = json.loads((lab / "results/study/quick/need.json").read_text())
    tiny = found["sets"]["tiny"]
    assert found["quick"] and tiny["queries"] == 80 and tiny["seeds"] == [0, 1]
    counts = {name: len(one["metrics"]["ndcg@10"]["by_seed"]) for name, one in tiny["variants"].items()}
    assert counts == {"aligned": 2, "pruned": 1, "chosen": 2}
    assert tiny["variants"]["chosen"]["chosen"] == [1, 1] and tiny["variants"]["chosen"]["dev"][0] is not None
    assert tiny["variants"]["chosen"]["metrics"] == tiny["variants"]["aligned"]["metrics"]
    assert tiny["claims"][1]["verdict"] == "not testable at this scale" and "elsewhere" in tiny["missing"]
    page = (lab / "results/study/README.md").read_text()
    assert "| need | tiny | **quick** | 0, 1 | 80 | 3 of 4 |" in page and "They answer nothing" in page
    assert "| aligned |" in page and "elsewhere was not run: " in page
    assert (lab / "results/study/quick/need.png").stat().st_size > 1000

    with pytest.raises(HlmError, match=refusal):
        study.main(ask)
    assert len(scored) == 3 and json.loads((lab / "results/study/quick/need.json").read_text())["sets"] == found["sets"]


def test_a_variants_learning_rate_is_the_only_one(lab):
    path = lab / "recipes/configs/tiny/teacher.yaml"
    path.write_text(path.read_text() + "try_learning_rates: [1.0e-3]\n")
    settings = study.Lab(lab / "runs", "tiny", quick=False).settings
    made = {"data": "d", "vectors": "v", "student": "s", "teacher": "t"}
    assert settings("teacher", {"max_steps": 3}, made)["try_learning_rates"] == [1e-3]
    assert "try_learning_rates" not in settings("teacher", {"learning_rate": 1e-4}, made)


def test_quick_limits_what_a_variant_asks_and_leaves_less_alone(lab, monkeypatch):
    asked: list[dict] = []
    quick = lab / "recipes/configs/study/quick/tiny.yaml"
    quick.write_text(
        "make_catalogue: {unlabelled: 100}\nteacher: {max_steps: 20, merge_weight: [1.0]}\nalign: {queries: 50}\n"
    )
    monkeypatch.setattr(study.Lab, "step", lambda lab, name, given, made: asked.append({name: given}) or name)
    variant = {"teacher": {"max_steps": 375, "merge_weight": "auto"}, "align": {"queries": 30, "learning_rate": 1.0}}
    study.Lab(lab / "runs", "tiny", quick=True).run(variant, {"align": {"queries": 4000}}, seed=1)
    assert asked[:2] == [{"make_catalogue": {"unlabelled": 100}}, {"teacher": {"max_steps": 20, "merge_weight": [1.0]}}]
    assert asked[-1] == {"align": {"queries": 30, "learning_rate": 1.0, "seed": 1}}
    study.Lab(lab / "runs", "tiny", quick=False).run(variant, {"align": {"queries": 4000}}, seed=1)
    assert asked[-2:] == [{"embed": {}}, {"align": {"queries": 30, "learning_rate": 1.0, "seed": 1}}]
    assert {"teacher": {"max_steps": 375, "merge_weight": "auto"}} in asked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "aligne"}, "reference: expected one of aligned"),
        ({"variants": {"aligned": {"algn": {}}}}, "did you mean 'align'"),
        ({"variants": {"aligned": {"align": {"objectiv": "kl"}}}}, "unknown setting 'objectiv'; did you mean 'objecti"),
        ({"variants": {"aligned": {"align": None}}}, "align: expected its settings, or {}, found None"),
        ({"claims": [{"text": "good"}]}, "claim 1: expected a claim"),
        ({"sets": ["huge"]}, "expected a set of configs with evaluate.yaml, found 'huge'"),
        ({"sets": []}, "expected `sets`, found none"),
    ],
)
def test_a_question_is_checked_before_anything_runs(lab, change, message):
    (lab / "wrong.yaml").write_text(yaml.safe_dump(QUESTION | {"claims": []} | change))
    with pytest.raises(HlmError, match=message.replace("{}", r"\{\}")):
        study.main(["--config", "need.yaml", "wrong.yaml", "--quick"])
    assert not (lab / "runs").exists()


QUESTIONS = sorted((recipes() / "configs/study").glob("*.yaml"))


@pytest.mark.parametrize("path", QUESTIONS, ids=lambda path: path.stem)
def test_shipped_questions_are_read(path):
    question = study.read_question(path)
    assert len(question["variants"]) > 1 and question["question"].endswith("?")
    for set_name in question["sets"]:
        assert (recipes() / f"configs/study/quick/{set_name}.yaml").is_file()


def test_the_page_is_rendered_from_the_answers(tmp_path):
    results = Path(__file__).resolve().parents[2] / "results/study"
    for path in results.rglob("*.json"):
        (tmp_path / path.relative_to(results)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(results))
        answered = json.loads(path.read_text())
        assert answered["quick"] == (path.parent.name == "quick"), path  # nobody takes one for the other
        assert path.with_suffix(".png").is_file()
    write_page(tmp_path)
    assert (tmp_path / "README.md").read_text() == (results / "README.md").read_text()
