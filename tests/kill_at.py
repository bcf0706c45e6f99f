"""Runs a recipe in a process that sends itself SIGKILL at a chosen moment."""

import os
import signal

from transformers import TrainerState

from hlm.training.trainer import RecipeTrainer
from recipes import align, refine, teacher


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(recipe: str, moment: str, number: str, *words: str) -> None:
    """`moment` is "step" (`number`: of the step, counted after the first checkpoint) or "checkpoint" (`number`: which
    one, from 1; half of its trainer_state.json is written by then)."""
    step, save, saved, steps = RecipeTrainer.training_step, TrainerState.save_to_json, [], []

    def training_step(self, *rest):
        if saved:
            steps.append(self.state.global_step)
        if len(steps) == int(number):
            die()
        return step(self, *rest)

    def save_to_json(self, path):
        save(self, path)
        saved.append(path)
        if moment == "checkpoint" and len(saved) == int(number):
            with open(path, "rb+") as file:
                file.truncate(os.path.getsize(path) // 2)
            die()

    TrainerState.save_to_json = save_to_json
    if moment == "step":
        RecipeTrainer.training_step = training_step
    {"teacher": teacher, "align": align, "refine": refine}[recipe].main(list(words))
