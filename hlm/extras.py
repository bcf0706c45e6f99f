"""What a plain `pip install hlm` leaves out: which extra brings a package that is missing."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

from hlm.errors import HlmError

# Module -> the smallest extra that brings it.
EXTRAS = {
    "faiss": "index", "pyarrow": "index", "regex": "index",
    "accelerate": "train", "datasets": "train", "jinja2": "train", "onnx": "train",
    "onnx_ir": "train", "onnxscript": "train", "peft": "train", "pytrec_eval": "train", "safetensors": "train",
    "sentence_transformers": "train", "torch": "train", "transformers": "train",
    "evaluate": "eval", "matplotlib": "eval",
    "duckdb": "logs", "phonenumbers": "logs",
    "gradio": "space",
    "lancedb": "lance",
    "openvino": "openvino",
    "pymilvus": "milvus",
    "ray": "ray",
}  # fmt: skip
OF_A_CLUSTER = {"milvus", "ray"}  # clients of what runs elsewhere: `all` leaves them out

# Extra -> those whose packages it brings.
BRINGS = {
    "index": ("index",),
    "train": ("index", "train"),
    "eval": ("index", "train", "eval"),
    "logs": ("index", "train", "logs"),
}


@contextlib.contextmanager
def extras_named(what: str) -> Iterator[None]:
    """Around an import or, as a decorator, around a function that imports.

    Args:
        what: what was asked for, for the message.

    Raises:
        HlmError: a package of `EXTRAS` is not installed; names it and the extra to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise _missing(package, EXTRAS[package], what) from error


def check_extra(extra: str, what: str) -> None:
    """Refuses, without importing them, where packages of an extra of `BRINGS` are missing.

    Raises:
        HlmError: as `extras_named`.
    """
    for package, brought in EXTRAS.items():
        if brought in BRINGS[extra] and importlib.util.find_spec(package) is None:
            raise _missing(package, extra, what)


def _missing(package: str, extra: str, what: str) -> HlmError:
    return HlmError(f"expected the package '{package}' for {what}, found none; pip install 'hlm[{extra}]'")
