"""The ad index that goes online, chosen by what a student's own queries find in it and what they cost."""

from __future__ import annotations

import contextlib
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hlm.artefacts import MANIFEST, HlmError, claimed, read_manifest
from hlm.data.contract import RetrievalData, load
from hlm.encoders.loading import encode, load_encoder
from hlm.fields import whole_number
from hlm.identity import PATHS, as_config, up_to_date, without
from hlm.indexes import tuning
from hlm.indexes.lineage import check_student, read_student
from hlm.indexes.recall import exact_neighbours, recalls
from hlm.settings import keywords
from hlm.steps import IndexConfig
from hlm.vectors.store import VectorStore

logger = logging.getLogger(__name__)
GB = 1e9


@keywords(IndexConfig)
def tune_index(config: IndexConfig) -> Path:
    """Builds the candidates, searches each with a student's own queries, and writes the fastest that finds enough of
    their exact neighbours within the bounds. A student's queries lie off the distribution of the ads: what suits the
    ads' own vectors, or the teacher's queries, need not suit them.

    Every setting of `IndexConfig` is a keyword. Half of the queries choose; what the other half finds is the recall in
    `hlm.json`, under "measured", beside every trial. The trials are printed, and drawn in `output`/tuning.png. An
    output that is up to date is left alone.

    Returns:
        `output`, which `open_index` opens.

    Raises:
        HlmError: settings, data or vectors that do not work or do not belong together, an output that is somebody's, or
            no candidate within the bounds: those that were built are kept for a run with others.
    """
    check(config)
    with claimed(config.output, "index") as output:
        _tune(config, output)
    return output


def _tune(config: IndexConfig, output: Path) -> None:
    store, manifest = VectorStore.open(Path(config.vectors) / "corpus"), read_student(config.student)
    check_student(config.student, store.encoder)
    inputs = {"encoder": store.encoder, "source": store.source, "student": manifest["encoder"]}
    data = load(config.data, splits=(), skip_bad_rows=config.skip_bad_rows)
    inputs["queries"] = data.fingerprint("unlabelled" if data.unlabelled else "queries")
    folder = output.with_name(f"{output.name}.candidates")
    if _is_up_to_date(output, inputs, config):
        _clear(folder)
        return
    columns = _columns(config, data, store)
    texts = list((data.unlabelled or data.queries)["text"])
    drawn = np.random.default_rng(config.seed).permutation(len(texts))[: config.queries]
    model = load_encoder(config.student)
    queries = encode(model, [texts[place] for place in drawn], prompt_name="query")
    exact = exact_neighbours(store, queries, config.k)
    bounds = tuning.Bounds(config.target_recall, config.memory_gb and config.memory_gb * GB, config.p99_ms)
    half = len(queries) // 2
    trials = _trials(config, store, queries[:half], exact[:half], bounds, columns, folder)
    chosen = tuning.choose(trials, bounds)
    print(tuning.format_table(trials, chosen, bounds, len(store)), flush=True)
    index, _ = tuning.build_candidate(store, chosen.factory, queries.shape[1], columns, folder, config.seed)
    index.set_options(**chosen.options)
    found: Any = index.search(queries[half:], config.k)[1]
    recall = float(recalls(found, exact[half:]).mean())
    index.measured = {
        "recall": recall,
        "k": config.k,
        "queries": len(queries) - half,
        "of": "queries of the student",
        "inputs": inputs,
        "config": as_config(config),
        "chosen": chosen._asdict(),
        "trials": [trial._asdict() for trial in trials],
    }
    index.save(output, lambda aside: tuning.plot(trials, chosen, bounds, config.k, aside / "tuning.png"))
    _clear(folder)
    say = logger.info if recall >= config.target_recall else logger.warning
    say(
        "%s: %s %s, recall %.4f on %d queries that did not choose it (wanted: %.4f), p50 %.3f ms, %.0f bytes an ad",
        output,
        chosen.factory,
        tuning.shown_options(chosen.options),
        recall,
        len(queries) - half,
        config.target_recall,
        chosen.p50_ms,
        chosen.bytes / len(store),
    )


def _trials(
    config: IndexConfig,
    store: VectorStore,
    queries: np.ndarray,
    exact: list[list[str]],
    bounds: tuning.Bounds,
    columns: pa.Table | None,
    folder: Path,
) -> list[tuning.Trial]:
    dim = queries.shape[1]
    trials: list[tuning.Trial] = []
    for factory in config.candidates or tuning.candidates(len(store), dim, tight=bounds.bytes is not None):
        if bounds.bytes is not None and (least := tuning.bytes_a_vector(factory, dim) * len(store)) > bounds.bytes:
            logger.info("%s: left out, it takes %.3g GB or more", factory, least / GB)
            continue
        index, size = tuning.build_candidate(store, factory, dim, columns, folder, config.seed)
        best = min((trial.p50_ms for trial in trials if trial.fits(bounds)), default=float("inf"))
        trials += tuning.explore(index, size, queries, exact, config.k, bounds, best)
    if not trials:
        raise HlmError(
            f"memory_gb: expected room for an index of {len(store)} ads, found {config.memory_gb}; allow more, or name "
            "smaller candidates such as IVF256,PQ16"
        )
    return trials


def _clear(folder: Path) -> None:
    """Removes the candidates, and nothing else that may lie there."""
    for place in folder.glob("*/" + MANIFEST):
        shutil.rmtree(place.parent)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _is_up_to_date(output: Path, inputs: dict[str, str], config: IndexConfig) -> bool:
    """Whether the index there was chosen from the same inputs by the same settings."""
    if not (output / MANIFEST).is_file():
        return False
    manifest = read_manifest(output, "index")
    measured = manifest.get("measured") or {}
    made = {name: measured.get(name) for name in ("inputs", "config")}
    wanted = {"inputs": inputs, "config": as_config(config)}
    return without(PATHS, made) == without(PATHS, wanted) and up_to_date(output, "index", manifest)  # its files


def _columns(config: IndexConfig, data: RetrievalData, store: VectorStore) -> pa.Table | None:
    """The corpus' ids and the columns to keep."""
    store.check(source=data.fingerprint("corpus"))
    for name in config.columns:
        if name not in data.corpus.column_names:
            raise HlmError(f"columns: expected some of {', '.join(data.corpus.column_names)}, found '{name}'")
    return data.corpus.select_columns(["_id", *config.columns]).with_format("arrow")[:] if config.columns else None


def check(config: IndexConfig) -> None:
    """Refuses numbers out of bounds, before anything is loaded."""
    whole_number("k", config.k, least=1)
    whole_number("queries (half choose, half measure)", config.queries, least=2)
    if not 0 < config.target_recall <= 1:
        raise HlmError(f"target_recall: expected more than 0, at most 1, found {config.target_recall}")
    for name in ("memory_gb", "p99_ms"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise HlmError(f"{name}: expected more than 0, found {value}")
