"""Losses against slow float64 loops, against constants worked out by hand, and under every mask and switch."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from hlm.artefacts import HlmError
from hlm.training import losses

E = math.e
B, K, D = 5, 3, 6


def unit(x):
    x = np.asarray(x, dtype=np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def slow_contrastive(batch, temperature, margin, hard=True, qq=True, dd=True, qd=True):
    """Equation 1-2 of arXiv 2506.05176, one term at a time."""
    q, p, n = unit(batch["queries"]), unit(batch["positives"]), unit(batch["negatives"])
    qid, pid, nid = (batch[name].tolist() for name in ("query_ids", "positive_ids", "negative_ids"))
    excluded = [set(row) - {-1} for row in batch["excluded_ids"].tolist()]
    total = 0.0
    for i in range(len(q)):
        positive = float(q[i] @ p[i])

        def term(similarity, false, positive=positive):
            if false or similarity > positive + margin:
                return 0.0
            return math.exp(similarity / temperature)

        def false_document(document, i=i):
            return document == pid[i] or document in excluded[i]

        share = math.exp(positive / temperature)
        z = share
        for k in range(n.shape[1]):
            if hard and nid[i][k] != -1:
                z += term(float(q[i] @ n[i, k]), false_document(nid[i][k]))
        for j in range(len(q)):
            if j == i:
                continue
            if qq:
                z += term(float(q[i] @ q[j]), qid[j] == qid[i] or false_document(pid[j]))
            if dd:
                z += term(float(p[i] @ p[j]), false_document(pid[j]))
            if qd:
                z += term(float(q[i] @ p[j]), false_document(pid[j]))
        total -= math.log(share / z)
    return total / len(q)


@pytest.fixture
def batch():
    """Random vectors near their pairs; repeated query (0, 3), repeated positive (1, 4), a padded, a known negative."""
    random = torch.Generator().manual_seed(3)
    queries = torch.randn(B, D, generator=random)
    return {
        "queries": queries,
        "positives": queries + 0.8 * torch.randn(B, D, generator=random),
        "negatives": queries[:, None] + 1.0 * torch.randn(B, K, D, generator=random),
        "query_ids": torch.tensor([7, 8, 9, 7, 11]),
        "positive_ids": torch.tensor([100, 101, 102, 103, 101]),
        "negative_ids": torch.tensor(
            [[200, 201, 202], [101, 204, 205], [206, 207, -1], [100, 209, 210], [211, 212, 213]]
        ),
        "excluded_ids": torch.tensor([[103, -1], [-1, -1], [207, 100], [100, -1], [5, 6]]),
    }


SWITCHES = {"hard": "use_hard", "qq": "use_query_query", "dd": "use_document_document", "qd": "use_in_batch"}


@pytest.mark.parametrize("off", [(), ("hard",), ("qq",), ("dd",), ("qd",), ("hard", "qq", "dd"), tuple(SWITCHES)])
@pytest.mark.parametrize(("temperature", "margin"), [(0.05, 0.1), (0.5, 0.0), (1.0, math.inf)])
def test_contrastive_equals_the_slow_loop(batch, off, temperature, margin):
    found = losses.qwen3_contrastive(
        **batch, temperature=temperature, margin=margin, **{SWITCHES[part]: False for part in off}
    )
    wanted = slow_contrastive(batch, temperature, margin, **{part: False for part in off})
    assert found.item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert found.shape == ()


def test_contrastive_by_hand():
    # Query i = document i = axis i: the positive has e, and each part has one other of cosine 0.
    eye, ids = 3 * torch.eye(2), torch.arange(2)
    value = losses.qwen3_contrastive(eye, eye, query_ids=ids, positive_ids=ids, temperature=1.0)
    assert value.item() == pytest.approx(0.743668, abs=1e-5)  # log((e + 3) / e)
    alone = losses.qwen3_contrastive(
        eye, eye, query_ids=ids, positive_ids=ids, temperature=1.0, use_query_query=False, use_document_document=False
    )
    assert alone.item() == pytest.approx(0.313262, abs=1e-5)  # log((e + 1) / e)
    # One hard negative of cosine -1 adds 1 / e.
    hard = losses.qwen3_contrastive(
        eye, eye, -eye[:, None], query_ids=ids, positive_ids=ids, negative_ids=ids[:, None] + 50, temperature=1.0
    )
    assert hard.item() == pytest.approx(math.log((E + 3 + 1 / E) / E), abs=1e-5)


@pytest.mark.parametrize(("cosine", "masked"), [(0.69, False), (0.71, True)])
def test_margin_masks_a_negative_nearer_than_the_positive(cosine, masked):
    query = torch.tensor([[1.0, 0.0]])

    def at(c):
        return torch.tensor([[c, math.sqrt(1 - c * c)]])

    ids = {"query_ids": torch.tensor([0]), "positive_ids": torch.tensor([0]), "negative_ids": torch.tensor([[1]])}
    value = losses.qwen3_contrastive(query, at(0.6), at(cosine)[None], **ids, temperature=1.0, margin=0.1)
    assert value.item() == pytest.approx(0 if masked else math.log(1 + math.exp(cosine - 0.6)), abs=1e-6)


def test_each_id_mask_removes_exactly_its_terms():
    eye, ids = torch.eye(2), torch.arange(2)

    def terms(query_ids=ids, positive_ids=ids, excluded_ids=None, negative_ids=None):
        negatives = None if negative_ids is None else torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]])
        given = {"query_ids": query_ids, "positive_ids": positive_ids, "negative_ids": negative_ids}
        value = losses.qwen3_contrastive(eye, eye, negatives, **given, excluded_ids=excluded_ids, temperature=1.0)
        return E * (math.exp(value.item()) - 1)  # with equal rows: the number of cosine-0 terms in the denominator

    assert terms() == pytest.approx(3, abs=1e-5)
    assert terms(query_ids=torch.tensor([4, 4])) == pytest.approx(2, abs=1e-5)  # the same query twice: no q-q
    assert terms(positive_ids=torch.tensor([4, 4])) == pytest.approx(0, abs=1e-5)  # one positive answers both queries
    assert terms(excluded_ids=torch.tensor([[1], [0]])) == pytest.approx(0, abs=1e-5)
    assert terms(excluded_ids=torch.tensor([[-1], [-1]])) == pytest.approx(3, abs=1e-5)
    assert terms(negative_ids=torch.tensor([[9], [9]])) == pytest.approx(4, abs=1e-5)
    assert terms(negative_ids=torch.tensor([[0], [1]])) == pytest.approx(3, abs=1e-5)  # the positive itself
    assert terms(negative_ids=torch.tensor([[-1], [-1]])) == pytest.approx(3, abs=1e-5)  # padding
    known = torch.tensor([[9], [9]])
    assert terms(negative_ids=torch.tensor([[9], [9]]), excluded_ids=known) == pytest.approx(3, abs=1e-5)


def test_everything_masked_is_zero_with_finite_gradient():
    x = torch.ones(2, 3, requires_grad=True)
    ids = torch.zeros(2, dtype=torch.long)
    value = losses.qwen3_contrastive(x, x, query_ids=ids, positive_ids=ids)
    value.backward()
    assert value.item() == 0 and x.grad.abs().max() == 0


def test_contrastive_gradients(batch):
    floats = ("queries", "positives", "negatives")
    inputs = [batch.pop(name).double().requires_grad_() for name in floats]

    def value(*vectors):
        return losses.qwen3_contrastive(*vectors, **batch, temperature=0.3)

    assert torch.autograd.gradcheck(value, inputs)


def test_scale_of_the_vectors_does_not_matter_and_half_precision_is_widened(batch):
    value = losses.qwen3_contrastive(**batch)
    scaled = losses.qwen3_contrastive(
        **{**batch, "queries": 1000 * batch["queries"], "negatives": batch["negatives"] / 9}
    )
    assert scaled.item() == pytest.approx(value.item(), rel=1e-4)
    halves = {name: t.bfloat16() if t.is_floating_point() else t for name, t in batch.items()}
    widened = {name: t.float() for name, t in halves.items() if t.is_floating_point()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses.qwen3_contrastive(**halves)
    assert found.dtype == torch.float32
    assert found.item() == losses.qwen3_contrastive(**{**batch, **widened}).item()


def test_zero_vectors_keep_gradients_finite():
    x = torch.zeros(2, 3, requires_grad=True)
    losses.l2_alignment(x, torch.ones(2, 3)).backward()
    assert torch.isfinite(x.grad).all()


def test_rows_of_other_ranks_by_offset(batch):
    """Without hard negatives, halves that see all rows average to the whole."""
    batch = {name: batch[name][:4] for name in ("queries", "positives", "query_ids", "positive_ids")}
    everything = {f"all_{name}": tensor for name, tensor in batch.items()}
    parts = [
        losses.qwen3_contrastive(**{n: t[o : o + 2] for n, t in batch.items()}, **everything, offset=o).item()
        for o in (0, 2)
    ]
    assert sum(parts) / 2 == pytest.approx(losses.qwen3_contrastive(**batch).item(), rel=1e-5)
    with pytest.raises(HlmError, match="offset 1"):
        losses.qwen3_contrastive(**{n: t[:2] for n, t in batch.items()}, **everything, offset=1)
    with pytest.raises(HlmError, match="all of"):
        losses.qwen3_contrastive(**batch, all_queries=batch["queries"])


def slow_refinement(q, p, pool, n, pid, pool_ids, nid, mask, excluded, qid, temperature, margin, qq):
    q, p, pool, n = unit(q), unit(p), unit(pool), unit(n)
    total = 0.0
    for i in range(len(q)):
        positive = float(q[i] @ p[i])
        negatives = []
        for j in range(len(pool)):
            if not mask[i, j] and pool_ids[j] != pid[i] and pool_ids[j] not in excluded[i].tolist():
                negatives.append(float(q[i] @ pool[j]))
        for k in range(n.shape[1]):
            if nid[i, k] not in (-1, pid[i]) and nid[i, k] not in excluded[i].tolist():
                negatives.append(float(q[i] @ n[i, k]))
        if qq:
            negatives += [float(q[i] @ q[j]) for j in range(len(q)) if qid[j] != qid[i]]
        z = sum(math.exp((s - positive) / temperature) for s in negatives if s <= positive + margin)
        total += math.log(1 + z)
    return total / len(q)


@pytest.mark.parametrize("qq", [False, True])
@pytest.mark.parametrize(("temperature", "margin"), [(0.05, 0.1), (1.0, math.inf)])
def test_refinement_equals_the_slow_loop_and_moves_only_queries(batch, qq, temperature, margin):
    random = torch.Generator().manual_seed(5)
    pool = torch.randn(9, D, generator=random)
    pool_ids = torch.tensor([100, 102, 207, 301, 302, 303, 304, 305, 306])
    mask = torch.rand(B, 9, generator=random) < 0.3
    floats = {name: batch.pop(name).requires_grad_() for name in ("queries", "positives", "negatives")}
    pool.requires_grad_()
    settings = {"temperature": temperature, "margin": margin, "use_query_query": qq}
    value = losses.refinement_contrastive(**floats, pool=pool, **batch, pool_ids=pool_ids, mask=mask, **settings)
    wanted = slow_refinement(
        *(t.detach().numpy() for t in (floats["queries"], floats["positives"], pool, floats["negatives"])),
        *(t.numpy() for t in (batch["positive_ids"], pool_ids, batch["negative_ids"], mask, batch["excluded_ids"])),
        batch["query_ids"].numpy(),
        temperature,
        margin,
        qq,
    )
    assert value.item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    value.backward()
    assert floats["queries"].grad.abs().max() > 0
    assert pool.grad is None and floats["positives"].grad is None and floats["negatives"].grad is None


def test_refinement_by_hand():
    query, pool = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    ids = {"positive_ids": torch.tensor([0]), "pool_ids": torch.tensor([0, 1, 2]), "temperature": 1.0}
    value = losses.refinement_contrastive(query, query, pool, **ids)
    assert value.item() == pytest.approx(0.407606, abs=1e-5)  # log(1 + 1/e + 1/e^2): the positive itself is masked
    masked = losses.refinement_contrastive(query, query, pool, **ids, mask=torch.tensor([[False, True, False]]))
    assert masked.item() == pytest.approx(0.126928, abs=1e-5)  # log(1 + 1/e^2)
    # mask is about the pool: a hard negative of the same id still counts
    hard_ids = {"mask": torch.tensor([[False, True, False]]), "negative_ids": torch.tensor([[1]])}
    hard = losses.refinement_contrastive(query, query, pool, **ids, **hard_ids, negatives=pool[None, 1:2])
    assert hard.item() == pytest.approx(value.item(), abs=1e-6)


def test_refinement_gradients(batch):
    queries = batch["queries"].double().requires_grad_()
    positives, pool = batch["positives"].double(), batch["negatives"].double().flatten(0, 1)
    ids = {"positive_ids": batch["positive_ids"], "pool_ids": torch.arange(300, 300 + B * K)}

    def value(x):
        return losses.refinement_contrastive(
            x, positives, pool, **ids, temperature=0.3, use_query_query=True, query_ids=batch["query_ids"]
        )

    assert torch.autograd.gradcheck(value, [queries])


def test_alignment_by_hand():
    student = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    teacher = torch.tensor([[0.0, 3.0], [0.0, 1.0]])  # cosines 0 and 1
    assert losses.l2_alignment(student, teacher).item() == pytest.approx(1.0)  # (2 + 0) / 2: a sum over dimensions
    assert losses.cosine_alignment(student, teacher).item() == pytest.approx(0.5)
    # The students' cosine is 0, the teachers' 1: both ordered pairs differ by 1.
    assert losses.kernel_alignment(student, teacher).item() == pytest.approx(1.0)
    # Documents are the axes: student row 0 gives softmax(1, 0), its teacher softmax(0, 1); row 1 agrees.
    p = E / (E + 1)
    wanted = ((1 - p) * math.log((1 - p) / p) + p * math.log(p / (1 - p))) / 2
    assert wanted == pytest.approx(0.231059, abs=1e-6)
    found = losses.kl_distillation(student, teacher, torch.eye(2), temperature=1.0)
    assert found.item() == pytest.approx(0.231059, abs=1e-6)


def test_alignment_equals_the_slow_loops():
    random = np.random.default_rng(1)
    student, teacher, documents = random.normal(size=(4, 5)), random.normal(size=(4, 5)), random.normal(size=(7, 5))
    s, t, d = unit(student), unit(teacher), unit(documents)
    l2 = sum(sum((s[i, j] - t[i, j]) ** 2 for j in range(5)) for i in range(4)) / 4
    kernel = sum((s[i] @ s[j] - t[i] @ t[j]) ** 2 for i in range(4) for j in range(4) if i != j) / 12
    kl = 0.0
    for i in range(4):
        ours, theirs = np.exp(d @ s[i] / 0.1), np.exp(d @ t[i] / 0.1)
        ours, theirs = ours / ours.sum(), theirs / theirs.sum()
        kl += sum(theirs[m] * math.log(theirs[m] / ours[m]) for m in range(7)) / 4
    student, teacher, documents = map(torch.tensor, (student, teacher, documents))
    assert losses.l2_alignment(student, teacher).item() == pytest.approx(l2)
    assert losses.cosine_alignment(student, teacher).item() == pytest.approx(l2 / 2)
    assert losses.kernel_alignment(student, teacher).item() == pytest.approx(kernel)
    assert losses.kl_distillation(student, teacher, documents, 0.1).item() == pytest.approx(kl)
    wide = torch.cat([teacher, torch.zeros(4, 3)], dim=1)  # the same similarities in another width
    assert losses.kernel_alignment(student, wide).item() == pytest.approx(kernel)


def test_alignment_gradients_reach_the_student_alone():
    student, teacher = torch.randn(4, 3).double().requires_grad_(), torch.randn(4, 3).double().requires_grad_()
    documents = torch.randn(5, 3).double().requires_grad_()
    functions = [
        losses.l2_alignment,
        losses.cosine_alignment,
        losses.kernel_alignment,
        lambda s, t: losses.kl_distillation(s, t, documents, 0.3),
    ]
    for function in functions:
        assert torch.autograd.gradcheck(lambda x, function=function: function(x, teacher), [student])
        function(student, teacher).backward()
    assert student.grad.abs().max() > 0 and teacher.grad is None and documents.grad is None


def test_matryoshka():
    cut = losses.matryoshka(torch.tensor([[3.0, 4.0, 12.0]]), 2)
    torch.testing.assert_close(cut, torch.tensor([[0.6, 0.8]]))
    with pytest.raises(HlmError, match=r"1\.\.3.*found 4"):
        losses.matryoshka(torch.ones(1, 3), 4)


def test_id_mask():
    rows = torch.tensor([[5, -1, 3], [-1, -1, -1]])
    assert losses.id_mask(rows, torch.tensor([3, 4, 5, -1])).tolist() == [[True, False, True, False], [False] * 4]
    assert losses.id_mask(rows, torch.tensor([[9, 3], [3, 5]])).tolist() == [[False, True], [False, False]]
    assert losses.id_mask(torch.empty(2, 0, dtype=torch.long), torch.tensor([1])).tolist() == [[False], [False]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positives": torch.ones(4, D)}, r"positives.*\(5, 6\).*\(4, 6\)"),
        ({"positives": torch.ones(B, 9)}, r"positives.*\(5, 6\).*\(5, 9\)"),
        ({"negatives": torch.ones(B, K, 9)}, r"negatives.*\(5, K, 6\).*\(5, 3, 9\)"),
        ({"negative_ids": torch.ones(B, 2, dtype=torch.long)}, r"negative_ids.*\(5, 3\).*\(5, 2\)"),
        ({"negative_ids": None}, "together"),
        ({"query_ids": torch.ones(B)}, "query_ids as int64.*float32"),
        ({"excluded_ids": torch.ones(B, dtype=torch.long)}, r"excluded_ids.*\(5, E\).*\(5,\)"),
        ({"queries": torch.ones(0, D)}, "at least one row"),
        ({"temperature": 0.0}, "positive temperature, found 0"),
    ],
)
def test_bad_contrastive_input(batch, change, message):
    with pytest.raises(HlmError, match=message):
        losses.qwen3_contrastive(**{**batch, **change})


def test_bad_alignment_and_refinement_input(batch):
    with pytest.raises(HlmError, match=r"\(2, 3\).*\(2, 4\).*matryoshka"):
        losses.l2_alignment(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(HlmError, match="at least 2, found 1"):
        losses.kernel_alignment(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(HlmError, match=r"documents.*\(M, 3\).*\(5, 4\)"):
        losses.kl_distillation(torch.ones(2, 3), torch.ones(2, 3), torch.ones(5, 4))
    ids = {"positive_ids": batch["positive_ids"], "pool_ids": torch.arange(4)}
    pool = torch.ones(4, D)
    with pytest.raises(HlmError, match=r"mask.*\(5, 4\).*\(5, 3\)"):
        mask = torch.ones(B, 3, dtype=torch.bool)
        losses.refinement_contrastive(batch["queries"], batch["positives"], pool, **ids, mask=mask)
    with pytest.raises(HlmError, match="query_ids"):
        losses.refinement_contrastive(batch["queries"], batch["positives"], pool, **ids, use_query_query=True)


def test_no_loss_looks_at_a_value():
    """Fake tensors have none: whatever would make the host wait for a GPU fails on them."""

    def vectors(*shape):
        return torch.randn(*shape, requires_grad=True)

    def ids(*shape):
        return torch.zeros(*shape, dtype=torch.int64)

    with FakeTensorMode():
        queries, documents, hard = vectors(B, D), vectors(B, D), vectors(B, K, D)
        with pytest.raises(DataDependentOutputException):
            queries.sum().item()
        known = {"positive_ids": ids(B), "negative_ids": ids(B, K), "excluded_ids": ids(B, 2), "query_ids": ids(B)}
        known["negatives"] = hard
        more = {"pool_ids": ids(7), "mask": losses.id_mask(ids(B, 2), ids(7)), "use_query_query": True}
        narrow = losses.matryoshka(vectors(B, 2 * D), D)
        for loss in (
            losses.qwen3_contrastive(queries, documents, **known),
            losses.refinement_contrastive(queries, documents, vectors(7, D), **known, **more),
            losses.l2_alignment(queries, narrow),
            losses.cosine_alignment(queries, narrow),
            losses.kernel_alignment(queries, documents),
            losses.kl_distillation(queries, documents, vectors(7, D)),
        ):
            loss.backward()
