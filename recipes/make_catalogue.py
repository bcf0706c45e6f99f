"""Makes the sample catalogue: ads, judged queries and unlabelled queries, from a seed.

python recipes/make_catalogue.py --config recipes/configs/quickstart/make_catalogue.yaml
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from hlm.artefacts import MANIFEST, check_output, read_manifest
from hlm.config import parse, run_recipe
from hlm.data.sample_catalogue import VERSION, write_catalogue

logger = logging.getLogger(__name__)


@dataclass
class CatalogueConfig:
    output: str = field(metadata={"help": "folder for the catalogue"})
    ads: int = field(default=10_000)
    unlabelled: int = field(default=30_000, metadata={"help": "unlabelled queries"})
    train_queries: int = field(default=8_000)
    dev_queries: int = field(default=300)
    test_queries: int = field(default=600)
    seed: int = field(default=0)


def main(argv: Sequence[str] | None = None) -> None:
    (config,) = parse(CatalogueConfig, argv=argv)
    options = asdict(config)
    output = check_output(options.pop("output"), "catalogue")
    if (output / MANIFEST).is_file() and read_manifest(output, "catalogue")["config"] == options | {"version": VERSION}:
        logger.info("%s: up to date", output)
        return
    write_catalogue(output, **options)
    logger.info("%s: %d ads", output, config.ads)


if __name__ == "__main__":
    run_recipe(main)
