"""What a run of the recipe will cost, step by step, before anything is paid for: `hlm plan`.

Takes the settings of the steps (`hlm.planning.settings`) and the backbones' shapes from their config.json, and adds up
parameters, GPU memory, disk, FLOPs and hours (`footprint`, `hardware`). Loads no weights and no data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hlm.artefacts import HlmError
from hlm.merge_weights import weights_of
from hlm.planning.footprint import backbone_config
from hlm.planning.hardware import GIB, Gpu, refuse
from hlm.planning.phases import (
    Phase,
    Training,
    align_phase,
    align_training,
    embed_phase,
    prune_phase,
    refine_phase,
    refine_training,
    teacher_phases,
    teacher_training,
)
from hlm.planning.settings import Assumptions
from hlm.planning.students import Model, after_cut, cascade, model_at
from hlm.step_table import STEPS

logger = logging.getLogger(__name__)


@dataclass
class Plan:
    """Everything that `hlm.planning.report` prints. `models`: name -> (parameters, without embeddings, LoRA's)."""

    folder: str
    assumptions: Assumptions
    models: dict[str, tuple[int, int, int]]
    phases: list[Phase]
    index: dict[str, int]
    host: int  # bytes of memory of one process: the exact index that checkpoints are chosen by
    notes: list[str]  # what is not known beforehand, of these steps


def make_plan(folder: str, steps: Mapping[str, dict[str, Any]], sizes: Assumptions, count: int = 1) -> Plan:
    """The plan of these steps on `count` GPUs.

    Raises:
        HlmError: no teacher to train, a cut or a cascade that cannot be made, a dimension above the teacher's, an
            unknown backbone.
    """
    if "teacher" not in steps:
        raise HlmError(f"expected teacher.yaml in {folder}, found none; a teacher elsewhere cannot be planned for")
    settings = steps["teacher"]
    teacher = Model(settings["backbone"], backbone_config(settings["backbone"]))
    models = {"teacher": (*teacher.counts[:2], teacher.shape.lora_parameters(settings["lora_rank"]))}
    phases = teacher_phases(teacher.shape, settings, sizes, count)
    plan = Plan(str(folder), sizes, models, phases, index={}, host=0, notes=[])
    if weights_of(settings["merge_weight"]) and not (sizes.dev_documents or sizes.unlabelled):
        plan.notes.append(
            "teacher: dev queries or unlabelled ones choose what is kept of the training, and dev_documents and "
            "unlabelled are 0; without such queries the backbone is handed on, untrained"
        )
    made = {settings["output"]: teacher}
    dim = teacher.shape.hidden
    embed = steps.get("embed", {})
    if embed:
        if embed["max_seq_length"] is None and embed["model"] == settings["output"]:
            embed = embed | {"max_seq_length": settings["max_seq_length"]}  # the teacher keeps its own
        dim = check_dim(embed["dim"], dim)
        plan.phases.append(embed_phase(teacher.shape, embed, sizes, dim))
    widths = []
    for name, settings in steps.items():
        script = STEPS[name].script
        if script in STUDENTS:
            source = settings["model" if script == "prune" else "student"]
            model = STUDENTS[script](plan, name, settings, made.get(source) or model_at(source), count, dim)
            made[settings["output"]] = model
            widths += [] if script == "prune" else [min(model.shape.hidden, dim)]
    widths = list(dict.fromkeys(widths)) or [teacher.shape.hidden]
    indexes = [(factory, width) for width in widths for factory in ("Flat", "SQ8")]
    if embed.get("index"):
        indexes.insert(0, (embed["index"], check_dim(embed["index_dim"], dim)))
    plan.index = {f"{name}, {size} wide": index_bytes(sizes.documents, size, name) for name, size in indexes}
    plan.host = 4 * sizes.documents * max(widths)
    return plan


def _cut(plan: Plan, name: str, step: dict[str, Any], model: Model, count: int, dim: int) -> Model:
    """Adds a cut without training to the plan; returns what is left of the model, as the others here do."""
    cut = after_cut(model, step)
    plan.models["pruned" if name == "prune" else name] = cut.counts
    plan.phases.append(replace(prune_phase(model.shape, cut.shape, step, plan.assumptions), step=name))
    if cut.config is None:
        tokens, width = cut.table
        plan.notes.append(
            f"{name}: a table of at most {tokens:,} tokens beside single characters, {width} wide; which words of the "
            "log are tokens already is not known before they are counted; a text costs a lookup a token, and no FLOPs"
        )
    elif "min_count" in step["vocabulary"]:
        plan.notes.append(
            f"{name}: how many tokens {{min_count: {step['vocabulary']['min_count']}}} keeps is not known before the "
            f"log is counted: the whole table of {cut.config.vocab_size:,} is taken"
        )
    return cut


def _aligned(plan: Plan, name: str, step: dict[str, Any], model: Model, count: int, dim: int) -> Model:
    for number, (stage, cut) in enumerate(stages_of(model, step["cascade"]), 1):
        shape, model = cut.shape, cut
        label = f"{name} {number}: {shape.layers} layers, FFN {shape.ffn}"
        if not shape.layers:
            label = f"{name}: {cut.table[0]:,} tokens, no layers"
        plan.models[label] = cut.counts
        plan.phases.append(replace(align_phase(label, shape, stage, step, plan.assumptions, count), step=name))
    return model


def _refined(plan: Plan, name: str, step: dict[str, Any], model: Model, count: int, dim: int) -> Model:
    plan.models["student" if name == "refine" else name] = model.counts
    plan.phases.append(replace(refine_phase(model.shape, step, plan.assumptions, count, dim), step=name))
    return model


STUDENTS = {"prune": _cut, "align": _aligned, "refine": _refined}  # script -> what plans its steps


def stages_of(model: Model, stages: list[dict[str, Any]]) -> list[tuple[dict[str, Any], Model]]:
    """(stage, model after it) of every stage of a cascade; without one the model stays as it is, in one stage.

    Raises:
        HlmError: a static student, which has nothing to cut; or as `cascade`.
    """
    if model.config is not None:
        return [(stage, Model(model.source, config)) for stage, _, config in cascade(model.config, stages or [{}])]
    if stages:
        raise HlmError(
            "cascade: expected none for a static student, which has no layers to cut, found one; leave it out"
        )
    return [({}, model)]


def check_dim(dim: int | None, most: int, name: str = "dim") -> int:
    """`dim`, or `most` for None; `name` is what the setting is called.

    Raises:
        HlmError: outside 1 ... `most`.
    """
    if dim is not None and not 1 <= dim <= most:
        raise HlmError(
            f"{name}: expected 1 to {most} (the teacher's width), found {dim}; a slice cannot widen a vector: the "
            f"nearest that works is {min(max(dim, 1), most)}"
        )
    return dim or most


def index_bytes(rows: int, dim: int, factory: str) -> int:
    """A FAISS index over `rows` vectors, in memory and on disk: codes, ids, graph and centroids.

    Raises:
        HlmError: a factory string FAISS does not take.
    """
    import faiss

    def sizes(index: faiss.Index) -> tuple[int, int]:
        """(bytes whatever the rows, bytes a row)."""
        index = faiss.downcast_index(index)
        if isinstance(index, faiss.IndexPreTransform):
            return sizes(index.index)
        if isinstance(index, faiss.IndexRefine):
            (fixed, each), (more, other) = sizes(index.base_index), sizes(index.refine_index)
            return fixed + more, each + other
        if isinstance(index, faiss.IndexHNSW):
            fixed, each = sizes(index.storage)
            return fixed, each + 4 * index.hnsw.nb_neighbors(0) + 12  # links of the lowest level; level and offset
        if isinstance(index, faiss.IndexIVF):
            return 4 * index.d * index.nlist, index.code_size + 8
        return 0, index.sa_code_size()

    try:
        whole = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)  # owns the parts: must live on
        fixed, each = sizes(whole)
    except RuntimeError as error:
        raise HlmError(f"index: expected a FAISS factory string, found {factory!r}; write one such as Flat") from error
    return fixed + rows * each


