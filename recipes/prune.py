"""Phase 2, the cut alone: writes a student with fewer layers and narrower FFNs, without any training.

    python recipes/prune.py --config recipes/configs/quickstart/prune.yaml

`recipes/align.py` cuts by itself, stage by stage; this recipe makes the student that is pruned only, at once: the
row that shows what alignment is worth, and the start of the baseline that is never aligned.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hlm.artefacts import claimed
from hlm.config import parse, run_recipe
from hlm.data.contract import load
from hlm.encoders.loading import fingerprint, load_encoder, save_encoder
from hlm.encoders.pruning import cut
from hlm.planning.footprint import backbone_config
from hlm.planning.plan import cascade
from hlm.training.trainer import as_config, up_to_date
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)


@dataclass
class PruneConfig:
    model: str = field(metadata={"help": "what is cut: a folder, a Hub id or package:..."})
    data: str = field(metadata={"help": "the dataset whose queries layers and FFN units are scored on"})
    vectors: str = field(metadata={"help": "the teacher's stores: which teacher's space the student searches"})
    output: str = field(metadata={"help": "folder for the pruned student"})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "leave out rows without text, and judgements of what is not in the data"}
    )
    layers: list[int] = field(default_factory=list, metadata={"help": "layers to keep; empty: `keep` chooses"})
    keep: int | None = field(default=None, metadata={"help": "how many layers to keep, chosen by `method`"})
    method: Literal["middle_skip", "norm_ratio"] = field(default="middle_skip")
    ffn: int | None = field(default=None, metadata={"help": "FFN units to keep; null: all"})
    calibration: int = field(default=512, metadata={"help": "queries that layers and FFN units are scored on"})


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse(PruneConfig, argv=argv)
    with claimed(config.output, "student"):
        prune(config)


def prune(config: PruneConfig) -> None:
    layers = config.layers or config.keep
    cascade(backbone_config(config.model), [{"layers": layers, "ffn": config.ffn}])  # before any weights load
    data = load(config.data, splits=(), skip_bad_rows=config.skip_bad_rows)
    teacher = VectorStore.open(Path(config.vectors) / "corpus").encoder
    model = load_encoder(config.model)
    identity = {"inputs": {"student": fingerprint(model), "teacher": teacher}, "config": as_config(config)}
    if up_to_date(config.output, "student", identity):
        return
    texts = (data.unlabelled or data.queries)[: config.calibration]["text"]
    save_encoder(cut(model, layers, config.ffn, config.method, list(texts)), config.output, "student", **identity)


if __name__ == "__main__":
    run_recipe(main)
