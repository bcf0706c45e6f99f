"""Gradient caching and gathering: the gradients of the whole batch, with dropout, autocast and on two processes."""

import gc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hlm.artefacts import HlmError
from hlm.training import losses
from hlm.training.gradcache import cached_loss, gather_with_gradient, loss_of_chunks

ROWS, WIDTH, K = 8, 5, 2


def make_model(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4))


def make_batch():
    random = torch.Generator().manual_seed(1)
    return {
        "queries": torch.randn(ROWS, WIDTH, generator=random),
        "positives": torch.randn(ROWS, WIDTH, generator=random),
        "negatives": torch.randn(ROWS, K * WIDTH, generator=random),
        "query_ids": torch.tensor([0, 1, 2, 3, 4, 1, 6, 7]),
        "positive_ids": torch.tensor([0, 1, 2, 0, 4, 5, 6, 7]),
        "negative_ids": torch.arange(20, 20 + ROWS * K).view(ROWS, K),
    }


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def contrastive(batch, rows, queries, positives, negatives):
    """The loss of local rows; in one process gathering changes nothing."""
    ids = {name: batch[name][rows] for name in ("query_ids", "positive_ids", "negative_ids")}
    return losses.qwen3_contrastive(
        queries,
        positives,
        negatives.view(len(queries), K, -1),
        **ids,
        temperature=0.2,
        all_queries=gather_with_gradient(queries),
        all_positives=gather_with_gradient(positives),
        all_query_ids=gather_with_gradient(ids["query_ids"]),
        all_positive_ids=gather_with_gradient(ids["positive_ids"]),
        offset=rows.start,
    )


def groups(batch, rows, chunk=2):
    """Chunks of queries, of positives, and of hard negatives one document a row."""
    negatives = batch["negatives"][rows].view(-1, WIDTH)
    return [list(part.split(chunk)) for part in (batch["queries"][rows], batch["positives"][rows], negatives)]


def plain_gradients(model, batch, rows):
    vectors = [model(torch.cat(group)) for group in groups(batch, rows)]
    value = contrastive(batch, rows, *vectors)
    value.backward()
    return value


def same_direction_and_length(found, wanted):
    cosine = torch.nn.functional.cosine_similarity(found.double(), wanted.double(), dim=0).item()
    assert cosine > 0.9999
    assert (found.norm() / wanted.norm()).item() == pytest.approx(1, abs=1e-3)


def test_cached_equals_uncached_with_dropout():
    batch, rows = make_batch(), slice(0, ROWS)
    model = make_model(dropout=0.5)
    torch.manual_seed(11)
    encoded = [[model(chunk) for chunk in group] for group in groups(batch, rows)]  # the same draws, chunk by chunk
    value = contrastive(batch, rows, *(torch.cat(group) for group in encoded))
    (value / 4).backward()
    wanted = gradients(model)
    model.zero_grad()
    torch.manual_seed(11)
    cached = cached_loss(model, groups(batch, rows), lambda *vectors: contrastive(batch, rows, *vectors))
    torch.rand(3)  # others draw between the passes
    after = torch.get_rng_state()
    assert cached.item() == value.item()
    cached /= 4  # as gradient accumulation does, in place
    cached.backward()
    torch.testing.assert_close(gradients(model), wanted)
    assert torch.equal(torch.get_rng_state(), after)  # the replay leaves the stream of random numbers where it was

    model.zero_grad()
    torch.manual_seed(12)
    other = cached_loss(model, groups(batch, rows), lambda *vectors: contrastive(batch, rows, *vectors))
    assert other.item() != value.item()  # dropout is really drawn


def test_cached_under_autocast_equals_uncached():
    batch, rows, model = make_batch(), slice(0, ROWS), make_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = plain_gradients(model, batch, rows)
    wanted = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cached = cached_loss(model, groups(batch, rows), lambda *vectors: contrastive(batch, rows, *vectors))
        cached.backward()  # inside: casts of the weights kept by autocast must not cut the graph
    inside = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cached = cached_loss(model, groups(batch, rows), lambda *vectors: contrastive(batch, rows, *vectors))
    cached.backward()  # outside: the replay must bring its own autocast
    assert cached.item() == pytest.approx(value.item(), rel=1e-5)
    torch.testing.assert_close(inside, wanted, atol=0.03, rtol=0.03)  # sums over chunks round otherwise in bf16
    torch.testing.assert_close(gradients(model), inside)


