"""Phase 2, the cut alone: writes a student with fewer layers and narrower FFNs, without any training.

    python recipes/prune.py --config recipes/configs/quickstart/prune.yaml

`recipes/align.py` cuts by itself, stage by stage; this recipe makes the student that is pruned only, at once: the
row that shows what alignment is worth, and the start of the baseline that is never aligned.
"""

from __future__ import annotations

from collections.abc import Sequence

from hlm.config import given, run_recipe
from hlm.steps import PruneConfig
from hlm.training.prune import prune


def main(argv: Sequence[str] | None = None) -> None:
    prune(**given(PruneConfig, argv=argv))


if __name__ == "__main__":
    run_recipe(main)
