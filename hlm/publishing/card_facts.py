"""What cards say, read from manifests and reports: plain values, scrubbed of what is nobody else's business."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hlm.artefacts import MANIFEST, HlmError, read_manifest
from hlm.benchmark import report as latency_report
from hlm.encoders.families import depth_field
from hlm.encoders.folder import EncoderFolder
from hlm.evaluation.tables import contribution_rows, describe, threshold_rows
from hlm.redaction import portable, public, public_manifest
from hlm.report_types import LatencyReport, Recovery, Report

PARTS = ("corpus", "queries", "unlabelled")
QRELS = ("train", "dev", "test")
SUFFIXES = (".parquet", ".jsonl", ".tsv", ".csv")


def data_name(source: str, repo: str | None) -> str:
    """How a dataset is called in prose: its repository, else the last part of where it came from."""
    return repo or Path(source).name or source


def encoder_facts(folder: str | Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Width, pooling, prompts, limit of tokens, head and parameters, as the folder's files say."""
    files = EncoderFolder(folder)
    static = files.is_static()
    pooling = "mean" if static else files.pooling()
    if pooling not in ("mean", "cls", "lasttoken"):
        raise HlmError(f"{folder}: expected mean, cls or last-token pooling, found {pooling}")
    architecture = files.json("config.json")
    return {
        "encoder": manifest["encoder"],
        "dim": manifest["dim"],
        "pooling": pooling.replace("lasttoken", "last token"),
        "prompt": files.prompt(),
        "prompts": files.prompts(),
        "limit": files.longest(),
        "heads": [(path, files.activation(path)) for path in files.heads()],
        "static": static,
        "architecture": "StaticEmbedding"
        if static
        else (architecture.get("architectures") or [architecture.get("model_type")])[0],
        "layers": architecture.get(depth_field(architecture)),
    }


def training_steps(folder: str | Path) -> list[dict[str, Any]]:
    """The steps that made an encoder, last first, as far back as their folders lie where the manifests say.

    Returns:
        [{"step", "encoder", "inputs", "settings": JSON text, "backbone": what a teacher was tuned from or None,
        "learning_rate": the one that was kept where several were tried, or None}]
    """
    return list(_steps(Path(folder)))


def _steps(folder: Path) -> Iterator[dict[str, Any]]:
    seen: set[Path] = set()
    while (folder / MANIFEST).is_file() and folder.resolve() not in seen:
        seen.add(folder.resolve())
        kind = _json(folder / MANIFEST).get("kind")
        if kind not in ("student", "teacher"):
            return
        manifest = read_manifest(folder, kind)
        config, inputs = manifest.get("config") or {}, manifest.get("inputs") or {}
        parent = Path(str(config.get("student") or config.get("model") or ""))
        before = _json(parent / MANIFEST).get("encoder") if (parent / MANIFEST).is_file() else None
        if before != manifest["encoder"]:  # a copy of the same encoder, such as an export, is no training step
            yield {
                "step": _step_name(kind, config),
                "encoder": manifest["encoder"],
                "inputs": public(inputs),
                "settings": json.dumps(portable(config), ensure_ascii=False),
                "backbone": config.get("backbone"),
                "learning_rate": _rate_kept(manifest.get("chosen") or {}),
            }
        if before is None or before not in (inputs.get("student"), inputs.get("teacher"), manifest["encoder"]):
            return
        folder = parent


def _rate_kept(chosen: dict[str, Any]) -> float | None:
    """The learning rate that dev chose; None where it had no choice."""
    tried = {row.get("learning_rate") for row in chosen.get("table") or ()}
    return chosen.get("learning_rate") if len(tried) > 1 else None


def _step_name(kind: str, config: dict[str, Any]) -> str:
    if kind == "teacher":
        return "teacher"
    marks = (("hard_negatives", "refinement"), ("cascade", "alignment"), ("layers", "pruning"))
    return next((name for mark, name in marks if mark in config), "student")


def system_of(report: Report | None, encoder: str, usual: str) -> str | None:
    """Which row of the report is about this encoder.

    Raises:
        HlmError: the report names the encoders it measured, and this is none of them.
    """
    if report is None:
        return None
    encoders = report["environment"].get("encoders")
    if not encoders:
        return usual if usual in report["systems"] else None
    if encoders.get(usual) == encoder:  # a teacher may be its backbone to the bit
        return usual
    name = next((name for name, found in encoders.items() if found == encoder), None)
    if name is None:
        found = ", ".join(f"{name} {value}" for name, value in encoders.items())
        raise HlmError(
            f"expected a report of encoder {encoder}, found one of {found}; evaluate this encoder, or leave "
            "the report out"
        )
    return name


