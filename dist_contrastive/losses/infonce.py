"""InfoNCE losses: each anchor picks its positives out among everything it is compared with.

All of them are float32 scalars, means over this rank's anchors, computed a block of anchors at a time (`blocks`). Each block's
gradient is written by hand and in place: it is the softmax over what an anchor is compared with, less its positives.

NT-Xent, the queue's and the indexed loss have a second way, which a GPU takes where it is faster (`fused.fastest`): the
log-sum-exp by a kernel, positives one by one. The loss of pairs, both ways, has more to keep: see there.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_contrastive.distributed import all_gather
from dist_contrastive.losses.blocks import blocks, mean_over_anchors, of_products, softmax_
from dist_contrastive.losses.fused import Tiles, fastest, log_sum_exp


def nt_xent(
    anchors: Float[Tensor, "n e"],
    everyone: Float[Tensor, "m e"],
    *,
    offset: int,
    num_views: int,
    temperature: float,
    decoupled: bool = False,
) -> Float[Tensor, ""]:
    """NT-Xent (SimCLR, Chen et al. 2020, equation 1).

    An anchor is told apart from all other embeddings of the global batch: its positives are the other views of its
    sample, everything else but itself is a negative. With more than two views the loss of an anchor is the mean over its
    positives (as in `supervised`).

    Args:
        anchors: [V·B, E] this rank's embeddings of unit length, view by view.
        everyone: [W·V·B, E] all ranks' embeddings in rank order, with gradient.
        offset: the row of `everyone` at which this rank's own embeddings start.
        num_views: V, at least 2.
        temperature: divides the cosine similarities.
        decoupled: leave the positives out of the denominator (DCL, Yeh et al. 2022, equation 6).
    """
    rest: dict[str, Any] = {
        "offset": offset,
        "num_views": num_views,
        "temperature": temperature,
        "decoupled": decoupled,
    }
    return fastest("NT-Xent", partial(_blocked_nt_xent, **rest), partial(_fused_nt_xent, **rest), anchors, everyone)


def _blocked_nt_xent(
    anchors: Tensor, everyone: Tensor, *, offset: int, num_views: int, temperature: float, decoupled: bool
) -> Tensor:
    has_negative = len(everyone) > num_views
    own_rows = torch.arange(offset, offset + len(anchors), device=anchors.device)
    of_views = own_rows.unflatten(0, (num_views, -1))
    all_positives = torch.stack([of_views.roll(-view, 0).flatten() for view in range(1, num_views)], 1)

    def loss(logits: Tensor, rows: slice) -> Tensor:
        positives = all_positives[rows]
        pulled = logits.gather(1, positives).mean(1)
        logits.scatter_(1, own_rows[rows, None], -torch.inf)
        if decoupled:
            logits.scatter_(1, positives, -torch.inf)
            if not has_negative:
                return logits.zero_().sum()
        pushed = softmax_(logits)
        logits.scatter_add_(1, positives, logits.new_full(positives.shape, -1 / (num_views - 1)))
        return (pushed - pulled).sum()

    return mean_over_anchors(of_products(loss, 1 / temperature), anchors, everyone)


def _fused_nt_xent(
    anchors: Tensor,
    everyone: Tensor,
    *,
    tiles: Tiles,
    offset: int,
    num_views: int,
    temperature: float,
    decoupled: bool,
) -> Tensor:
    own = everyone[offset : offset + len(anchors)].float().unflatten(0, (num_views, -1))
    positives = sum((own.roll(view, 0) for view in range(2, num_views)), own.roll(1, 0)) / (num_views - 1)
    pulled = (anchors.float() * positives.flatten(0, 1)).sum(1) / temperature
    pushed = log_sum_exp(
        anchors,
        everyone,
        scale=1 / temperature,
        tiles=tiles,
        excluded="sample" if decoupled else "itself",
        offset=offset,
        num_views=num_views,
    )
    return (pushed - pulled).mean()


def supervised(
    anchors: Float[Tensor, "n e"],
    everyone: Float[Tensor, "m e"],
    labels: Int[Tensor, " m"],
    *,
    offset: int,
    temperature: float,
    decoupled: bool = False,
) -> Float[Tensor, ""]:
    """SupCon's L_out (Khosla et al. 2020, equation 2): the positives are all other embeddings of the anchor's label.

    Args:
        anchors: [n, E] this rank's embeddings of unit length; each must have a positive.
        everyone: [m, E] all ranks' embeddings in rank order, with gradient.
        labels: [m] the label of each of `everyone`.
        offset: the row of `everyone` at which this rank's own embeddings start.
        temperature: divides the cosine similarities.
        decoupled: leave the positives out of the denominator; an anchor without any negative then counts as 0.
    """

    def loss(logits: Tensor, rows: slice) -> Tensor:
        own = torch.arange(offset + rows.start, offset + rows.stop, device=logits.device)[:, None]
        positive = (labels[own] == labels).scatter_(1, own, value=False)
        num_positives = positive.sum(1, keepdim=True)
        share = positive / num_positives
        pulled = (logits * share).sum(1)
        logits.scatter_(1, own, -torch.inf)
        if not decoupled:
            pushed = softmax_(logits)
            logits.sub_(share)
            return (pushed - pulled).sum()
        # An anchor without negatives has an empty sum, whose gradient is no number: keep it out of the result.
        has_negative = num_positives < len(labels) - 1
        pushed = softmax_(logits.masked_fill_(positive & has_negative, -torch.inf))
        logits.sub_(share).mul_(has_negative)
        return (pushed - pulled).where(has_negative.squeeze(1), 0.0).sum()

    return mean_over_anchors(of_products(loss, 1 / temperature), anchors, everyone)


def queue_nce(
    queries: Float[Tensor, "n e"], keys: Float[Tensor, "n e"], queue: Float[Tensor, "k e"], *, temperature: float
) -> Float[Tensor, ""]:
    """InfoNCE of each query's own key against a queue of other keys (MoCo, He et al. 2020, equation 1).

    Args:
        queries: [n, E] of unit length, with gradient.
        keys: [n, E] of unit length: row i is the positive of query i; no gradient reaches them.
        queue: [K, E] of unit length: the negatives of all queries.
        temperature: divides the cosine similarities.
    """
    rest: dict[str, Any] = {"keys": keys.detach(), "temperature": temperature}
    return fastest(
        "the queue's loss",
        partial(_blocked_queue_nce, **rest),
        partial(_fused_queue_nce, **rest),
        queries,
        queue.detach(),
    )


def _blocked_queue_nce(queries: Tensor, queue: Tensor, *, keys: Tensor, temperature: float) -> Tensor:
    keys = keys.float()

    def accumulate(
        block: Tensor, others: Tensor, rows: slice, of_block: Tensor | None, of_others: Tensor | None
    ) -> Tensor:
        positive = (block * keys[rows]).sum(1) / temperature
        logits = (block / temperature) @ others.T
        negative = softmax_(logits)
        both = torch.logaddexp(positive, negative)
        if of_block is not None:
            # The softmax over the queue and the key: each part's weight is its share of the whole sum.
            logits.mul_((negative - both).exp_()[:, None])
            of_block.addmm_(logits, others, alpha=1 / temperature)
            of_block.addcmul_((positive - both).expm1_()[:, None], keys[rows], value=1 / temperature)
        return (both - positive).sum()

    return mean_over_anchors(accumulate, queries, queue)


def _fused_queue_nce(queries: Tensor, queue: Tensor, *, tiles: Tiles, keys: Tensor, temperature: float) -> Tensor:
    positive = (queries.float() * keys).sum(1) / temperature
    negative = log_sum_exp(queries, queue, scale=1 / temperature, tiles=tiles)
    return (torch.logaddexp(positive, negative) - positive).mean()


def indexed_nce(
    anchors: Float[Tensor, "n e"], candidates: Float[Tensor, "m e"], positives: Int[Tensor, " n"], *, temperature: float
) -> Float[Tensor, ""]:
    """InfoNCE with one positive for each anchor among candidates that all anchors share: cross entropy of the softmax.

    CPC's loss (van den Oord et al. 2018, equation 4) and MoCo v3's (Chen, Xie and He 2021, algorithm 1).

    Args:
        anchors: [n, E] this rank's predictions or queries.
        candidates: [m, E] what they are compared with by inner product.
        positives: [n] the row of `candidates` that is each anchor's positive.
        temperature: divides the inner products.
    """
    rest: dict[str, Any] = {"positives": positives, "temperature": temperature}
    return fastest(
        "the indexed loss",
        partial(_blocked_indexed_nce, **rest),
        partial(_fused_indexed_nce, **rest),
        anchors,
        candidates,
    )


def _blocked_indexed_nce(anchors: Tensor, candidates: Tensor, *, positives: Tensor, temperature: float) -> Tensor:
    def loss(logits: Tensor, rows: slice) -> Tensor:
        own = positives[rows, None]
        pulled = logits.gather(1, own).squeeze(1)
        pushed = softmax_(logits)
        logits.scatter_add_(1, own, logits.new_full(own.shape, -1.0))
        return (pushed - pulled).sum()

    return mean_over_anchors(of_products(loss, 1 / temperature), anchors, candidates)


def _fused_indexed_nce(
    anchors: Tensor, candidates: Tensor, *, tiles: Tiles, positives: Tensor, temperature: float
) -> Tensor:
    pulled = (anchors.float() * candidates.index_select(0, positives)).sum(1) / temperature
    pushed = log_sum_exp(anchors, candidates, scale=1 / temperature, tiles=tiles)
    return (pushed - pulled).mean()


class _Paired(torch.autograd.Function):
    """The gradient is taken in the forward pass, once both denominators are known."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, others: Tensor, offset: int, grad_enabled: bool) -> tuple[Tensor, ...]:
        needs = [grad_enabled and needed for needed in ctx.needs_input_grad[:2]]
        slices = list(blocks(len(anchors), len(others), anchors.device))
        own = torch.arange(offset, offset + len(anchors), device=anchors.device)
        pulled, of_rows = torch.empty_like(anchors[:, 0]), torch.empty_like(anchors[:, 0])
        of_columns = torch.full_like(others[:, 0], -torch.inf)
        logits = anchors.new_empty(0)
        for rows in slices:
            logits = anchors[rows] @ others.T
            pulled[rows] = logits.gather(1, own[rows, None]).squeeze(1)
            of_rows[rows] = logits.logsumexp(1)
            of_columns = torch.logaddexp(of_columns, logits.logsumexp(0))
        of_columns = all_gather(of_columns[None]).logsumexp(0)
        of_anchors, of_others = (
            torch.zeros_like(x) if needed else None for x, needed in zip((anchors, others), needs, strict=True)
        )
        for rows in slices if any(needs) else []:
            if len(slices) > 1:
                logits = anchors[rows] @ others.T
            both = (logits - of_columns).exp_()
            both += logits.sub_(of_rows[rows, None]).exp_()
            both.scatter_add_(1, own[rows, None], both.new_full((len(both), 1), -2.0))
            if of_anchors is not None:
                of_anchors[rows] = both @ others
            if of_others is not None:
                of_others.addmm_(both.T, anchors[rows])
        ctx.save_for_backward(of_anchors, of_others)
        ctx.num_terms = 2 * len(anchors)
        means = (of_rows - pulled).mean(), (of_columns[own] - pulled).mean()
        ctx.mark_non_differentiable(*means)
        return (means[0] + means[1]) / 2, *means

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        share = upstream[0] / ctx.num_terms
        of_anchors, of_others = (None if grad is None else share * grad for grad in ctx.saved_tensors)
        return of_anchors, of_others, None, None


