"""A model none of whose layers and FFN units are alike, for the tests of what is cut."""

from __future__ import annotations

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from hlm.encoders.loading import encode, load_encoder

TEXTS = ["red shoe", "a small black laptop charger with cable", "kettle", "cheap used camera 5 inch", "blue jacket"]


def uneven(folder: str) -> SentenceTransformer:
    """A fresh copy whose norms and biases differ by unit as a trained model's do: with the norms' initial ones, every
    BERT layer's ratio is 1."""
    model = load_encoder(folder, device="cpu")
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def vectors(model: SentenceTransformer) -> np.ndarray:
    return encode(model, TEXTS, prompt_name=None)
