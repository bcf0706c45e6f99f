"""The shards of the stores handed out to workers of a Ray cluster, by Ray Data (extra `ray`).

Ray decides which worker writes which shard; what is in a shard is decided here, so that the store has the bytes that
one process gives it. Rows are not passed through Ray: a worker reads its shard's rows from the checked table. So the
dataset, the output and HF_HOME lie on a file system that all workers see.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from pathlib import Path
from typing import Any

from hlm.artefacts import HlmError
from hlm.extras import extras_named
from hlm.steps import EmbedConfig
from hlm.vectors.store_writer import write_shard

BLOCKS_A_WORKER = 16  # what Ray hands out at a time is a block: small enough that fast workers take more of them


class ShardWriter:
    """A worker: loads the model and opens the data once, then writes the shards that Ray gives it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.work: Any = None
        self.refused = ""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Writes a batch of shards. What is refused goes back as text: Ray would bury it in tracebacks of its own."""
        try:
            if not self.refused:
                self._write(batch)
        except HlmError as error:
            self.refused = str(error)
        return {"refused": [self.refused]}

    def _write(self, batch: dict[str, Any]) -> None:
        embed = importlib.import_module("hlm.embedding.embed")  # which imports this file
        self.work = self.work or embed.Work.of(EmbedConfig(**self.settings), embed.processes())
        for part, shard in zip(batch["part"].tolist(), batch["shard"].tolist(), strict=True):
            folder = Path(self.work.config.output) / part
            write_shard(folder, shard, *self.work.writes(part), **self.work.plans[part])


@extras_named("embedding with Ray")
def write_by_ray(config: EmbedConfig, rows: dict[str, int]) -> None:
    """Writes all shards that are not whole yet; `hlm.embedding.embed.embed` joins them.

    Joins the cluster that RAY_ADDRESS names, or one that runs on this machine, or starts one here. A worker takes one
    GPU where the cluster has any, else one CPU.

    Args:
        config: its `ray_workers` says how many.
        rows: of each part, how many.

    Raises:
        HlmError: as `write_store`, from whichever worker it was raised by.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray tells its maker what it runs
    import ray

    items = [
        {"part": part, "shard": shard}
        for part, count in rows.items()
        for shard in range(-(-count // config.shard_rows))
    ]
    workers = min(config.ray_workers or 1, len(items))
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, logging_level="warning")
    try:
        on_gpu = ray.cluster_resources().get("GPU", 0) > 0
        blocks = ray.data.from_items(items, override_num_blocks=min(len(items), BLOCKS_A_WORKER * workers))
        settings = dataclasses.asdict(dataclasses.replace(config, ray_workers=None))
        written = blocks.map_batches(
            ShardWriter,
            fn_constructor_args=(settings,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=1 if on_gpu else None,
            num_cpus=None if on_gpu else 1,
        )
        refused = [row["refused"] for row in written.take_all() if row["refused"]]
    finally:
        if started:
            ray.shutdown()
    if refused:
        raise HlmError(refused[0])
