"""Losses of the three phases: pure functions of vectors, with no parameters and no state.

Common to all: vectors of any length and floating dtype come in, every function L2-normalises them itself (so a
similarity is a cosine in [-1, 1]) and computes in fp32 or wider with autocast off. Each returns a scalar, a mean over
the B rows. Shapes: B queries of this process, N queries of all processes (N = B in one process), K hard negatives a
query, M pool documents, d dimensions. Ids are int64 and non-negative; -1 is padding where padding is allowed.

For batches larger than one device holds, see `hlm.training.gradcache`. Sources: the alignment losses and phase 3 are of
HARNESS-LM (arXiv 2605.23572); the contrastive loss is eq. 1-2 of the Qwen3-Embedding report (arXiv 2506.05176).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hlm.artefacts import HlmError

# Zero vectors stay zero; a larger value than F.normalize's own 1e-12 keeps their gradient finite in fp32.
_EPS = 1e-6


def matryoshka(teacher: Tensor, dim: int) -> Tensor:
    """First `dim` dimensions of `teacher` (N, D), L2-normalised again -> (N, dim), fp32 or wider.

    How a student narrower than its teacher meets it: the front of a Matryoshka-trained vector is a vector itself.
    HlmError where `dim` is not within 1..D.
    """
    _check("teacher", teacher, "N", "D")
    if not 1 <= dim <= teacher.shape[1]:
        raise HlmError(
            f"expected a student dimension within 1..{teacher.shape[1]} (the teacher's), found {dim}; "
            "slicing cannot widen a vector: take a narrower student or a wider teacher"
        )
    with _full_precision(teacher):
        return _unit(teacher[:, :dim])[0]


def l2_alignment(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """Squared distance of the unit vectors of `student` (B, d) and `teacher` (B, d): sum over d, mean over B.

    With `weights` (B,), each row counts by its own before the mean is taken.

    In [0, 4]; equals 2 - 2 cos. No gradient flows to the teacher. HARNESS-LM, phase 2. The sum over d is on purpose:
    a mean over 1024-4096 dimensions would make gradients that many times smaller. HlmError where shapes differ.
    """
    _check("student", student, "B", "d")
    _check("teacher", teacher, *student.shape)
    with _full_precision(student):
        student, teacher = _unit(student, teacher.detach())
        return _mean((student - teacher).square().sum(dim=1), weights)


def cosine_alignment(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """1 - cosine of `student` (B, d) and `teacher` (B, d), mean over B; in [0, 2], half of `l2_alignment`, with the
    same `weights`.

    No gradient flows to the teacher. HlmError where shapes differ.
    """
    _check("student", student, "B", "d")
    _check("teacher", teacher, *student.shape)
    with _full_precision(student):
        student, teacher = _unit(student, teacher.detach())
        return _mean(1 - (student * teacher).sum(dim=1), weights)


def kernel_alignment(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the in-batch cosine matrices of `student` (B, d) and `teacher` (B, D).

    Mean over the B(B-1) ordered pairs of different rows (a row's cosine with itself is always 1 and would only dilute
    the mean); in [0, 4]. The widths d and D may differ: only similarities between queries are compared, so the student
    is free to rotate away from the teacher's document vectors. No gradient flows to the teacher.

    Raises:
        HlmError: row counts differ, inputs are no matrices, or B < 2.
    """
    _check("student", student, "B", "d")
    rows = student.shape[0]
    _check("teacher", teacher, rows, "D")
    if rows < 2:
        raise HlmError(f"kernel_alignment compares pairs of queries: expected a batch of at least 2, found {rows}")
    with _full_precision(student):
        student, teacher = _unit(student, teacher.detach())
        # The diagonals agree up to rounding and add nothing.
        return (student @ student.T - teacher @ teacher.T).square().sum() / (rows * (rows - 1))


def kl_distillation(
    student: Tensor, teacher: Tensor, documents: Tensor, temperature: float = 0.02, weights: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) between softmaxes of cosine / temperature over M documents, in nats, mean over B, with the
    `weights` of `l2_alignment`.

    student (B, d) with gradient; teacher (B, d) and documents (M, d) without. Not multiplied by temperature squared.

    HlmError where shapes do not fit or the temperature is not positive.
    """
    _check("student", student, "B", "d")
    _check("teacher", teacher, *student.shape)
    _check("documents", documents, "M", student.shape[1])
    _check_temperature(temperature)
    with _full_precision(student):
        student, teacher, documents = _unit(student, teacher.detach(), documents.detach())
        ours = F.log_softmax(student @ documents.T / temperature, dim=1)
        theirs = F.log_softmax(teacher @ documents.T / temperature, dim=1)
        if weights is None:
            return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return _mean(F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1), weights)


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of `values` (B,), each times its weight; weights have a mean of 1 over the data, not in a batch."""
    if weights is None:
        return values.mean()
    _check("weights", weights, *values.shape)
    return (values * weights).mean()


