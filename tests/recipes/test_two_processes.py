"""The recipes' mains on two gloo processes against one: gradients, weights, vectors, kills, under DDP and FSDP2; and
the whole recipe, each step on what the step before made there.

This file is also the script that torchrun starts: one launch for all jobs, as importing torch takes longest.
"""

import itertools
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import children
import numpy as np
import peft  # noqa: F401 (as the line after next: loaded before the forks, which then need not load it)
import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file, save_file
from transformers import BertModel, Qwen3Model  # noqa: F401

import hlm.training.checkpoints
import hlm.training.trainer
from hlm.artefacts import HlmError, read_manifest
from hlm.data.contract import load
from hlm.encoders.loading import encode, load_encoder
from hlm.training.checkpoints import take_folder
from hlm.training.trainer import RecipeTrainer
from recipes import align, embed, refine, teacher

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {"teacher": teacher, "embed": embed, "align": align, "refine": refine}
STEPS = {
    "teacher": "hlm.training.teacher",
    "embed": "hlm.embedding.embed",
    "align": "hlm.training.align",
    "refine": "hlm.training.refine",
}
ROWS = {"teacher": 36, "align": 24, "refine": 24}  # of a process at a step: 2, 3 and 6 steps an epoch
# On two processes -> on one: the same but for gradient caching and sharding.
EQUAL = {
    "teacher": "teacher",
    "teacher cached": "teacher",
    "teacher sharded": "teacher",
    "align": "align",
    "align kernel": "align kernel",
    "refine": "refine",
    "refine cached": "refine",
    "refine rates": "refine rates",
}
# Job -> the step of the kill (or call of the encoder), just after a checkpoint and within the second epoch.
CHAIN_KILLED = ("align", 2)  # the step of the whole recipe, and its training step, at which that is killed once
REFUSED = "align refused"  # its output is a folder with somebody's files
KILLED = {"teacher dropout": 3, "teacher sharded": 3, "align": 4, "refine": 8, "embed": 1}


def arguments(house: Path, data: str, bert: str, qwen3: str) -> dict[str, list[str]]:
    """Job -> recipe and command line, without output and batch size."""
    common = ["--data", data, "--seed", "3", "--disable_tqdm", "true", "--learning_rate", "3e-3", "--max_grad_norm"]
    common += ["0", "--save_strategy", "steps", "--save_steps"]  # clipping would hide gradients of a wrong length
    tuned = ["--backbone", qwen3, "--min_score", "3", "--pairs_per_query", "1", "--max_seq_length", "16"]
    tuned += ["--lora_rank", "4", "--max_steps", "4", *common, "3"]
    vectors = ["--vectors", str(house / "vectors")]
    aligned = ["--student", bert, "--parts", "train", "--num_train_epochs", "2", *vectors, *common, "4"]
    stages = ["--head", "true", "--cascade", '[{"layers": 4, "epochs": 1}, {"layers": 2, "ffn": 32}]']
    refined = ["--student", str(house / "one/align"), "--min_score", "3", "--pool", "64", "--hard_negatives", "4"]
    refined += ["--query_query", "true", "--alignment_weight", "0.5", "--max_steps", "9", *vectors, *common, "8"]
    return {
        "teacher": ["teacher", *tuned],
        "teacher cached": ["teacher", *tuned, "--cache_chunk", "16"],
        "teacher sharded": ["teacher", *tuned, "--cache_chunk", "36"],
        "teacher dropout": ["teacher", *tuned, "--lora_dropout", "0.1"],
        "align": ["align", *aligned, *stages],
        "align kernel": ["align", *aligned, "--cascade", '[{"layers": 2}]', "--objective", "kernel"],
        "refine": ["refine", *refined],
        "refine cached": ["refine", *refined, "--cache_chunk", "16"],
        "refine rates": ["refine", *refined, "--try_learning_rates", "1e-9"],
        "embed": ["embed", "--model", qwen3, "--data", data, "--shard_rows", "64"],
    }


