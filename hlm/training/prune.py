"""Phase 2, the cut alone: a student with fewer layers and narrower FFNs, without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hlm.artefacts import claimed
from hlm.data.contract import load
from hlm.encoders.loading import fingerprint, load_encoder, save_encoder
from hlm.encoders.pruning import cut
from hlm.identity import as_config, up_to_date
from hlm.planning.footprint import backbone_config
from hlm.planning.plan import cascade
from hlm.settings import keywords
from hlm.steps import PruneConfig
from hlm.vectors.store import VectorStore


@keywords(PruneConfig)
def prune(config: PruneConfig) -> Path:
    """Cuts a model at once: the student that shows what alignment is worth, and the start of the baseline that is never
    aligned. `align` cuts by itself, stage by stage.

    Every setting of `PruneConfig` is a keyword. An output that is up to date is left alone.

    Returns:
        `output`: the student, a sentence-transformers folder.

    Raises:
        HlmError: a shape that the model cannot be cut to, no such data or vectors, or an output that is somebody's.
    """
    with claimed(config.output, "student") as output:
        _prune(config)
    return output


def _prune(config: PruneConfig) -> None:
    layers = config.layers or config.keep
    cascade(backbone_config(config.model), [{"layers": layers, "ffn": config.ffn}])  # before any weights load
    data = load(config.data, splits=(), skip_bad_rows=config.skip_bad_rows)
    teacher = VectorStore.open(Path(config.vectors) / "corpus").encoder
    model = load_encoder(config.model)
    inputs = {"student": fingerprint(model), "teacher": teacher}
    identity: dict[str, Any] = {"inputs": inputs, "config": as_config(config)}
    if up_to_date(config.output, "student", identity):
        return
    texts = (data.unlabelled or data.queries)[: config.calibration]["text"]
    save_encoder(cut(model, layers, config.ffn, config.method, list(texts)), config.output, "student", **identity)