def paired_nce(
    anchors: Float[Tensor, "n e"], others: Float[Tensor, "m e"], *, offset: int
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """InfoNCE both ways between the two of each pair, by inner products (CLIP, Radford et al. 2021, figure 3).

    Each anchor is to find its partner among all ranks' others, each other its partner among all ranks' anchors. A rank computes
    the products of its own anchors alone: of those of other ranks it gets, for each other, the logarithm of a sum, which is
    all that the second denominator needs. So anchors are not gathered, and nothing is computed by two ranks. All call it
    together, and take the same part of it into their loss.

    Returns the mean of both ways, which has the gradient (of the sum of all ranks' means, what goes through this rank's anchors:
    with `gather_with_grad` the average over ranks is the gradient of the global batch, as for other losses); then, to be
    reported, the mean over this rank's anchors and the mean over their partners.

    Memory beside the embeddings: a few times `blocks.PAIRS` values and two for each anchor and other, whatever n and m. Two
    passes over the products, which one block keeps. It can be differentiated once.

    Args:
        anchors: [n, E] this rank's embeddings, with gradient; as many on each rank.
        others: [m, E] all ranks' embeddings of what the anchors are paired with, in rank order, with gradient.
        offset: the row of `others` at which the partners of this rank's anchors start.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        means: tuple[Tensor, Tensor, Tensor]
        means = _Paired.apply(anchors.float(), others.float(), offset, torch.is_grad_enabled())
        return means
