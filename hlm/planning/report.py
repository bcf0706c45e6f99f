"""A plan as text for people, as JSON for programs, and as the line that stands in each step's YAML."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, replace
from typing import Any

from hlm.planning.hardware import CONTEXT_BYTES, FRAGMENTED, GIB, Gpu, machines_of
from hlm.planning.phases import ID_BYTES, PADDING, SEARCH_FLOPS, Phase
from hlm.planning.plan import Plan
from hlm.step_table import STEPS


def size(count: float) -> str:
    """Bytes in GiB, or in MiB below a tenth of one."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.1f} MiB"


def duration(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:,.0f} min" if hours >= 1 / 60 else "< 1 min"


def title(phase: Phase) -> str:
    return phase.name if phase.name.startswith(phase.step) else f"{phase.step}: {phase.name}"


def hardware_name(count: int, gpu: Gpu | None) -> str:
    return f"{count}x {gpu.name}" if gpu else "no GPUs given"


def launches(plan: Plan, count: int = 1) -> dict[str, str]:
    """Step -> the command that runs it on `count` GPUs, of as many machines as the plan's `gpus` names. With several,
    it is run on every one of them, each with a rank of its own and the address of the first. Steps of one process are
    left out."""
    machines = machines_of(plan.assumptions.gpus) if plan.assumptions.gpus else 1
    whole = "single" if count == 1 else "ddp" if machines == 1 else "multinode"
    found = {}
    for step in dict.fromkeys(phase.step for phase in plan.phases):
        if not STEPS[step].parallel:
            continue
        sharded = step == "teacher" and plan.assumptions.fsdp and count > 1
        words = [f"--config_file recipes/configs/accelerate/{'fsdp' if sharded else whole}.yaml"]
        words += [f"--num_processes {count}"] if count > 1 else []
        if machines > 1:
            words += [f"--num_machines {machines} --machine_rank RANK"]
            words += ["--main_process_ip ADDRESS --main_process_port 29500"]
        found[step] = f"accelerate launch {' '.join(words)} recipes/{STEPS[step].script}.py"
        found[step] += f" --config {plan.folder}/{step}.yaml"
    return found


def step_line(plan: Plan, step: str, count: int, gpu: Gpu) -> str:
    """One line on a step: its hardware, memory, time, disk and the smallest hardware that holds it."""
    phases = [phase for phase in plan.phases if phase.step == step]
    widest = max(phases, key=lambda phase: phase.peak)
    disk = sum(sum(phase.disk.values()) for phase in phases)
    hours = duration(sum(phase.hours(count, gpu) for phase in phases))
    return (
        f"hlm plan, {hardware_name(count, gpu)}: {size(widest.peak)} a GPU, {hours}, {size(disk)} on disk; "
        f"smallest hardware: {widest.smallest()}"
    )


def as_dict(plan: Plan, count: int = 1, gpu: Gpu | None = None) -> dict[str, Any]:
    """The whole plan as JSON values: bytes, FLOPs, hours (None without a GPU)."""
    return {
        "config": plan.folder,
        "hardware": {"gpus": count, "name": gpu.name, "usable_bytes": gpu.usable} if gpu else None,
        "models": {
            name: {"parameters": total, "without_embeddings": body, "lora_parameters": lora}
            for name, (total, body, lora) in plan.models.items()
        },
        "phases": [
            {
                "step": phase.step,
                "phase": phase.name,
                "gpu_bytes": phase.memory,
                "gpu_bytes_peak": phase.peak,
                "alternatives_gpu_bytes": alternatives(phase, count, plan.assumptions.fsdp),
                "fits": phase.peak <= gpu.usable if gpu else None,
                "smallest_hardware": phase.smallest(),
                "steps": phase.steps,
                "flops": phase.flops,
                "search_flops": phase.search_flops,
                "lookups": phase.lookups,
                "hours": phase.hours(count, gpu) if gpu else None,
                "disk_bytes": phase.disk,
            }
            for phase in plan.phases
        ],
        "hours": sum(phase.hours(count, gpu) for phase in plan.phases) if gpu else None,
        "launch": launches(plan, count),
        "index_bytes": plan.index,
        "host_bytes_a_process": plan.host,
        "assumptions": asdict(plan.assumptions),
        "notes": plan.notes,
    }


def alternatives(phase: Phase, count: int, fsdp: bool) -> dict[str, int]:
    """Bytes a GPU of the same training step with checkpointing, and with gradient caching, turned the other way."""
    if (training := phase.training) is None or not training.shape.layers:
        return {}
    other = "without" if training.checkpointing else "with"
    found = {
        f"{other} gradient checkpointing": replace(training, checkpointing=not training.checkpointing),
        **({"without gradient caching": replace(training, chunk=None)} if training.chunk else {}),
    }
    return {name: changed.peak(count, fsdp) for name, changed in found.items()}


