"""What `hlm doctor` says: whether this machine can run HLM, and what to do where it cannot. A check a line."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from huggingface_hub import constants, get_session, get_token
from huggingface_hub.errors import HTTPError

from hlm import __version__, machine
from hlm.extras import EXTRAS, OF_A_CLUSTER
from hlm.integrity import cache_folder

GIB = 1024**3
QUICKSTART_GIB = 3.3  # peak of all its steps, results/quickstart.json
NVIDIA = Path("/proc/driver/nvidia/version")
TIMEOUT_S = 5.0


class Check(NamedTuple):
    """One line. "problem": something does not work until the remedy is followed; "note": something is left out."""

    name: str
    status: Literal["ok", "note", "problem"]
    text: str
    remedy: str = ""


def examine() -> list[Check]:
    """Every check of this machine, in the order in which they are shown. Nothing is changed or downloaded; the Hub is
    asked once, for five seconds at most, unless HF_HUB_OFFLINE is set."""
    checks: tuple[Callable[[], Check], ...] = (
        _python,
        _processor,
        _memory,
        _disk,
        _torch,
        _gpu,
        _engines,
        _faiss,
        _extras,
        _hub,
    )
    return [check() for check in checks]


def as_text(checks: list[Check]) -> str:
    """A line a check, and a line below it that begins with an arrow where there is something to do."""
    width = max(len(check.name) for check in checks)
    marks = {"ok": "ok  ", "note": "note", "problem": "FIX "}
    lines = []
    for check in checks:
        lines.append(f"{marks[check.status]}  {check.name:<{width}}  {check.text}")
        if check.remedy:
            lines.append(f"{'':6}{'':{width}}  -> {check.remedy}")
    return "\n".join(lines)


def _python() -> Check:
    return Check("Python", "ok", f"{platform.python_version()}, HLM {__version__}")


def _processor() -> Check:
    quota, found = machine.cpu_quota(), machine.instructions()
    text = f"{machine.cores()} cores of {machine.cpu_model()}"
    text += f", a container's limit is {quota:.1f}" if quota is not None else ""
    return Check("processor", "ok", f"{text}, {' '.join(found)}" if found else text)


def _memory() -> Check:
    available, limit = machine.memory_mib("MemAvailable"), machine.memory_limit_mib()
    if available is None:
        return Check("memory", "note", "this system does not tell")
    free_gib = min(available, limit or available) / 1024
    text = f"{free_gib:.1f} GiB available" + (f", a container's limit is {limit / 1024:.1f}" if limit else "")
    if free_gib < QUICKSTART_GIB:
        return Check("memory", "note", text, f"the quickstart took {QUICKSTART_GIB} GiB; serving takes about 0.1")
    return Check("memory", "ok", text)


def _disk() -> Check:
    """Room and permission where HLM, the Hub's client and the steps write."""
    places = {"HLM_CACHE": cache_folder(), "HF_HOME": Path(constants.HF_HOME), "this folder": Path.cwd()}
    free = {}
    for name, place in places.items():
        there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
        if not os.access(there, os.W_OK | os.X_OK):
            what = f"set {name} to a folder" if name.isupper() else "run it in a folder"
            return Check("disk", "problem", f"{name} cannot be written to", f"{what} that this user can write to")
        free[name] = shutil.disk_usage(there).free / GIB
    text = ", ".join(f"{gib:.0f} GiB free in {name}" for name, gib in free.items())
    name = min(free, key=lambda place: free[place])
    if free[name] < 1:
        return Check("disk", "problem", text, f"free 1 GiB or more in {name}")
    return Check("disk", "ok", text)


def _torch() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check("torch", "note", "not installed: a student is served, not trained", "pip install 'hlm[train]'")
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("torch", "problem", f"does not load ({error})", "install it again: pip install --force torch")
    return Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")


def _gpu() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check("GPU", "note", "seen through torch alone")
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        text = ", ".join(f"{card.name} {card.total_memory / GIB:.0f} GiB" for card in cards)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Check("GPU", "ok", f"{text}, bf16, CUDA {torch.version.cuda}")
        return Check("GPU", "note", f"{text}, no bf16", "set bf16: false and fp16: true in the configs of training")
    if NVIDIA.is_file():
        cause = "torch is a build without CUDA" if torch.version.cuda is None else "torch cannot use its driver"
        return Check("GPU", "problem", f"there is one, but {cause}", "install the torch build of your driver's CUDA")
    return Check("GPU", "note", "none: the quickstart's configs suit a CPU, those of billions of parameters do not")


def _engines() -> Check:
    import onnxruntime

    found = machine.installed_versions(("onnxruntime", "onnxruntime-gpu", "openvino"))
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    return Check("engines", "ok", f"{text} ({', '.join(providers)})")


def _faiss() -> Check:
    if importlib.util.find_spec("faiss") is None:
        return Check("FAISS", "note", "not installed: no ads are searched", "pip install 'hlm[index]'")
    import faiss

    both = [name for name in machine.installed_versions(("faiss-cpu", "faiss-gpu-cu12", "faiss-gpu-cu11"))]
    if len(both) > 1:
        remedy = f"pip uninstall {both[0]}, then pip install --force-reinstall --no-deps {both[-1]}"
        return Check("FAISS", "problem", f"{' and '.join(both)} share one folder", remedy)
    gpus = getattr(faiss, "get_num_gpus", lambda: 0)()
    return Check("FAISS", "ok", f"{faiss.__version__}, {faiss.get_compile_options().strip()}, {gpus} GPUs")


def _extras() -> Check:
    missing: dict[str, list[str]] = {}
    for package, extra in EXTRAS.items():
        if importlib.util.find_spec(package) is None:
            missing.setdefault(extra, []).append(package)
    whole = [extra for extra in dict.fromkeys(EXTRAS.values()) if extra not in missing]
    text = f"installed: {', '.join(whole) or 'none'}"
    missing = {extra: packages for extra, packages in missing.items() if extra not in OF_A_CLUSTER}
    if missing:
        lacks = "; ".join(f"{extra} lacks {', '.join(packages)}" for extra, packages in missing.items())
        return Check("extras", "note", f"{text}; {lacks}", f"pip install 'hlm[{','.join(missing)}]'")
    return Check("extras", "ok", text)


def _hub() -> Check:
    """Whether the Hub answers, whether a token is there and whose; the token itself is never shown."""
    cached = sum(1 for _ in Path(constants.HF_HUB_CACHE).glob("*--*"))
    kept = f"{cached} repositories in the cache"
    if constants.HF_HUB_OFFLINE:
        return Check("Hub", "note", f"HF_HUB_OFFLINE is set; {kept}", "unset it to download or publish")
    return hub_answer(constants.ENDPOINT, get_token(), kept)


def hub_answer(endpoint: str, token: str | None, kept: str) -> Check:
    """What the Hub at `endpoint` answers; `kept` says what the cache holds."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = get_session().get(f"{endpoint}/api/whoami-v2", headers=headers, timeout=TIMEOUT_S)
    except (OSError, HTTPError) as error:
        remedy = "set HF_HUB_OFFLINE=1 to work from the cache at once, or HF_ENDPOINT to a mirror"
        return Check("Hub", "note", f"out of reach ({type(error).__name__}); {kept}", remedy)
    if token is None:
        return Check(
            "Hub", "note", f"reached, not logged in; {kept}", "hf auth login, to publish and to read private ones"
        )
    if answer.status_code == 401:
        return Check("Hub", "problem", f"the token is refused; {kept}", "hf auth login, or set HF_TOKEN to another")
    return Check("Hub", "ok", f"logged in as {answer.json()['name']}; {kept}")
