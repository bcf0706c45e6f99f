"""Makes the sample catalogue: ads, judged queries and unlabelled queries, from a seed.

python recipes/make_catalogue.py --config recipes/configs/quickstart/make_catalogue.yaml
"""

from __future__ import annotations

from collections.abc import Sequence

from hlm.config import given, run_recipe
from hlm.data.sample_catalogue import make_catalogue
from hlm.steps import CatalogueConfig


def main(argv: Sequence[str] | None = None) -> None:
    make_catalogue(**given(CatalogueConfig, argv=argv))


if __name__ == "__main__":
    run_recipe(main)
