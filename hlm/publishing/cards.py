"""Model and dataset cards: the templates in `model_cards/`, filled from what a run wrote and from nothing else.

Whatever comes out of a manifest or report is data: it is escaped in prose, quoted in code, and made `public`: paths are
cut to their last names, tokens struck out. A section whose JSON is missing says that it was not measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from hlm.artefacts import HlmError, read_manifest
from hlm.indexes.lineage import read_student
from hlm.publishing.card_facts import (
    data_name,
    dataset_facts,
    encoder_facts,
    latency_facts,
    report_facts,
    system_of,
    training_steps,
)
from hlm.redaction import machine_names, public, public_command, public_manifest, refuse_secrets
from hlm.report_types import LatencyReport, Report

# In a checkout beside hlm/, in an installed package inside it.
TEMPLATES = (Path(__file__).resolve().parents[2] / "model_cards", Path(__file__).resolve().parents[1] / "model_cards")
TAGS = ["sentence-transformers", "feature-extraction", "sentence-similarity", "retrieval", "sponsored-search", "hlm"]
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class About:
    """What a card says beside the folder's manifests.

    Attributes:
        repo_id: where the card will stand, owner/name.
        report: report.json of recipes/evaluate.py; None: not measured.
        latency: latency.json of recipes/benchmark.py; None: not measured.
        teacher_repo, student_repo, dataset_repo: the run's other repositories; None where they are not published.
        base_model: Hub id of the backbone; None: what the run was configured with, if that is a Hub id.
        licence: SPDX id in lower case, as the Hub writes it; None: not stated.
        language: ISO 639 codes of the texts; empty: not stated.
        command: what makes the artefact again; None: the report's own command.
        commit: of the code; None: the report's.
        public_names: names of this machine, its user or home folder that the card may tell.
    """

    repo_id: str
    report: Report | None = None
    latency: LatencyReport | None = None
    teacher_repo: str | None = None
    student_repo: str | None = None
    dataset_repo: str | None = None
    base_model: str | None = None
    licence: str | None = None
    language: Sequence[str] = ()
    command: str | None = None
    commit: str | None = None
    public_names: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("report", "latency"):
            object.__setattr__(self, name, public(getattr(self, name)))
        for name in ("repo_id", "teacher_repo", "student_repo", "dataset_repo", "base_model"):
            value = getattr(self, name)
            if value is not None and not REPO_ID.fullmatch(value):
                raise HlmError(f"{name}: expected a Hub id, owner/name, found {value!r}; correct it")
        for name, values in (("licence", [self.licence]), ("language", self.language)):
            if wrong := [value for value in values if value is not None and not re.fullmatch(r"[a-z0-9.+-]+", value)]:
                raise HlmError(f"{name}: expected codes such as apache-2.0 or en, found {wrong[0]!r}; correct it")


def student_card(folder: str | Path, **about: Any) -> str:
    """The card of a student's folder.

    Args:
        about: the fields of `About`.

    Raises:
        HlmError: no student there, or a report of another encoder than this one.
    """
    given, manifest = About(**about), public_manifest(read_student(folder))
    system = system_of(given.report, manifest["encoder"], "student")
    steps = training_steps(folder)
    base = given.base_model or _hub_base(steps)
    own = encoder_facts(folder, manifest)
    static = own["static"]
    front = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        base_model=base,
        base_model_relation="finetune" if base else None,
        teacher=given.teacher_repo,
        **_common(given, system),
        tags=[*TAGS, *(["onnx", *(() if static else ["transformers.js"])] if manifest.get("onnx") else [])],
    )
    facts = own | {"onnx": manifest.get("onnx") or {}, "steps": steps, "base": base}
    return _render(
        "student.md.jinja",
        front,
        given,
        facts | {"teacher": manifest["inputs"]["teacher"], "named": manifest.get("named_teacher")},
        system,
    )


def teacher_card(folder: str | Path, **about: Any) -> str:
    """The card of a teacher's LoRA adapter, from the folder of the merged teacher that it lies in; else as
    `student_card`."""
    given, manifest = About(**about), public_manifest(read_manifest(folder, "teacher"))
    system = system_of(given.report, manifest["encoder"], "teacher")
    base = given.base_model or _hub_base(training_steps(folder))
    front = ModelCardData(
        library_name="peft",
        pipeline_tag="sentence-similarity",
        base_model=base,
        base_model_relation="adapter" if base else None,
        **_common(given, system),
        tags=[*TAGS, "lora"],
    )
    configured = str(manifest.get("config", {}).get("backbone", ""))
    package = configured if configured.startswith("package:") and not given.base_model else None
    facts = encoder_facts(folder, manifest) | {"steps": training_steps(folder), "base": base or package}
    chosen = manifest.get("chosen") or {}
    if "ndcg@10" not in chosen:  # of an older HLM: in its table alone
        rows = [row for row in chosen.get("table", ()) if all(row[at] == chosen[at] for at in ("step", "merge_weight"))]
        chosen |= {"ndcg@10": rows[0]["ndcg@10"]} if rows else {}
    facts |= {"packaged": bool(package), "chosen": chosen}
    return _render("teacher.md.jinja", front, given, facts, system)


def dataset_card(folder: str | Path, **about: Any) -> str:
    """The card of a dataset's folder (`corpus`, `queries`, `qrels/`, `vectors/`, `index/`); else as `student_card`."""
    given, facts = About(**about), dataset_facts(folder)
    front = DatasetCardData(
        pretty_name=given.repo_id.split("/")[1],
        license=given.licence,
        language=list(given.language) or None,
        task_categories=["text-retrieval"],
        size_categories=facts["size"],
        tags=["retrieval", "sponsored-search", "embeddings", "hlm"],
        configs=facts["configs"] or None,
    )
    return _render("dataset.md.jinja", front, given, facts, None)


