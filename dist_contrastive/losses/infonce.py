"""InfoNCE losses: each anchor picks its positives out among everything it is compared with.

All of them are float32 scalars, means over this rank's anchors, computed a block of anchors at a time (`blocks`).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_contrastive.losses.blocks import mean_over_anchors, samples_of_rows


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
    samples = samples_of_rows(len(everyone), len(anchors), num_views, everyone.device)
    return _pick_out(anchors, everyone, samples, offset=offset, temperature=temperature, decoupled=decoupled)


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
    return _pick_out(anchors, everyone, labels, offset=offset, temperature=temperature, decoupled=decoupled)


def _pick_out(
    anchors: Tensor, everyone: Tensor, groups: Tensor, *, offset: int, temperature: float, decoupled: bool
) -> Tensor:
    """The mean over anchors of log Σ_a exp(s_a / T) - mean over positives of s_p / T, where positives share a group."""

    def block_sum(block: Tensor, others: Tensor, rows: slice) -> Tensor:
        logits = block @ others.T / temperature
        own = torch.arange(offset + rows.start, offset + rows.stop, device=block.device)[:, None]
        positive = (groups[own] == groups).scatter_(1, own, value=False)
        pulled = logits.where(positive, 0.0).sum(1) / positive.sum(1)
        left_out = torch.zeros_like(positive).scatter_(1, own, value=True)
        if not decoupled:
            return (logits.masked_fill(left_out, -torch.inf).logsumexp(1) - pulled).sum()
        # An anchor without negatives has an empty sum, whose gradient is no number: keep it out of the result.
        has_negative = positive.sum(1) < len(others) - 1
        left_out |= positive & has_negative[:, None]
        return (logits.masked_fill(left_out, -torch.inf).logsumexp(1) - pulled).where(has_negative, 0.0).sum()

    return mean_over_anchors(block_sum, anchors, everyone)


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
    keys = keys.detach().float()

    def block_sum(block: Tensor, others: Tensor, rows: slice) -> Tensor:
        positives = (block * keys[rows]).sum(1) / temperature
        negatives = (block @ others.T / temperature).logsumexp(1)
        return (torch.logaddexp(positives, negatives) - positives).sum()

    return mean_over_anchors(block_sum, queries, queue.detach())


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

    def block_sum(block: Tensor, others: Tensor, rows: slice) -> Tensor:
        logits = block @ others.T / temperature
        return (logits.logsumexp(1) - logits.gather(1, positives[rows, None]).squeeze(1)).sum()

    return mean_over_anchors(block_sum, anchors, candidates)