def chain(house: Path, folder: str, data: str, qwen3: str) -> dict[str, list[str]]:
    """Step -> the command line of the whole recipe in `folder`, each step on what the step before made there."""
    made = house / folder
    common = ["--data", data, "--seed", "3", "--disable_tqdm", "true", "--per_device_train_batch_size", "24"]
    common += ["--learning_rate", "3e-3", "--save_strategy", "steps", "--save_steps", "1"]
    tuned = ["--backbone", qwen3, "--min_score", "3", "--pairs_per_query", "1", "--max_seq_length", "16"]
    vectors = ["--vectors", str(made / "embed")]
    words = {
        "teacher": [*tuned, *"--lora_rank 4 --cache_chunk 24 --max_steps 2".split(), *common],
        "embed": ["--model", str(made / "teacher"), "--data", data, "--shard_rows", "64"],
        "align": ["--student", str(made / "teacher"), "--cascade", '[{"layers": 2, "ffn": 32}]', "--max_steps", "4"],
        "refine": ["--student", str(made / "align"), *"--min_score 3 --pool 64 --hard_negatives 4".split()],
    }
    words["align"] += [*vectors, *common]
    words["refine"] += ["--max_steps", "2", *vectors, *common]
    return {step: [*words[step], "--output", str(made / step)] for step in RECIPES}


class Joined:
    """What two processes draw, for one: their batches of the same step, joined."""

    def __init__(self, batches):
        self.batches, self.batch_size, self.drop_last = batches, 2 * batches.batch_size, True

    def set_epoch(self, epoch):
        self.batches.set_epoch(epoch)

    def __len__(self):
        return len(self.batches) // 2

    def __iter__(self):
        drawn = list(self.batches)
        for start in range(0, 2 * len(self), 2):
            yield drawn[start] + drawn[start + 1]


