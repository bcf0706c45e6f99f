"""Checkpoints: a damaged one is not resumed, a run that was moved is the same run, the best is not lost in silence."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import children
import numpy as np
import pytest
from safetensors.numpy import load_file

from hlm.artefacts import HlmError, read_manifest
from hlm.integrity import check_files
from hlm.training.checkpoints import STATE, fault, last_checkpoint, mark_whole
from hlm.training.trainer import RecipeTrainer
from recipes import align, embed, refine, teacher

SAVED = [STATE, "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "optimizer_0/__0_0.distcp"]
STEPS = ["--max_steps", "8", "--save_strategy", "steps", "--save_steps", "2", "--seed", "3", "--disable_tqdm", "true"]
STEPS += ["--per_device_train_batch_size", "16", "--save_total_limit", "4"]
# So high a rate that the first checkpoint is the best.
BEST = ["--eval_strategy", "steps", "--eval_steps", "2", "--load_best_model_at_end", "true", "--learning_rate", "0.3"]
BEST += ["--metric_for_best_model", "dev_ndcg@10", "--greater_is_better", "true", "--lr_scheduler_type", "constant"]
MODULES = {"teacher": teacher, "align": align, "refine": refine}


class Stop(Exception):
    pass


def stop_at(monkeypatch, module: str, step: int) -> None:
    """The recipe ends as if killed when it begins this step."""

    class Stopped(RecipeTrainer):
        def training_step(self, *rest):
            if self.state.global_step == step:
                raise Stop
            return super().training_step(*rest)

    monkeypatch.setattr(f"{module}.RecipeTrainer", Stopped)


@pytest.fixture(scope="module")
def run(tmp_path_factory, catalogue_200, tiny_bert) -> Path:
    """A run with data, a teacher and its vectors, that nothing is written into."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(catalogue_200, folder / "data")
    shutil.copytree(tiny_bert, folder / "base")
    embed.main(["--model", str(folder / "base"), "--data", str(folder / "data"), "--output", str(folder / "vectors")])
    return folder


def words(name: str, run: Path, output: Path) -> list[str]:
    if name == "teacher":
        given = ["--backbone", str(run / "base"), "--lora_rank", "4", "--min_score", "3", "--eval_strategy", "no"]
        return [*given, "--data", str(run / "data"), "--output", str(output), *STEPS, "--learning_rate", "1e-2"]
    given = ["--student", str(run / "base"), "--vectors", str(run / "vectors"), "--cascade", '[{"layers": 2}]']
    return [*given, "--data", str(run / "data"), "--output", str(output), *STEPS, *BEST]


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return all(np.array_equal(first[name], second[name]) for name in first)


def checkpoint(folder: Path, step: int, names=SAVED) -> Path:
    path = folder / f"checkpoint-{step}"
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps({"best_global_step": None, "name": name}))
    mark_whole(path)
    return path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", SAVED)
def test_every_file_of_a_checkpoint_is_missed_and_compared(tmp_path, name):
    path = checkpoint(tmp_path, 2)
    assert fault(path) is None
    flip(path / name)
    assert fault(path) == f"{name} is not what was saved"
    with open(path / name, "a") as file:
        file.write(" ")
    assert fault(path).startswith(f"{name} has ")
    (path / name).unlink()
    assert fault(path) == f"{name} is missing"


@pytest.mark.parametrize(
    "mark", ["", "{", "[]", "{}", '{"files": {}}', '{"files": {"optimizer.pt": 3}}', '{"files": 1}']
)
def test_a_mark_that_names_no_files_marks_nothing(tmp_path, mark):
    path = checkpoint(tmp_path, 2)
    (path / "whole").write_text(mark)
    assert "whole" in fault(path)


def test_an_older_whole_one_is_taken_and_the_reason_told(tmp_path, caplog):
    for step in (2, 10, 12):
        checkpoint(tmp_path, step)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-12")
    (tmp_path / "checkpoint-12/whole").unlink()
    (tmp_path / "checkpoint-10/rng_state_0.pth").unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-12 is not resumed: it was not finished" in caplog.text
    assert "checkpoint-10 is not resumed: rng_state_0.pth is missing" in caplog.text
    flip(tmp_path / "checkpoint-2/optimizer.pt")
    assert last_checkpoint(tmp_path) is None and "training starts anew" in caplog.text


