"""What a measurement must know of the machine: how busy other processes keep it, memory, and what it is made of."""

from __future__ import annotations

import os
import resource
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

STAT = Path("/proc/stat")
# Instructions that decide which precisions pay off on a CPU.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tokenizers", "safetensors")


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


def facts() -> dict[str, Any]:
    """What latency depends on beyond `hlm.report.environment`: JSON-able, None where it cannot be read."""
    import torch

    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "runtime_versions": versions,
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