def report_facts(report: Report, system: str | None, repo: str | None) -> dict[str, Any]:
    """Rows of the tables of quality, header first."""
    k = report["k"]
    metrics = [f"{name}@{k}" for name in ("ndcg", "condensed_ndcg", "judged", "precision")]
    metrics += ["recall@100", f"mrr@{k}", f"overlap@{k}"]
    names = list(report["systems"])
    metrics = [metric for metric in metrics if any(metric in report["systems"][name] for name in names)]
    rows = [["system", *metrics, f"recovery of ndcg@{k} [95%]", "parameters", "without embeddings"]]
    for name in names:
        values = report["systems"][name]
        kept = report["recovery_by_system"].get(name, {}).get(f"ndcg@{k}")
        cells = [f"{values[metric]:.4f}" if values.get(metric) is not None else "-" for metric in metrics]
        sizes = [f"{values[key]:,}" if values.get(key) else "-" for key in ("params_total", "params_non_embedding")]
        rows.append([name, *cells, _recovery(kept) if kept else "-", *sizes])
    own = report["recovery_by_system"].get(system or "", {})
    slices = [["slice", "queries", f"ndcg@{k}", f"teacher's ndcg@{k}", "recovery [95%]"]]
    for by, groups in report["slices"].items() if system == "student" else ():
        for name, group in groups.items():
            cells = [f"{group[f'{who}_ndcg@{k}']:.4f}" for who in ("student", "teacher")]
            recovered = _recovery(group["recovery"]) if group.get("recovery") else "-"
            slices.append([f"{by} {name}", str(group["n"]), *cells, recovered])
    return {
        "data": data_name(report["dataset"], repo),
        "split": report["split"],
        "queries": report["queries"],
        "level": report["relevance_level"],
        "k": k,
        "system": system,
        "rows": rows,
        "recovery": {
            metric: _recovery(kept) + (f" ({kept['reason']})" if "reason" in kept else "")
            for metric, kept in own.items()
        },
        "overlap": report["systems"].get(system or "", {}).get(f"overlap@{k}"),
        "slices": slices if len(slices) > 1 else None,
        "ensembles": [
            {"what": describe(name, fusion, k), "rows": contribution_rows(fusion, k)}
            for name, fusion in report.get("fusions", {}).items()
            if system in fusion["systems"]
        ],
        "least_score": _least_score(report, system),
    }


def _least_score(report: Report, system: str | None) -> dict[str, Any] | None:
    thresholds = report.get("thresholds")
    if thresholds is None or system not in thresholds["systems"]:
        return None
    header, *rows = threshold_rows(thresholds)
    own = [row for row in rows if row[0] == system]
    return {"wanted": thresholds["wanted_precision"], "split": thresholds["split"], "rows": [header, *own]}


def _recovery(kept: Recovery) -> str:
    if kept["value"] is None:
        return "-"
    if kept["ci95"] is None:
        return f"{kept['value']:.1%} [-]"
    low, high = kept["ci95"]
    return f"{kept['value']:.1%} [{low:.1%}, {high:.1%}]"


def latency_facts(latency: LatencyReport, repo: str | None) -> dict[str, Any]:
    """The rows and notes that recipes/benchmark.py prints, and the machine they were taken on."""
    where = latency["environment"]
    return {
        "rows": latency_report.rows(latency),
        "notes": latency_report.notes(latency),
        "queries": latency["queries"],
        "data": data_name(latency["data"], repo),
        "reference": latency["reference"],
        "cpu": where.get("cpu"),
        "cores": where.get("cores"),
        "gpu": where.get("gpu"),
        "versions": where.get("versions") or {},
    }


def dataset_facts(folder: str | Path) -> dict[str, Any]:
    """What a dataset's folder holds, from its manifests and file names.

    Raises:
        HlmError: it has neither a corpus nor a manifest.
    """
    folder = Path(folder)
    manifest = public_manifest(_json(folder / MANIFEST)) if (folder / MANIFEST).is_file() else {}
    stores = {}
    for made in sorted(folder.glob(f"vectors/*/{MANIFEST}")):
        stores[made.parent.name] = public_manifest(read_manifest(made.parent, "vectors"))
    built = (folder / "index" / MANIFEST).is_file()
    index = public_manifest(read_manifest(folder / "index", "index")) if built else None
    configs = []
    for part in PARTS:
        if found := _data_files(folder, part):
            configs.append({"config_name": part, "data_files": [{"split": "train", "path": found}]})
    splits = [{"split": split, "path": path} for split in QRELS if (path := _data_files(folder, f"qrels/{split}"))]
    if splits:
        configs.append({"config_name": "qrels", "data_files": splits})
    if not configs and not stores:
        raise HlmError(
            f"{folder}: expected corpus, queries and qrels, or vectors/, found neither; name a dataset's folder"
        )
    rows = stores["corpus"]["rows"] if "corpus" in stores else (manifest.get("config") or {}).get("ads")
    return {
        "manifest": manifest,
        "made_settings": json.dumps(portable(manifest.get("config") or {}), ensure_ascii=False),
        "configs": configs,
        "stores": {name: store | {"fingerprint_of_texts": store["inputs"]["source"]} for name, store in stores.items()},
        "index": index,
        "rows": rows,
        "size": [_size(rows)] if rows else None,
        "teacher": stores["corpus"]["inputs"]["encoder"] if "corpus" in stores else None,
        "named": stores["corpus"]["config"].get("teacher") if "corpus" in stores else None,
        "synthetic": manifest.get("kind") == "catalogue",
    }


def _data_files(folder: Path, part: str) -> str | None:
    """Where a table's files lie, as the Hub's data_files write it: one file, or a folder of files."""
    for suffix in SUFFIXES:
        if (folder / f"{part}{suffix}").is_file():
            return f"{part}{suffix}"
    for suffix in SUFFIXES:
        if any((folder / part).glob(f"*{suffix}")):
            return f"{part}/*{suffix}"
    return None


def _size(rows: int) -> str:
    bounds = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
    bounds += [(10**8, "10M<n<100M"), (10**9, "100M<n<1B")]
    return next((name for bound, name in bounds if rows < bound), "1B<n<10B")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HlmError(
            f"expected JSON at {path}, found none that can be read ({error}); write the folder again"
        ) from error