@pytest.fixture(scope="module")
def killed_teacher(run, tmp_path_factory):
    """A teacher that was stopped after checkpoint 6; and one never stopped."""
    folder = tmp_path_factory.mktemp("killed_teacher")
    teacher.main(words("teacher", run, folder / "never"))
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, "hlm.training.teacher", 7)
        with pytest.raises(Stop):
            teacher.main(words("teacher", run, folder / "killed"))
    return folder


@pytest.mark.parametrize("lost", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_ends_in_the_weights_of_a_run_never_stopped(run, killed_teacher, tmp_path, caplog, lost):
    shutil.copytree(killed_teacher / "killed.training", tmp_path / "killed.training")
    newest = tmp_path / "killed.training/checkpoint-6"
    flip(newest / lost) if lost == "optimizer.pt" else (newest / lost).unlink()
    caplog.set_level("INFO")
    teacher.main(words("teacher", run, tmp_path / "killed"))
    assert f"checkpoint-6 is not resumed: {lost}" in caplog.text and "resuming from" in caplog.text
    assert caplog.text.split("resuming from ")[1].split()[0].endswith("checkpoint-4")
    assert same_weights(tmp_path / "killed", killed_teacher / "never")


@pytest.fixture(scope="module")
def killed(run, tmp_path_factory):
    """An alignment that was stopped after checkpoint 6 while checkpoint 2 was the best; and one never stopped."""
    folder = tmp_path_factory.mktemp("killed")
    shutil.copytree(run, folder, dirs_exist_ok=True)
    align.main(words("align", folder, folder / "never"))
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, "hlm.training.align", 7)
        with pytest.raises(Stop):
            align.main(words("align", folder, folder / "aligned"))
    state = json.loads((folder / "aligned.training/checkpoint-6/trainer_state.json").read_text())
    assert state["best_global_step"] < 6
    return folder, state["best_global_step"]


def test_a_moved_run_goes_on_and_ends_with_its_best_checkpoint(killed, tmp_path, caplog):
    folder, best = killed
    shutil.copytree(folder, tmp_path / "elsewhere")
    for gone in (folder / "aligned.training").glob("checkpoint-*"):
        gone.rename(gone.with_name("hidden" + gone.name))  # the old place is gone, as after mv
    try:
        moved = tmp_path / "elsewhere"
        caplog.set_level("INFO")
        align.main(words("align", moved, moved / "aligned"))
    finally:
        for hidden in (folder / "aligned.training").glob("hidden*"):
            hidden.rename(hidden.with_name(hidden.name.removeprefix("hidden")))
    assert "resuming from" in caplog.text and f"best: checkpoint-{best} " in caplog.text
    assert "does not exist anymore" not in caplog.text
    assert same_weights(moved / "aligned", folder / "never")
    caplog.clear()
    align.main(words("align", moved, moved / "never"))  # a finished step is up to date at another path, too
    assert "up to date" in caplog.text


@pytest.mark.parametrize("damage", ["gone", "flipped"])
def test_a_best_checkpoint_that_is_lost_is_trained_again(killed, tmp_path, caplog, damage):
    folder, best = killed
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    lost = tmp_path / f"aligned.training/checkpoint-{best}"
    shutil.rmtree(lost) if damage == "gone" else flip(lost / STATE)
    align.main(words("align", tmp_path, tmp_path / "aligned"))
    assert f"checkpoint-6 is not resumed: of checkpoint-{best}, the best until then, " in caplog.text
    assert same_weights(tmp_path / "aligned", folder / "never")


def test_a_best_checkpoint_lost_at_the_very_end_stops_with_one_error(run, tmp_path, monkeypatch):
    load_best = RecipeTrainer._load_best_model

    def lose(self):
        flip(Path(self.state.best_model_checkpoint) / STATE)
        load_best(self)

    with monkeypatch.context() as patch:
        patch.setattr(RecipeTrainer, "_load_best_model", lose)
        with pytest.raises(HlmError, match="the best checkpoint, cannot be taken: .*run the same command again"):
            align.main(words("align", run, tmp_path / "aligned"))
    align.main(words("align", run, tmp_path / "aligned"))  # the remedy works


def test_a_training_folder_without_a_whole_checkpoint_is_taken_over(run, tmp_path):
    arguments = words("align", run, tmp_path / "aligned")
    size = arguments.index("--per_device_train_batch_size") + 1
    with pytest.raises(HlmError, match="lower per_device_train_batch_size"):
        align.main([*arguments[:size], "4096", *arguments[size + 1 :]])
    assert (tmp_path / "aligned.training/identity.json").is_file()
    align.main(arguments)  # the remedy of the error above, and no error about another run
    assert (tmp_path / "aligned/hlm.json").is_file()


