"""The online folder: the student with its ONNX files, and what int8 costs on this data's queries.

    python recipes/export.py --config recipes/configs/quickstart/export.yaml

What is published, and what `hlm.QueryEncoder` and the demo load.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hlm.artefacts import HlmError, claimed, read_manifest
from hlm.config import parse, run_recipe
from hlm.data.contract import load
from hlm.encoders.loading import encode, fingerprint, load_encoder, save_encoder
from hlm.evaluation.metrics import dense_run, mean, overlap
from hlm.serving.export import export_model
from hlm.serving.query_encoder import QueryEncoder
from hlm.training.inputs import check_student
from hlm.training.trainer import as_config, up_to_date
from hlm.vectors.index import AdIndex
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)


@dataclass
class ExportConfig:
    student: str = field(metadata={"help": "the student's folder"})
    output: str = field(metadata={"help": "the online folder"})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "leave out rows without text, and judgements of what is not in the data"}
    )
    data: str | None = field(default=None, metadata={"help": "dataset whose queries the int8 file is judged on"})
    vectors: str | None = field(default=None, metadata={"help": "the teacher's stores, searched for that"})
    split: str = "test"
    k: int = field(default=10, metadata={"help": "documents whose overlap with fp32's is counted"})
    lookup: bool = field(default=True, metadata={"help": "write onnx/model_lookup.onnx where it pays: faster, larger"})


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse(ExportConfig, argv=argv)
    if (config.data is None) != (config.vectors is None):
        raise HlmError("data and vectors: expected both or neither; int8 is judged by searching vectors with queries")
    with claimed(config.output, "student"):
        export(config)


def export(config: ExportConfig) -> None:
    source = read_manifest(config.student, "student")
    model = load_encoder(config.student, device="cpu")
    identity = {
        "inputs": source["inputs"] | {"student": fingerprint(model)},
        "config": as_config(config) | {"trained": source["config"]},
    }
    if config.vectors is not None:
        check_student(config.student, VectorStore.open(Path(config.vectors) / "corpus").encoder)
    if up_to_date(config.output, "student", identity):
        return
    facts: dict[str, dict] = {}

    def beside(folder: Path) -> None:
        facts.update(export_model(model, folder, lookup=config.lookup))
        if config.vectors is not None:
            facts["int8"][f"overlap@{config.k}"] = int8_overlap(config, model, folder)

    save_encoder(model, config.output, "student", beside=beside, onnx=facts, **identity)
    for precision, found in facts.items():
        logger.info("%s: %s", precision, found)


def int8_overlap(config: ExportConfig, model, folder: Path) -> float:
    """Mean share of the first k documents that int8 and the fp32 model have in common, over the split's queries."""
    queries = load(config.data, splits=(config.split,), skip_bad_rows=config.skip_bad_rows).split_queries(config.split)
    ids, texts = [query for query, _ in queries], [text for _, text in queries]
    index = AdIndex.build(VectorStore.open(Path(config.vectors) / "corpus"), dim=model.get_embedding_dimension())
    quantised = QueryEncoder.from_pretrained(folder, precision="int8").encode(texts)
    runs = [
        dense_run(vectors, index, ids, config.k) for vectors in (encode(model, texts, prompt_name="query"), quantised)
    ]
    return mean(overlap(*runs, k=config.k))


if __name__ == "__main__":
    run_recipe(main)
