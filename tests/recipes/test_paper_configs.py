"""The configs: every file loads through its recipe's own parser, every plan line is what the planner says, and the
cascade ends at the published size."""

import importlib
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

from hlm.config import parse
from hlm.planning.hardware import parse_gpus
from hlm.planning.plan import check_fit, make_plan
from hlm.planning.report import step_line
from hlm.planning.settings import Assumptions, read_steps
from hlm.recipe_files import sets
from hlm.step_table import STEPS
from hlm.training.trainer import TrainingArguments

CONFIGS = Path(__file__).resolve().parents[2] / "recipes/configs"
PAPER = ("qwen3-8b-190m", "qwen3-4b-0.6b", "qwen3-0.6b-190m")
FILES = sorted(path for folder in sets().values() for path in folder.glob("*.yaml"))
TRAINED = {"teacher", "align", "refine"}


HOMES = ("recipes", "results", "hlm")


def recipe_of(path: Path) -> str:
    """The recipe that reads this file, where it is not named after it."""
    step = path.stem
    if path.parent.name == "latency":
        return "benchmark"
    if step == "prepare" and "locale" in yaml.safe_load(path.read_text()):
        return "prepare_esci"
    return STEPS[step].script if step in STEPS else step


def dataclasses_of(recipe: str) -> list[type]:
    """The recipe's config, and the training arguments of one that trains."""
    if recipe == "plan":
        return [Assumptions]
    own = [step.settings for step in STEPS.values() if step.script == recipe and step.settings][:1]
    if not own:
        home = "recipes" if (CONFIGS.parent / f"{recipe}.py").is_file() else "results.measure"
        module = importlib.import_module(f"{home}.{recipe}")
        own = [
            value
            for name, value in vars(module).items()
            if name.endswith("Config") and is_dataclass(value) and value.__module__.split(".")[0] in HOMES
        ]
    assert len(own) == 1, (recipe, own)
    return [*own, *([TrainingArguments] if recipe in TRAINED else [])]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_config_loads_through_its_recipes_parser(path):
    recipe = recipe_of(path)
    # bf16 asks for a GPU where the arguments are made, not where they are used: on the CPU it is enough to say so.
    cpu = ["--use_cpu", "true"] if recipe in TRAINED else []
    config, *training = parse(*dataclasses_of(recipe), argv=["--config", str(path), *cpu])
    given = yaml.safe_load(path.read_text())
    known = {item.name for kind in (config, *training) for item in fields(kind)}
    assert set(given) <= known and given  # every key has been read


@pytest.mark.parametrize("folder", PAPER)
def test_the_papers_configs_are_complete_and_hang_together(folder):
    steps = {path.stem: yaml.safe_load(path.read_text()) for path in (CONFIGS / folder).glob("*.yaml")}
    assert set(steps) == {
        "plan",
        "prepare",
        "teacher",
        "embed",
        "prune",
        "align",
        "refine",
        "contrastive_only",
        "evaluate",
    }
    data, vectors = steps["prepare"]["output"], steps["embed"]["output"]
    for name, step in steps.items():
        assert step.get("data", data) == data, name
        assert step.get("vectors", vectors) == vectors, name
        assert all(value.startswith(f"runs/{folder}/") for key, value in step.items() if key == "output") or (
            name == "evaluate" and step["output"] == f"runs/{folder}"
        ), name
    assert steps["embed"]["model"] == steps["teacher"]["output"]
    assert steps["refine"]["student"] == steps["align"]["output"]
    assert steps["contrastive_only"]["student"] == steps["prune"]["output"]
    # Dtype and truncation are part of an encoder's fingerprint: embed and evaluate must load the teacher alike.
    teacher = steps["evaluate"]["systems"]["teacher"]
    for name in ("dtype", "max_seq_length"):
        assert steps["teacher"][name] == steps["embed"][name] == teacher[name]
    assert teacher["corpus"] == f"{vectors}/corpus" and teacher["model"] == steps["teacher"]["output"]
    # The baseline differs from the student in its start and in the alignment that is kept, in nothing else.
    differing = {key for key in steps["refine"] if steps["refine"][key] != steps["contrastive_only"][key]}
    assert differing == {"student", "output", "alignment_weight"}


@cache
def plan_of(folder: str):
    root = CONFIGS / folder
    (sizes,) = parse(Assumptions, argv=["--config", str(root / "plan.yaml")])
    count, gpu = parse_gpus(sizes.gpus)
    return make_plan(str(root), read_steps(root, TrainingArguments), sizes, count), count, gpu


@pytest.mark.parametrize("folder", PAPER)
@pytest.mark.parametrize("step", ["teacher", "embed", "align", "refine"])
def test_each_step_says_what_the_planner_says(folder, step):
    line = f"# {step_line(plan_of(folder)[0], step, *plan_of(folder)[1:])}"
    text = (CONFIGS / folder / f"{step}.yaml").read_text()
    (found,) = [each for each in text.splitlines() if each.startswith("# hlm plan, ")]
    assert found == line  # after a change of settings: hlm plan --config, and this line anew


@pytest.mark.parametrize("folder", PAPER)
def test_the_configs_fit_their_hardware(folder):
    plan, count, gpu = plan_of(folder)
    check_fit(plan, count, gpu)


def test_the_papers_teacher_and_cascade():
    plan, *_ = plan_of("qwen3-8b-190m")
    steps = read_steps(CONFIGS / "qwen3-8b-190m", TrainingArguments)
    assert steps["teacher"]["backbone"] == "Qwen/Qwen3-Embedding-8B" and steps["teacher"]["lora_rank"] == 256
    assert [stage["layers"] for stage in steps["align"]["cascade"]] == [14, 7, 4]
    sizes = {name: round(total / 1e6, 1) for name, (total, _, _) in plan.models.items() if name != "teacher"}
    # 189.9M, counted on the meta device: tests/encoders/test_pruning.py does so for the bare numbers.
    assert sizes["align 3: 4 layers, FFN 768"] == sizes["pruned"] == sizes["student"] == 189.9
    assert plan_of("qwen3-0.6b-190m")[0].models["student"] == plan.models["student"]
    assert plan_of("qwen3-4b-0.6b")[0].models["student"][0] == 595_776_512