def check_fit(plan: Plan, count: int, gpu: Gpu) -> None:
    """Refuses a plan with a phase that needs more than this GPU holds.

    Raises:
        HlmError: the first such phase, both numbers, the parts, and the nearest setting that works.
    """
    for phase in plan.phases:
        where = f"{phase.step}, {phase.name}"
        if phase.training is not None:
            refuse(where, phase.training, gpu, count, plan.assumptions.fsdp)
        elif phase.peak > gpu.usable:
            raise HlmError(
                f"{where}: expected at most {gpu.usable / GIB:.1f} GiB a GPU ({gpu.name}), found "
                f"{phase.peak / GIB:.1f}; take {phase.smallest()}"
            )


def check_step(
    step: str, settings: Mapping[str, Any], *, gpu: Gpu | None = None, gpus: int = 1, sharded: bool = False
) -> None:
    """What a recipe asks before it loads any weights: is the cascade one that its backbone allows, and can a training
    step fit the GPU at all? Takes texts of middling length, so that only what cannot work is refused.

    Args:
        step: "teacher", "align" or "refine".
        settings: the recipe's settings and training arguments by name, as `read_steps` gives them.
        gpu: None takes the one that torch sees; without one, memory is not checked, nor for a backbone whose layers
            this project does not know (such a one can be trained, but not cut).
        gpus: data-parallel processes.
        sharded: whether FSDP splits weights and optimizer over them.

    Raises:
        HlmError: with the numbers and the nearest setting that works.
    """
    model = model_at(str(settings["backbone" if step == "teacher" else "student"]))
    stages = settings.get("cascade") or []
    try:
        shape = model.shape
    except HlmError as error:
        if any(set(stage) & {"layers", "ffn"} for stage in stages):
            raise
        logger.info("%s: what it takes is not known beforehand (%s)", step, error)
        return
    limit = min(settings.get("max_seq_length") or 128, 128)
    settings = {**settings, "max_seq_length": limit}
    sizes = Assumptions(documents=settings.get("pool") or 1, queries=1, longest_query=min(16, limit))
    found: list[tuple[str, Callable[[], Training]]]
    if step == "teacher":
        found = [("teacher", partial(teacher_training, shape, settings, sizes, gpus))]
    elif step == "align":
        found = [
            (f"align, stage {number}", partial(align_training, cut.shape, settings, sizes))
            for number, (_, cut) in enumerate(stages_of(model, stages), 1)
        ]
    else:
        found = [("refine", partial(refine_training, shape, settings, sizes, gpus))]
    if gpu is None and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu = Gpu(properties.name, properties.total_memory, 0.0)
    if gpu is not None:
        for where, training in found:
            refuse(where, training(), gpu, gpus, sharded)
