"""The steps of the recipe: what each is called, its settings, what it reads and writes.

One table that the runner of all steps, `hlm plan` and the command line read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hlm.log_settings import PrepareLogsConfig
from hlm.settings import hints_of
from hlm.steps import (
    AlignConfig,
    CatalogueConfig,
    EmbedConfig,
    EvaluateConfig,
    ExportConfig,
    IndexConfig,
    PruneConfig,
    PublishConfig,
    RefineConfig,
    TeacherConfig,
)


class Step(NamedTuple):
    """One step, read from the YAML of its name."""

    script: str  # recipes/<script>.py, and the command `hlm <script>`
    settings: type | None  # None: those that the script itself declares
    reads: tuple[str, ...]  # settings that name a file, a folder or a repository, or hold such names
    writes: str  # the kind of artefact at `output`, or the file that a report is
    help: str
    trains: bool = False  # its YAML takes the training arguments too
    parallel: bool = False  # works on several processes
    by_name: bool = False  # left out when all steps are run

    @property
    def is_report(self) -> bool:
        """Whether it writes files into a folder that others write into, instead of an artefact."""
        return self.writes.endswith(".json")

    def hints(self, training: type | None) -> dict[str, Any]:
        """Setting -> type, of all that its YAML takes. `training`: the dataclass of the training arguments, which comes
        with torch; a step that does not train needs none."""
        taken = (self.settings, training) if self.trains else (self.settings,)
        return hints_of(*(one for one in taken if one))


OF_A_STUDENT = ("student", "data", "vectors")
STEPS = {
    "make_catalogue": Step("make_catalogue", CatalogueConfig, (), "catalogue", "make the sample catalogue"),
    "prepare_logs": Step(
        "prepare_logs",
        PrepareLogsConfig,
        ("catalogue", "log", "clicks", "judgements"),
        "dataset",
        "make a dataset of a catalogue, a query log and clicks",
    ),
    "prepare": Step(
        "prepare_catalogue_queries",
        None,
        ("source", "general_queries"),
        "dataset",
        "derive training pairs and unlabelled queries from a catalogue without any",
    ),
    "teacher": Step(
        "teacher",
        TeacherConfig,
        ("backbone", "data"),
        "teacher",
        "phase 1: tune the teacher",
        trains=True,
        parallel=True,
    ),
    "embed": Step(
        "embed",
        EmbedConfig,
        ("model", "data", "ready", "same_as"),
        "vectors",
        "write the teacher's vectors, and an index over the ads",
        parallel=True,
    ),
    "prune": Step("prune", PruneConfig, ("model", "data", "vectors"), "student", "phase 2, the cut alone: no training"),
    "align": Step(
        "align",
        AlignConfig,
        OF_A_STUDENT,
        "student",
        "phase 2: cut the student and align it to the teacher's queries",
        trains=True,
        parallel=True,
    ),
    "refine": Step(
        "refine",
        RefineConfig,
        OF_A_STUDENT,
        "student",
        "phase 3: refine the student against the teacher's ads",
        trains=True,
        parallel=True,
    ),
    "contrastive_only": Step(
        "refine",
        RefineConfig,
        OF_A_STUDENT,
        "student",
        "the baseline: refined, never aligned",
        trains=True,
        parallel=True,
    ),
    "static_cut": Step("prune", PruneConfig, ("model", "data", "vectors"), "student", "a static student, untrained"),
    "static": Step(
        "align",
        AlignConfig,
        OF_A_STUDENT,
        "student",
        "a static student: aligned, it looks tokens up",
        trains=True,
        parallel=True,
    ),
    "index": Step(
        "index",
        IndexConfig,
        OF_A_STUDENT,
        "index",
        "choose the ad index by what a student's queries find and cost",
        by_name=True,
    ),
    "evaluate": Step(
        "evaluate", EvaluateConfig, ("data", "systems"), "report.json", "score every system on judged queries"
    ),
    "export": Step("export", ExportConfig, OF_A_STUDENT, "student", "write the online folder: the student in ONNX"),
    "benchmark": Step(
        "benchmark",
        None,
        ("data", "report", "corpus", "systems"),
        "latency.json",
        "time every system; a gate where budgets are given",
    ),
    "publish": Step(
        "publish",
        PublishConfig,
        ("student", "vectors", "data", "teacher", "space", "report", "latency"),
        "",
        "publish the run on the Hub",
        by_name=True,
    ),
}
