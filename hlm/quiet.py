"""What other libraries put on the screen of a recipe and a user can do nothing about, switched off in one place."""

from __future__ import annotations

import functools
import logging
import os
import warnings

from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
from huggingface_hub.utils import enable_progress_bars
from transformers.utils import logging as transformers_logging

# (logger, beginning of the message)
NOTES = (
    # Checkpoints are then ordered by their number, which is right.
    ("transformers.trainer_utils", "mtime may not be reliable"),
)


def _not_beginning(text: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(text)


def quiet_others() -> None:
    """Called as a recipe starts, never by the library: an application decides for itself what it shows."""
    # A warning of forks that tokenise, which ours do not.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Bars over files that load in a second.
    transformers_logging.disable_progress_bar()
    if not HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()  # downloads take long: theirs stay, and transformers switches them off with its own
    # How one library calls another one that will change.
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", category)
    # Memory is pinned for a GPU: without one nothing is lost. Of LoRA we leave out the pooler, where there is one.
    for message in (".*pin_memory.*", ".*exclude_modules.*"):
        warnings.filterwarnings("ignore", message=message)
    for name, beginning in NOTES:
        logging.getLogger(name).addFilter(functools.partial(_not_beginning, beginning))
