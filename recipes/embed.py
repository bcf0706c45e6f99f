"""Writes a teacher's vectors of the ads and of the queries into vector stores: `output/{corpus,unlabelled,queries}`.

    accelerate launch recipes/embed.py --config recipes/configs/quickstart/embed.yaml

With `index`, a FAISS factory string, it also builds `output/index`, which is what goes online with the student.

Every part of the dataset becomes one store, written shard by shard: a killed run goes on after the last whole shard,
and a store that is up to date is left alone. Several processes share the shards and write the same store as one.
"""

from __future__ import annotations

from collections.abc import Sequence

from hlm.config import given, run_recipe
from hlm.embedding.embed import embed
from hlm.steps import EmbedConfig


def main(argv: Sequence[str] | None = None) -> None:
    embed(**given(EmbedConfig, argv=argv))


if __name__ == "__main__":
    run_recipe(main)
