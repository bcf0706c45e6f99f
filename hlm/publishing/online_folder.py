"""The online folder: the student with its ONNX files, and what int8 costs on a dataset's queries."""

from __future__ import annotations

import logging
from pathlib import Path

from sentence_transformers import SentenceTransformer

from hlm.artefacts import HlmError, claimed, read_manifest
from hlm.data.contract import load
from hlm.encoders.loading import encode, fingerprint, load_encoder, save_encoder
from hlm.evaluation.metrics import dense_run, mean, overlap
from hlm.identity import as_config, up_to_date
from hlm.indexes.faiss_index import AdIndex
from hlm.indexes.lineage import check_student
from hlm.serving.export import export_model
from hlm.serving.query_encoder import QueryEncoder
from hlm.settings import keywords
from hlm.steps import ExportConfig
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)


@keywords(ExportConfig)
def export(config: ExportConfig) -> Path:
    """Writes a student with its ONNX files: what is published, and what `hlm.QueryEncoder` and the demo load.

    Every setting of `ExportConfig` is a keyword. With `data` and `vectors`, the manifest says which share of the first
    `k` documents int8 and fp32 have in common. An output that is up to date is left alone.

    Returns:
        `output`: a sentence-transformers folder, with graphs under `onnx`.

    Raises:
        HlmError: no student there, one that cannot be exported, vectors of another teacher, or an output that is
            somebody's.
    """
    if (config.data is None) != (config.vectors is None):
        raise HlmError("data and vectors: expected both or neither; int8 is judged by searching vectors with queries")
    with claimed(config.output, "student") as output:
        _export(config)
    return output


def _export(config: ExportConfig) -> None:
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
    named = {name: source[name] for name in ("named_teacher",) if name in source}

    def beside(folder: Path) -> None:
        facts.update(export_model(model, folder, lookup=config.lookup))
        if "int8" in facts and config.data is not None and config.vectors is not None:
            found = int8_overlap(config, config.data, config.vectors, model, folder)
            facts["int8"][f"overlap@{config.k}"] = found

    save_encoder(model, config.output, "student", beside=beside, onnx=facts, **identity, **named)
    for found in facts.values():
        shared = found.get(f"overlap@{config.k}")
        logger.info(
            "%s/%s: cosine to the model's vectors at least %.6f%s",
            config.output,
            found["file"],
            found["min_cosine"],
            "" if shared is None else f", {shared:.1%} of the first {config.k} documents in common",
        )


def int8_overlap(config: ExportConfig, data: str, vectors: str, model: SentenceTransformer, folder: Path) -> float:
    """Mean share of the first k documents that int8 and the fp32 model have in common, over the split's queries."""
    queries = load(data, splits=(config.split,), skip_bad_rows=config.skip_bad_rows).split_queries(config.split)
    ids, texts = [query for query, _ in queries], [text for _, text in queries]
    index = AdIndex.build(VectorStore.open(Path(vectors) / "corpus"), dim=model.get_embedding_dimension())
    whole = encode(model, texts, prompt_name="query")
    quantised = QueryEncoder.from_pretrained(folder, precision="int8").encode(texts)
    one, other = (dense_run(found, index, ids, config.k) for found in (whole, quantised))
    return mean(overlap(one, other, config.k))
