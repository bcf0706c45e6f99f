"""The fingerprint of an encoder: equal for encoders that give equal vectors, wherever they were loaded from."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer

# Fields of a backbone's configuration, of whatever depth, that leave its vectors as they are; all others are part of
# its fingerprint. A field of this list differs between models that are equal.
HARMLESS = {
    *("_name_or_path", "transformers_version", "architectures"),  # where the model came from, and who saved it
    *("dtype", "torch_dtype"),  # the weights' own are hashed with them
    *("_attn_implementation", "attn_implementation", "_experts_implementation"),  # kernels of one computation
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states"),  # what is given beside the vectors
    *("id2label", "label2id", "problem_type", "classifier_dropout"),  # of heads that are no part of an encoder
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"),  # act in training alone
    *("initializer_range", "gradient_checkpointing"),  # of new weights, of the backward pass
}


def fingerprint(model: SentenceTransformer) -> str:
    """16 hex digits over all that decides an encoder's vectors: weights, tokenizer, prompts, pooling, normalisation,
    dimension, truncation, and the backbone's whole configuration but for `HARMLESS`. Adapters that are not merged
    count as weights, with their scales."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    backend = json.loads(model.tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None  # these two change with every call of the tokenizer
    digest.update(json.dumps(backend, sort_keys=True).encode())
    config = getattr(getattr(model[0], "model", None), "config", None)  # a static encoder has none
    default = {}
    if config is not None and not getattr(config, "has_no_defaults_at_init", False):
        default = type(config)().to_dict()
    facts = {
        "prompts": model.prompts,
        "modules": [(type(module).__name__, _settings(module)) for module in model],
        "dim": model.get_embedding_dimension(),
        "max_seq_length": model.max_seq_length,
        "config": {} if config is None else _deciding(config.to_dict(), default),
        "adapters": _adapters(model),
    }
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _deciding(config: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """What of a backbone's configuration decides its vectors, at every depth. What is off and off by default is left
    out too: a later transformers has options that this one lacks, and a model is the same under both."""
    kept = {}
    for name, value in config.items():
        usual = default.get(name)
        if name in HARMLESS or (not value and value == usual):
            continue
        deeper = usual if isinstance(usual, dict) else {}
        kept[name] = _deciding(value, deeper) if isinstance(value, dict) else value
    return kept


def _adapters(model: SentenceTransformer) -> dict[str, list[Any]]:
    """Module -> what decides its adapters' share beside their weights; {} where none is left unmerged."""
    return {
        name: [module.scaling, module.active_adapters, module.disable_adapters, module.merged_adapters]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)  # attention has a scaling too, a number
    }


def _settings(module: torch.nn.Module) -> dict[str, Any]:
    return (
        module.get_config_dict() if not isinstance(module, Transformer) and hasattr(module, "get_config_dict") else {}
    )
