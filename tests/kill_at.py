"""Runs a recipe and sends itself SIGKILL at a chosen moment: python kill_at.py RECIPE MOMENT NUMBER ARGUMENTS...

MOMENT is `step` (NUMBER: of the step, counted after the first checkpoint) or `checkpoint` (NUMBER: which one, from 1;
half of its trainer_state.json is written by then).
"""

import os
import signal
import sys

from transformers import TrainerState

from hlm.training.trainer import RecipeTrainer
from recipes import align, refine, teacher


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(recipe: str, moment: str, number: str, *words: str) -> None:
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


if __name__ == "__main__":
    main(*sys.argv[1:])
