"""Training on the screen: a bar of steps, and the loss in the log."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hlm.progress import progress

logger = logging.getLogger(__name__)

# What the trainer shows by itself: a bar without a word or a unit, and dictionaries of strings.
REPLACED = (ProgressCallback, PrinterCallback)


class TrainingBar(TrainerCallback):
    """The bar goes on from the step at which a run is resumed; `disable_tqdm` leaves it out and keeps the log."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        shown = state.is_world_process_zero and not args.disable_tqdm
        self.bar = progress(what="train", unit="step", total=state.max_steps, initial=state.global_step, shown=shown)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            rate = logs.get("learning_rate", float("nan"))
            logger.info(
                "step %d of %d: loss %.4g, learning rate %.3g", state.global_step, state.max_steps, logs["loss"], rate
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.close()
