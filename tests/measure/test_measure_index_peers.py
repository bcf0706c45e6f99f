"""The measurement beside other engines runs whole on a tiny catalogue, with those that are installed."""

import importlib.util
import json
import sys
from pathlib import Path

import faiss
import pytest
import torch

from hlm.artefacts import HlmError
from hlm.vectors.embed import embed

PATH = Path(__file__).resolve().parents[2] / "results/measure/measure_index_peers.py"
spec = importlib.util.spec_from_file_location("measure_index_peers", PATH)
peers = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peers)
PACKAGES = {"hnswlib": "hnswlib", "usearch": "usearch", "scalable-vs": "svs", "lancedb": "lancedb"}


def test_it_runs_whole(tiny_bert, online_bert, catalogue_200, tmp_path, monkeypatch):
    for owner, name in ((torch, "set_num_threads"), (faiss, "omp_set_num_threads")):
        monkeypatch.setattr(owner, name, lambda *given: None)
    embed(model=tiny_bert, data=catalogue_200, output=str(tmp_path / "vectors"), parts=["corpus"])
    folders = {"vectors": tmp_path / "vectors", "online": online_bert, "work": tmp_path / "work"}
    words = [word for name, folder in folders.items() for word in (f"--{name}", str(folder))]
    words += ["--data", catalogue_200, "--output", str(tmp_path / "peers.json"), "--recalls", "0.5", "0.9"]
    words += ["--candidates", "Flat", "HNSW32", "--k", "5", "--queries", "40", "--repeats", "1"]
    peers.main(words)
    report = json.loads((tmp_path / "peers.json").read_text())
    here = {name for name, package in PACKAGES.items() if importlib.util.find_spec(package)}
    assert set(report["left_out"]) == {"pgvector", *(PACKAGES.keys() - here)}
    assert {(row["engine"], row["recall_asked_for"]) for row in report["found"]} == {
        (name, target) for name in {"hlm", *here} for target in (0.5, 0.9)
    }
    for row in report["found"]:
        assert row["recall"] > row["recall_asked_for"] - 0.2 and 0 < row["p50_ms"] <= row["p99_ms"]
    assert report["ads"] == 200 and "/" not in json.dumps(report["settings"])
    with pytest.raises(HlmError, match="engines: expected some of hlm, hnswlib, .*, found faiss"):
        peers.main([*words, "--engines", "faiss"])
