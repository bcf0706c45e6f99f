"""The claims of the paper, tested: each question runs its variants of the recipe over several seeds, and what they say
is written down with intervals, tests and a verdict.

    python recipes/study.py --config recipes/configs/study/*.yaml --quick

A variant is a list of steps with settings that differ from those of a set of configs. Every step writes into a folder
of `--runs` that is named after its settings and those of the steps before: what variants have in common is made once.
Run again, the same command goes on where it was: a variant that was scored is not touched, test queries are searched
once for each. `--quick` limits data and training as `recipes/configs/study/quick` says, whatever a variant asks, and
takes one seed and each question's first set: it shows that the study runs, not what holds.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from hlm.artefacts import MANIFEST, HlmError, fingerprint_json, read_manifest, write_json
from hlm.config import run_recipe
from hlm.evaluation.evaluate import evaluate
from hlm.evaluation.report import environment
from hlm.evaluation.study import METRIC, against, check_claim, describe, judge
from hlm.evaluation.study_page import draw, write_page
from hlm.locks import locked
from hlm.recipe_files import recipes
from hlm.report_files import read_report
from hlm.settings import closest, overridden, read_yaml
from hlm.step_table import OF_A_STUDENT, STEPS, Step
from hlm.training.trainer import TrainingArguments

logger = logging.getLogger(__name__)

BASE = ("make_catalogue", "prepare_logs", "prepare", "teacher", "embed")  # what all variants have, unless they say more
# Other projects' ways to a small encoder, which are no step of the recipe.
PEER = Step("peers", None, (*OF_A_STUDENT, "teacher"), "student", "a peer", trains=True)
STEP = {**STEPS, "peer": PEER}
SCORED = {"data", "split", "k", "depth", "relevance_level", "incomplete", "bm25_k1", "bm25_b", "skip_bad_rows"}
METRICS = ("ndcg@10", "precision@10", "recall@100", "mrr@10", "condensed_ndcg@10", "judged@10", "overlap@10")
KEYS = {"question": str, "about": str, "sets": list, "reference": str, "base": dict, "variants": dict, "claims": list}
LEFT_OUT = "left out by --variants"
SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", nargs="+", required=True, help="YAML files, a question each")
    parser.add_argument("--quick", action="store_true", help="little data, short training, one seed, in minutes")
    parser.add_argument("--runs", default="runs/study", help="folder for what the steps make")
    parser.add_argument("--results", default="results/study", help="folder for the answers; with --quick: its quick/")
    parser.add_argument("--sets", nargs="+", help="only these of each question's sets of configs")
    parser.add_argument("--variants", nargs="+", help="only these of each question's variants")
    parser.add_argument("--seeds", nargs="+", type=int, help="of training (default: 0 1 2, with --quick 0)")
    options = parser.parse_args(argv)
    questions = {Path(path).stem: read_question(Path(path)) for path in options.config}
    runs, results = Path(options.runs), Path(options.results)
    folder = results / "quick" if options.quick else results
    seeds = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
    refused: list[str] = []
    runs.mkdir(parents=True, exist_ok=True)
    with locked(runs / ".lock", f"the study in {runs}"):
        for name, question in questions.items():
            started, found = time.monotonic(), {}
            for set_name in question["sets"][:1] if options.quick and not options.sets else question["sets"]:
                if not options.sets or set_name in options.sets:
                    lab = Lab(runs / set_name, set_name, quick=options.quick)
                    found[set_name] = answer(lab, question, seeds, options.variants)
                    failed = {what: why for what, why in found[set_name]["missing"].items() if why != LEFT_OUT}
                    refused += [f"{name}: {what}: {why}" for what, why in failed.items()]
            if not found:
                continue
            path = folder / f"{name}.json"
            write_json(path, merged(path, question | {"quick": options.quick, "sets": found}))
            draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
            logger.info("%s: %.0f s, %s", name, time.monotonic() - started, path)
            write_page(results)
    if refused:
        raise HlmError("expected all variants to run, found some that did not:\n" + "\n".join(refused))


def merged(path: Path, answered: dict[str, Any]) -> dict[str, Any]:
    """The answer with that of other sets, which an earlier call wrote for the same question, and what makes it again
    wherever the runs lie."""
    config = f"recipes/configs/study/{path.stem}.yaml"
    command = f"recipes/study.py --config {config}" + (" --quick" if answered["quick"] else "")
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    same = before.get("variants") == answered["variants"] and before.get("claims") == answered["claims"]
    sets = {**(before.get("sets", {}) if same else {}), **answered["sets"]}
    return {"schema_version": 1, **answered, "sets": sets, "environment": environment(command)}


def read_question(path: Path) -> dict[str, Any]:
    """A question's YAML, checked before anything is run.

    Raises:
        HlmError: names the file and what is wrong there.
    """
    found = read_yaml(str(path), {name: kind for name, kind in KEYS.items()})
    for key in ("question", "sets", "variants", "reference"):
        if not found.get(key):
            raise HlmError(f"{path}: expected `{key}`, found none; add it")
    found = {"about": "", "base": {}, "claims": []} | found
    if found["reference"] not in found["variants"]:
        raise HlmError(f"{path}: reference: expected one of {', '.join(found['variants'])}, found {found['reference']}")
    for number, claim in enumerate(found["claims"], 1):
        check_claim(claim, list(found["variants"]), f"{path}, claim {number}")
    for set_name in found["sets"]:
        if not (recipes() / "configs" / set_name / "evaluate.yaml").is_file():
            raise HlmError(f"{path}: sets: expected a set of configs with evaluate.yaml, found '{set_name}'")
    check_steps(found["base"], f"{path}, base")
    for name, variant in found["variants"].items():
        for one in alternatives(variant):
            check_steps(one, f"{path}, variant {name}")
    return found


def alternatives(variant: Any) -> list[dict[str, Any]]:
    """A variant's steps; or, where it is a list, several, of which dev chooses one."""
    return variant if isinstance(variant, list) else [variant]


