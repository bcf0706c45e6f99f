"""The stores of a teacher that is not loaded here: an endpoint answers, or the vectors are ready."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from hlm.artefacts import HlmError
from hlm.embedding.endpoint import Endpoint
from hlm.embedding.ready import ReadyVectors, open_ready
from hlm.embedding.teacher_identity import Loaded, Part, Source, identify, prompt_name
from hlm.encoders.lengths import say_what_is_cut
from hlm.planning.plan import check_dim
from hlm.progress import progress
from hlm.settings import closest, read_section
from hlm.steps import PARTS, EmbedConfig
from hlm.teacher_settings import EndpointSettings, ReadySettings
from hlm.vectors import canaries
from hlm.vectors.store import pending_shards, write_store
from hlm.vectors.store_versions import Target, target_of

logger = logging.getLogger(__name__)

COMPARED = 16  # rows of a ready part that are encoded to see whose they are
RENDERED_ALIKE = 0.98


def read_settings(config: EmbedConfig) -> tuple[EndpointSettings | None, dict[str, ReadySettings]]:
    """The checked settings of `endpoint` and `ready`.

    Raises:
        HlmError: a part that is none, or what `read_section` refuses.
    """
    endpoint = read_section(EndpointSettings, config.endpoint, "endpoint") if config.endpoint else None
    ready = {}
    for part, given in config.ready.items():
        if part not in PARTS or part not in config.parts:
            raise HlmError(
                f"ready: expected some of the parts {', '.join(config.parts)}, found '{part}'{closest(part, PARTS)}"
            )
        entry = {"path": given} if isinstance(given, str) else given
        if not isinstance(entry, dict) or "path" not in entry:
            raise HlmError(f"ready: {part}: expected a path, or {{path, ids, vectors, table}}, found {given!r}")
        ready[part] = read_section(ReadySettings, entry, f"ready: {part}")
    if config.same_as and not (endpoint or ready):
        raise HlmError("same_as: expected an endpoint or ready vectors, found neither; a model says itself what it is")
    return endpoint, ready


def needs_model(config: EmbedConfig) -> bool:
    """Whether `model` is a model to load: neither an endpoint nor ready vectors give all that is asked for."""
    return not config.endpoint and not set(config.parts) <= set(config.ready)


def write_given(
    config: EmbedConfig,
    parts: Mapping[str, Part],
    endpoint: Endpoint | None,
    ready_settings: Mapping[str, ReadySettings],
    model: SentenceTransformer | None,
) -> list[Target]:
    """Writes the stores of `parts` into `config.output`, or what is left of them to write; what has changed of a store
    lies beside it, until the targets that are returned are committed.

    Args:
        model: where `needs_model`; it encodes the parts that are not ready.

    Raises:
        HlmError: ready vectors that are not this teacher's, an endpoint that is another teacher than before, and what
            `Endpoint` and `ReadyVectors` refuse. What was written is kept.
    """
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    ready = {part: open_ready(part, one, has_ids=parts[part].ids is not None) for part, one in ready_settings.items()}
    source: Source | None = endpoint or (Loaded(model, config.batch_tokens) if model is not None else None)
    width = _width(config, source, ready)
    dim = check_dim(config.dim, width)
    plans: dict[str, dict[str, Any]] = {
        part: {"dim": dim, "source": one.source, "n_rows": one.rows, "shard_rows": config.shard_rows}
        for part, one in parts.items()
    }
    teacher = identify(config, source, ready, parts, width)
    for part in parts:
        facts = {"prompt": prompt_name(part), "oracle": config.oracle, **teacher.facts}
        facts |= {"ready": ready[part].stamp} if part in ready else {"dtype": config.dtype} if model else {}
        plans[part] |= {"encoder": teacher.encoder, "facts": facts}
    asked = {
        part: target_of(part, output / part, one.records, plans[part])
        for part, one in parts.items()
        if part not in ready
    }
    if endpoint is not None:
        _tell_cost(endpoint, config, asked)
    for part, one in parts.items():
        if part in ready and pending_shards(output / part, **plans[part]):
            _write_ready(output / part, part, one, ready[part], source, plans[part])
        elif part in asked and asked[part].pending():
            assert source is not None
            if model is not None:
                target = asked[part]
                say_what_is_cut(model, target.rows, target.plan["n_rows"], role=prompt_name(part))
            _write_asked(part, asked[part], source)
        else:
            logger.info("%s: up to date", output / part)
    if teacher.canaries is not None:
        made = canaries.record(canaries.vectors_of(teacher.canaries, dim, where=str(output)), teacher.canaries["texts"])
        for part in parts:
            canaries.keep(output / part, "vectors", made)
    return list(asked.values())


def _width(config: EmbedConfig, source: Source | None, ready: Mapping[str, ReadyVectors]) -> int:
    widths = {f"ready: {part}": one.width for part, one in ready.items()}
    if source is not None:
        widths["endpoint" if config.endpoint else "model"] = source.width
    if len(set(widths.values())) > 1:
        found = ", ".join(f"{width} ({name})" for name, width in widths.items())
        raise HlmError(f"expected vectors of one teacher, all of one width, found {found}; name vectors that it made")
    return next(iter(widths.values()))


def _tell_cost(endpoint: Endpoint, config: EmbedConfig, targets: Mapping[str, Target]) -> None:
    """Logs what is still to be sent and about what it costs, before it is sent.

    Raises:
        HlmError: more than `max_cost`.
    """
    price, most = endpoint.settings.price, endpoint.settings.max_cost
    total = 0
    for part, target in targets.items():
        prompt = prompt_name(part)
        rows = tokens = 0
        for shard in target.pending():
            start, stop = shard * config.shard_rows, min((shard + 1) * config.shard_rows, target.plan["n_rows"])
            rows += stop - start
            tokens += endpoint.tokens([text for _, text in target.rows(start, stop)], prompt)
        if rows:
            cost = "" if price is None else f", about {tokens * price / 1e6:,.4f} at {price:g} a million"
            logger.info("%s: %s texts to send, about %s tokens%s", part, f"{rows:,}", f"{tokens:,}", cost)
        total += tokens
    if price is not None and most is not None and total * price / 1e6 > most:
        raise HlmError(
            f"endpoint: max_cost: expected at most {most:g}, found about {total * price / 1e6:,.4f} for {total:,} "
            "tokens; nothing was sent but canary queries: raise it, or embed fewer parts or texts"
        )


def _write_asked(part: str, target: Target, source: Source) -> None:
    plan = target.plan
    prompt, size = plan["facts"]["prompt"], plan["shard_rows"]
    rows = sum(min(size, plan["n_rows"] - shard * size) for shard in target.pending())

    def asked(texts: list[str]) -> np.ndarray:
        return _sliced(source.encode(texts, prompt_name=prompt, bar=bar), plan["dim"])

    with progress(what=f"embed {part}", unit="text", total=rows) as bar:
        target.write(asked)
    logger.info("%s: %d vectors written", target.folder, rows)


def _write_ready(
    folder: Path, part: str, one: Part, ready: ReadyVectors, source: Source | None, plan: dict[str, Any]
) -> None:
    vectors, places = ready.in_order(one.keys(ready), plan["dim"], folder.parent)
    if source is not None:
        _check_theirs(part, one, vectors, places, source, plan)

    def numbered(start: int, stop: int) -> Iterator[tuple[str, str]]:
        for number, (name, _) in enumerate(one.records(start, stop), start):
            yield name, str(number)

    write_store(folder, numbered, partial(_rows_of, vectors, places), **plan)
    logger.info("%s: %d vectors taken from %s", folder, one.rows, ready.path)


def _rows_of(vectors: np.ndarray, places: np.ndarray, numbers: list[str]) -> np.ndarray:
    return np.asarray(vectors[places[[int(number) for number in numbers]]])


def _check_theirs(
    part: str, one: Part, vectors: np.ndarray, places: np.ndarray, source: Source, plan: dict[str, Any]
) -> None:
    """Refuses ready vectors of another teacher than `source`, by some rows whose texts it encodes: each must find its
    own among the ready ones."""
    rows = np.unique(np.linspace(0, one.rows - 1, COMPARED).astype(np.int64))
    texts = [next(iter(one.records(int(row), int(row) + 1)))[1] for row in rows]
    ours = _sliced(source.encode(texts, prompt_name=plan["facts"]["prompt"]), plan["dim"])
    cosines = ours @ vectors[places[rows]].astype(np.float32).T
    found = int((np.diag(cosines) >= cosines.max(axis=1) - 1e-3).sum())
    mean = float(np.diag(cosines).mean())
    if not found >= canaries.LEAST_SHARE * len(rows):
        raise HlmError(
            f"ready: {part}: expected vectors of this teacher, found that only {found} of {len(rows)} texts are "
            f"nearest to their own (mean cosine {mean:.3f}): another model, or other ids; name vectors that it made"
        )
    if mean < RENDERED_ALIKE:
        logger.warning(
            "ready: %s: the teacher's own vectors of these texts are at cosine %.3f to the ready ones: they were made "
            "of other texts ('title. text' here), or with another prompt",
            part,
            mean,
        )


def _sliced(vectors: np.ndarray, dim: int) -> np.ndarray:
    vectors = vectors[:, :dim]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
