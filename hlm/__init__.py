"""HLM: turn a billion-parameter retriever into a query encoder small enough to serve online.

Every step of the recipe is a function with plain arguments: it writes an artefact, a folder with a manifest, goes on
where a killed run stopped, and leaves alone what is up to date.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hlm.data.contract import load as load_data
    from hlm.data.logs import prepare
    from hlm.embedding.embed import embed
    from hlm.encoders.loading import load_encoder
    from hlm.errors import HlmError
    from hlm.evaluation.evaluate import evaluate
    from hlm.indexes.faiss_index import AdIndex
    from hlm.indexes.index import open_index
    from hlm.indexes.lineage import verify
    from hlm.indexes.tune_index import tune_index
    from hlm.publishing.online_folder import export
    from hlm.publishing.release import publish
    from hlm.serving.micro_batches import AsyncQueryEncoder
    from hlm.serving.query_encoder import QueryEncoder
    from hlm.training.align import align
    from hlm.training.prune import prune
    from hlm.training.refine import refine
    from hlm.training.teacher import train_teacher
    from hlm.vectors.store import VectorStore

__version__ = "0.1.0"
__all__ = [
    "AdIndex",
    "AsyncQueryEncoder",
    "HlmError",
    "QueryEncoder",
    "VectorStore",
    "align",
    "embed",
    "evaluate",
    "export",
    "load_data",
    "load_encoder",
    "open_index",
    "prepare",
    "prune",
    "publish",
    "refine",
    "train_teacher",
    "tune_index",
    "verify",
]
# Public name -> its module, and its name there where that is another. Loaded when asked for: `import hlm` stays light.
_PLACES = {
    "AdIndex": "indexes.faiss_index",
    "AsyncQueryEncoder": "serving.micro_batches",
    "HlmError": "errors",
    "QueryEncoder": "serving.query_encoder",
    "VectorStore": "vectors.store",
    "align": "training.align",
    "embed": "embedding.embed",
    "evaluate": "evaluation.evaluate",
    "export": "publishing.online_folder",
    "load_data": "data.contract:load",
    "load_encoder": "encoders.loading",
    "open_index": "indexes.index",
    "prepare": "data.logs",
    "prune": "training.prune",
    "publish": "publishing.release",
    "refine": "training.refine",
    "train_teacher": "training.teacher",
    "tune_index": "indexes.tune_index",
    "verify": "indexes.lineage",
}

# ONNX Runtime sends usage data to its maker unless told otherwise before it is imported, by a thread for whose end a
# forked process waits for ever when it ends.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'hlm' has no attribute '{name}'")
    module, _, there = _PLACES[name].partition(":")
    from hlm.extras import extras_named

    with extras_named(f"hlm.{name}"):
        value = getattr(importlib.import_module(f"hlm.{module}"), there or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