def check_steps(steps: Any, where: str) -> None:
    """Refuses a step or a setting that is not there."""
    if not isinstance(steps, dict):
        raise HlmError(f"{where}: expected a mapping of steps to their settings, found {steps!r}")
    for name, given in steps.items():
        if name not in STEP:
            raise HlmError(f"{where}: expected steps of {', '.join(STEP)}, found '{name}'{closest(name, STEP)}")
        step = STEP[name]
        if not isinstance(given, dict):
            raise HlmError(f"{where}: {name}: expected its settings, or {{}}, found {given!r}")
        if step.settings and name != "evaluate":
            hints = step.hints(TrainingArguments)
            for key in given:
                if key not in hints:
                    raise HlmError(f"{where}: {name}: unknown setting '{key}'{closest(key, hints)}")


def answer(
    lab: Lab, question: dict[str, Any], seeds: Sequence[int], wanted: Sequence[str] | None = None
) -> dict[str, Any]:
    """What one set of configs says to a question; with all its variants, or those wanted."""
    systems: dict[str, list[dict[str, dict[str, float]]]] = {}
    facts: dict[str, dict[str, Any]] = {}
    teacher: list[dict[str, dict[str, float]]] = []
    missing: dict[str, str] = {}
    for name, variant in question["variants"].items():
        if wanted and name not in wanted:
            missing[name] = LEFT_OUT
            continue
        try:
            scored = [lab.score(alternatives(variant), question["base"], seed) for seed in seeds]
        except HlmError as error:  # the others are not in vain: it is in the answer, on the page and in the end's error
            logger.error("%s was not run: %s", name, error)
            missing[name] = textwrap.shorten(str(error), 160, placeholder=" ...")
            continue
        unique = {one["folder"]: one for one in scored}.values()  # without training, seeds are one and the same
        systems[name] = [one["scores"] for one in unique]
        first = next(iter(unique))
        if not teacher:
            teacher = [first["teacher"]]
        facts[name] = {
            **describe(systems[name], [first["teacher"]], METRICS),
            **{key: first[key] for key in ("params_total", "params_non_embedding")},
            "dev": [one["dev"] for one in unique],
            "chosen": [one["chosen"] for one in unique],
            "test_read": [one["date"] for one in unique],
            "code": sorted({one["commit"] for one in unique}),
        }
    if question["reference"] in systems:
        for name, compared in against(systems, question["reference"]).items():
            facts[name]["against_reference"] = compared
    return {
        "seeds": list(seeds),
        "queries": len(teacher[0][METRIC]) if teacher else 0,
        "teacher": describe(teacher, teacher, METRICS)["metrics"] if teacher else {},
        "variants": facts,
        "claims": judge(question["claims"], systems, teacher, missing),
        "missing": missing,
    }