def test_cached_keeps_one_chunk_with_a_graph_and_none_in_evaluation():
    model, seen = make_model(), []

    def encode(chunk):
        seen.append(torch.is_grad_enabled())
        return model(chunk)

    chunks = list(torch.randn(6, WIDTH).split(2))
    value = cached_loss(encode, [chunks], lambda x: x.square().mean())
    assert seen == [False] * 3
    value.backward()
    assert seen == [False] * 3 + [True] * 3
    with torch.no_grad():
        again = cached_loss(encode, [chunks], lambda x: x.square().mean())
    assert seen == [False] * 3 + [True] * 3 + [False] * 3
    assert again.item() == value.item() and not again.requires_grad


def test_cached_replays_only_the_groups_that_get_gradients():
    model, calls = make_model(), []

    def encode(chunk):
        calls.append(chunk.shape[0])
        return model(chunk)

    cached_loss(encode, [[torch.ones(2, WIDTH)], [torch.ones(3, WIDTH)]], lambda x, frozen: x.sum()).backward()
    assert calls == [2, 3, 2]


def test_bad_cached_input():
    with pytest.raises(HlmError, match="group 1"):
        cached_loss(lambda x: x, [[torch.ones(1, 1)], []], lambda x, y: x.sum())
    with pytest.raises(HlmError, match="no gradient"):
        cached_loss(lambda x: x, [[torch.ones(1, 1)]], lambda x: torch.ones(()))


def refine(model, batch, rows):
    """Refinement with q-q over all ranks; the frozen documents are plain numbers."""
    queries = model(batch["queries"][rows])
    return losses.refinement_contrastive(
        queries,
        batch["positives"][rows, :4],
        batch["positives"][:, :4],
        positive_ids=batch["positive_ids"][rows],
        pool_ids=batch["positive_ids"],
        temperature=0.2,
        use_query_query=True,
        query_ids=batch["query_ids"][rows],
        all_queries=gather_with_gradient(queries),
        all_query_ids=gather_with_gradient(batch["query_ids"][rows]),
        offset=rows.start,
    )


def two_ranks(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    batch, rows = make_batch(), slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    model = DistributedDataParallel(make_model())
    found = {}

    found["plain value"] = plain_gradients(model, batch, rows).detach()
    found["plain"] = gradients(model)
    for name, no_sync in {"cached": model.no_sync, "cached, always synchronised": None}.items():
        model.zero_grad()
        local = groups(batch, rows)
        cached_loss(model, local, lambda *v: contrastive(batch, rows, *v), no_sync=no_sync).backward()
        found[name] = gradients(model)
    model.zero_grad()
    refine(model, batch, rows).backward()
    found["refinement"] = gradients(model)

    with pytest.raises(HlmError, match=r"\[3, 4\]"):
        gather_with_gradient(torch.ones(3 + rank, 2))
    save_file(found, f"{folder}/rank{rank}.safetensors")
    del model
    gc.collect()  # DDP is in cycles, and holds the group: its threads, alive as the process ends, would abort it
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    batch, rows = make_batch(), slice(0, ROWS)
    model = make_model()
    value = plain_gradients(model, batch, rows)
    wanted = gradients(model)
    model.zero_grad()
    refine(model, batch, rows).backward()
    wanted_refinement = gradients(model)

    mp.spawn(two_ranks, args=(str(tmp_path),), nprocs=2)
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2)]
    assert sum(found["plain value"].item() for found in ranks) / 2 == pytest.approx(value.item(), rel=1e-5)
    for found in ranks:
        for name in ("plain", "cached", "cached, always synchronised"):
            same_direction_and_length(found[name], wanted)
        same_direction_and_length(found["refinement"], wanted_refinement)


@pytest.mark.parametrize("cached", [True, False])
def test_chunks_do_not_keep_what_modules_put_into_them(cached):
    """sentence-transformers' modules write every token's vector into the features that they are given."""
    inner = make_model()

    class Encoder(nn.Module):
        def forward(self, features):
            features["sentence_embedding"] = inner(features["rows"])
            return features

    chunks = [{"rows": part} for part in make_batch()["queries"].split(3)]
    loss_of_chunks(Encoder(), [chunks], lambda queries: queries.square().sum(), cached=cached).backward()
    assert all(chunk.keys() == {"rows"} for chunk in chunks) and gradients(inner).abs().sum() > 0