def run(recipe: str, words: list[str], record: Path, *, processes: int = 1, kill: int | None = None) -> None:
    """Runs a recipe's main. Writes to `record` the gradients of the first step and the weights after the last one of
    each of its trainings. `kill`: the step, or the call of the encoder, at which SIGKILL comes."""
    found, trainings, calls = {}, itertools.count(), itertools.count()

    def strike(number):
        if number == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    class Recorded(RecipeTrainer):
        def get_batch_sampler(self, dataset, batch_size, *rest, **named):
            assert self.args.world_size == processes
            if processes > 1:
                return super().get_batch_sampler(dataset, batch_size, *rest, **named)
            return Joined(super().get_batch_sampler(dataset, batch_size // 2, *rest, **named))

        def train(self, *rest, **named):
            self.number = next(trainings)
            super().train(*rest, **named)
            found.update({f"{self.number} weight {name}": t.clone() for name, t in self.trained_tensors().items()})

        def training_step(self, *rest):
            strike(self.state.global_step)
            loss = super().training_step(*rest)
            for name, parameter in self.model.named_parameters():
                if self.state.global_step == 0 and parameter.grad is not None:
                    whole = getattr(parameter.grad, "full_tensor", parameter.grad.clone)()
                    found[f"{self.number} gradient {name}"] = whole
            return loss

    def counted(*rest, **named):
        strike(next(calls))
        return encode(*rest, **named)

    replaced = {"encode": counted} if recipe == "embed" else {"RecipeTrainer": Recorded}
    with mock.patch.multiple(STEPS[recipe], **replaced):
        RECIPES[recipe].main(words)
    save_file(found, record)


def worker(plan: Path) -> None:
    """One of torchrun's processes: every job in a fork of its own, with its own process group."""
    for job in json.loads(plan.read_text()):
        os.environ["MASTER_PORT"] = agreed_port(plan.parent / f"{job['name']}.port")
        child = os.fork()
        if child == 0:
            record = plan.parent / f"{job['name']}.{os.environ['RANK']}.safetensors"
            try:
                forked(job, record)
                os._exit(0)
            except BaseException as error:
                traceback.print_exc()
                record.with_suffix(".refusal").write_text(str(error))
                os._exit(0 if job["name"] == REFUSED and isinstance(error, HlmError) else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        wanted = 0 if job["kill"] is None else -signal.SIGKILL
        if status != wanted:
            sys.exit(f"{job['name']}: expected exit status {wanted}, found {status}")
        if job["name"] == "refine killed" and os.environ["RANK"] == "0":
            shutil.copytree(f"{job['words'][-1]}.training", plan.parent.parent / "left.training")


def forked(job: dict, record: Path) -> None:
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", **job["environment"]}
    if job["environment"]:  # accelerate shards on accelerators alone: two CPU processes pass for two of them
        torch.distributed.init_process_group("gloo")
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    if job["machines"] == 2:  # what each one's launcher says: the first process here, and the only one
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        if os.environ["RANK"] == "0":  # the other must not go ahead of what the first does for both
            hlm.training.checkpoints.take_folder = late(take_folder)
    if os.environ["RANK"] != "0":
        hlm.training.trainer.save_file = None  # the first process alone writes what all share
    run(job["recipe"], job["words"], record, processes=2, kill=job["kill"])


def late(call):
    def called(*rest):
        time.sleep(0.3)
        return call(*rest)

    return called


def agreed_port(path: Path) -> str:
    """A port that the first process finds free just before it is used: other tests take ports all the time."""
    if os.environ["RANK"] == "0":
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            path.with_suffix(".partial").write_text(str(found.getsockname()[1]))
        path.with_suffix(".partial").rename(path)
    while not path.exists():
        time.sleep(0.005)
    return path.read_text()


def fsdp_environment() -> dict[str, str]:
    """What `accelerate launch` tells its processes for recipes/configs/accelerate/fsdp.yaml."""
    words = ["--config_file", str(ROOT / "recipes/configs/accelerate/fsdp.yaml"), "--main_process_port", "0", "x.py"]
    launch, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    told = prepare_multi_gpu_env(launch)
    return {k: v for k, v in told.items() if "FSDP" in k} | {"ACCELERATE_TORCH_DEVICE": "cpu"}


@pytest.fixture(scope="module")
def house(tmp_path_factory, catalogue_200, tiny_bert, tiny_qwen3):
    """Artefacts in `one/<job>` and `two/<job>`, records in `one/<job>.safetensors` and `two/<job>.<rank>.safetensors`;
    `two/<job> killed` was killed and resumed, `left.training` is a copy of what the kill of refine left."""
    house = tmp_path_factory.mktemp("two_processes")
    for folder in ("one", "two"):
        (house / folder).mkdir()
    settings = arguments(house, catalogue_200, tiny_bert, tiny_qwen3)

    def words(name, output, processes):
        recipe, *rest = settings[name]
        sizes = ["--per_device_train_batch_size", str(2 // processes * ROWS[recipe])] if recipe in ROWS else []
        return [*rest, *sizes, "--output", str(house / output)]

    def alone(name):
        run(settings[name][0], words(name, f"one/{name}", 1), house / f"one/{name}.safetensors")

    plan = []

    def planned(name, recipe, words, kill, environment, machines=1):
        run = {"name": name, "recipe": recipe, "words": words, "kill": kill, "environment": environment}
        plan.append(run | {"machines": machines})

    whole = [(name, "") for name in settings if name != "embed"]
    for name, suffix in [*((name, suffix) for name in KILLED for suffix in (" killed", " resumed")), *whole]:
        output = f"two/{name} killed" if suffix else f"two/{name}"
        kill = KILLED[name] if suffix == " killed" else None
        environment = fsdp_environment() if name == "teacher sharded" else {}
        planned(name + suffix, settings[name][0], words(name, output, 2), kill, environment)
    (house / "theirs").mkdir()
    (house / "theirs/notes.txt").touch()
    planned(REFUSED, "align", words("align", "theirs", 2), None, {})
    killed = [("two/chain killed", CHAIN_KILLED[0]), ("two/chain killed", None)]
    for folder, upto in [("two/chain", None), *killed, ("two/machines", None)]:
        steps = chain(house, folder, catalogue_200, tiny_qwen3)
        for step in list(steps)[: list(steps).index(upto) + 1 if upto else None]:
            name, kill = Path(folder).name + (" at first" if upto else ""), CHAIN_KILLED[1] if step == upto else None
            environment = fsdp_environment() if step == "teacher" else {}  # sharded, as its launch file says
            planned(f"{name} {step}", step, steps[step], kill, environment, 2 if folder == "two/machines" else 1)
    (house / "two/plan.json").write_text(json.dumps(plan))
    alone("embed")
    (house / "vectors").symlink_to(house / "one/embed")
    alone("align")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(house / "log", "w") as log:
        launched = children.Popen(
            [*command, house / "two/plan.json"], cwd=ROOT, env=environment, stdout=log, stderr=log, forks=True
        )
    try:
        for name in {*EQUAL.values()} - {"align"}:
            alone(name)
        status = launched.wait(timeout=900)
    finally:
        launched.kill()
    log = (house / "log").read_text()
    torchrun = log.find("torch/distributed/elastic/multiprocessing/api.py")  # what it says at the end tells no cause
    assert status == 0, log[:torchrun][-6000:]
    return house


def record(path: Path, part: str, training: int) -> torch.Tensor:
    found = load_file(path)
    names = sorted(name for name in found if name.startswith(f"{training} {part} "))
    return torch.cat([found[name].flatten().double() for name in names]) if names else torch.zeros(0)


TWICE = ("align", "refine rates")  # two stages, two rates
TRAININGS = [(name, number) for name in EQUAL for number in ((0, 1) if name in TWICE else (0,))]


@pytest.mark.parametrize(("name", "training"), TRAININGS)
def test_gradients_are_those_of_the_whole_batch(house, name, training):
    wanted = record(house / f"one/{EQUAL[name]}.safetensors", "gradient", training)
    for rank in (0, 1):
        found = record(house / f"two/{name}.{rank}.safetensors", "gradient", training)
        assert torch.cosine_similarity(found, wanted, dim=0) > 0.9999
        assert found.norm() / wanted.norm() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("name", "training"), TRAININGS)
def test_ranks_end_with_equal_weights_and_one_process_with_nearly_these(house, name, training):
    first, second = (record(house / f"two/{name}.{rank}.safetensors", "weight", training) for rank in (0, 1))
    assert len(first) and torch.equal(first, second)
    wanted = record(house / f"one/{EQUAL[name]}.safetensors", "weight", training)
    # AdamW's first steps are signs: a gradient of rounding errors alone moves a weight by the whole learning rate.
    assert (first - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize("name", EQUAL)
def test_artefacts_give_the_vectors_of_one_process(house, catalogue_200, name):
    texts = list(dict(load(catalogue_200, splits=("test",)).split_queries("test")).values())
    found, wanted = (
        encode(load_encoder(str(path)), texts, prompt_name="query")
        for path in (house / "two" / name, house / "one" / EQUAL[name])
    )
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("name", KILLED)
def test_killed_and_resumed_is_never_killed(house, name):
    never = house / ("one" if name == "embed" else "two") / name  # embed: byte for byte as one process
    paths = [path.relative_to(never) for path in never.rglob("*.safetensors")]
    assert paths
    for path in paths:
        assert (house / f"two/{name} killed" / path).read_bytes() == (never / path).read_bytes(), path


@pytest.mark.parametrize("folder", ["chain killed", "machines"])
def test_the_whole_recipe_ends_in_the_same_student(house, folder):
    """Killed once, and on two machines of one process each."""
    never, other = house / "two/chain", house / "two" / folder
    paths = [path.relative_to(never) for path in never.rglob("*.safetensors")]
    assert {path.parts[0] for path in paths} == set(RECIPES)
    for path in paths:
        assert (other / path).read_bytes() == (never / path).read_bytes(), path


def test_the_whole_recipe_hands_over_its_own_and_ranks_agree(house):
    never = house / "two/chain"
    teacher_of = [read_manifest(never / step, "student")["inputs"]["teacher"] for step in ("align", "refine")]
    assert teacher_of == [read_manifest(never / "teacher", "teacher")["encoder"]] * 2
    first, second = (load_file(house / f"two/chain refine.{rank}.safetensors") for rank in (0, 1))
    assert first and all(torch.equal(first[name], second[name]) for name in first if " weight " in name)


def test_all_ranks_tell_what_the_first_one_refuses(house):
    first, second = ((house / f"two/{REFUSED}.{rank}.refusal").read_text() for rank in (0, 1))
    assert first == second and "notes.txt" in first


def test_resuming_on_another_number_of_processes_is_refused_by_name(house):
    words = next(job["words"] for job in json.loads((house / "two/plan.json").read_text()) if job["name"] == "refine")
    with pytest.raises(HlmError, match="config 'processes' was 2, now 1"):
        refine.main([*words[:-1], str(house / "left")])


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
