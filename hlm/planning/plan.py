"""What a run of the recipe will cost, step by step, before anything is paid for: `hlm plan`.

Takes the settings of the steps (`hlm.planning.settings`) and the backbones' shapes from their config.json, and adds up
parameters, GPU memory, disk, FLOPs and hours (`footprint`, `hardware`). Loads no weights and no data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig

from hlm.artefacts import HlmError
from hlm.encoders.families import check_layers
from hlm.encoders.loading import resolve
from hlm.encoders.pruning import check_cascade, cut_config
from hlm.encoders.static import is_static_folder
from hlm.planning.footprint import Shape, backbone_config
from hlm.planning.hardware import GIB, Gpu, refuse
from hlm.planning.phases import (
    Phase,
    Training,
    align_phase,
    align_training,
    embed_phase,
    refine_phase,
    refine_training,
    teacher_phases,
    teacher_training,
)
from hlm.planning.settings import Assumptions

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


def make_plan(folder: str, steps: Mapping[str, dict[str, Any]], sizes: Assumptions, count: int = 1) -> Plan:
    """The plan of these steps on `count` GPUs.

    Raises:
        HlmError: no teacher to train, a cascade or an FFN that grows, a dimension above the teacher's, an unknown
            backbone.
    """
    if "teacher" not in steps:
        raise HlmError(f"expected teacher.yaml in {folder}, found none; a teacher elsewhere cannot be planned for")
    teacher_config = backbone_config(steps["teacher"]["backbone"])
    teacher = Shape.of(teacher_config)
    rank = steps["teacher"]["lora_rank"]
    models = {"teacher": (teacher.parameters, teacher.parameters - teacher.embeddings, teacher.lora_parameters(rank))}
    phases = teacher_phases(teacher, steps["teacher"], sizes, count)
    made = {steps["teacher"]["output"]: teacher_config}
    dim = width = teacher.hidden
    if "embed" in steps:
        dim = check_dim(steps["embed"]["dim"], teacher.hidden)
        phases.append(embed_phase(teacher, steps["embed"], sizes, dim))
    if "prune" in steps:
        model, cut = made.get(steps["prune"]["model"]), steps["prune"]
        stage = {"layers": cut["layers"] or cut["keep"], "ffn": cut["ffn"]}
        ((_, shape, config),) = cascade(model or backbone_config(cut["model"]), [stage])
        models["pruned"] = (shape.parameters, shape.parameters - shape.embeddings, 0)
        made[cut["output"]] = config
    if "align" in steps:
        config = made.get(steps["align"]["student"]) or backbone_config(steps["align"]["student"])
        stages = cascade(config, steps["align"]["cascade"] or [{}])
        for number, (stage, shape, _) in enumerate(stages, 1):
            name = f"align {number}: {shape.layers} layers, FFN {shape.ffn}"
            models[name] = (shape.parameters, shape.parameters - shape.embeddings, 0)
            phases.append(align_phase(name, shape, stage, steps["align"], sizes, count))
            width = min(shape.hidden, dim)
        made[steps["align"]["output"]] = stages[-1][2]
    if "refine" in steps:
        shape = Shape.of(made.get(steps["refine"]["student"]) or backbone_config(steps["refine"]["student"]))
        width = min(shape.hidden, dim)
        models["student"] = (shape.parameters, shape.parameters - shape.embeddings, 0)
        phases.append(refine_phase(shape, steps["refine"], sizes, count, dim))
    embed = steps.get("embed", {})
    indexes = [("Flat", width), ("SQ8", width)]
    if embed.get("index"):
        indexes.insert(0, (embed["index"], check_dim(embed["index_dim"], dim)))
    index = {f"{name}, {size} wide": index_bytes(sizes.documents, size, name) for name, size in indexes}
    return Plan(str(folder), sizes, models, phases, index, 4 * sizes.documents * width)


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


def cascade(config: PretrainedConfig, stages: list[dict[str, Any]]) -> list[tuple[dict, Shape, PretrainedConfig]]:
    """(stage, shape, config) after every stage of a cascade over this backbone; no weights are needed.

    Raises:
        HlmError: a stage that grows, in layers or FFN units, beyond the backbone or the stage before; layer numbers
            that the stage before does not have.
    """
    check_cascade(stages)
    found = []
    for number, stage in enumerate(stages, 1):
        layers, ffn = stage.get("layers"), stage.get("ffn")
        if isinstance(layers, list):
            try:
                check_layers(config, layers)
            except HlmError as error:
                raise HlmError(f"cascade, stage {number}: {error}") from error
            layers = len(layers)
        try:
            shape = Shape.of(config, layers, ffn)
        except HlmError as error:
            raise HlmError(f"cascade, stage {number}: {error}") from error
        config = cut_config(config, shape.layers, shape.ffn)
        found.append((stage, shape, config))
    return found


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
    source = settings["backbone" if step == "teacher" else "student"]
    if is_static_folder(resolve(str(source))):
        if settings.get("cascade"):
            raise HlmError(f"cascade: expected none for {source}, found one; a static student has nothing to cut")
        return
    config = backbone_config(source)
    try:
        shape = Shape.of(config)
    except HlmError as error:
        if any(set(stage) & {"layers", "ffn"} for stage in settings.get("cascade") or []):
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
        stages = cascade(config, settings["cascade"] or [{}])
        found = [
            (f"align, stage {number}", partial(align_training, shape, settings, sizes))
            for number, (_, shape, _) in enumerate(stages, 1)
        ]
    else:
        found = [("refine", partial(refine_training, shape, settings, sizes, gpus))]
    if gpu is None and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu = Gpu(properties.name, properties.total_memory, 0.0)
    if gpu is not None:
        for where, training in found:
            refuse(where, training(), gpu, gpus, sharded)
