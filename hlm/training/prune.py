"""Phase 2, the cut alone: a student with fewer layers, narrower FFNs and fewer tokens, without any training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from hlm.artefacts import claimed
from hlm.data.contract import RetrievalData, iterate, load
from hlm.encoders.loading import fingerprint, load_encoder, save_encoder
from hlm.encoders.pruning import cut
from hlm.encoders.static_words import static_student
from hlm.encoders.vocabulary import choose_tokens, count_tokens, cut_vocabulary, share_kept
from hlm.identity import as_config, up_to_date
from hlm.indexes.lineage import named_teacher
from hlm.planning.students import after_cut, model_at
from hlm.progress import progress
from hlm.settings import keywords
from hlm.steps import PruneConfig
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)

REPORTED = ("dev", "test")  # whose queries are told apart by whether they keep their tokens


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
    after_cut(model_at(config.model), vars(config))  # refuses what cannot be made, before any weights load
    splits = REPORTED if config.vocabulary else ()
    data = load(config.data, splits=splits, skip_bad_rows=config.skip_bad_rows)
    store = VectorStore.open(Path(config.vectors) / "corpus")
    model = load_encoder(config.model)
    inputs = {"student": fingerprint(model), "teacher": store.encoder}
    if config.vocabulary or config.static:
        inputs |= {part: data.fingerprint(part) for part in ("corpus", *(["unlabelled"] if data.unlabelled else []))}
    identity: dict[str, Any] = {"inputs": inputs, "config": as_config(config)}
    if up_to_date(config.output, "student", identity):
        return
    if config.static is not None:
        model = static_student(model, _log(data), config.static)
        logger.info("a static student of %s tokens", f"{len(model.tokenizer):,}")
        save_encoder(model, config.output, "student", **identity, **named_teacher(store))
        return
    texts = (data.unlabelled or data.queries)[: config.calibration]["text"]
    model = cut(model, config.layers or config.keep, config.ffn, config.method, list(texts), fold=config.fold)
    facts = named_teacher(store)
    if config.vocabulary:
        model, facts["vocabulary"] = _with_fewer_tokens(model, data, config.vocabulary)
    save_encoder(model, config.output, "student", **identity, **facts)


def _with_fewer_tokens(
    model: SentenceTransformer, data: RetrievalData, vocabulary: dict[str, int]
) -> tuple[SentenceTransformer, dict[str, Any]]:
    """The model with the tokens that unlabelled queries and titles use, and what became of its vocabulary."""
    counts = count_tokens(model, _log(data))
    kept = choose_tokens(model, counts, **vocabulary)
    shares = {
        split: share_kept(model, kept, [text for _, text in data.split_queries(split)])
        for split in REPORTED
        if split in data.qrels
    }
    told = "".join(f"; {share:.1%} of the {split} queries keep theirs" for split, share in shares.items())
    logger.info("vocabulary: %s of %s tokens stay%s", f"{len(kept):,}", f"{len(counts):,}", told)
    facts = {"tokens": len(kept), "tokens_before": len(counts), "queries_whole": shares}
    return cut_vocabulary(model, kept), facts


def _log(data: RetrievalData) -> Iterator[str]:
    """The texts whose tokens count: unlabelled queries and ads' titles."""
    log = [] if data.unlabelled is None else [data.unlabelled.select_columns(["text"])]
    if not log:
        logger.warning("%s has no unlabelled queries: tokens are chosen by the ads' titles alone", data.source)
    rows = chain.from_iterable(map(iterate, [*log, data.corpus.select_columns(["title"])]))
    total = sum(map(len, log)) + len(data.corpus)
    for row in progress(rows, what="count tokens", unit="text", total=total):
        yield from (text for text in row.values() if text)
