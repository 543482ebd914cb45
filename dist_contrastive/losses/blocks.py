"""Losses over all pairs, a block of anchors at a time, so that the matrix of similarities is never whole."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Pairs of one block: 8 MiB of float32. At SimCLR's 4096 samples the whole matrix would be 256 MiB, several times over.
MAX_PAIRS = 1 << 21

Accumulate = Callable[[Tensor, Tensor, slice, Tensor | None, Tensor | None], Tensor]
"""`accumulate(block, others, rows, of_block, of_others)` is the sum of a loss over the anchors `block` = anchors[rows], a
scalar. It adds the sum's gradients to `of_block` and `of_others`, in place, where they are wanted."""


def blocks(num_anchors: int, num_others: int) -> Iterator[slice]:
    """Slices over the anchors of at most `MAX_PAIRS` pairs with `num_others` others, at least one anchor each."""
    size = max(1, MAX_PAIRS // max(1, num_others))
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
        of_anchors, of_others = (
            torch.zeros_like(x) if needed else None for x, needed in zip((anchors, others), needs, strict=True)
        )
        for rows in blocks(len(anchors), len(others)):
            of_block = None if of_anchors is None else of_anchors[rows]
            total += accumulate(anchors[rows], others, rows, of_block, of_others)
        ctx.save_for_backward(*(None if grad is None else grad.div_(len(anchors)) for grad in (of_anchors, of_others)))
        return total / len(anchors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        of_anchors, of_others = (None if grad is None else upstream[0] * grad for grad in ctx.saved_tensors)
        return None, of_anchors, of_others, None


def mean_over_anchors(
    accumulate: Accumulate, anchors: Float[Tensor, "n e"], others: Float[Tensor, "m e"]
) -> Float[Tensor, ""]:
    """The mean over anchors of a loss on all pairs (anchor, other), a float32 scalar with gradient for both.

    Memory beside the embeddings: one or a few times `MAX_PAIRS` values, whatever n and m; work: as for the whole matrix,
    since the gradient is taken at once rather than by computing blocks again (as in Inf-CL, Cheng et al. 2024, section 4,
    with the gradient in the forward pass). It can be differentiated once.

    Args:
        accumulate: the loss of a block of anchors and its gradient.
        anchors: [n, E] this rank's embeddings.
        others: [m, E] what each anchor is compared with.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, others = anchors.float(), others.float()
        loss: Tensor = _MeanOverAnchors.apply(accumulate, anchors, others, torch.is_grad_enabled())
        return loss
