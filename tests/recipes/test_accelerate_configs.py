"""recipes/configs/accelerate: what accelerate makes of each file, and launches that fall back to fewer processes."""

import os
import sys
from pathlib import Path

import children
import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from hlm.artefacts import HlmError
from hlm.config import check_processes, parse
from hlm.encoders.loading import load_encoder
from hlm.training.trainer import TrainingArguments
from hlm.vectors.store import VectorStore
from recipes import embed

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes/configs/accelerate"


def launch_arguments(name, *more):
    """What `accelerate launch --config_file` runs with, after its own checks; port 0: any free one."""
    words = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--main_process_port", "0", *more, "recipe.py"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


@pytest.mark.parametrize(
    ("name", "kind", "machines", "processes"),
    [
        ("single", DistributedType.NO, 1, 1),
        ("ddp", DistributedType.MULTI_GPU, 1, 8),
        ("fsdp", DistributedType.FSDP, 1, 8),
        ("multinode", DistributedType.MULTI_GPU, 2, 16),
    ],
)
def test_accelerate_reads_what_the_file_means(name, kind, machines, processes):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # refuses unknown keys
    assert (config.distributed_type, config.num_machines, config.num_processes) == (kind, machines, processes)
    assert (config.machine_rank, config.mixed_precision, config.use_cpu) == (0, "no", False)  # precision: the recipe's
    arguments = launch_arguments(name)
    assert (arguments.multi_gpu, arguments.use_fsdp) == (
        kind == DistributedType.MULTI_GPU,
        kind == DistributedType.FSDP,
    )
    assert arguments.num_processes == processes
    assert sorted(path.stem for path in CONFIGS.iterdir()) == ["ddp", "fsdp", "multinode", "single"]


def test_every_machine_starts_its_share_and_finds_the_first():
    arguments = launch_arguments("multinode", "--machine_rank", "1")
    arguments.main_process_port = load_config_from_file(str(CONFIGS / "multinode.yaml")).main_process_port
    prepare_multi_gpu_env(arguments)
    assert (arguments.nproc_per_node, arguments.nnodes, arguments.node_rank) == ("8", "2", 1)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "10.0.0.1:29500")


def test_fsdp_shards_layer_by_layer_the_second_way(monkeypatch, tiny_qwen3):
    for name, value in prepare_multi_gpu_env(launch_arguments("fsdp")).items():
        if "FSDP" in name:
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert "SHARDED_STATE_DICT" in str(plugin.state_dict_type)  # no process gathers the whole optimizer
    assert not plugin.activation_checkpointing and not plugin.cpu_ram_efficient_loading
    model = load_encoder(tiny_qwen3, device="cpu")
    plugin.set_auto_wrap_policy(model)
    wrapped = [
        module for module in model.modules() if plugin.auto_wrap_policy(module, recurse=False, nonwrapped_numel=0)
    ]
    assert len(wrapped) == 6 and all(isinstance(module, Qwen3DecoderLayer) for module in wrapped)


@pytest.mark.parametrize(
    ("environment", "found", "message"),
    [
        ({"WORLD_SIZE": "2"}, 1, "expected 2 processes .WORLD_SIZE., found 1"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, 1, "asked for, found 1.*torchrun"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, 1, None),  # accelerate launch, one process asked for
        ({"MASTER_PORT": "29500"}, 1, None),  # a cluster's own variable
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500", "WORLD_SIZE": "2"}, 2, None),
    ],
)
def test_fewer_processes_than_asked_for_are_refused(monkeypatch, environment, found, message):
    for name in ("WORLD_SIZE", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if message is None:
        check_processes(found)
        return
    with pytest.raises(HlmError, match=message):
        check_processes(found)
    if "WORLD_SIZE" not in environment:  # the training recipes stop as they read their arguments
        with pytest.raises(HlmError, match=message):
            parse(TrainingArguments, argv=["--output_dir", "nowhere"])


def test_a_launch_that_falls_back_to_one_process_stops(tiny_bert, catalogue_200, tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    recipe = [embed.__file__, "--model", tiny_bert, "--data", catalogue_200, "--output", str(tmp_path / "none")]
    started = []
    monkeypatch.setattr(launch, "simple_launcher", started.append)  # the launcher of a single process
    launch.launch_command(launch_command_parser().parse_args(["--cpu", "--num_processes", "2", *recipe]))
    command, environment = prepare_simple_launcher_cmd_env(started[0])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(HlmError, match="several processes that accelerate launch was asked for, found 1"):
        embed.main(command[2:])
    assert not (tmp_path / "none").exists()


def test_single_launches(tiny_bert, catalogue_200, tmp_path):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_", "WORLD_SIZE", "RANK"))}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / "single.yaml"]
    recipe = [embed.__file__, "--model", tiny_bert, "--data", catalogue_200, "--parts", "queries", "--output", tmp_path]
    environment = clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = list(map(str, [*command, *recipe]))
    done = children.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, forks=True)
    assert done.returncode == 0, done.stderr
    assert len(VectorStore.open(tmp_path / "queries")) > 100
