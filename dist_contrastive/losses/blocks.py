"""Losses over all pairs, a block of anchors at a time, so that the matrix of similarities is never whole."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Pairs of one block: 32 MiB of float32 similarities. Larger blocks are no faster, but at SimCLR's 4096 samples the whole
# matrix would be 256 MiB, several times over.
MAX_PAIRS = 1 << 23

BlockSum = Callable[[Tensor, Tensor, slice], Tensor]


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


class _MeanOverAnchors(torch.autograd.Function):
    """The gradient is taken in the forward pass, block by block: what is kept has the size of the embeddings."""

    @staticmethod
    def forward(ctx: Any, block_sum: BlockSum, anchors: Tensor, others: Tensor, grad_enabled: bool) -> Tensor:
        needs = [grad_enabled and ctx.needs_input_grad[1], grad_enabled and ctx.needs_input_grad[2]]
        total = anchors.new_zeros(())
        grads = [torch.zeros_like(x) if needed else None for x, needed in zip((anchors, others), needs, strict=True)]
        for rows in blocks(len(anchors), len(others)):
            with torch.set_grad_enabled(any(needs)):
                inputs = [anchors[rows].detach().requires_grad_(needs[0]), others.detach().requires_grad_(needs[1])]
                value = block_sum(inputs[0], inputs[1], rows)
            total += value.detach()
            wanted = [x for x, needed in zip(inputs, needs, strict=True) if needed]
            found = iter(torch.autograd.grad(value, wanted)) if wanted else iter(())
            if grads[0] is not None:
                grads[0][rows] = next(found)
            if grads[1] is not None:
                grads[1].add_(next(found))
        ctx.save_for_backward(*(None if grad is None else grad.div_(len(anchors)) for grad in grads))
        return total / len(anchors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        of_anchors, of_others = (None if grad is None else upstream[0] * grad for grad in ctx.saved_tensors)
        return None, of_anchors, of_others, None


def mean_over_anchors(
    block_sum: BlockSum, anchors: Float[Tensor, "n e"], others: Float[Tensor, "m e"]
) -> Float[Tensor, ""]:
    """The mean over anchors of a loss on all pairs (anchor, other), a float32 scalar with gradient for both.

    Memory beside the embeddings: a few times `MAX_PAIRS` values, whatever n and m; work: as for the whole matrix, since
    the gradient is taken at once rather than by computing blocks again (as in Inf-CL, Cheng et al. 2024, section 4, with
    the gradient in the forward pass). It can be differentiated once.

    Args:
        block_sum: `block_sum(anchors[rows], others, rows)` is the sum of the loss over these anchors, a scalar that
            depends on both.
        anchors: [n, E] this rank's embeddings.
        others: [m, E] what each anchor is compared with.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, others = anchors.float(), others.float()
        loss: Tensor = _MeanOverAnchors.apply(block_sum, anchors, others, torch.is_grad_enabled())
        return loss
