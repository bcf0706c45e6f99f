"""Batches: every row once an epoch, rows of one key together, the same order after a kill, and the same whoever makes
them; settings that cannot work are refused, and what is left out is said."""

import json
import pickle
import shutil
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import children
import numpy as np
import pytest
import torch
from on_device import OnDevice
from safetensors.numpy import load_file

from hlm.artefacts import MANIFEST, HlmError
from hlm.config import parse
from hlm.data.contract import load
from hlm.encoders.loading import check_device, load_encoder
from hlm.training import trainer
from hlm.training.batches import GroupedBatches, TokenTable
from hlm.training.trainer import TrainingArguments
from recipes import align, embed, evaluate, refine, teacher

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["--max_steps", "3", "--save_strategy", "no", "--per_device_train_batch_size", "16", "--seed", "3"]
STEPS += ["--disable_tqdm", "true", "--learning_rate", "1e-2"]


@pytest.mark.parametrize("keys, group", [(None, None), (np.arange(103) % 7, None), (np.arange(103) % 7, 5)])
@pytest.mark.parametrize("drop_last", [True, False])
def test_an_epoch_holds_every_row_once(keys, group, drop_last):
    batches = GroupedBatches(103, 10, 0, keys=keys, group=group, drop_last=drop_last)
    found = list(batches)
    assert len(found) == len(batches) == (10 if drop_last else 11)
    rows = [row for batch in found for row in batch]
    assert len(rows) == len(set(rows)) == (100 if drop_last else 103)
    assert all(len(batch) == 10 for batch in found[:10])


def test_batches_follow_from_seed_and_epoch_alone():
    first, second = (GroupedBatches(64, 8, 3, keys=np.arange(64) // 4) for _ in range(2))
    list(first)  # an epoch that was seen must not matter
    for batches in (first, second):
        batches.set_epoch(2)
    assert list(first) == list(second)
    second.set_epoch(1)
    assert list(first) != list(second)


def test_groups_bring_one_key_together():
    keys = np.random.default_rng(0).permutation(np.repeat(np.arange(16), 16))
    whole = [keys[batch] for batch in GroupedBatches(256, 16, 0, keys=keys)]
    assert all(len(set(batch)) == 1 for batch in whole)
    grouped = [keys[batch] for batch in GroupedBatches(256, 16, 0, keys=keys, group=4)]
    assert all(len(set(batch)) <= 4 for batch in grouped) and any(len(set(batch)) > 1 for batch in grouped)


def test_a_group_must_divide_the_batch():
    with pytest.raises(HlmError, match="expected a group that divides the batch of 10, found 4"):
        GroupedBatches(100, 10, 0, keys=np.zeros(100), group=4)
    with pytest.raises(HlmError, match="at least one whole batch of 10, found 9"):
        GroupedBatches(9, 10, 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory, catalogue_200, tiny_bert) -> Path:
    """A teacher, its vectors, and a student aligned to them."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "data").symlink_to(catalogue_200)
    (folder / "base").symlink_to(tiny_bert)
    teacher.main(words("teacher", folder, folder / "teacher"))
    embed.main(["--model", str(folder / "teacher"), "--data", catalogue_200, "--output", str(folder / "vectors")])
    align.main(words("align", folder, folder / "student"))
    return folder


def words(name: str, run: Path, output: Path, *more: str) -> list[str]:
    given = {
        "teacher": ["--backbone", str(run / "base"), "--lora_rank", "4", "--min_score", "3"],
        "align": ["--student", str(run / "teacher"), "--vectors", str(run / "vectors")],
        "refine": ["--student", str(run / "student"), "--vectors", str(run / "vectors"), "--min_score", "3"],
    }[name]
    return [*given, "--data", str(run / "data"), "--output", str(output), *STEPS, *more]


MODULES = {"teacher": teacher, "align": align, "refine": refine}


class Made(Exception):
    """Carries the trainer out of a recipe before it trains."""


@pytest.mark.parametrize("name", list(MODULES))
def test_what_goes_to_a_loader_worker_is_small_and_makes_the_same_batch(run, tmp_path, monkeypatch, name):
    def stop(trainer, *rest, **named):
        raise Made(trainer)

    monkeypatch.setattr(f"hlm.training.{'rates' if name == 'refine' else name}.train", stop)
    with pytest.raises(Made) as made:
        MODULES[name].main(words(name, run, tmp_path / "made"))
    collate = made.value.args[0].data_collator
    raw = bytes(ForkingPickler.dumps(collate))
    text = load(str(run / "data"), splits=("train",)).split_queries("train")[0][1]
    assert b"SentenceTransformer" not in raw and text.encode() not in raw  # no model, and no texts
    rows = [{"row": row} for row in (5, 0, 33, 2)]
    assert same(pickle.loads(raw)(rows), collate(rows))


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(torch.as_tensor(one), torch.as_tensor(other))


LOADED = """
import multiprocessing, sys
from recipes import align
multiprocessing.set_start_method(sys.argv[1])
align.main(sys.argv[2:])
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_loader_workers_train_to_the_same_weights_however_they_start(run, tmp_path, method):
    # In a process of its own: torch's loader takes over SIGCHLD, and children of other tests may end meanwhile.
    given = words("align", run, tmp_path / "workers", "--dataloader_num_workers", "1")
    done = children.run([sys.executable, "-c", LOADED, method, *given], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "workers", run / "student"))
    for tensor in one:
        np.testing.assert_array_equal(one[tensor], other[tensor], err_msg=tensor)


def test_a_pickled_token_table_opens_its_files_instead_of_carrying_them(tiny_bert, tmp_path):
    texts = ["a red shoe for a large desk"] * 5000
    table = TokenTable(load_encoder(tiny_bert), texts, folder=tmp_path, source="s")
    raw = pickle.dumps(table)
    assert len(raw) < 1000 < table.flat.nbytes
    again = pickle.loads(raw)
    assert isinstance(again.flat, np.memmap) and torch.equal(
        again.features([0, 4999])["input_ids"], table.features([0, 4999])["input_ids"]
    )
    in_memory = pickle.loads(pickle.dumps(TokenTable(load_encoder(tiny_bert), texts)))
    assert torch.equal(in_memory.features([7])["input_ids"], table.features([7])["input_ids"])


@pytest.mark.parametrize("part", ["ids", "ends"])
@pytest.mark.parametrize("damage", ["short", "gone"])
def test_token_files_that_do_not_belong_together_are_written_again(tiny_bert, tmp_path, part, damage):
    model, texts = load_encoder(tiny_bert), ["red shoe", "a steel kettle", "desk"]
    wanted = TokenTable(model, texts, folder=tmp_path, source="s").features([0, 1, 2])["input_ids"].clone()
    (path,) = tmp_path.glob(f"*.{part}")
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-8])
    found = TokenTable(model, texts, folder=tmp_path, source="s").features([0, 1, 2])["input_ids"]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--use_cpu false", "use_cpu: false: expected a GPU, found no GPU that torch"),
        ("--use_cpu false --bf16 true", "use_cpu: false: expected a GPU, found no GPU that torch"),
        ("--fp16 true", "fp16: expected a GPU, found none in use"),
        ("--resume_from_checkpoint x", "a recipe resumes by itself"),
        (
            "--load_best_model_at_end true --eval_strategy steps --eval_steps 2 --save_strategy steps --save_steps 4",
            "expected each evaluated step to be saved, found eval_steps 2 and save_steps",
        ),
    ],
)
def test_settings_that_cannot_work_here_are_refused_before_any_work(monkeypatch, tmp_path, given, message):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(HlmError, match=message):
        parse(TrainingArguments, argv=["--output_dir", str(tmp_path), *given.split()])


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps", "gpu", "accelerator"])
def test_a_device_that_is_not_there_is_one_error(monkeypatch, tiny_bert, tmp_path, device):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(HlmError, match="device: expected .*, found "):
        check_device(device)
    if device != "accelerator":
        with pytest.raises(HlmError, match="device: expected "):
            load_encoder(tiny_bert, device=device)
        with pytest.raises(HlmError, match="device: expected "):  # before the data is read: there is none
            evaluate.main(["--data", "nowhere", "--systems", '{"bm25": null}', "--device", device])
    for fine in (None, "cpu", "cpu:0"):
        check_device(fine)


def test_half_precision_is_said_of_a_cpu_without_instructions_for_it(monkeypatch, run, tmp_path, caplog):
    for fast, bf16 in ((False, "true"), (False, "false"), (True, "true")):
        monkeypatch.setattr(trainer, "computes_in_bf16", lambda fast=fast: fast)
        caplog.clear()
        align.main(words("align", run, tmp_path / f"{fast}-{bf16}", "--use_cpu", "true", "--bf16", bf16))
        assert ("align: bf16 is slow on this CPU" in caplog.text) == (bf16 == "true" and not fast)


@pytest.mark.parametrize("name", ["teacher", "refine"])
def test_pairs_below_min_score_do_not_vanish_unsaid(run, tmp_path, caplog, name):
    shutil.copytree(run / "data", tmp_path / "data")
    (judgements,) = (run / "data/qrels").glob("train.*")
    assert judgements.suffix == ".tsv"
    lines = judgements.read_text().splitlines()
    grades = [line.rsplit("\t", 1)[1] for line in lines[1:]]
    kept = sum(int(grade) >= 3 for grade in grades)
    caplog.set_level("INFO")
    MODULES[name].main(words(name, run, tmp_path / "made"))
    told = next(record for record in caplog.records if "judged pairs" in record.message)
    assert told.message.startswith(f"{kept:,} of {len(grades):,} judged pairs (")
    assert f"{grades.count('3'):,} of grade 3" in told.message
    assert (told.levelname == "WARNING") == (kept < len(grades) / 2)
    with pytest.raises(HlmError, match="min_score: expected train pairs of grade 9 or more, found .*of grade 3"):
        MODULES[name].main(words(name, run, tmp_path / "none", "--min_score", "9"))


