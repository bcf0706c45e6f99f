"""The floor of the machine: work counted by hand, rates of what the works need."""

import numpy as np
import pytest
from transformers import AutoConfig, BertConfig

from hlm.benchmark import floor as latency_floor
from hlm.benchmark.floor import Work, floor_of, measure_rates, work_of


def test_work_is_of_the_body_and_of_the_tokens_that_are_there(tiny_qwen3):
    config = AutoConfig.from_pretrained(tiny_qwen3)
    work = work_of(config, [4, 6], "bf16")
    # 32 wide, 4 heads and 2 for keys of 8, FFN 64: queries, output 2 x 32 x 32; keys, values 2 x 32 x 16; 3 x 32 x 64.
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    assert work.flops == [6 * count * (2 * layer + 4 * count * 32) for count in (4, 6)]
    norms = 6 * (2 * 32 + 2 * 8) + 32
    assert work.weights == 6 * layer + norms and work.weight_bytes == 2 * work.weights
    assert work_of(config, [4], "int8").weight_bytes == work.weights and work_of(config, [4], "nf4") is None


def test_a_floor_is_the_higher_of_two_bounds():
    summary = {"latency_ms": {"all": {"p50": 6.0}}, "best_queries_per_s": 1000.0}
    rates = {"bandwidth_gb_per_s": {"1": 1.0}, "gemm_gflop_per_s": {"float32": 2.0, "int8": 4.0}}
    work = Work(2**18, "float32", [1, 2, 3], [1e6, 4e6, 10e6])  # 1 MiB: 1.05 ms; 0.5, 2, 5 ms
    found = floor_of(work, rates, summary)
    assert found["memory_ms"] == pytest.approx(1.048576) and found["arithmetic_ms"] == pytest.approx(2)
    assert found["floor_ms"] == pytest.approx(2) and found["over"] == pytest.approx(3)
    assert found["gemm_share"] == pytest.approx(5e6 * 1000 / 2e9) and found["tokens"] == 2 and found["weight_mib"] == 1
    fast = floor_of(Work(2**20, "int8", [1, 2, 3], [1e5, 2e5, 3e5]), rates, summary)
    assert fast["arithmetic_ms"] == pytest.approx(0.05) and fast["floor_ms"] == pytest.approx(1.048576)
    # Without instructions for a precision its weights are widened: fewer bytes, the rate of float32.
    wide = floor_of(Work(2**19, "bfloat16", [1, 2, 3], [1e6, 4e6, 10e6]), rates, summary)
    assert wide["memory_ms"] == pytest.approx(1.048576) and wide["arithmetic_ms"] == pytest.approx(2)
    less = Work(2**18, "float32", [1, 2, 3], [1e6, 4e6, 10e6], Work(2**18, "float32", [1, 2, 3], [4e5, 3e6, 8e6]))
    found, alone = floor_of(less, rates, summary), floor_of(less.left, rates, summary)
    assert found == floor_of(work, rates, summary) | {"left": alone} and alone["over"] == pytest.approx(4)


def test_look_ups_leave_less_to_multiply():
    config = BertConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=4, intermediate_size=64)
    whole, work = work_of(config, [4, 6], "fp32"), work_of(config, [4, 6], "fp32", lookup=True)
    assert whole.left is None and (work.weights, work.flops) == (whole.weights, whole.flops)
    assert work.left.weights == whole.weights - 3 * 32 * 32 and work.left.left is None
    saved = [before - after for before, after in zip(work.flops, work.left.flops, strict=True)]
    assert saved == [2 * 3 * 32 * 32 * count for count in (4, 6)]


def test_rates_are_of_what_the_works_need(monkeypatch):
    monkeypatch.setattr(latency_floor, "SIDES", (32,))
    monkeypatch.setattr(latency_floor, "instructions", lambda: ["avx2"])
    works = [Work(2**20, precision, [1], [1.0]) for precision in ("float32", "bfloat16", "int8")]
    found = measure_rates([*works, Work(2**33, "int8", [1], [1.0])], seconds=0.001)
    assert list(found["bandwidth_gb_per_s"]) == ["1", "2", "4", "1024"]  # no more than a GiB is streamed
    assert list(found["gemm_gflop_per_s"]) == ["float32", "int8"]  # these processors have nothing for bfloat16
    assert all(rate > 0 for part in ("bandwidth_gb_per_s", "gemm_gflop_per_s") for rate in found[part].values())


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_products_that_are_timed_are_products(precision):
    for call in latency_floor._products(precision, 16, "cpu"):
        np.testing.assert_array_equal(np.asarray(call()).reshape(16, 16), 16)
