"""Latency: statistics on encoders and a clock whose times are known, contamination from counters that are made up."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hlm import machine
from hlm.artefacts import HlmError
from hlm.benchmark import latency
from hlm.benchmark import report as latency_report
from hlm.benchmark.latency import derive, measure, ratios, summarise
from hlm.benchmark.report import format_table, notes, pareto, plot
from hlm.machine import Counters, other_load, peak_memory_mib, read_counters

QUERIES = ["shoe", "red shoe", "red steel kettle", "a kettle for two cups"]


FIRST_CALL_S = 50.0


class House:
    """A clock that only encoders move, and the counters of a machine with two CPUs."""

    def __init__(self):
        self.now, self.own, self.busy, self.log = 0.0, 0.0, 0.0, []

    def encoder(self, name, call_s, others=lambda texts: 0.0):
        """Takes `call_s(texts)` seconds of one CPU; others use `others(texts)` seconds meanwhile."""

        def encode(texts):
            used = call_s(texts)
            self.now += used
            self.own += used
            self.busy += used + others(texts)
            self.log.append((name, list(texts), used))
            return np.ones((len(texts), 4), dtype=np.float32)

        return encode

    def counters(self):
        return Counters(self.now, self.busy, self.own, 2)


@pytest.fixture
def house(monkeypatch):
    house = House()
    monkeypatch.setattr(latency, "perf_counter", lambda: house.now)
    monkeypatch.setattr(latency, "read_counters", house.counters)
    return house


def words_ms(texts):
    """1 ms a word."""
    return sum(len(text.split()) for text in texts) / 1e3


def test_new_words_are_forgotten_before_every_query_that_counts(house):
    seen = set()

    def seconds(texts):
        new = set(texts) - seen
        seen.update(texts)
        return 0.003 if new else 0.001

    encode = house.encoder("one", seconds)
    found = latency.new_words(encode, seen.clear, QUERIES, seconds=0.02)
    assert (found["p50_ms"], found["known_p50_ms"]) == (pytest.approx(3), pytest.approx(1)) and found["samples"] == 5
    assert [texts for _, texts, _ in house.log] == [[text] for text in (*QUERIES, QUERIES[0]) for _ in range(2)]


def test_percentiles_by_length_are_those_of_the_calls(house):
    blocks = measure({"one": house.encoder("one", words_ms)}, QUERIES, repeats=3, block_s=0.0221, batch_sizes=[])
    found = summarise(blocks, QUERIES)["one"]
    calls = [call for block in blocks for call in block.calls_ms]
    # 11 ms for the four queries: a block lasts two rounds and one call more.
    assert [len(block.calls_ms) for block in blocks] == [9, 9, 9]
    assert found["latency_ms"]["all"]["p50"] == pytest.approx(np.percentile(calls, 50))
    assert found["latency_ms"]["all"]["p99"] == pytest.approx(np.percentile(calls, 99))
    for length, milliseconds in (("1", 1), ("2", 2), ("3-4", 3), ("5+", 5)):
        figures = found["latency_ms"][length]
        assert (figures["p50"], figures["p99"]) == pytest.approx((milliseconds, milliseconds))
    assert sum(found["latency_ms"][length]["samples"] for length in ("1", "2", "3-4", "5+")) == 27
    assert found["latency_ms"]["all"]["samples"] == 27 and found["latency_ms"]["all"]["over"] == "clean"


def test_throughput_counts_queries_and_names_the_best_batch(house):
    # A call costs 4 ms and 1 ms a query up to 4 queries, then 10 ms a query: 4 is the best batch.
    encode = house.encoder("one", lambda texts: (4 + len(texts) if len(texts) <= 4 else 10 * len(texts)) / 1e3)
    found = summarise(measure({"one": encode}, QUERIES, repeats=2, block_s=0.1, batch_sizes=[1, 4, 8]), QUERIES)["one"]
    rates = {size: figures["queries_per_s"] for size, figures in found["throughput"].items()}
    assert rates == pytest.approx({"1": 200, "4": 500, "8": 100})
    assert found["best_batch_size"] == 4 and found["best_queries_per_s"] == pytest.approx(500)
    assert found["throughput"]["8"]["blocks"] == 2


def test_systems_take_turns_in_a_rotating_order(house):
    names = ["a", "b", "c"]
    encoders = {name: house.encoder(name, lambda texts: 0.01) for name in names}
    blocks = measure(encoders, QUERIES, repeats=3, block_s=0.03, batch_sizes=[2])
    assert [block.system for block in blocks if block.batch_size == 1] == list("abcbcacab")
    assert [(block.repeat, block.batch_size) for block in blocks[:6]] == [(0, 1)] * 3 + [(0, 2)] * 3
    # Within a repeat all meet the same queries in the same order; the next repeat has another.
    by_system = {(b.system, b.repeat): b.queries for b in blocks if b.batch_size == 1}
    assert by_system["a", 0] == by_system["b", 0] == by_system["c", 0]
    assert len({tuple(by_system["a", repeat]) for repeat in range(3)}) > 1


def test_warm_up_is_not_timed(house):
    seen: set = set()

    def slow_at_first(texts):
        """The first call at a batch size and every first query takes long, and so does what comes after a rest."""
        key = (len(texts), texts[0] if len(texts) == 1 else None)
        first = key not in seen
        seen.add(key)
        return FIRST_CALL_S if first else 0.001

    other = house.encoder("other", lambda texts: 0.001)
    blocks = measure(
        {"one": house.encoder("one", slow_at_first), "other": other}, QUERIES, repeats=1, block_s=0.01, batch_sizes=[3]
    )
    assert max(call for block in blocks for call in block.calls_ms) == pytest.approx(1)
    timed = sum(len(block.calls_ms) for block in blocks)
    assert len(house.log) > timed + len(blocks)  # one untimed call a block, and the warm-up


def test_contaminated_blocks_are_flagged_counted_and_left_out(house):
    """Others take 1 of 2 CPUs in the second repeat, and everything takes twice as long."""
    repeat = {"now": 0}

    def call_s(texts):
        return 0.02 if repeat["now"] else 0.01

    def others(texts):
        return 0.02 if repeat["now"] else 0.0

    encode = house.encoder("one", call_s, others)
    clean = measure({"one": encode}, QUERIES, repeats=2, block_s=0.5, batch_sizes=[])
    repeat["now"] = 1
    loaded = measure({"one": encode}, QUERIES, repeats=1, block_s=0.5, batch_sizes=[])
    assert [block.contaminated for block in clean + loaded] == [False, False, True]
    # A tick of 10 ms on each CPU is within the counters' resolution: (0.5 - 0.02) / (2 x 0.5).
    assert loaded[0].other_load == pytest.approx(0.48) and clean[0].other_load == 0

    mixed = summarise(clean + loaded, QUERIES)["one"]
    assert mixed["latency_ms"]["all"]["p99"] == pytest.approx(10)
    counts = len(clean[0].calls_ms) + len(clean[1].calls_ms), len(loaded[0].calls_ms)
    assert mixed["latency_ms"]["all"]["samples"] == sum(counts)
    assert mixed["latency_ms"]["all"]["contaminated"] == counts[1]
    assert mixed["throughput"]["1"] == {
        "queries_per_s": pytest.approx(100),
        "blocks": 3,
        "contaminated": 1,
        "over": "clean",
    }

    alone = summarise(loaded, QUERIES)["one"]["latency_ms"]["all"]
    assert alone["over"] == "all" and alone["p50"] == pytest.approx(20) and alone["contaminated"] == alone["samples"]


def test_a_higher_limit_lets_the_load_pass(house):
    encode = house.encoder("one", lambda texts: 0.01, lambda texts: 0.004)
    (strict,) = measure({"one": encode}, QUERIES, repeats=1, block_s=1, batch_sizes=[])
    (lenient,) = measure({"one": encode}, QUERIES, repeats=1, block_s=1, batch_sizes=[], max_other_load=0.3)
    assert strict.contaminated and not lenient.contaminated and lenient.other_load == pytest.approx(0.19, abs=0.01)


def test_without_counters_nothing_is_flagged_and_the_notes_say_so(house, monkeypatch):
    monkeypatch.setattr(latency, "read_counters", lambda: None)
    blocks = measure({"one": house.encoder("one", words_ms)}, QUERIES, repeats=1, block_s=0.1, batch_sizes=[])
    assert blocks[0].other_load is None and not blocks[0].contaminated
    assert "could not be read" in notes(report_of(blocks, "one"))[0]


def test_cuda_is_waited_for_before_and_after_each_timed_call(house, monkeypatch):
    order = []
    cuda = SimpleNamespace(is_initialized=lambda: True, synchronize=lambda: order.append("wait"))
    encode = house.encoder("one", lambda texts: order.append("call") or 0.01)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    (block,) = measure({"one": encode}, QUERIES, repeats=1, block_s=0.05, batch_sizes=[])
    assert order[-3 * len(block.calls_ms) :] == ["wait", "call", "wait"] * len(block.calls_ms)
    assert order.count("wait") == 2 * len(block.calls_ms)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"queries": []}, "queries to measure"),
        ({"systems": {}}, "systems"),
        ({"repeats": 0}, "repeats: expected 1 or more"),
        ({"batch_sizes": [8, 0]}, "batch_sizes: expected 1 or more"),
        ({"block_s": 0}, "block_s"),
        ({"max_other_load": 5}, "max_other_load"),
        ({"systems": {"flat": lambda texts: np.ones(4)}}, r"flat: expected vectors of shape \(1, dim\).*\(4,\)"),
        ({"systems": {"broken": lambda texts: np.full((1, 4), np.nan)}}, "broken: expected finite vectors, found NaN"),
    ],
)
def test_bad_input_is_named(change, words):
    good = {"systems": {"one": lambda texts: np.ones((len(texts), 4))}, "queries": QUERIES, "block_s": 0.001}
    given = good | change
    with pytest.raises(HlmError, match=words):
        measure(given.pop("systems"), given.pop("queries"), **given)


def test_ratios_pair_repeats(house):
    encoders = {
        "teacher": house.encoder("teacher", lambda texts: 0.02 * len(texts)),
        "student": house.encoder("student", lambda texts: 0.004),
    }
    blocks = measure(encoders, QUERIES, repeats=2, block_s=0.1, batch_sizes=[2])
    for block in blocks:
        if block.system == "student" and block.repeat == 1 and block.batch_size == 1:
            block.calls_ms = [call / 2 for call in block.calls_ms]
    found = ratios(summarise(blocks, QUERIES), blocks, "teacher")
    assert found["student"]["p50_range"] == pytest.approx([5, 10])
    assert 5 <= found["student"]["p50"] <= 10
    assert found["student"]["throughput"] == pytest.approx((2 / 0.004) / (1 / 0.02))
    assert set(found["student"]["p50_by_length"]) == {"1", "2", "3-4", "5+"}
    assert found["teacher"]["p50"] == found["teacher"]["throughput"] == 1


def test_the_whole_depth_is_derived_from_the_slope_between_two(house):
    """2 ms outside the layers and 1 ms a layer: 36 layers take 38 ms."""
    encoders = {
        f"{depth}": house.encoder(str(depth), lambda texts, depth=depth: (2 + depth) * len(texts) / 1e3)
        for depth in (4, 8)
    }
    found = summarise(measure(encoders, QUERIES, repeats=2, block_s=0.1, batch_sizes=[4]), QUERIES)
    whole = derive(found["4"], found["8"], (4, 8), 36)
    assert whole["latency_ms"]["all"]["p50"] == pytest.approx(38) and whole["latency_ms"]["2"]["p99"] == pytest.approx(
        38
    )
    assert whole["throughput"]["4"]["queries_per_s"] == pytest.approx(1 / 0.038)
    assert whole["derived"] == "derived from 4 and 8 of 36 layers"
    assert whole["latency_ms"]["all"]["over"] == whole["throughput"]["4"]["over"] == "clean"
    found["4"]["latency_ms"]["all"]["over"] = found["4"]["throughput"]["4"]["over"] = "all"
    crowded = derive(found["4"], found["8"], (4, 8), 36)  # what is derived rests on both depths
    assert crowded["latency_ms"]["all"]["over"] == crowded["throughput"]["4"]["over"] == "all"
    assert crowded["latency_ms"]["2"]["over"] == crowded["throughput"]["1"]["over"] == "clean"
    # Noise that makes the deeper one look faster must not make the whole one faster still.
    assert derive(found["8"], found["4"], (4, 8), 36)["latency_ms"]["all"]["p50"] == pytest.approx(6)


def test_other_load_by_hand():
    before = Counters(wall_s=10, busy_s=100, own_s=5, cpus=4)
    after = Counters(wall_s=20, busy_s=120, own_s=13, cpus=4)  # 20 s busy, 8 own: 12 of 40 are others', less 4 ticks
    assert other_load(before, after) == pytest.approx((12 - 0.04) / 40)
    assert other_load(before, after, children_s=8) == pytest.approx((4 - 0.04) / 40)
    assert other_load(before, after, children_s=50) == 0
    assert other_load(None, after) is None and other_load(before, before) is None


def test_counters_are_read_per_allowed_cpu(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text("cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 20 30 5000 600 4 5 41 7 0\ncpu1 10 0 0 0 0 0 0 0 0 0\nintr 1\n")
    monkeypatch.setattr(machine, "STAT", stat)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0})
    found = read_counters()
    assert found.busy_s == pytest.approx(200 / machine.os.sysconf("SC_CLK_TCK")) and found.cpus == 1
    monkeypatch.setattr(machine, "STAT", tmp_path / "none")
    assert read_counters() is None


@pytest.mark.skipif(not machine.STAT.is_file(), reason="the system does not show what other processes use")
def test_own_work_is_not_held_against_others():
    before = read_counters()
    while machine.time.process_time() - before.own_s < 0.05:
        pass
    after = read_counters()
    assert after.own_s - before.own_s >= 0.05 and after.busy_s >= before.busy_s
    assert 0 <= other_load(before, after) <= 1


def test_peak_memory_is_the_process_own():
    held = bytearray(64 * 2**20)
    before = peak_memory_mib()
    assert before > len(held) / 2**20
    code = "from hlm.machine import peak_memory_mib; print(peak_memory_mib())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < before / 2  # not what the process that started it holds


def test_facts_are_json():
    found = json.loads(json.dumps(machine.facts()))
    assert found["threads"]["torch"] == torch.get_num_threads() and len(found["load_average"]) == 3
    assert "tokenizers" in found["runtime_versions"]


def report_of(blocks, reference, **parts):
    summaries = summarise(blocks, QUERIES)
    compared = ratios(summaries, blocks, reference)
    systems = {
        name: {"backend": "fake"} | summaries[name] | {"ratio": compared[name]} | parts.get(name, {})
        for name in summaries
    }
    asked = {"data": "here", "split": "test", "queries": len(QUERIES), "lengths": {"1": 1, "2": 1, "3-4": 1, "5+": 1}}
    asked |= {"reference": reference, "settings": {"repeats": 1, "max_other_load": 0.05}}
    return asked | {"systems": systems, "blocks": [block.record() for block in blocks], "environment": {"cpu": "a CPU"}}


def test_table_and_notes(house):
    encoders = {
        "teacher": house.encoder("teacher", lambda texts: 0.0625 * len(texts)),
        "student": house.encoder("student", lambda texts: 2**-9, lambda texts: 0.002),
    }
    blocks = measure(encoders, QUERIES, repeats=1, block_s=1, batch_sizes=[4])
    parts = {
        "teacher": {
            "quality": {"system": "teacher", "ndcg": 0.5},
            "cold_start": {"total_s": 6.54, "peak_memory_mib": 700.4},
            "floor": {
                "over": 12.34,
                "gemm_share": 0.456,
                "gflop": 4.0,
                "left": {"over": 20.06, "gemm_share": 0.25, "gflop": 1.0},
            },
        },
        "student": {
            "quality": {"system": "other", "ndcg": 0.49, "recovery": 0.98},
            "derived": "derived from 1 and 2 of 3 layers",
            "new_words": {"p50_ms": 3.456, "known_p50_ms": 2, "samples": 9},
            "agreement": {
                "with": "teacher",
                "min_cosine": 0.5,
                "overlap": 0.75,
                "k": 10,
                "ratio": {"p50": 32.0, "throughput": 8.0},
            },
        },
    }
    rates = {"bandwidth_gb_per_s": {"41": 20.04}, "gemm_gflop_per_s": {"float32": 123.4}, "other_load": 0.5}
    report = report_of(blocks, "teacher", **parts) | {"rates": rates}
    table = format_table(report).splitlines()
    header, teacher, student = table[2], table[4].split(), table[5].split()
    assert header.split()[:2] == ["system", "backend"] and "p99 ms" in header and "recovery" in header
    shown = "teacher fake 62.50 62.50 62.50 1.0x 16 1 1.0x 12.3x* 46%* 6.5 700 0.5000 -"
    assert teacher == shown.split()
    assert student[2] == "1.95!~" and student[5] == "32.0x" and student[-6:] == ["-", "-", "-", "-", "0.4900", "98.0%"]
    said = " ".join(notes(report))
    assert "2 of 4 blocks are contaminated" in said and "derived from 1 and 2" in said
    assert (
        "teacher: p99 of 16 samples" in said and "75.00% of their first 10 ads in common; 32.0x lower p50, 8.0x" in said
    )
    assert "20 GB/s over 41 MiB" in said and "123 GFLOP/s in float32" in said and "others took 50%" in said
    assert "student: nDCG and recovery are those of 'other'" in said
    assert "student: had tokenised every word" in said and "are new, it takes 1.7 times as long" in said
    assert "3.46" not in said  # the table's p50 is of another measurement: one number a fact
    assert "teacher*: floor" in said and "75% are looked up; of those that are left, it is 20.1x and 25%" in said


def test_pareto_front():
    points = {"slow": (100.0, 0.6), "fast": (1.0, 0.5), "worse": (2.0, 0.4), "twin": (1.0, 0.45), "mid": (10.0, 0.55)}
    assert pareto(points) == ["fast", "mid", "slow"]


@pytest.mark.parametrize("with_quality", [True, False])
def test_plot_is_a_png(house, tmp_path, with_quality):
    encoders = {name: house.encoder(name, words_ms) for name in ("teacher", "student")}
    blocks = measure(encoders, QUERIES, repeats=1, block_s=0.1, batch_sizes=[4])
    known = {"quality": {"metric": "ndcg@10", "ndcg": 0.5}} if with_quality else {}
    plot(report_of(blocks, "teacher", teacher=known), tmp_path / "latency.png")
    with Image.open(tmp_path / "latency.png") as image:
        assert image.format == "PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["latency.png"]


@pytest.mark.parametrize("with_quality", [True, False])
def test_a_system_has_one_colour_in_both_panels(house, tmp_path, monkeypatch, with_quality):
    names = [f"s{number}" for number in range(12)]
    blocks = measure(
        {name: house.encoder(name, words_ms) for name in names}, QUERIES, repeats=1, block_s=0.01, batch_sizes=[4]
    )
    figures = []
    save = latency_report.Figure.savefig
    monkeypatch.setattr(
        latency_report.Figure,
        "savefig",
        lambda figure, *args, **more: figures.append(figure) or save(figure, *args, **more),
    )
    known = {name: {"quality": {"metric": "ndcg@10", "ndcg": 0.5 + n / 100}} for n, name in enumerate(names)}
    plot(report_of(blocks, "s0", **(known if with_quality else {})), tmp_path / "latency.png")
    left, right = figures[0].axes
    points = [tuple(found.get_facecolor()[0]) for found in left.collections]
    lines = [tuple(line.get_color()) for line in right.lines]
    assert points == lines and len(set(lines)) == len(names)


def test_an_undefined_recovery_is_a_dash_with_its_reason(house, tmp_path):
    blocks = measure({"one": house.encoder("one", words_ms)}, QUERIES, repeats=1, block_s=0.1, batch_sizes=[])
    known = {"metric": "ndcg@10", "ndcg": 0.5, "recovery": None, "recovery_reason": "the teacher scores 0 on all"}
    report = report_of(blocks, "one", one={"quality": known})
    assert "recovery" not in format_table(report).splitlines()[2]
    assert "one: recovery: the teacher" in " ".join(notes(report))
    plot(report, tmp_path / "latency.png")