def test_another_teacher_is_no_start_for_alignment(run, tiny_bert, tmp_path):
    other = [*words("teacher", run, tmp_path / "other"), "--learning_rate", "1"]
    teacher.main(other)
    with pytest.raises(HlmError, match=f"student: expected a backbone, teacher .*other, another teacher .*{MANIFEST}"):
        align.main([*words("align", run, tmp_path / "aligned"), "--student", str(tmp_path / "other")])
    vectors = tmp_path / "vectors"
    embed.main(["--model", str(tmp_path / "other"), "--data", str(run / "data"), "--output", str(vectors)])
    strange = [*words("align", run, tmp_path / "aligned"), "--vectors", str(vectors), "--student", str(run / "student")]
    with pytest.raises(HlmError, match="a student of another teacher"):
        align.main(strange)
    (tmp_path / "copy").mkdir()
    shutil.copytree(tmp_path / "other", tmp_path / "copy", dirs_exist_ok=True)
    (tmp_path / "copy" / MANIFEST).unlink()
    align.main([*words("align", run, tmp_path / "copied"), "--student", str(tmp_path / "copy")])  # the remedy


def test_a_learning_rate_of_the_embeddings_alone_is_followed_and_remembered(run, tmp_path):
    given = [*words("align", run, tmp_path / "aligned"), "--learning_rate", "0", "--weight_decay", "0"]
    align.main([*given, "--learning_rate_mapping", '{"word_embeddings": 0.01}'])
    before = load_encoder(str(run / "teacher"))[0].auto_model.state_dict()
    after = load_encoder(str(tmp_path / "aligned"))[0].auto_model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "embeddings.word_embeddings.weight"
    }
    manifest = json.loads((tmp_path / "aligned" / MANIFEST).read_text())
    assert manifest["config"]["training"]["learning_rate_mapping"] == {"word_embeddings": 0.01}
    with pytest.raises(HlmError, match="learning_rate_mapping: expected patterns of parameters' names, found 'words'"):
        align.main([*given, "--learning_rate_mapping", '{"words": 0.01}'])
    align.main([*given, "--learning_rate_mapping", '{"word_embeddings": 0.02}'])  # not up to date
    again = load_encoder(str(tmp_path / "aligned"))[0].auto_model.state_dict()
    assert not torch.equal(*(state["embeddings.word_embeddings.weight"] for state in (after, again)))


def test_the_teacher_itself_in_another_dtype_is_its_own_start(run, tmp_path):
    vectors = tmp_path / "vectors"
    embed.main(
        ["--model", str(run / "teacher"), "--data", str(run / "data"), "--output", str(vectors), "--dtype", "bfloat16"]
    )
    align.main([*words("align", run, tmp_path / "aligned"), "--vectors", str(vectors)])
    manifest = json.loads((tmp_path / "aligned" / MANIFEST).read_text())
    assert manifest["inputs"]["teacher"] != json.loads((run / "teacher" / MANIFEST).read_text())["encoder"]


def test_the_trainer_never_waits_for_a_gpu_to_look_at_the_loss_and_fuses_the_optimizer(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path))
    assert args.logging_nan_inf_filter is False and args.optim == "adamw_torch_fused"


@pytest.mark.parametrize("pool", ["64", "100000"])
def test_a_refinement_step_reads_nothing_back_from_the_device(run, tmp_path, monkeypatch, pool):
    def stop(trainer, *rest, **named):
        raise Made(trainer)

    monkeypatch.setattr("hlm.training.rates.train", stop)
    more = ["--pool", pool, "--query_query", "true", "--alignment_weight", "0.5"]
    with pytest.raises(Made) as made:
        refine.main(words("refine", run, tmp_path / "made", *more))
    trainer = made.value.args[0]
    refinement = trainer.step_loss.__self__
    refinement.refresh()
    batch = trainer.data_collator([{"row": row} for row in range(8)])
    vectors = trainer.model(dict(batch["query"][0]))["sentence_embedding"].detach()
    expected = refinement.contrast(vectors, batch)

    def placed(tensor, device=None):
        return tensor.as_subclass(OnDevice)

    for module in ("refine", "frozen"):
        monkeypatch.setattr(f"hlm.training.{module}.sent", placed)
    for frozen in (refinement.ads, refinement.targets):
        frozen.table = placed(frozen.copied())
    if refinement.pool:
        refinement.pool = tuple(map(placed, refinement.pool))
    with pytest.raises(AssertionError, match="tolist"):
        placed(vectors).tolist()
    ids = {name: placed(batch[name]) for name in ("query_ids", "positive_ids")}
    found = refinement.contrast(placed(vectors), batch | ids)
    assert torch.equal(found.as_subclass(torch.Tensor), expected)
