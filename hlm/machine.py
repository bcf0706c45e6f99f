"""What a measurement must know of the machine: how busy other processes keep it, memory, and what it is made of."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

STAT = Path("/proc/stat")
CGROUP, MOUNTS = Path("/proc/self/cgroup"), Path("/proc/self/mountinfo")
# Instructions that decide which precisions pay off on a CPU.
BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tokenizers", "safetensors")


def cores() -> int:
    """CPU cores that this process can keep busy: as many as it may run on, and no more than the CPU time of its
    container allows, rounded down (at least 1): one core more would use the time up early, and stand still until the
    next period begins."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def cpu_quota() -> float | None:
    """Cores' worth of CPU time that the control groups of this process allow, the strictest of them (`docker --cpus`,
    `limits.cpu` of Kubernetes); None where there is no limit."""
    quotas = []
    for folder in _control_groups("cpu"):
        try:
            if (folder / "cpu.max").is_file():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            if quota not in ("max", "-1"):
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue  # the root of the tree has no limit
    return min(quotas, default=None)


def memory_limit_mib() -> float | None:
    """Memory (MiB) that the control groups of this process allow, the strictest of them (`docker --memory`,
    `limits.memory` of Kubernetes); None where there is no limit below the machine's memory."""
    limits = []
    for folder in _control_groups("memory"):
        new, old = folder / "memory.max", folder / "memory.limit_in_bytes"
        try:
            limits.append(int((new if new.is_file() else old).read_text()) / 2**20)
        except (OSError, ValueError):
            continue  # the root of the tree has no limit, another group the limit "max"
    total = memory_mib("MemTotal")
    return min((limit for limit in limits if total is None or limit < total), default=None)


def _control_groups(controller: str) -> list[Path]:
    """The folders of this process's control groups of a controller, and of the groups above them, as far as they can be
    seen; none where the system has no control groups."""
    folders: list[Path] = []
    try:
        mounts = [line.split() for line in MOUNTS.read_text().splitlines()]
        for line in CGROUP.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            for mount in mounts:
                kind, *_, options = mount[mount.index("-") + 1 :]
                if (kind == "cgroup2" and not controllers) or (
                    kind == "cgroup" and controller in controllers.split(",") and controller in options.split(",")
                ):
                    folders += _group_and_above(_unescaped(mount[4]), _unescaped(mount[3]), group)
    except (OSError, ValueError):  # no Linux, or one that writes these files otherwise
        return []
    return folders


def _group_and_above(mounted: str, root: str, group: str) -> Iterator[Path]:
    """A control group's folder and those above it, where the group `root` is what is mounted at `mounted`."""
    inside = os.path.relpath(group, root) if os.path.isabs(group) else "."
    folder = Path(mounted)
    # A group outside of what is mounted, as in a container, is what is mounted.
    for part in ("", *(() if inside.startswith("..") else Path(inside).parts)):
        folder /= part
        yield folder


def _unescaped(path: str) -> str:
    """A path of /proc/self/mountinfo, which writes spaces as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


@dataclass(frozen=True)
class Counters:
    """CPU time used so far, in seconds, on the CPUs that this process may run on."""

    wall_s: float
    busy_s: float  # by everything: other processes, the kernel, and what a hypervisor gave to other machines
    own_s: float  # by this process, all its threads
    cpus: int


def read_counters() -> Counters | None:
    """The counters now; None where the system does not show them (no /proc/stat)."""
    try:
        lines = STAT.read_text().splitlines()
    except OSError:
        return None
    allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    ticks = cpus = 0
    for line in lines:
        name, *values = line.split()
        if name in allowed:
            # user nice system idle iowait irq softirq steal; guest time is counted in user already.
            user, nice, system, _, _, irq, softirq, steal = map(int, values[:8])
            ticks, cpus = ticks + user + nice + system + irq + softirq + steal, cpus + 1
    if not ticks:
        return None
    return Counters(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time(), cpus)


def other_load(before: Counters | None, after: Counters | None, *, children_s: float = 0.0) -> float | None:
    """The share (0 ... 1) of the CPUs' time that others used between two readings; None where it cannot be read.

    /proc/stat counts in ticks (10 ms): one tick a CPU is within its resolution and not held against anyone.

    Args:
        children_s: CPU seconds of this process' own children in between; they are no others.
    """
    if before is None or after is None or after.wall_s <= before.wall_s:
        return None
    others = after.busy_s - before.busy_s - (after.own_s - before.own_s) - children_s
    others -= after.cpus / os.sysconf("SC_CLK_TCK")
    return min(1.0, max(0.0, others / (after.cpus * (after.wall_s - before.wall_s))))


def peak_memory_mib() -> float:
    """The most memory (MiB, resident) that this process has held.

    From VmHWM where there is one: on Linux `ru_maxrss` starts at the size of the process that started this one.
    """
    held = status_mib("VmHWM")
    if held is not None:
        return held
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes


def anonymous_mib() -> float:
    """Memory (MiB) that this process holds and no file backs: what a memory map does not count in. NaN where the system
    does not tell."""
    held = status_mib("RssAnon")
    return float("nan") if held is None else held


def status_mib(field: str, pid: int | str = "self") -> float | None:
    """A line of a process's /proc/<pid>/status in MiB, such as "RssFile"; None where there is none, or it is gone."""
    return _line_mib(Path(f"/proc/{pid}/status"), field)


def memory_mib(field: str) -> float | None:
    """A line of /proc/meminfo in MiB, "MemTotal" or "MemAvailable"; None where there is none."""
    return _line_mib(Path("/proc/meminfo"), field)


def _line_mib(path: Path, field: str) -> float | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{field}:")), None)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of the packages that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def facts() -> dict[str, Any]:
    """What latency depends on beyond `hlm.evaluation.report.environment`: JSON-able, None where it cannot be read."""
    import torch

    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "runtime_versions": installed_versions(_PACKAGES),
        "memory_mib": memory_mib("MemTotal"),
        "governor": governor.read_text().strip() if governor.is_file() else None,
        "instructions": instructions(),
        "load_average": list(os.getloadavg()),
        "threads": {
            "torch": torch.get_num_threads(),
            "torch_interop": torch.get_num_interop_threads(),
            **{name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM")},
        },
        "contention": "read from /proc/stat" if read_counters() else "not readable on this system",
    }


def instructions() -> list[str] | None:
    """Those of `INSTRUCTIONS` that the processor has; None where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return None
    for line in info.read_text().splitlines():
        if line.startswith(("flags", "Features")):  # x86, ARM
            found = set(line.split(":", 1)[1].split())
            return [name for name in INSTRUCTIONS if name in found]
    return None


def computes_in_bf16() -> bool:
    """Whether the processor has instructions for bf16; without them it is slower than fp32."""
    return bool(BF16 & {*(instructions() or ())})


def cpu_model() -> str:
    """The processor's name; where the system does not tell it, its kind."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
