"""LoRA: adapters on a backbone's linear layers, trained in its place and merged into it before any vector is kept."""

from __future__ import annotations

import torch
from sentence_transformers import SentenceTransformer

from hlm.artefacts import HlmError


def add_lora(model: SentenceTransformer, *, rank: int, alpha: int, dropout: float = 0.0) -> SentenceTransformer:
    """Wraps the backbone in a LoRA adapter on all its linear layers, in place; only the adapter trains.

    Raises:
        HlmError: a rank below 1.
    """
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        raise HlmError(f"lora_rank: expected at least 1, found {rank}")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        exclude_modules=r".*pooler.*",  # BERT's pooler takes no part in mean pooling: it would get no gradient
        task_type="FEATURE_EXTRACTION",
    )
    model[0].model = get_peft_model(model[0].model, config)
    leave_casts_to_autocast(model)
    return model


def leave_casts_to_autocast(model: torch.nn.Module) -> None:
    """Under autocast, keeps PEFT from casting every input of an adapter to fp32, which autocast would cast back: two
    copies that change no bit. Layers that read one input then keep it once for the backward pass."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    def ask(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        layer.cast_input_dtype_enabled = not torch.is_autocast_enabled(inputs[0].device.type)

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.register_forward_pre_hook(ask)


def enable_gradient_checkpointing(model: SentenceTransformer) -> None:
    """Recomputes activations in the backward pass. Under LoRA the frozen embeddings' output must ask for gradients, or
    nothing below the first recomputed block would get any."""
    backbone = model[0].model
    backbone.enable_input_require_grads()
    backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def weaken_lora(model: SentenceTransformer, weight: float) -> None:
    """Keeps the share `weight` (0 to 1) of what LoRA learnt, in place: merged, the model lies on the line between the
    backbone (0) and the tuned model (1). Half-way is often better than either on queries unlike those trained on
    (WiSE-FT, arXiv 2109.01903)."""
    if not 0 < weight <= 1:
        raise HlmError(f"expected a weight above 0 and up to 1, found {weight}; 1 keeps all that was learnt")
    set_adapter(model, adapter_of(model), weight)


def adapter_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name -> a copy of each tensor that LoRA trains."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def set_adapter(model: torch.nn.Module, adapter: dict[str, torch.Tensor], weight: float) -> None:
    """Puts the share `weight` of an adapter of `adapter_of` in the place of the model's: with 0 the model answers as
    its backbone does."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in adapter.items():
            parameters[name].copy_(value * weight if ".lora_B." in name else value)


def merge_lora(model: SentenceTransformer) -> SentenceTransformer:
    """Folds the adapter into the weights, in place; to be done before any vector is kept."""
    model[0].model = model[0].model.merge_and_unload()
    return model