def text(plan: Plan, count: int = 1, gpu: Gpu | None = None) -> str:
    """The plan as it is printed."""
    sizes = plan.assumptions
    lines = [f"Plan of {plan.folder} on {hardware_name(count, gpu)}", "", "Parameters"]
    rows: list[tuple[str, ...]] = [("", "total", "without embeddings")]
    for name, (total, body, lora) in plan.models.items():
        rows.append(
            (name, f"{total / 1e6:,.1f}M", f"{body / 1e6:,.1f}M" + (f" + LoRA {lora / 1e6:,.1f}M" if lora else ""))
        )
    lines += table(rows)

    lines += ["", "Phases"]
    rows = [("", "GPU memory", "fits", "PFLOP", "time", "steps", "smallest hardware")]
    for phase in plan.phases:
        fits = ("yes" if phase.peak <= gpu.usable else "NO") if gpu else "-"
        hours = duration(phase.hours(count, gpu)) if gpu else "-"
        rows.append(
            (
                title(phase),
                size(phase.peak),
                fits,
                "lookups" if phase.lookups else f"{phase.flops / 1e15:,.1f}",
                hours,
                f"{phase.steps:,}" if phase.steps else "",
                phase.smallest(),
            )
        )
    lines += table(rows)
    if gpu:
        lines.append(f"  in all {duration(sum(phase.hours(count, gpu) for phase in plan.phases))}")

    machines = machines_of(sizes.gpus) if sizes.gpus else 1
    where = f"on each of {machines} machines, RANK 0 at ADDRESS" if machines > 1 else ""
    lines += ["", f"Launch {where}".rstrip(), *(f"  {line}" for line in launches(plan, count).values())]

    lines += ["", "GPU memory in parts"]
    for phase in plan.phases:
        parts = ", ".join(f"{name} {size(value)}" for name, value in phase.memory.items())
        lines.append(f"  {title(phase)}: {parts}")
        lines += [f"    {name}: {size(value)}" for name, value in alternatives(phase, count, sizes.fsdp).items()]

    lines += ["", "Disk"]
    for phase in plan.phases:
        if phase.disk:
            lines.append(
                f"  {title(phase)}: " + ", ".join(f"{name} {size(value)}" for name, value in phase.disk.items())
            )
    lines += ["", "Index (memory and disk)"]
    lines += table([("", "size"), *((name, size(value)) for name, value in plan.index.items())])
    lines.append(f"  host memory of each process for choosing checkpoints (exact search): {size(plan.host)}")
    lines += ["", "Assumptions"]
    for line in [*assumptions(plan), *plan.notes]:
        lines += textwrap.wrap(line, 118, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"


def assumptions(plan: Plan) -> list[str]:
    """What the figures rest on, each with the figures that it decides."""
    sizes = plan.assumptions
    return [
        f"data: {sizes.documents:,} ads, {sizes.queries:,} queries ({sizes.judged_queries:,} of them train, with "
        f"{sizes.judged_pairs:,} pairs), {sizes.unlabelled:,} unlabelled: steps, stores, index, time",
        f"tokens, mean: query {sizes.query_tokens:g} (+ {sizes.prompt_tokens:g} of instruction for the teacher), ad "
        f"{sizes.document_tokens:g}, and {PADDING - 1:.0%} padding: FLOPs, time",
        f"tokens, longest: query {sizes.longest_query} (+ instruction), ad {sizes.longest_document} where no "
        "max_seq_length is set: GPU memory, which every row of a batch is taken to reach",
        f"utilisation: {sizes.teacher_utilisation:.0%} of the data sheet's dense bf16 FLOP/s where the teacher trains, "
        f"{sizes.embed_utilisation:.0%} where it encodes, {sizes.student_utilisation:.0%} for students: time goes with "
        "its inverse",
        "FLOPs: 2 a weight and token, backward twice that (once through weights that LoRA freezes), one forward pass "
        "more for gradient checkpointing and one for gradient caching; embeddings are looked up",
        "GPU memory: AdamW in fp32, gradients kept, SDPA without stored scores; "
        + ("the teacher split by FSDP" if sizes.fsdp else "every GPU holds the whole model (DDP)"),
        f"refinement copies all ads to the GPU, {size(plan.host / 2)} in fp16, where that is at most a quarter of its "
        "free memory; not in the figures, as the store's memory map serves as well, slower",
        f"fits: {FRAGMENTED:.0%} of a GPU lost between blocks and {size(CONTEXT_BYTES)} to CUDA; where 2 and more "
        "GPUs are the smallest hardware, they are under FSDP",
        f"disk: 2 bytes a value of a store and {ID_BYTES} a row's id; checkpoints hold weights and two moments in fp32",
        f"mining and masking search the whole store, the GPUs sharing the queries, in fp32 at "
        f"{SEARCH_FLOPS / 1e12:g} TFLOP/s each; a training step takes {sizes.step_seconds:g} s at least: time",
    ]


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns padded to their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip() for row in rows
    ]