class Lab:
    """Runs steps of one set of configs, each into a folder named after what it is made from."""

    def __init__(self, folder: Path, set_name: str, *, quick: bool) -> None:
        self.folder, self.configs = folder, recipes() / "configs" / set_name
        shrunk = recipes() / "configs/study/quick" / f"{set_name}.yaml"
        if quick and not shrunk.is_file():
            raise HlmError(f"--quick: expected {shrunk}, which says how {set_name} is shrunk, found none; add it")
        self.quick: dict[str, Any] = yaml.safe_load(shrunk.read_text(encoding="utf-8")) if quick else {}
        self.made: set[str] = set()

    def score(self, variants: list[dict[str, Any]], base: dict[str, Any], seed: int) -> dict[str, Any]:
        """The scores of a variant on each test query; of several, of the one that is best on dev."""
        runs = [self.run(variant, base, seed) for variant in variants]
        devs = [dev_of(made["student"]) for made, _ in runs]
        if len(runs) > 1 and None in devs:
            raise HlmError(
                "expected alternatives that were scored on dev, found one that was not; end each in training"
            )
        best = max(range(len(runs)), key=lambda number: devs[number] or 0.0)
        made, scoring = runs[best]
        return self.evaluated(made, scoring) | {"dev": devs[best], "chosen": best}

    def run(self, variant: dict[str, Any], base: dict[str, Any], seed: int) -> tuple[dict[str, str], dict[str, Any]]:
        """Runs the steps; returns the folders they left, and the settings of the evaluation."""
        common = [name for name in BASE if (self.configs / f"{name}.yaml").is_file()]
        made: dict[str, str] = {}
        for name in [*common, *(name for name in variant if name not in (*common, "evaluate"))]:
            given = {**base.get(name, {}), **variant.get(name, {})}
            for key, limit in self.quick.get(name, {}).items():
                # Of what is no number there is no less: it stands in place of what is asked.
                given[key] = min(limit, given.get(key, limit)) if isinstance(limit, int | float) else limit
            if STEP[name].trains and name not in BASE:
                given["seed"] = seed
            folder = str(self.step(name, given, made))
            if STEP[name].writes in ("catalogue", "dataset"):
                made["data"] = folder
            elif name == "embed":
                made["vectors"] = folder
            else:
                made |= {"student": folder} | ({"teacher": folder} if name == "teacher" else {})
        return made, {**base.get("evaluate", {}), **variant.get("evaluate", {})}

    def settings(self, name: str, given: dict[str, Any], made: dict[str, str]) -> dict[str, Any]:
        """The set's own settings, those given, and the folders that the steps before left."""
        path = self.configs / f"{name}.yaml"
        own = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        inputs = {
            key: made["student" if key == "model" else key] for key in STEP[name].reads if key in (*made, "model")
        }
        return overridden({**own, **inputs}, given)

    def step(self, name: str, given: dict[str, Any], made: dict[str, str]) -> Path:
        """The folder of a step's result, made where it is not there yet."""
        settings = self.settings(name, given, made)
        settings.pop("output", None)
        folder = self.place(name, settings)
        if folder.name not in self.made:
            config = folder.with_suffix(".yaml")
            folder.parent.mkdir(parents=True, exist_ok=True)
            config.write_text(yaml.safe_dump(settings | {"output": str(folder)}, sort_keys=False), encoding="utf-8")
            started = time.monotonic()
            script(STEP[name].script).main(["--config", str(config)])  # itself it sees what is up to date
            gc.collect()
            logger.info("%s: %.1f s", folder, time.monotonic() - started)
            self.made.add(folder.name)
        return folder

    def place(self, name: str, settings: dict[str, Any]) -> Path:
        """Named after the settings, not after where the runs lie."""
        text = json.dumps([STEP[name].script, settings], sort_keys=True, default=str)
        return self.folder / f"{name}-{fingerprint_json(json.loads(text.replace(f'{self.folder}/', '')))[:12]}"

    def evaluated(self, made: dict[str, str], scoring: dict[str, Any]) -> dict[str, Any]:
        """Scores a student on the test queries, once: what is there is read."""
        own = yaml.safe_load((self.configs / "evaluate.yaml").read_text(encoding="utf-8"))
        as_system = scoring.get("system", "student")
        corpus = f"{made['vectors']}/corpus"
        systems = {"teacher": {"model": made["teacher"], "corpus": corpus, **scoring.get("teacher", {})}}
        systems[as_system] = {"model": made["student"], **scoring.get("student", {})}
        settings = {key: value for key, value in own.items() if key in SCORED} | {"data": made["data"]}
        read = [Path(folder, MANIFEST).read_text() for folder in (made["data"], corpus, made["student"])]
        folder = self.place(
            "evaluate", settings | {"systems": systems, "read": [fingerprint_json(one) for one in read]}
        )
        if not (folder / "per_query.parquet").is_file():
            evaluate(**settings, systems=systems, output=str(folder))
            gc.collect()
        report = read_report(folder / "report.json")
        scores: dict[str, dict[str, dict[str, float]]] = {"teacher": {}, as_system: {}}
        for row in pq.read_table(folder / "per_query.parquet").to_pylist():
            for metric in METRICS:
                if row.get(metric) is not None:
                    scores[row["system"]].setdefault(metric, {})[row["query_id"]] = row[metric]
        size = report["systems"][as_system]
        return {
            "folder": folder.name,
            "scores": scores[as_system],
            "teacher": scores["teacher"],
            "date": report["environment"]["date"],
            "commit": str(report["environment"]["git_commit"]),
            "params_total": size["params_total"],
            "params_non_embedding": size["params_non_embedding"],
        }


def dev_of(student: str) -> float | None:
    """nDCG@10 on dev at the end of a student's training; None of one that was only cut."""
    found: float | None = (read_manifest(student, "student").get("dev") or {}).get("end")
    return found


def script(name: str) -> Any:
    """The script of a step, as a module."""
    full = f"hlm_study_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, recipes() / f"{name}.py")
        assert spec is not None and spec.loader is not None, name
        sys.modules[full] = importlib.util.module_from_spec(spec)  # dataclasses look their types up there
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


if __name__ == "__main__":
    run_recipe(main)
