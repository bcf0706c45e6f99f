"""The settings of a benchmark: the shipped ones are read, and a sample of queries follows its seed."""

import json
import shutil
from dataclasses import replace

import pytest

from hlm.benchmark import entries, run
from hlm.benchmark.random_weights import shape_config
from hlm.benchmark.systems import load_system
from hlm.config import parse
from hlm.recipe_files import recipes

CONFIGS = recipes() / "configs"


@pytest.mark.parametrize(
    "path",
    [*CONFIGS.glob("*/benchmark.yaml"), *CONFIGS.glob("latency/*.yaml")],
    ids=lambda p: f"{p.parent.stem}/{p.stem}",
)
def test_shipped_configs_are_read(path):
    (config,) = parse(entries.BenchmarkConfig, argv=["--config", str(path)])
    found = entries.read_entries(config)
    assert {config.reference, config.candidate} - {None} <= set(found) and len(found) > 1
    for entry in found.values():
        if entry.shape:
            assert shape_config(entry.shape, layers=entry.layers, ffn=entry.ffn).num_hidden_layers >= 4


def test_a_static_student_has_no_floor(online_bert, tmp_path):
    entry, system = entries.Entry(model=str(tmp_path), backend="hlm"), load_system(str(online_bert), backend="hlm")
    shutil.copytree(online_bert, tmp_path, dirs_exist_ok=True)
    assert entries.find_works({"a": entry}, {"a": system}, {}, ["red shoe"])["a"].tokens == [4]
    kind = "sentence_transformers.models.StaticEmbedding"
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
    assert entries.find_works({"a": entry}, {"a": system}, {}, ["red shoe"]) == {}


def test_the_sample_follows_the_seed(catalogue_200):
    config = entries.BenchmarkConfig(data=catalogue_200, queries=20)
    taken = [run.read_queries(replace(config, seed=seed))[0] for seed in (0, 0, 1)]
    assert taken[0] == taken[1] != taken[2] and len(set(taken[2])) == 20