def qwen3_contrastive(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    query_ids: Tensor,
    positive_ids: Tensor,
    negative_ids: Tensor | None = None,
    excluded_ids: Tensor | None = None,
    temperature: float = 0.02,
    margin: float = 0.1,
    use_hard: bool = True,
    use_query_query: bool = True,
    use_document_document: bool = True,
    use_in_batch: bool = True,
    all_queries: Tensor | None = None,
    all_positives: Tensor | None = None,
    all_query_ids: Tensor | None = None,
    all_positive_ids: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """The Qwen3-Embedding contrastive loss (arXiv 2506.05176, eq. 1-2): mean over B of -log(e^{s(q_i, d_i)/t} / Z_i).

        Z_i = e^{s(q_i, d_i)/t}                      the positive
            + sum_k   m e^{s(q_i, d-_ik)/t}          its K hard negatives                     (use_hard)
            + sum_j!=i m e^{s(q_i, q_j)/t}           other queries                            (use_query_query)
            + sum_j!=i m e^{s(d_i, d_j)/t}           other positives against its positive     (use_document_document)
            + sum_j!=i m e^{s(q_i, d_j)/t}           other positives                          (use_in_batch)

    with s the cosine, t the temperature, and m = 0 for a false negative: where the term's own s > s(q_i, d_i) + margin
    (math.inf switches that off), where the document is d_i itself or one of query i's `excluded_ids`, and in q-q where
    the query is q_i itself or one whose positive d_j is such a document: queries that one document answers are no
    negatives of each other. Documents and queries are compared by id: dropout makes equal texts differ.

    Args:
        queries, positives: (B, d), row i of one belongs to row i of the other.
        negatives: (B, K, d), or None. negative_ids: (B, K) int64, required with them; -1 marks a padded slot.
        query_ids, positive_ids: (B,) int64.
        excluded_ids: (B, E) int64 padded with -1: documents that must never count as negatives of query i, such as its
            other known positives; masks hard negatives, q-q, d-d and q-d.
        all_queries, all_positives, all_query_ids, all_positive_ids: (N, d) and (N,): the rows of all processes in rank
            order; give all four or none. offset: where this process's rows start in them (rank x B).

    Distribution: with `all_*` from `gather_with_gradient`, the mean of this loss over the ranks is that of the whole
    batch in one process, and the gradients that DDP averages are its gradients. Hard negatives stay with their query.

    Raises:
        HlmError: shapes, id dtypes or the offset do not fit, or the temperature is not positive.
    """
    _check("queries", queries, "B", "d")
    batch, width = queries.shape
    _check("positives", positives, batch, width)
    _check("query_ids", query_ids, batch, ids=True)
    _check("positive_ids", positive_ids, batch, ids=True)
    _check_negatives(negatives, negative_ids, batch, width)
    if excluded_ids is not None:
        _check("excluded_ids", excluded_ids, batch, "E", ids=True)
    _check_temperature(temperature)
    gathered = (all_queries, all_positives, all_query_ids, all_positive_ids)
    if all(part is None for part in gathered):
        all_queries, all_positives, all_query_ids, all_positive_ids = queries, positives, query_ids, positive_ids
    elif any(part is None for part in gathered):
        raise HlmError("expected all of all_queries, all_positives, all_query_ids and all_positive_ids, or none")
    _check_gathered("all_queries", all_queries, all_query_ids, query_ids, width, offset)
    _check_gathered("all_positives", all_positives, all_positive_ids, positive_ids, width, offset)

    with _full_precision(queries):
        queries, positives, all_queries, all_positives = _unit(queries, positives, all_queries, all_positives)
        positive = (queries * positives).sum(dim=1, keepdim=True)
        limit = positive.detach() + margin
        parts = [positive]
        if use_hard and negatives is not None:
            false = _false_documents(negative_ids, positive_ids, excluded_ids)
            parts.append(_masked(_hard_similarity(queries, negatives), false, limit))
        false = _false_documents(all_positive_ids, positive_ids, excluded_ids)
        if use_query_query:
            parts.append(_masked(queries @ all_queries.T, false | (query_ids[:, None] == all_query_ids), limit))
        if use_document_document:
            parts.append(_masked(positives @ all_positives.T, false, limit))
        if use_in_batch:
            parts.append(_masked(queries @ all_positives.T, false, limit))
        return _mean_negative_log_share(parts, temperature)


def refinement_contrastive(
    queries: Tensor,
    positives: Tensor,
    pool: Tensor,
    *,
    positive_ids: Tensor,
    pool_ids: Tensor,
    mask: Tensor | None = None,
    negatives: Tensor | None = None,
    negative_ids: Tensor | None = None,
    excluded_ids: Tensor | None = None,
    temperature: float = 0.02,
    margin: float = 0.1,
    use_query_query: bool = False,
    query_ids: Tensor | None = None,
    all_queries: Tensor | None = None,
    all_query_ids: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """`qwen3_contrastive` against frozen document vectors (HARNESS-LM, phase 3): only the query encoder learns.

    Denominator: the positive, M pool documents, K hard negatives of the query, and with `use_query_query` the other
    queries. The d-d term is left out: with frozen documents it is constant. No gradient flows to any document.

    Args:
        queries: (B, d) with gradient. positives: (B, d). pool: (M, d), shared by the batch; it may hold the batch's own
            positives, since a query's own positive is masked by id. positive_ids: (B,), pool_ids: (M,) int64.
        mask: (B, M) bool, True where a pool document must not count as a negative (the teacher's top-ranked documents;
            `id_mask` makes it from ids). It does not touch the hard negatives, which are top-ranked by design.
        negatives, negative_ids: (B, K, d) and (B, K) int64, -1 marks a padded slot; both or neither.
        excluded_ids: (B, E) int64 padded with -1: known positives of the query, masked in pool and hard negatives.
        query_ids: (B,) int64, needed with `use_query_query`; all_queries, all_query_ids, offset as in
            `qwen3_contrastive`. Ranks see one another's documents only where they are given one pool.

    Raises:
        HlmError: shapes or dtypes do not fit, or the temperature is not positive.
    """
    _check("queries", queries, "B", "d")
    batch, width = queries.shape
    _check("positives", positives, batch, width)
    _check("pool", pool, "M", width)
    _check("positive_ids", positive_ids, batch, ids=True)
    _check("pool_ids", pool_ids, pool.shape[0], ids=True)
    _check_negatives(negatives, negative_ids, batch, width)
    if excluded_ids is not None:
        _check("excluded_ids", excluded_ids, batch, "E", ids=True)
    _check_temperature(temperature)
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (batch, pool.shape[0])):
        raise HlmError(
            f"expected mask as bool of shape {(batch, pool.shape[0])}, found {mask.dtype} {tuple(mask.shape)}; "
            "True marks a pool document that must not count as a negative"
        )
    if use_query_query:
        if query_ids is None:
            raise HlmError("expected query_ids with use_query_query=True, found None; repeated queries need masking")
        _check("query_ids", query_ids, batch, ids=True)
        if (all_queries is None) != (all_query_ids is None):
            raise HlmError("expected all_queries and all_query_ids together, or neither")
        if all_queries is None:
            all_queries, all_query_ids = queries, query_ids
        _check_gathered("all_queries", all_queries, all_query_ids, query_ids, width, offset)

    with _full_precision(queries):
        queries, positives, pool = _unit(queries, positives.detach(), pool.detach())
        positive = (queries * positives).sum(dim=1, keepdim=True)
        limit = positive.detach() + margin
        false = _false_documents(pool_ids, positive_ids, excluded_ids)
        parts = [positive, _masked(queries @ pool.T, false if mask is None else false | mask, limit)]
        if negatives is not None:
            false = _false_documents(negative_ids, positive_ids, excluded_ids)
            parts.append(_masked(_hard_similarity(queries, negatives.detach()), false, limit))
        if use_query_query:
            (all_queries,) = _unit(all_queries)
            parts.append(_masked(queries @ all_queries.T, query_ids[:, None] == all_query_ids, limit))  # type: ignore[index]
        return _mean_negative_log_share(parts, temperature)


def id_mask(rows: Tensor, ids: Tensor) -> Tensor:
    """Where ids occur in a row's set: rows (B, E) int64 padded with -1, ids (N,) or (B, N) int64 -> (B, N) bool.

    -1 in `ids` is padding and never matches. Costs O(B N log E) time and O(B N) memory, never B x E x N.
    """
    batch = rows.shape[0]
    wanted = ids.expand(batch, ids.shape[-1]).contiguous()
    if rows.shape[1] == 0:
        return torch.zeros_like(wanted, dtype=torch.bool)
    ordered = rows.sort(dim=1).values
    place = torch.searchsorted(ordered, wanted).clamp_(max=rows.shape[1] - 1)
    return (ordered.gather(1, place) == wanted) & (wanted >= 0)


def _full_precision(tensor: Tensor) -> torch.autocast:
    # TF32 stays off too, as torch has it: it rounds a cosine by up to 5e-4, and over a temperature of 0.02 that changes
    # a share by 2%. In fp32 the products take a few milliseconds of a step.
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def _unit(*tensors: Tensor) -> list[Tensor]:
    """L2-normalised over the last dimension, all in one dtype: fp32, or float64 if any came so (gradient checks)."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [F.normalize(tensor.to(dtype), dim=-1, eps=_EPS) for tensor in tensors]


def _hard_similarity(queries: Tensor, negatives: Tensor) -> Tensor:
    (negatives,) = _unit(negatives)
    return torch.einsum("bd,bkd->bk", queries, negatives.to(queries.dtype))


def _false_documents(ids: Tensor, positive_ids: Tensor, excluded_ids: Tensor | None) -> Tensor:
    """(B, N) True where document `ids` (N,) or (B, N) is padding, the query's positive or one of its excluded."""
    false = (ids == positive_ids[:, None]) | (ids < 0)
    return false if excluded_ids is None else false | id_mask(excluded_ids, ids)


def _masked(similarity: Tensor, false: Tensor, limit: Tensor) -> Tensor:
    return similarity.masked_fill(false | (similarity.detach() > limit), -torch.inf)


def _mean_negative_log_share(parts: list[Tensor], temperature: float) -> Tensor:
    """Mean of -log softmax of column 0. The positive is finite, so rows whose negatives are all masked give 0."""
    logits = torch.cat(parts, dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device))


