"""The layout of a saved sentence-transformers folder that every reader knows.

Newer sentence-transformers write other module types (text-embeddings-inference then refuses the folder or drops its
`Dense`), one `pooling_mode` instead of boolean flags (mispooled by text-embeddings-inference and vLLM), and no limit of
tokens in sentence_bert_config.json (text-embeddings-inference then does not start).
"""

from __future__ import annotations

import json
from pathlib import Path

from hlm.artefacts import HlmError
from hlm.encoders.folder import LIMITS, MODULES, POOLING, EncoderFolder

LEGACY_MODULES = ("Transformer", "Pooling", "Normalize", "Dense", "StaticEmbedding")


def write_legacy_layout(folder: Path) -> None:
    """Rewrites modules.json, the pooling flags and the limit of tokens of a saved folder, in place and as often as one
    likes; loading it gives equal vectors."""
    path = folder / MODULES
    modules = json.loads(path.read_text())
    for module in modules:
        name = module["type"].rsplit(".", 1)[-1]
        if name in LEGACY_MODULES:
            module["type"] = f"sentence_transformers.models.{name}"
        if name == "Pooling":
            _write_pooling_flags(folder / module["path"] / "config.json")
        if name == "Transformer":
            _write_token_limit(folder / module["path"])
    path.write_text(json.dumps(modules, indent=2) + "\n")


def _write_token_limit(folder: Path) -> None:
    """text-embeddings-inference does not start without `max_seq_length` in sentence_bert_config.json, and vLLM reads it
    only beside `do_lower_case`; newer sentence-transformers keep the limit with the tokenizer alone."""
    files = EncoderFolder(folder)
    longest, config = files.longest(), files.json(LIMITS)
    if longest is not None:
        config = {"max_seq_length": longest, "do_lower_case": False, **config}
    (folder / LIMITS).write_text(json.dumps(config, indent=2) + "\n")


def _write_pooling_flags(path: Path) -> None:
    config = json.loads(path.read_text())
    mode = config.pop("pooling_mode", None)
    if isinstance(mode, str):
        mode = [mode]
    if mode is None:
        return  # the flags are there already
    unknown = set(mode) - set(POOLING)
    if unknown:
        raise HlmError(f"{path}: expected pooling among {', '.join(POOLING)}, found {', '.join(sorted(unknown))}")
    config["word_embedding_dimension"] = config.pop("embedding_dimension", config.get("word_embedding_dimension"))
    for name, flag in POOLING.items():
        config[f"pooling_mode_{flag}"] = name in mode
    path.write_text(json.dumps(config, indent=2) + "\n")
