"""`hlm plan`: what it adds up, what it refuses with which numbers, and that its settings are the recipes' own."""

import json
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from live_bytes import LiveBytes

from hlm.artefacts import HlmError
from hlm.cli import main
from hlm.planning.footprint import Precision, Shape, backbone_config, forward_flops
from hlm.planning.hardware import GIB, GPUS, Gpu, Training, machines_of, parse_gpus, refuse, remedy, smallest
from hlm.planning.phases import CONTRASTIVE_MATRICES, REFINEMENT_MATRICES, steps_of, store_bytes
from hlm.planning.plan import cascade, check_dim, check_step, index_bytes, make_plan
from hlm.planning.settings import PLANNED, TRAINING, Assumptions, read_steps
from hlm.settings import defaults_of
from hlm.step_table import STEPS
from hlm.training.losses import id_mask, qwen3_contrastive, refinement_contrastive
from hlm.training.trainer import TrainingArguments
from hlm.vectors.store import write_store

ROOT = Path(__file__).resolve().parents[2]
MINI = "Qwen/Qwen3-Embedding-0.6B"


@pytest.fixture(scope="module")
def teacher_8b():
    return Shape.of(backbone_config("Qwen/Qwen3-Embedding-8B"))


@pytest.fixture(scope="module")
def student():
    return Shape.of(backbone_config(MINI), 4, 768)


def training(shape, batch=64, chunk=None, checkpointing=False, precision=None, tokens=256):
    precision = precision or Precision("bfloat16", autocast=True, lora_rank=256)
    return Training(shape, precision, ((1, 64), (2, tokens)), batch, chunk, checkpointing, lambda rows: 0)


@pytest.fixture
def folder(tmp_path, tiny_bert):
    """A run of tiny models: the student is cut from the teacher."""
    steps = {
        "teacher": f"backbone: {tiny_bert}\noutput: runs/t\nlora_rank: 4\nhard_negatives: 1\npairs_per_query: 2\n"
        "per_device_train_batch_size: 16\nnum_train_epochs: 2\neval_strategy: epoch\nmax_seq_length: 40\n",
        "embed": "model: runs/t\noutput: runs/v\nindex: SQ8\nindex_dim: 16\n",
        "prune": "model: runs/t\noutput: runs/p\nlayers: [0, 5]\n",
        "align": "student: runs/t\noutput: runs/a\nper_device_train_batch_size: 32\n"
        "cascade:\n  - {layers: 4, epochs: 1}\n  - {layers: [0, 3], ffn: 16, epochs: 2}\n",
        "refine": "student: runs/a\noutput: runs/s\nper_device_train_batch_size: 32\npool: 100\nmax_steps: 10\n",
        "plan": "documents: 1000\nqueries: 200\ntrain_queries: 150\ntrain_pairs: 400\nunlabelled: 650\n",
    }
    for name, text in steps.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def refusal(capsys, *argv):
    assert main(["plan", *map(str, argv)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


# ---- what is added up


def test_the_plan_of_a_folder(folder, tiny_bert):
    sizes = Assumptions(documents=1000, queries=200, train_queries=150, train_pairs=400, unlabelled=650)
    plan = make_plan(str(folder), read_steps(folder, TrainingArguments), sizes, 2)
    config = backbone_config(tiny_bert)
    whole, cut = Shape.of(config), Shape.of(config, 2, 16)
    assert plan.models["teacher"] == (whole.parameters, whole.parameters - whole.embeddings, whole.lora_parameters(4))
    assert plan.models["align 1: 4 layers, FFN 64"][0] == Shape.of(config, 4).parameters
    assert plan.models["align 2: 2 layers, FFN 16"][0] == plan.models["student"][0] == cut.parameters
    assert plan.models["pruned"][0] == Shape.of(config, 2).parameters
    steps = {phase.name: phase.steps for phase in plan.phases if phase.steps}
    # 300 pairs (two of each of 150 queries) in batches of 2 x 16, twice; 800 queries in batches of 2 x 32.
    assert steps == {"align 1: 4 layers, FFN 64": 12, "align 2: 2 layers, FFN 16": 24, "train": 10}
    (train,) = [phase for phase in plan.phases if (phase.step, phase.name) == ("teacher", "train")]
    assert train.steps == 18
    embed = next(phase for phase in plan.phases if phase.step == "embed")
    assert embed.disk == {
        "corpus": store_bytes(1000, 32),
        "unlabelled": store_bytes(650, 32),
        "queries": store_bytes(200, 32),
    }
    # Ads: 128 tokens, cut to the teacher's 40; queries: 28 with the instruction, and 10% padding.
    assert embed.flops == pytest.approx(forward_flops(whole, 1000, 40) + forward_flops(whole, 850, 28 * 1.1))
    assert plan.index["SQ8, 16 wide"] == 1000 * 16 and plan.index["Flat, 32 wide"] == plan.host == 1000 * 32 * 4
    dev = next(phase for phase in plan.phases if phase.name == "dev retrieval")
    # 128 tokens are cut to the teacher's 40; at the start, after each epoch, at the end; no more ads than there are.
    assert dev.flops == forward_flops(whole, 4 * 1000, 40)
    assert dev.hours(2, GPUS["H100"]) == dev.hours(1, GPUS["H100"]) > 0  # every process does it all


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "SQfp16", "HNSW16", "IVF32,Flat", "IVF32,SQ8,RFlat"])
def test_index_sizes_are_those_on_disk(factory, tmp_path):
    """Within 3%: what FAISS writes for real vectors."""
    rows = 3000
    vectors = np.random.default_rng(0).standard_normal((rows, 64), dtype=np.float32)
    index = faiss.index_factory(64, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "index"))
    assert index_bytes(rows, 64, factory) == pytest.approx((tmp_path / "index").stat().st_size, rel=0.03)
    with pytest.raises(HlmError, match="FAISS factory string.*'Flattest'"):
        index_bytes(rows, 64, "Flattest")


