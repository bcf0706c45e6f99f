"""HLM: turn a billion-parameter retriever into a query encoder small enough to serve online."""

import os
from typing import Any

__version__ = "0.1.0"

# ONNX Runtime sends usage data to its maker unless told otherwise before it is imported, by a thread for whose end a
# forked process waits for ever when it ends.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    # Loaded when asked for: `import hlm` stays light.
    if name == "QueryEncoder":
        from hlm.serving.query_encoder import QueryEncoder

        return QueryEncoder
    if name == "AsyncQueryEncoder":
        from hlm.serving.micro_batches import AsyncQueryEncoder

        return AsyncQueryEncoder
    raise AttributeError(f"module 'hlm' has no attribute '{name}'")
