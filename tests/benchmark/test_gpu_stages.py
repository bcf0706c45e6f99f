"""What is measured on a GPU runs here at tiny shapes, every stage; what is predicted follows from FLOPs and bytes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Config

from hlm.benchmark import gpu_inputs, gpu_stages, gpu_work
from hlm.benchmark.random_weights import shape_config
from hlm.config import parse
from hlm.planning.footprint import Precision, Shape
from hlm.planning.hardware import GPUS
from hlm.planning.settings import Assumptions, read_steps
from hlm.training.frozen import FrozenVectors
from hlm.training.losses import matryoshka
from hlm.training.trainer import TrainingArguments

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "configs" / "qwen3-8b-190m"
SIZES = Assumptions(
    documents=200, queries=100, unlabelled=100, query_tokens=4, prompt_tokens=3, document_tokens=10, longest_query=8
)
LESS = {"per_device_train_batch_size": 4, "bf16": False}


def tiny(hidden=32):
    return Qwen3Config(
        vocab_size=200,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=64,
    )


@pytest.fixture(scope="module")
def steps():
    return read_steps(FOLDER, TrainingArguments)


@pytest.fixture(scope="module")
def sizes():
    (found,) = parse(Assumptions, argv=["--config", str(FOLDER / "plan.yaml")])
    return found


def run(name, every, **more):
    settings = {
        "lora_step": {"lora_rank": 4, "cache_chunk": 3, "max_seq_length": 16, "dtype": "float32"},
        "store_rate": {"batch_tokens": 64, "max_seq_length": 16, "dtype": "float32"},
        "align_rate": {"max_seq_length": 8},
        "refine_rate": {"pool": 32, "hard_negatives": 2},
    }[name]
    step = every[{"lora_step": "teacher", "store_rate": "embed"}.get(name, name.split("_")[0])]
    more |= {"teacher_width": 48} if name in ("align_rate", "refine_rate") else {}
    more |= {"documents": 64} if name == "refine_rate" else {}
    more = ({"seconds": 0.2} if name == "store_rate" else {"steps": 3}) | more
    return getattr(gpu_stages, name)(tiny(), {**step, **LESS, **settings}, SIZES, device="cpu", **more)


@pytest.mark.parametrize("name", ["lora_step", "store_rate", "align_rate", "refine_rate"])
def test_every_stage_runs_and_tells_what_it_found(steps, name):
    noted = []
    found = run(name, steps, note=noted.append)
    assert noted == [{"work": found["work"], "predicted": found["predicted"]}]  # known before it ran
    assert json.loads(json.dumps(found)) == found
    assert found["measured"]["rows_per_s"] > 0 and found["measured"]["step_seconds"] > 0
    for gpu in gpu_work.PREDICTED:
        assert found["predicted"][gpu].keys() <= found["measured"].keys()
    assert found["planned"]["step_seconds"] is None and found["planned"]["peak_memory_allocated"] > 0  # on the CPU


def test_training_stops_when_the_time_is_over(steps):
    found = run("lora_step", steps, steps=10_000, seconds=0.0)
    assert found["measured"]["steps"] == 1  # one warms up, one is measured


def test_flops_of_a_step_are_those_of_its_batch(steps):
    """Counted from the shapes that went through the encoder, they come near what the plan's lengths give."""
    found = run("lora_step", steps)
    assert 0.5 < found["measured"]["flops_a_step"] / found["work"]["flops"] < 2.5


@pytest.mark.parametrize("gpu", gpu_work.PREDICTED)
def test_the_predicted_time_is_that_of_arithmetic_or_of_memory(steps, sizes, gpu):
    teacher = Shape.of(shape_config("Qwen/Qwen3-Embedding-8B"))
    student = Shape.of(shape_config("Qwen/Qwen3-Embedding-0.6B", layers=4, ffn=768))
    work, phase = gpu_work.lora_work(teacher, steps["teacher"], sizes)
    found = gpu_work.predicted(work, GPUS[gpu], phase.peak)
    arithmetic = work.flops / (GPUS[gpu].flops * sizes.teacher_utilisation)
    assert found["step_seconds"] == arithmetic and found["rows_per_s"] == 64 / arithmetic
    assert found["fraction_of_peak"] == pytest.approx(sizes.teacher_utilisation)
    assert phase.peak < GPUS[gpu].usable
    work, phase = gpu_work.refine_work(student, {**steps["refine"], "per_device_train_batch_size": 8}, sizes)
    moved = work.bytes / (GPUS[gpu].bandwidth * gpu_work.BANDWIDTH_UTILISATION)
    assert gpu_work.predicted(work, GPUS[gpu], phase.peak)["step_seconds"] == moved


def test_bytes_of_a_forward_pass():
    shape = Shape.of(tiny())
    weights = sum(into * out for into, out in shape.linears) * 2 * 2  # of two layers, in bf16
    ends = sum(into + out for into, out in shape.linears) * 2 * 2
    assert gpu_work.forward_bytes(shape, [(3, 5)], Precision("bfloat16")) == weights + 15 * ends
    assert gpu_work.forward_bytes(shape, [(3, 5)] * 2, Precision("bfloat16")) == 2 * (weights + 15 * ends)


def test_made_up_texts_are_as_long_as_they_should_be():
    texts = gpu_inputs.made_texts(500, 20, 40)
    model = gpu_inputs.made_encoder(tiny(), "float32", "cpu", 64)
    lengths = np.array([len(ids) for ids in model.tokenizer(texts)["input_ids"]])
    assert lengths.max() == 40 and lengths.min() >= 2 and abs(lengths.mean() - 20) < 1


def test_frozen_vectors_on_a_device_are_those_of_the_store(tmp_path):
    store = gpu_inputs.made_store(tmp_path / "store", 300, 48)
    frozen = FrozenVectors(store, 32, torch.device("cpu"))
    assert frozen.table is None  # memory of the CPU: the map is read
    rows = np.array([299, 0, 7, 7])
    expected = matryoshka(torch.from_numpy(store.gather(rows)), 32)
    assert torch.equal(frozen.gather(rows), expected)
    frozen.table = frozen.copied()
    assert frozen.table.shape == (300, 32) and frozen.table.dtype == torch.float16
    assert torch.equal(frozen.gather(rows), expected) and torch.equal(frozen.gather(torch.from_numpy(rows)), expected)
