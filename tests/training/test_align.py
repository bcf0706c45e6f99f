"""What alignment reads and minimises: which of the unlabelled queries, and sums of objectives."""

import json
import shutil

import pytest
import small_store
import torch

from hlm.artefacts import HlmError
from hlm.data.contract import load
from hlm.steps import AlignConfig
from hlm.training.align import objective, rows_of_kinds
from hlm.training.losses import kernel_alignment, l2_alignment
from hlm.vectors.store import VectorStore, write_store


def test_queries_are_taken_by_their_kind(catalogue_200, tmp_path):
    folder = shutil.copytree(catalogue_200, tmp_path / "data")
    rows = [{"text": f"query {n}", "kind": kind} for n, kind in enumerate(("log", "crop", "log", "general"))]
    (folder / "unlabelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load(folder, splits=("dev",))
    assert rows_of_kinds(data, ["log"]).tolist() == [0, 2]
    assert rows_of_kinds(data, ["general", "crop"]).tolist() == [1, 3]
    with pytest.raises(HlmError, match="kinds: expected some of crop, general, log, found 'head'"):
        rows_of_kinds(data, ["log", "head"])


def test_objectives_add_up_by_their_weights(tmp_path):
    write_store(tmp_path / "store", small_store.records, small_store.encode, **small_store.PLAN)
    store = VectorStore.open(tmp_path / "store")
    student, teacher = torch.randn(2, 5, store.dim, generator=torch.Generator().manual_seed(0))
    config = AlignConfig("s", "d", "v", "o", also={"cosine": 2.0, "kernel": 0.5})
    want = 2 * l2_alignment(student, teacher) + 0.5 * kernel_alignment(student, teacher)  # a cosine is half of L2
    torch.testing.assert_close(objective(config, store, store.dim)(student, teacher), want)
