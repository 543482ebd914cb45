"""Losses over all pairs, a block of anchors at a time, so that the matrix of similarities is never whole."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Pairs of a block. At SimCLR's 4096 samples the whole matrix of float32 would be 256 MiB, several times over.
PAIRS = {"cpu": 1 << 21, "cuda": 1 << 25}
"""8 MiB, which a cache holds, and 128 MiB, which keep a GPU busy for longer than it takes to launch a block's dozen kernels."""
MAX_PAIRS = {"cpu": 1 << 23, "cuda": 1 << 25}
"""What a block may have so that it has `MIN_ROWS`."""
MIN_ROWS = 64
"""Fewer at a time, and a product waits for memory: over 131,072 prototypes 64 rows took half of the time of 16."""

Accumulate = Callable[[Tensor, Tensor, slice, Tensor | None, Tensor | None], Tensor]
"""`accumulate(block, others, rows, of_block, of_others)` is the sum of a loss over the anchors `block` = anchors[rows], a
scalar. It adds the sum's gradients to `of_block` and `of_others`, in place, where they are wanted. If all anchors are in the
block and are the others, these are one tensor, which gets both."""


def blocks(num_anchors: int, num_others: int, device: torch.device) -> Iterator[slice]:
    """Slices over the anchors: with `num_others` others about `PAIRS` pairs, `MAX_PAIRS` at most, at least one anchor each."""
    kind = device.type if device.type in PAIRS else "cpu"
    wanted = max(MIN_ROWS, PAIRS[kind] // max(1, num_others))
    size = max(1, min(wanted, MAX_PAIRS[kind] // max(1, num_others)))
    for start in range(0, num_anchors, size):
        yield slice(start, min(num_anchors, start + size))


def samples_of_rows(num_rows: int, num_anchors: int, num_views: int, device: torch.device) -> Tensor:
    """The sample int64 [num_rows] of each row of all ranks' embeddings: ranks in order, in a rank view by view.

    `num_anchors` is V·B, the rows of one rank.
    """
    batch_size = num_anchors // num_views
    rows = torch.arange(num_rows, device=device)
    return rows // num_anchors * batch_size + rows % batch_size


def of_products(loss: Callable[[Tensor, slice], Tensor], scale: float) -> Accumulate:
    """A loss that knows embeddings by their inner products alone.

    `loss(products, rows)` gets scale · <anchor, other> [b, m], returns the sum of the loss over the anchors `rows`, and leaves
    its derivative in `products`.
    """

    def accumulate(
        block: Tensor, others: Tensor, rows: slice, of_block: Tensor | None, of_others: Tensor | None
    ) -> Tensor:
        products = (block * scale) @ others.T
        value = loss(products, rows)
        if of_block is not None and of_block is of_others:
            of_block.addmm_(products + products.T, others, alpha=scale)
            return value
        if of_block is not None:
            of_block.addmm_(products, others, alpha=scale)
        if of_others is not None:
            of_others.addmm_(products.T, block, alpha=scale)
        return value

    return accumulate


def by_autograd(loss: Callable[[Tensor, Tensor, slice], Tensor]) -> Accumulate:
    """Any loss: `loss(block, others, rows)` is its sum over the anchors `rows` and depends on both."""

    def accumulate(
        block: Tensor, others: Tensor, rows: slice, of_block: Tensor | None, of_others: Tensor | None
    ) -> Tensor:
        sums = (of_block, of_others)
        inputs = [x.detach().requires_grad_(s is not None) for x, s in zip((block, others), sums, strict=True)]
        with torch.enable_grad():
            value = loss(inputs[0], inputs[1], rows)
        wanted = [(x, s) for x, s in zip(inputs, sums, strict=True) if s is not None]
        if wanted:
            for gradient, (_, s) in zip(torch.autograd.grad(value, [x for x, _ in wanted]), wanted, strict=True):
                s.add_(gradient)
        return value.detach()

    return accumulate


def softmax_(logits: Tensor) -> Tensor:
    """The softmax of each row of `logits` [b, m], in place; returns the rows' log-sum-exp [b]."""
    largest = logits.amax(1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    logits.div_(total)
    return (total.log_() + largest).squeeze(1)


class _MeanOverAnchors(torch.autograd.Function):
    """The gradient is taken in the forward pass, block by block: what is kept has the size of the embeddings."""

    @staticmethod
    def forward(ctx: Any, accumulate: Accumulate, anchors: Tensor, others: Tensor, grad_enabled: bool) -> Tensor:
        needs = [grad_enabled and ctx.needs_input_grad[1], grad_enabled and ctx.needs_input_grad[2]]
        total = anchors.new_zeros(())
        slices = list(blocks(len(anchors), len(others), anchors.device))
        are_one = others is anchors and len(slices) == 1
        of_anchors = torch.zeros_like(anchors) if needs[0] else None
        of_others = of_anchors if are_one else torch.zeros_like(others) if needs[1] else None
        for rows in slices:
            of_block = of_anchors if of_anchors is None or are_one else of_anchors[rows]
            total += accumulate(anchors[rows], others, rows, of_block, of_others)
        ctx.save_for_backward(of_anchors, None if are_one else of_others)
        ctx.num_anchors = len(anchors)
        return total / len(anchors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        share = upstream[0] / ctx.num_anchors
        of_anchors, of_others = (None if grad is None else share * grad for grad in ctx.saved_tensors)
        return None, of_anchors, of_others, None


def mean_over_anchors(
    accumulate: Accumulate, anchors: Float[Tensor, "n e"], others: Float[Tensor, "m e"]
) -> Float[Tensor, ""]:
    """The mean over anchors of a loss on all pairs (anchor, other), a float32 scalar with gradient for both.

    Memory beside the embeddings: one or a few times `PAIRS` values, whatever n and m; work: as for the whole matrix,
    since the gradient is taken at once rather than by computing blocks again (as in Inf-CL, Cheng et al. 2024, section 4,
    with the gradient in the forward pass). It can be differentiated once.

    Args:
        accumulate: the loss of a block of anchors and its gradient.
        anchors: [n, E] this rank's embeddings.
        others: [m, E] what each anchor is compared with.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        # What is one tensor stays one.
        own = anchors.float()
        anchors, others = own, own if others is anchors else others.float()
        loss: Tensor = _MeanOverAnchors.apply(accumulate, anchors, others, torch.is_grad_enabled())
        return loss