def test_store_sizes_are_those_on_disk(tmp_path):
    rows, dim = 2000, 64
    generator = np.random.default_rng(0)

    def encode(texts):
        vectors = generator.standard_normal((len(texts), dim), dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    names = [f"B{number:09d}" for number in generator.integers(0, 10**9, rows)]
    write_store(
        tmp_path / "store", [(name, "text") for name in names], encode, dim=dim, encoder="e", source="s", n_rows=rows
    )
    measured = sum(path.stat().st_size for path in (tmp_path / "store").iterdir())
    assert store_bytes(rows, dim) == pytest.approx(measured, rel=0.05)


def test_losses_need_what_the_plan_sets_aside():
    """Matrices of similarities at the peak of forward and backward, counted; the plan rounds up."""
    rows, pool, width = 256, 8192, 8
    queries, positives = torch.randn(rows, width, requires_grad=True), torch.randn(rows, width, requires_grad=True)
    ids = torch.arange(rows)
    live = LiveBytes([])
    with live:
        qwen3_contrastive(queries, positives, query_ids=ids, positive_ids=ids, excluded_ids=ids[:, None]).backward()
    assert 0.75 * CONTRASTIVE_MATRICES <= live.peak / (4 * rows * rows) <= CONTRASTIVE_MATRICES
    ads, pool_ids = torch.randn(pool, width), torch.arange(pool)
    live = LiveBytes([])
    with live:
        masks = {"mask": id_mask(ids[:, None], pool_ids), "excluded_ids": ids[:, None]}
        loss = refinement_contrastive(queries, positives.detach(), ads, positive_ids=ids, pool_ids=pool_ids, **masks)
        loss.backward()
    assert 0.75 * REFINEMENT_MATRICES <= live.peak / (4 * rows * pool) <= REFINEMENT_MATRICES


def test_steps():
    step = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_train_epochs": 3, "max_steps": -1}
    assert steps_of(step, 1000, 4) == (48, 3072)  # 31 whole batches of 32 an epoch, two of them a step
    assert steps_of(step | {"max_steps": 7}, 1000, 4) == (7, 448)
    with pytest.raises(HlmError, match=r"whole batch of 32 rows \(8 on 4 GPUs\), found 20; .* works is 5"):
        steps_of(step, 20, 4)


# ---- hardware


def test_gpus_are_read():
    assert parse_gpus("8xH100") == (8, GPUS["H100"]) and parse_gpus("rtx4090") == (1, GPUS["RTX4090"])
    assert parse_gpus("2 x 8xH100") == (16, GPUS["H100"])
    assert [machines_of(text) for text in ("H100", "8xH100", "2x8xH100")] == [1, 1, 2]
    for text, found in (
        ("8xH1000", "did you mean '8xH100'"),
        ("2x8xH1000", "did you mean '2x8xH100'"),
        ("0xH100", "found '0xH100'"),
        ("2x2x2xH100", "found '2x2x2xH100'"),
        ("eight", "name of RTX4090"),
    ):
        with pytest.raises(HlmError, match=found):
            parse_gpus(text)


def test_the_largest_batch_that_fits_is_the_largest(teacher_8b):
    step = training(teacher_8b, batch=64)
    usable = GPUS["A100-80"].usable
    batch = step.largest(usable)
    assert 0 < batch < 64
    assert training(teacher_8b, batch=batch).peak() <= usable < training(teacher_8b, batch=batch + 1).peak()
    assert training(teacher_8b, batch=2).largest(usable) == 2  # never more than was asked for
    assert step.largest(20 * GIB) == 0  # weights alone are 14, the adapter and its moments 10
    cached = training(teacher_8b, chunk=64)
    chunk = cached.largest(usable)
    assert training(teacher_8b, chunk=chunk).peak() <= usable < training(teacher_8b, chunk=chunk + 1).peak()


def test_a_batch_that_cannot_fit_is_refused_with_the_nearest_that_does(teacher_8b):
    step = training(teacher_8b, batch=64)
    batch, again = step.largest(GPUS["H100"].usable), training(teacher_8b, checkpointing=True)
    with pytest.raises(HlmError) as refused:
        refuse("teacher", step, GPUS["H100"])
    message = str(refused.value)
    assert f"at most {GPUS['H100'].usable / GIB:.1f} GiB" in message and f"found {step.peak() / GIB:.1f}" in message
    assert f"per_device_train_batch_size: {batch} or gradient_checkpointing: true with " in message
    assert again.peak() <= GPUS["H100"].usable and "with per_device_train_batch_size: 64" in message
    refuse("teacher", again, GPUS["H100"])
    tiny = Gpu("small", 8 * GIB, 1e12)
    assert remedy(step, tiny.usable, 1, False) == f"take other hardware: {smallest(step.peak)}"
    assert "FSDP" in remedy(training(teacher_8b, batch=1), int(22 * GIB), 8, False)


def test_only_the_teacher_is_sharded(teacher_8b, student):
    whole, split = (training(teacher_8b).memory(8, sharded) for sharded in (False, True))
    assert split["weights"] == whole["weights"] // 8
    own = training(student, precision=Precision(autocast=True))
    assert own.memory(8, True) == own.memory(8, False) and "FSDP" not in remedy(own, GIB, 8, False)


def test_the_smallest_hardware(teacher_8b, student):
    small = training(student, batch=32, precision=Precision(autocast=True))
    assert smallest(small.peak) == "1x RTX4090"
    assert smallest(training(teacher_8b, batch=2).peak) == "1x A100-40"
    assert smallest(lambda count, sharded: 50 * GIB // count) == "1x H100"
    assert smallest(lambda count, sharded: 500 * GIB // count) == "4x H200 with FSDP"
    assert smallest(lambda count, sharded: 500 * GIB, shards=False) == "none of the table"


# ---- what is refused before any weights load


@pytest.mark.parametrize(
    "stages, message",
    [
        ([{"layers": 14}, {"layers": 16}], "stage 2: layers grows from 14 to 16.*14 at most"),
        ([{"layers": 29}], "stage 1: .*1 to 28 .*found 29.*nearest that works is 28"),
        ([{"layers": 4, "ffn": 4096}], "stage 1: FFN width: .*1 to 3072 .*found 4096.*nearest that works is 3072"),
        ([{"ffn": 768}, {"ffn": 1024}], "ffn grows from 768 to 1024"),
        ([{"layers": 4}, {"layers": [0, 4]}], r"stage 2: .*within 0\.\.3, found \[0, 4\]; .*works is \[0, 3\]"),
        ([{"layers": [1, 0]}], r"ascending .*works is \[0, 1\]"),
    ],
)
def test_cascades(stages, message):
    with pytest.raises(HlmError, match=message):
        cascade(backbone_config(MINI), stages)


def test_a_dimension_above_the_teachers():
    assert check_dim(None, 4096) == 4096 and check_dim(1024, 4096) == 1024
    with pytest.raises(HlmError, match="dim: expected 1 to 4096 .*found 8192.*nearest that works is 4096"):
        check_dim(8192, 4096)
    with pytest.raises(HlmError, match="nearest that works is 1$"):
        check_dim(0, 4096)


def settings(step, **own):
    defaults = defaults_of(TrainingArguments)
    return defaults_of(STEPS[step].settings) | {name: defaults[name] for name in TRAINING} | own


def test_a_recipe_asks_before_it_loads(monkeypatch):
    gpu = GPUS["RTX4090"]
    teacher = settings("teacher", backbone="Qwen/Qwen3-Embedding-8B", dtype="bfloat16", bf16=True)
    with pytest.raises(
        HlmError, match=r"teacher: expected at most 21\.3 GiB a GPU \(RTX4090\), found 4.*take other hardware: 1x H100"
    ):
        check_step("teacher", teacher, gpu=gpu)
    check_step("teacher", teacher | {"backbone": MINI}, gpu=gpu)
    check_step("teacher", teacher | {"max_seq_length": 32_768, "cache_chunk": 8}, gpu=GPUS["A100-80"])
    align = settings("align", student=MINI, cascade=[{"layers": 14}, {"layers": 4, "ffn": 768}], bf16=True)
    check_step("align", align, gpu=gpu)
    with pytest.raises(HlmError, match="align, stage 1: .*set per_device_train_batch_size: "):
        check_step("align", align | {"per_device_train_batch_size": 100_000}, gpu=gpu)
    with pytest.raises(HlmError, match="stage 2: layers grows from 14 to 15"):  # without a GPU as well
        check_step("align", align | {"cascade": [{"layers": 14}, {"layers": 15}]})
    refine = settings("refine", student=MINI, bf16=True)
    check_step("refine", refine | {"pool": 65_536, "per_device_train_batch_size": 128}, gpu=gpu)
    with pytest.raises(HlmError, match="refine: .*loss "):
        check_step("refine", refine | {"pool": 10**7, "per_device_train_batch_size": 128}, gpu=gpu)


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("align", "student: runs/t\noutput: x\ncascade: [{layers: 7}]\n", "1 to 6 .*found 7"),
        ("align", "output: x\n", "align.yaml: expected 'student', found none"),
        ("embed", "model: runs/t\noutput: x\ndim: 64\n", "dim: expected 1 to 32 .*found 64.*works is 32"),
        ("embed", "model: runs/t\noutput: x\nindex: Flat\nindex_dim: 33\n", "found 33.*works is 32"),
        ("teacher", "backbone: nowhere/at-all\noutput: runs/t\n", "backbone at 'nowhere/at-all'"),
        ("teacher", "backbone: [", "not valid YAML"),
        ("refine", "student: runs/a\noutput: x\npool: many\n", "line 3: pool: expected a whole number, found 'many'"),
        ("refine", "student: runs/a\noutput: x\npool: -1\n", "pool: expected a number from 0 up, found -1"),
        ("embed", "model: runs/t\noutput: x\nindexs: Flat\n", "line 3: unknown key 'indexs'; did you mean 'index'"),
        ("align", "student: runs/t\noutput: x\nlerning_rate: 1\n", "did you mean 'learning_rate'"),
        ("plan", "documents: 0\nqueries: 5\n", "documents: expected above 0, found 0"),
        ("plan", "documents: 10\nquerys: 5\n", "'querys'; did you mean 'queries'"),
        ("plan", "documents: 10\n", "queries"),
    ],
)
def test_folders_that_cannot_work(folder, capsys, file, text, message):
    (folder / f"{file}.yaml").write_text(text)
    line = refusal(capsys, "--config", folder)
    assert re.search(message, line), line


def test_a_folder_without_steps(tmp_path, capsys):
    assert "teacher.yaml" in refusal(capsys, "--config", tmp_path)
    assert "no such folder" in refusal(capsys, "--config", tmp_path / "none")


# ---- the command


def test_the_command_prints_the_plan(folder, capsys):
    assert main(["plan", "--config", str(folder), "--gpus", "2xA100-40", "--documents", "5000"]) == 0
    out = capsys.readouterr().out
    assert "on 2x A100-40" in out and "5,000 ads" in out and "align 2: 2 layers, FFN 16" in out
    assert "with gradient checkpointing" in out and "1x RTX4090" in out
    assert main(["plan", "--config", str(folder)]) == 0
    assert "no GPUs given" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gpus", "fsdp", "teacher", "rest"),
    [
        ("H100", False, ("single", 1, 1), ("single", 1, 1)),
        ("4xH100", False, ("ddp", 4, 1), ("ddp", 4, 1)),
        ("8xH100", True, ("fsdp", 8, 1), ("ddp", 8, 1)),
        ("2x4xH100", False, ("multinode", 8, 2), ("multinode", 8, 2)),
        ("2x4xH100", True, ("fsdp", 8, 2), ("multinode", 8, 2)),
        (None, True, ("single", 1, 1), ("single", 1, 1)),
    ],
)
def test_each_step_has_the_line_that_launches_it(folder, capsys, gpus, fsdp, teacher, rest):
    """As accelerate's own launcher reads it: so many processes of this kind, on so many machines."""
    words = [*(["--gpus", gpus] if gpus else []), "--fsdp", str(fsdp).lower()]
    assert main(["plan", "--config", str(folder), *words, "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)["launch"]
    assert list(lines) == ["teacher", "embed", "align", "refine"]
    for step, line in lines.items():
        name, processes, machines = teacher if step == "teacher" else rest
        command = line.replace("RANK", "1").replace("ADDRESS", "10.0.0.7").split()
        assert command[:2] == ["accelerate", "launch"]
        arguments = launch_command_parser().parse_args([*command[2:4], "--main_process_port", "0", *command[4:]])
        arguments = _validate_launch_command(arguments)[0]
        assert (arguments.num_processes, arguments.num_machines) == (processes, machines)
        assert (arguments.use_fsdp, arguments.multi_gpu) == (name == "fsdp", name in ("ddp", "multinode"))
        assert arguments.machine_rank == machines - 1 and (machines == 1 or arguments.main_process_ip == "10.0.0.7")
        assert Path(arguments.training_script).name == f"{step}.py" and (ROOT / arguments.training_script).is_file()
        assert arguments.training_script_args == ["--config", f"{folder}/{step}.yaml"]
    assert main(["plan", "--config", str(folder), *words]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert all(f"  {line}" in printed for line in lines.values())


def test_json_adds_up(folder, capsys):
    assert main(["plan", "--config", str(folder), "--gpus", "H100", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["hours"] == pytest.approx(sum(phase["hours"] for phase in plan["phases"]))
    for phase in plan["phases"]:
        assert phase["gpu_bytes_peak"] == sum(phase["gpu_bytes"].values()) and phase["fits"]
    assert plan["assumptions"]["documents"] == 1000 and plan["hardware"]["name"] == "H100"


def test_a_plan_that_does_not_fit_is_printed_and_refused(folder, capsys):
    text = (folder / "align.yaml").read_text().replace("batch_size: 32", "batch_size: 1000000")
    (folder / "align.yaml").write_text(text)
    argv = ["plan", "--config", str(folder), "--gpus", "RTX4090", "--unlabelled", "2000000"]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert "  NO " in out and "error: align, align 1: 4 layers, FFN 64: expected at most 21.3 GiB" in err
    assert "set per_device_train_batch_size: " in err


def test_the_command_imports_nothing_heavy_until_it_plans():
    code = (
        "import sys; from hlm.cli import main; main(['plan', '--config', 'nowhere']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'faiss')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


# ---- the settings are the steps' own


def test_defaults_are_the_steps_own(folder):
    for name in ("align", "teacher"):
        text = (folder / f"{name}.yaml").read_text()
        (folder / f"{name}.yaml").write_text(re.sub("per_device_train_batch_size.*\n", "", text))
    steps = read_steps(folder, TrainingArguments)
    own = TrainingArguments(output_dir="x", use_cpu=True)
    for name in PLANNED:
        for item in fields(STEPS[name].settings):
            if item.default is not MISSING and f"\n{item.name}:" not in (folder / f"{name}.yaml").read_text():
                assert steps[name][item.name] == item.default, (name, item.name)
    for name in TRAINING:
        if f"\n{name}:" not in (folder / "align.yaml").read_text():
            assert (steps["align"][name] or None) == (getattr(own, name) or None), name


def test_a_training_argument_that_a_plan_does_not_read_is_none_the_less_known(folder):
    with open(folder / "align.yaml", "a") as file:
        file.write("warmup_ratio: 0.1\n")
    assert "warmup_ratio" not in read_steps(folder, TrainingArguments)["align"]
