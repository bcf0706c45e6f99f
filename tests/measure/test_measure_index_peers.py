"""The measurements beside other engines, of widths, and of builds under a limit run whole on a tiny catalogue."""

import importlib.util
import json
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from hlm.artefacts import HlmError
from hlm.embedding.embed import embed


def script(name):
    path = Path(__file__).resolve().parents[2] / f"results/measure/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


peers, widths, builds, tables = (
    script(name) for name in ("measure_index_peers", "measure_index_widths", "measure_index_build", "tables")
)
PACKAGES = {"hnswlib": "hnswlib", "usearch": "usearch", "scalable-vs": "svs", "lancedb": "lancedb"}


@pytest.fixture
def words(tiny_bert, online_bert, catalogue_200, tmp_path, monkeypatch):
    """The settings that both scripts share."""
    for owner, name in ((torch, "set_num_threads"), (faiss, "omp_set_num_threads")):
        monkeypatch.setattr(owner, name, lambda *given: None)
    embed(model=tiny_bert, data=catalogue_200, output=str(tmp_path / "vectors"), parts=["corpus"])
    folders = {"vectors": tmp_path / "vectors", "online": online_bert, "data": catalogue_200, "work": tmp_path / "work"}
    given = [word for name, folder in folders.items() for word in (f"--{name}", str(folder))]
    return [*given, "--output", str(tmp_path / "out.json"), "--k", "5", "--queries", "40"]


def test_peers(words, tmp_path):
    words += ["--recalls", "0.5", "0.9", "--candidates", "Flat", "HNSW32", "--repeats", "1"]
    peers.main(words)
    report = json.loads((tmp_path / "out.json").read_text())
    here = {name for name, package in PACKAGES.items() if importlib.util.find_spec(package)}
    assert set(report["left_out"]) == {"pgvector", *(PACKAGES.keys() - here)}
    assert {(row["engine"], row["recall_asked_for"]) for row in report["found"]} == {
        (name, target) for name in {"hlm", *here} for target in (0.5, 0.9)
    }
    for row in report["found"]:
        assert row["recall"] > row["recall_asked_for"] - 0.2 and 0 < row["p50_ms"] <= row["p99_ms"]
    assert "hlm | Flat" in tables.beside(report) and "Left out: pgvector" in tables.beside(report)
    assert report["ads"] == 200 and "/" not in json.dumps(report["settings"])
    with pytest.raises(HlmError, match="engines: expected some of hlm, hnswlib, .*, found faiss"):
        peers.main([*words, "--engines", "faiss"])


def test_builds_under_a_limit(words, tmp_path):
    words += ["--sizes", "150", "700", "--kind", "SQ8", "--target_recall", "0.5", "--threads", "1"]
    builds.main(words)
    report = json.loads((tmp_path / "out.json").read_text())
    assert [(row["ads"], row["factory"]) for row in report["found"]] == [(150, "IVF16,SQ8"), (700, "IVF16,SQ8")]
    assert all(row["recall"] > 0.3 and row["build_s"] > 0 and row["bytes_an_ad"] > 30 for row in report["found"])
    assert report["ads_times"] == 700 / 150 and "| 700 | IVF16,SQ8 |" in tables.grown(report)
    made = builds.VectorStore.open(tmp_path / "work/700/store").gather(np.arange(700)).astype(np.float64)
    assert np.allclose(np.linalg.norm(made, axis=1), 1, atol=1e-2)
    assert np.allclose((made[200:400] * made[:200]).sum(1), 0.9, atol=1e-2)  # 200 real ones, and then as near as asked
    built = (tmp_path / "work/700/index/hlm.json").stat().st_mtime_ns
    builds.main(words)
    assert (tmp_path / "work/700/index/hlm.json").stat().st_mtime_ns == built
    with pytest.raises(builds.subprocess.CalledProcessError):
        builds.main([*words, "--memory_gib", "0.01"])


@pytest.mark.parametrize("name", ["memory.max", "memory.limit_in_bytes"])
def test_a_control_group_limits_the_builds(words, tmp_path, name):
    group = tmp_path / "group"
    group.mkdir()
    words += ["--sizes", "150", "200", "--kind", "SQ8", "--target_recall", "0.5", "--cgroup", str(group)]
    with pytest.raises(HlmError, match="cgroup: expected a memory control group"):
        builds.main(words)
    (group / name).touch()
    builds.main(words)
    assert (group / name).read_text() == str(4 * 2**30) and int((group / "cgroup.procs").read_text()) > 0
    assert "what it reads from the disk" in tables.grown(json.loads((tmp_path / "out.json").read_text()))


def test_widths(words, tmp_path):
    widths.main([*words, "--widths", "8", "16", "--kinds", "Flat", "SQ8", "HNSW32"])
    report = json.loads((tmp_path / "out.json").read_text())
    found = {(row["dim"], row["factory"]): row for row in report["found"]}
    assert (
        len(found) == 9 and found[32, "Flat"]["recall"] == 1 > found[16, "Flat"]["recall"] > found[8, "Flat"]["recall"]
    )
    assert found[32, "SQ8"]["bytes_an_ad"] < found[32, "Flat"]["bytes_an_ad"] and (tmp_path / "out.png").is_file()
    one = next(row for row in report["to_1b"] if (row["ads"], row["factory"]) == (10**9, "Flat"))
    assert one["gib"] == pytest.approx(found[32, "Flat"]["bytes_an_ad"] * 1e9 / 2**30)
    assert one["machines"] == -(-one["gib"] // 48)
    shown = tables.widened(report)
    assert "| 16 | `SQ8` | " in shown and "| 1,000,000,000 | `HNSW32` | " in shown
