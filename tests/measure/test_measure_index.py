"""The measurement of indexes runs whole on a tiny catalogue, and its figures are of what they say."""

import importlib.util
import json
import sys
from pathlib import Path

import faiss
import torch

from hlm.embedding.embed import embed

PATH = Path(__file__).resolve().parents[2] / "results/measure/measure_index.py"
spec = importlib.util.spec_from_file_location("measure_index", PATH)
measure_index = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
spec.loader.exec_module(measure_index)


def test_it_runs_whole(tiny_bert, online_bert, catalogue_200, tmp_path, monkeypatch):
    for owner, name in ((torch, "set_num_threads"), (faiss, "omp_set_num_threads")):
        monkeypatch.setattr(owner, name, lambda *given: None)
    embed(model=tiny_bert, data=catalogue_200, output=str(tmp_path / "vectors"), parts=["corpus"])
    folders = {
        "vectors": tmp_path / "vectors",
        "student": online_bert,
        "online": online_bert,
        "work": tmp_path / "work",
    }
    words = [word for name, folder in folders.items() for word in (f"--{name}", str(folder))]
    words += ["--data", catalogue_200, "--output", str(tmp_path / "index.json"), "--recalls", "0.5", "1.0"]
    words += ["--candidates", "Flat", "HNSW32", "IVF8,SQ8,RFlat"]
    words += ["--k", "5", "--queries", "60", "--timed", "9", "--repeats", "1", "--block_s", "0.02"]
    measure_index.main(words)
    report = json.loads((tmp_path / "index.json").read_text())
    found = report["text_to_ads"]
    assert found["sentence-transformers + Flat"]["recall"] == found["hlm + flat"]["recall"] == 1
    assert all(one["p50_ms"] > 0 for one in found.values())
    assert found["hlm + flat"]["times_faster_than"]["sentence-transformers + Flat"] > 0
    assert report["chosen"]["hlm_1"]["recall"] == 1 and report["ads"] == 200
    assert all(one["ours"]["short_lists"] == 0 for name, one in report["filters"].items() if "1%" not in name)
    assert set(report["memory"]) == {"flat", "hnsw32", "hlm_0.5", "hlm_1"}
    assert all(set(one) == {"mapped_bytes_a_vector", "read_bytes_a_vector"} for one in report["memory"].values())
    assert "/" not in json.dumps(report["settings"])
    assert {"faiss_ms", "ad_index_ms", "ratio"} == set(report["beyond_faiss"]["hlm_1"])
