"""The online folder: the student with its ONNX files, and what int8 costs on this data's queries.

    python recipes/export.py --config recipes/configs/quickstart/export.yaml

What is published, and what `hlm.QueryEncoder` and the demo load.
"""

from __future__ import annotations

from collections.abc import Sequence

from hlm.config import given, run_recipe
from hlm.publishing.online_folder import export
from hlm.steps import ExportConfig


def main(argv: Sequence[str] | None = None) -> None:
    export(**given(ExportConfig, argv=argv))


if __name__ == "__main__":
    run_recipe(main)
