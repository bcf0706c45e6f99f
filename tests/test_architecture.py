"""Who may import whom, and what may not be written anywhere."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Lowest first; a module imports from its own line and from those above it.
LAYERS = [
    {"errors"},
    {"locks"},
    {"outputs"},
    {"integrity"},
    {"artefacts"},
    {"texts", "forks", "families"},
    {"fields"},
    {"endings", "processes", "report_files"},
    {"config", "data", "gradcache", "hub_changes", "keywords", "losses", "readers", "redaction",
     "sample_catalogue", "sample_vocabulary", "sources", "spelling", "store", "store_writer", "tables", "words"},
    {"layout"},
    {"encoder_fingerprint"},
    {"encoders", "pruning", "footprint", "hardware", "plan_settings", "plan_phases", "planner", "plan_report"},
    {"hub_repository", "hub_cache"},
    {"online_graph", "export", "backends", "fused", "cuda_graphs",
     "word_cache", "student_files", "long_texts", "bulk", "runtime",
     "micro_batches", "mining",
     "faiss_parts", "index",
     "evaluation", "metric", "latency", "report", "latency_report", "budgets", "machine", "latency_floor",
     "latency_quality", "systems", "random_weights", "qwen_tokenizer", "canaries", "batches", "checkpoints",
     "dev_retrieval", "training_inputs", "frozen"},
    {"training"},
    {"gpu_stages", "gpu_work", "gpu_inputs", "gpu_timing"},
    {"lineage", "card_facts", "cards", "hub", "hub_files"},
    {"demo", "demo_examples", "demo_limits", "demo_page", "demo_plots"},
    {"cli"},
]  # fmt: skip
MODULES = sorted((ROOT / "hlm").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def level(name: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem != "__init__"], ids=lambda path: path.stem)
def test_the_library_imports_downwards_only(path):
    names = imported(path)
    assert not {name.split(".")[0] for name in names} & {"recipes", "spaces", "tests"}
    for name in names:
        if name.startswith("hlm."):
            assert level(name.split(".")[1]) <= level(path.stem), f"{path.stem} imports {name}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_do_not_import_one_another(path):
    assert not any(name.split(".")[0] == "recipes" for name in imported(path))
    # Recipes run with their own folder first on the path: `import evaluate` there is our recipe, not the library.
    assert not imported(path) & {"evaluate", "hlm.evaluation.hf_metric"}


@pytest.mark.parametrize("path", MODULES + RECIPES, ids=lambda path: path.stem)
def test_nothing_is_unpickled_and_no_remote_code_runs(path):
    text = path.read_text()
    assert not imported(path) & {"pickle", "dill", "joblib", "shelve"}
    assert not re.search(r"torch\.(load|save)\(|allow_pickle=True|trust_remote_code=True|use_auth_token", text)


def test_training_arguments_never_carry_a_token_into_a_manifest():
    from hlm.training.trainer import TrainingArguments, recorded

    assert "secret" not in str(recorded(TrainingArguments(output_dir="x", hub_token="hf_secret")))