def test_another_runs_whole_checkpoints_are_not(killed, tmp_path):
    folder, _ = killed
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with pytest.raises(HlmError, match="another run: config 'dropout' was 0.0, now 0.1; set it back .*or delete"):
        align.main([*words("align", tmp_path, tmp_path / "aligned"), "--dropout", "0.1"])
    # Other judgements at the same path are another run, too.
    (judgements,) = (tmp_path / "data/qrels").glob("dev.*")
    judgements.write_text("".join(judgements.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(HlmError, match="another run: inputs 'qrels/dev'"):
        align.main(words("align", tmp_path, tmp_path / "aligned"))


def test_checkpoints_without_the_optimizer_are_never_resumed(run, killed, tmp_path, monkeypatch, caplog):
    arguments = [*words("align", run, tmp_path / "killed"), "--save_only_model", "true"]
    with monkeypatch.context() as patch:
        stop_at(patch, "hlm.training.align", 7)
        with pytest.raises(Stop):
            align.main(arguments)
    caplog.set_level("INFO")
    align.main(arguments)
    assert "resuming from" not in caplog.text
    assert same_weights(tmp_path / "killed", killed[0] / "never")


def test_training_that_did_harm_says_so_and_the_manifest_tells(run, tmp_path, caplog):
    harmful = [*words("align", run, tmp_path / "harmed"), "--load_best_model_at_end", "false"]
    align.main([*harmful, "--max_steps", "2"])
    dev = read_manifest(tmp_path / "harmed", "student")["dev"]
    assert dev["metric"] == "ndcg@10" and dev["end"] < dev["start"]
    assert f"training did harm: nDCG@10 on dev is {dev['end']:.4f} at the end, below {dev['start']:.4f}" in caplog.text


@pytest.mark.parametrize("name", ["teacher", "align"])
def test_somebodys_files_stop_a_recipe_before_any_work(run, tmp_path, name):
    for folder in ("out", "out.training", *(["out.stages/1", "out.stages/1.training"] if name == "align" else [])):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "thesis.txt").write_text("mine")
        arguments = [
            *words(name, Path("nowhere"), tmp_path / "out"),
            *(["--backbone", str(run / "base")] if name == "teacher" else ["--student", str(run / "base")]),
        ]
        if name == "align":
            arguments += ["--cascade", '[{"layers": 4}, {"layers": 2}]']
        with pytest.raises(HlmError, match="thesis.txt"):
            MODULES[name].main(arguments)
        assert (tmp_path / folder / "thesis.txt").read_text() == "mine"
        shutil.rmtree(tmp_path / folder)


def test_an_output_is_written_where_its_path_leads(run, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("HOME", str(tmp_path))
    for number, output in enumerate((f"{tmp_path}/link/one/", "~/two", str(tmp_path / "link"))):
        teacher.main([*words("teacher", run, Path("none")), "--output", output, "--max_steps", "1"])
        where = [tmp_path / "disk/one", tmp_path / "two", tmp_path / "disk"][number]
        assert read_manifest(where, "teacher") and (tmp_path / "link").is_symlink()
        shutil.rmtree(tmp_path / "disk/one", ignore_errors=True)
    assert not list(tmp_path.rglob("*.training"))


def test_of_two_teachers_at_once_one_is_told_and_the_other_is_whole(run, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "recipes/teacher.py", *words("teacher", run, tmp_path / "out"), "--max_steps", "200"]
    command += ["--save_steps", "50"]
    running = [children.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=300)[1] for process in running]
    assert sorted(process.returncode for process in running) == [0, 2], told
    loser = next(text for process, text in zip(running, told, strict=True) if process.returncode == 2)
    assert "expected to be the only one who writes" in loser.splitlines()[-1] and "mining" not in loser
    manifest = read_manifest(tmp_path / "out", "teacher")
    check_files(tmp_path / "out", manifest["files"], manifest["files"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_artefact_that_lost_its_files_is_not_up_to_date(run, tmp_path, caplog):
    teacher.main(words("teacher", run, tmp_path / "out"))
    before = load_file(tmp_path / "out/model.safetensors")
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file() and path.name != "hlm.json":
            path.unlink()
    teacher.main(words("teacher", run, tmp_path / "out"))
    assert "is made again" in caplog.text
    after = load_file(tmp_path / "out/model.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before)