def eval_results(report: Report, *, dataset_repo: str, repo_id: str, revision: str | None = None) -> str:
    """YAML for `.eval_results/hlm.yaml` of a model repository (https://huggingface.co/docs/hub/eval-results).

    The Hub shows an entry where `dataset_repo` is registered as a benchmark and ignores it elsewhere; task ids are the
    metrics' names.
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    report = public(report)
    entries = [
        EvalResultEntry(
            dataset_id=dataset_repo,
            task_id=_slug(metric),
            value=value,
            dataset_revision=revision,
            date=report["environment"].get("date"),
            source_url=f"https://huggingface.co/{repo_id}",
            source_name="HLM report",
            notes=f"{metric} of split {report['split']}, {report['queries']} queries",
        )
        for metric, value in _metrics(report, "student").items()
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)


def _common(given: About, system: str | None) -> dict[str, Any]:
    """What the front matter of both kinds of models says."""
    report = given.report
    metrics = _metrics(report, system) if report and system else {}
    common: dict[str, Any] = {
        "license": given.licence,
        "language": list(given.language) or None,
        "datasets": [given.dataset_repo] if given.dataset_repo else None,
        "metrics": [_line(metric) for metric in metrics] or None,
        "model_name": given.repo_id.split("/")[1],
    }
    if report and metrics:
        name = data_name(report["dataset"], given.dataset_repo)
        common["eval_results"] = [
            EvalResult(
                task_type="information-retrieval",
                task_name="Information Retrieval",
                dataset_type=given.dataset_repo or _slug(name),
                dataset_name=_line(name),
                dataset_split=_line(report["split"]),
                metric_type=_line(metric),
                metric_name=_line(metric),
                metric_value=value,
            )
            for metric, value in metrics.items()
        ]
    return common


def _metrics(report: Report, system: str) -> dict[str, float]:
    row = report["systems"].get(system, {})
    return {name: value for name, value in row.items() if not name.startswith("params_") and value is not None}


def _hub_base(steps: Sequence[dict[str, Any]]) -> str | None:
    backbone = str(steps[-1]["backbone"] or "") if steps else ""
    return backbone if REPO_ID.fullmatch(backbone) and not Path(backbone).exists() else None


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "data"


def _line(text: Any) -> str:
    """One line: in a YAML scalar of several, a line of dashes would end the front matter."""
    return " ".join(str(text).split())


class Raw(str):
    """Markdown that is not to be escaped again."""


def escape(value: Any) -> str:
    """Text as Markdown that shows it literally: no link, image, heading, table cell, HTML or second line."""
    if isinstance(value, Raw):
        return value
    text = re.sub(r"\s+", " ", str(value))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]{}()#|~$!])", r"\\\1", text)


def code(value: Any) -> Raw:
    """Inline code; a text with backticks or line ends cannot leave it."""
    return Raw("`" + " ".join(str(value).replace("`", "'").replace("|", "\u00a6").split()) + "`")


def fenced(value: Any) -> Raw:
    """A line inside a fenced block, which it cannot close."""
    return Raw(re.sub(r"\s+", " ", str(value)).replace("```", "'''"))


def python(value: Any) -> Raw:
    """A Python literal inside a fenced block: ASCII, on one line, which can close neither the block nor its quotes."""
    text = ascii(value)
    if isinstance(value, str) and '"' not in text:
        text = f'"{text[1:-1]}"'
    return Raw(text.replace("```", "\\x60" * 3))


def js(value: str) -> Raw:
    """A JavaScript string inside a fenced block, as safe as `python`."""
    return Raw(json.dumps(value).replace("`", "\\u0060"))


def table(rows: Sequence[Sequence[Any]]) -> Raw:
    """A Markdown table, header first; the first column is aligned to the left, the others to the right."""
    lines = ["| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows]
    return Raw("\n".join([lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]]))


def _render(name: str, front: Any, given: About, facts: dict[str, Any], system: str | None) -> str:
    found = next((folder for folder in TEMPLATES if folder.is_dir()), None)
    if found is None:
        raise HlmError(
            f"expected the card templates at {TEMPLATES[0]} or {TEMPLATES[1]}, found neither; install hlm again"
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(found),
        undefined=jinja2.StrictUndefined,
        finalize=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Any] = {"code": code, "fenced": fenced, "python": python, "js": js, "table": table}
    environment.filters |= filters
    report = given.report
    made = report["environment"] if report else {}
    text = environment.get_template(name).render(
        front=Raw(front.to_yaml()),
        given=given,
        report=report and report_facts(report, system, given.dataset_repo),
        latency=given.latency and latency_facts(given.latency, given.dataset_repo),
        command=public_command(given.command) if given.command else made.get("command"),
        commit=given.commit or made.get("git_commit"),
        made=made,
        **facts,
    )
    named = (given.repo_id, given.teacher_repo, given.student_repo, given.dataset_repo, given.base_model)
    known = [part for repo in named if repo for part in repo.split("/")]
    remedy = "it stands in the run's manifests or reports, or among the card's own arguments: take it out there"
    refuse_secrets("README.md", text, machine_names([*known, *given.public_names]), remedy)
    return re.sub(r"\n{3,}", "\n\n", text)
