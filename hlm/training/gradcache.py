"""Batches larger than one device holds: rows of all ranks with gradient, and gradient caching.

A contrastive loss needs its whole batch at once, an encoder does not. `gather_with_gradient` lets every rank see the
rows of all; `cached_loss` (GradCache, arXiv 2101.06983) keeps the activations of one chunk at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hlm.artefacts import HlmError

Chunk = TypeVar("Chunk")


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Rows of all ranks in rank order: (B, ...) on each -> (world size x B, ...); the input itself in one process.

    The backward pass sums over the ranks the gradients that each one's loss has for this rank's rows. That is the right
    scale under DDP, which averages parameter gradients: the mean over ranks of mean-over-local-rows losses. Tensors
    that need no gradient (ids) are gathered plainly. Collective: every rank must call it, in the same order.

    Raises:
        HlmError: the ranks hold different numbers of rows (on every rank, so none is left waiting).
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    rows = torch.tensor([tensor.shape[0]], device=tensor.device)
    # The host waits for the GPU here, once a call: a rank with fewer rows would leave the others waiting for ever.
    sizes = torch.cat(_all_gather(rows)).tolist()
    if len(set(sizes)) > 1:
        raise HlmError(
            f"expected the same number of rows on every rank, found {sizes}; "
            "set dataloader_drop_last=True so that the last batch is whole"
        )
    if torch.is_grad_enabled() and tensor.requires_grad:
        return _Gather.apply(tensor)
    return torch.cat(_all_gather(tensor))


def loss_of_chunks(
    model: torch.nn.Module, groups: Sequence[Sequence[Chunk]], loss: Callable[..., Tensor], *, cached: bool
) -> Tensor:
    """The loss of sentence-transformers features that come in chunks: all activations kept, or by `cached_loss`.

    Args:
        model: as wrapped for distribution.
        groups, loss: as in `cached_loss`.
    """

    def encode(chunk: Any) -> Tensor:
        # A copy: modules put every token's vector into the dict that they get, which would keep them for all chunks.
        return model(dict(chunk))["sentence_embedding"]

    if cached:
        return cached_loss(encode, groups, loss, no_sync=getattr(model, "no_sync", None))
    return loss(*(torch.cat([encode(chunk) for chunk in group]) for group in groups))


def rows_of_short_texts(chunk: int, tokens: int, longest: int) -> int:
    """Rows of texts of at most `tokens` tokens that fit where `chunk` rows of `longest` do; at least `chunk`."""
    return chunk * max(1, longest // tokens)


def cached_loss(
    encode: Callable[[Chunk], Tensor],
    groups: Sequence[Sequence[Chunk]],
    loss: Callable[..., Tensor],
    *,
    no_sync: Callable[[], contextlib.AbstractContextManager] | None = None,
) -> Tensor:
    """A scalar with the value and, through `.backward()`, the gradients of the loss of the whole batch at once.

    (1) Every chunk is encoded without a graph, its random state kept. (2) `loss` runs on the detached whole vectors and
    gives their gradients. (3) When the returned scalar's backward runs, a hook encodes each chunk again, with its graph
    and under the same random state (so dropout falls the same), and carries the kept gradients into the parameters.
    Memory: one chunk's activations. Time: one more forward pass. Scaling of the result (gradient accumulation, loss
    scaling) reaches the hook. Without gradients enabled (evaluation) only the value is computed.

    Args:
        encode: a chunk (any object, such as a dict of token tensors) -> (b, d) vectors. Must depend on nothing random
            beyond torch's generators of the CPU and of the current CUDA device. Called in the same autocast as here.
        groups: chunks of queries, of positives, of hard negatives, ...; a group's vectors are concatenated to (B, d).
        loss: one (B, d) tensor a group -> scalar; half-precision vectors arrive as fp32. May call
            `gather_with_gradient` and reshape, must not encode.
        no_sync: the DDP model's `no_sync`. The hook runs one backward pass a chunk; given this, only the last one
            reduces gradients over the ranks, without it every one does: equal gradients, needless traffic. Where the
            trainer accumulates gradients, its own outer no_sync still holds for the last one.

    Under DDP let every rank have the same number of chunks, as forward passes may broadcast buffers. Use `.backward()`,
    not `torch.autograd.grad`: parameters get their gradients by the hook, they are not in the scalar's graph.

    Raises:
        HlmError: a group has no chunk, or the loss depends on no vector.
    """
    for number, group in enumerate(groups):
        if len(group) == 0:
            raise HlmError(f"expected at least one chunk in every group, found none in group {number}")
    with_gradient = torch.is_grad_enabled()
    states: list[list[_RandomState]] = []
    vectors: list[Tensor] = []
    sizes: list[list[int]] = []
    with torch.no_grad():
        for group in groups:
            group_states, parts = [], []
            for chunk in group:
                group_states.append(_RandomState())
                parts.append(encode(chunk))
            states.append(group_states)
            sizes.append([part.shape[0] for part in parts])
            whole = torch.cat(parts)
            vectors.append(whole.float() if whole.dtype in (torch.float16, torch.bfloat16) else whole)
    # Before 2.11, torch's autocast keeps weights that it cast without a graph for the passes that need one.
    torch.clear_autocast_cache()
    if not with_gradient:
        return loss(*vectors)

    leaves = [whole.requires_grad_() for whole in vectors]
    value = loss(*leaves)
    if not value.requires_grad:
        raise HlmError("expected a loss that depends on the vectors it is given, found one with no gradient")
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    replays = [
        (chunk, state, part)
        for group, group_states, gradient, rows in zip(groups, states, gradients, sizes, strict=True)
        if gradient is not None
        for chunk, state, part in zip(group, group_states, gradient.split(rows), strict=True)
    ]
    device = leaves[0].device.type
    autocast: dict[str, Any] = {"device_type": device, "enabled": torch.is_autocast_enabled(device)}
    autocast["dtype"] = torch.get_autocast_dtype(device)

    def replay(scale: Tensor) -> None:
        for number, (chunk, state, gradient) in enumerate(replays):
            last = number == len(replays) - 1
            # Both passes must be inside: DDP decides at the forward pass whether the backward pass reduces.
            with contextlib.nullcontext() if last or no_sync is None else no_sync(), torch.enable_grad():
                with state.replayed(), torch.autocast(**autocast):
                    part = encode(chunk)
                (part.to(gradient.dtype) * (gradient * scale)).sum().backward()

    leaf = value.detach().requires_grad_()
    leaf.register_hook(replay)
    return leaf * 1.0  # no leaf: trainers scale the loss in place


class _RandomState:
    """The generators' states of the CPU and the current CUDA device at construction. Both lie on the host: no wait."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self.cuda = None if self.device is None else torch.cuda.get_rng_state(self.device)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, random numbers fall as they did after construction; after, the streams go on where they were."""
        with torch.random.fork_rng(devices=[] if self.device is None else [self.device]):
            torch.set_rng_state(self.cpu)
            if self.device is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = tensor.shape[0]
        return torch.cat(_all_gather(tensor))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, op=dist.ReduceOp.SUM)
        return gradient.narrow(0, dist.get_rank() * ctx.rows, ctx.rows)


def _all_gather(tensor: Tensor) -> list[Tensor]:
    tensor = tensor.detach().contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts
