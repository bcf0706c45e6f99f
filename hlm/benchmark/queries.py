"""The queries that systems are timed on."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hlm.artefacts import HlmError
from hlm.data.sample_catalogue import write_catalogue


def drawn(queries: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` of the queries, drawn by `seed` without replacement and kept in their order; all where there are fewer.

    Raises:
        HlmError: a count below 1.
    """
    if count < 1:
        raise HlmError(f"queries: expected 1 or more, found {count}")
    if len(queries) <= count:
        return list(queries)
    return [queries[place] for place in sorted(random.Random(seed).sample(range(len(queries)), count))]


def catalogue_queries() -> list[str]:
    """Queries of the sample catalogue, where a user names no data."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_catalogue(data, ads=200, unlabelled=10, train_queries=10, dev_queries=10, test_queries=200, seed=0)
        return [json.loads(line)["text"] for line in (data / "queries.jsonl").read_text().splitlines()]
