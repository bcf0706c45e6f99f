"""What alignment reads and minimises: which of the unlabelled queries, and sums of objectives."""

import json
import shutil

import numpy as np
import pytest
import small_store
import torch

from hlm.artefacts import HlmError
from hlm.data.contract import load
from hlm.data.counts import counts_of, fingerprint_counts, weights_of
from hlm.embedding.embed import embed
from hlm.steps import AlignConfig
from hlm.training.align import Queries, align, objective, rows_of_kinds
from hlm.training.losses import cosine_alignment, kernel_alignment, kl_distillation, l2_alignment
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
    torch.testing.assert_close(objective(config, store, store.dim)(student, teacher, None), want)


@pytest.mark.parametrize("loss", [l2_alignment, cosine_alignment, kl_distillation])
def test_a_weight_of_three_is_three_rows(loss):
    student, teacher, documents = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    more = (documents, 0.1) if loss is kl_distillation else ()
    repeated = [0, 0, 0, 1, 2, 3]
    want = loss(student[repeated], teacher[repeated], *more)
    weights = torch.tensor([3.0, 1, 1, 1]) * 4 / 6
    torch.testing.assert_close(loss(student, teacher, *more, weights=weights), want)
    torch.testing.assert_close(loss(student, teacher, *more, weights=torch.ones(4)), loss(student, teacher, *more))
    with pytest.raises(HlmError, match="weights"):
        loss(student, teacher, *more, weights=torch.ones(3))


@pytest.fixture
def counted(catalogue_200, tmp_path):
    """The catalogue whose queries say how often they were typed."""
    folder = shutil.copytree(catalogue_200, tmp_path / "data")
    for part in ("queries", "unlabelled"):
        rows = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]
        rows = [row | {"count": number % 7} for number, row in enumerate(rows)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_each_query_weighs_its_own_count(counted, tiny_bert, tmp_path):
    embed(tiny_bert, counted, tmp_path / "v")
    data = load(str(counted), splits=("train", "dev"))
    queries = Queries(AlignConfig("s", "d", str(tmp_path / "v"), "o", count_power=0.5), data)
    count = {"train": dict(zip(data.queries["_id"], data.queries["count"], strict=True)), "unlabelled": {}}
    want = [float(n) for n in data.unlabelled["count"]]
    want += [float(count["train"][name]) for name, _ in data.split_queries("train")]
    want = np.sqrt(np.maximum(want, 1))
    np.testing.assert_allclose(queries.weights, want / want.mean(), rtol=1e-5)
    assert queries.weights.mean() == pytest.approx(1, abs=1e-5)
    assert Queries(AlignConfig("s", "d", str(tmp_path / "v"), "o"), data).weights is None
    settings = {"max_steps": 3, "learning_rate": 1e-3, "seed": 1, "eval_strategy": "no", "save_strategy": "no"}
    settings |= {"per_device_train_batch_size": 16, "disable_tqdm": True}
    made = {}
    for power in (0.0, 1.0):
        made[power] = align(tiny_bert, counted, tmp_path / "v", tmp_path / f"{power}", count_power=power, **settings)
    manifests = {power: json.loads((folder / "hlm.json").read_text()) for power, folder in made.items()}
    assert manifests[0.0]["encoder"] != manifests[1.0]["encoder"]
    assert "counts" in manifests[1.0]["inputs"] and "counts" not in manifests[0.0]["inputs"]


def test_counts_that_cannot_be(counted, catalogue_200):
    data = load(str(counted), splits=())
    assert counts_of(data.queries, "queries").min() == 1
    with pytest.raises(HlmError, match="queries: expected the column 'count' that hlm prepare writes, found _id, text"):
        counts_of(load(catalogue_200, splits=()).queries, "queries")
    for value, message in (
        ("often", "expected numbers in 'count', found others"),
        (-1, "from 0 up"),
        (None, "from 0 "),
    ):
        rows = [{"text": "a", "count": 1}, {"text": "b", "count": value}]
        (counted / "unlabelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(HlmError, match=message):
            counts_of(load(str(counted), splits=()).unlabelled, "unlabelled")
    for settings, message in (
        ({"count_power": 2.0}, "expected 0"),
        ({"count_power": 1.0, "objective": "kernel"}, "pairs"),
    ):
        with pytest.raises(HlmError, match=message):
            align("s", "d", "v", "o", **settings)
    counts = np.array([1.0, 4.0, 16.0])
    assert weights_of(counts, 0.0).tolist() == [1, 1, 1] and weights_of(counts, 0.5).tolist() == pytest.approx(
        [3 / 7, 6 / 7, 12 / 7]
    )
    assert fingerprint_counts(counts) != fingerprint_counts(counts[::-1])