def _check(name: str, tensor: Tensor, *shape: int | str, ids: bool = False) -> None:
    """Dtype and shape of an argument: a number in `shape` must be met, a name stands for any size."""
    found = [size if isinstance(wanted, int) else wanted for size, wanted in zip(tensor.shape, shape, strict=False)]
    right_dtype = tensor.dtype == torch.int64 if ids else tensor.is_floating_point()
    if tensor.ndim != len(shape) or tuple(found) != shape or not right_dtype:
        raise HlmError(
            f"expected {name} as {'int64' if ids else 'floating'} of shape ({', '.join(map(str, shape))}), "
            f"found {tensor.dtype} of shape {tuple(tensor.shape)}; "
            "pair the rows, and cut a wider teacher's vectors to the student's dimension with losses.matryoshka"
        )
    if not ids and 0 in tensor.shape[:2]:
        raise HlmError(f"expected at least one row and one dimension in {name}, found shape {tuple(tensor.shape)}")


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise HlmError(f"expected a positive temperature, found {temperature}; 0.01 to 0.05 is usual")


def _check_negatives(negatives: Tensor | None, negative_ids: Tensor | None, batch: int, width: int) -> None:
    if (negatives is None) != (negative_ids is None):
        raise HlmError("expected negatives and negative_ids together, or neither; false negatives are masked by id")
    if negatives is not None:
        _check("negatives", negatives, batch, "K", width)
        _check("negative_ids", negative_ids, batch, negatives.shape[1], ids=True)


def _check_gathered(name: str, vectors: Tensor, all_ids: Tensor, local_ids: Tensor, width: int, offset: int) -> None:
    _check(name, vectors, "N", width)
    _check(f"ids of {name}", all_ids, vectors.shape[0], ids=True)
    if all_ids is local_ids and offset == 0:
        return  # nothing was gathered; the comparison below would wait for the device
    end = offset + local_ids.shape[0]
    if offset < 0 or end > vectors.shape[0] or not torch.equal(all_ids[offset:end], local_ids):
        raise HlmError(
            f"expected this rank's {local_ids.shape[0]} rows at offset {offset} of {name} ({vectors.shape[0]} rows), "
            "found other ids there; gather vectors and ids in one order and pass offset = rank x batch size"
        )
