"""The contrastive margin loss on in-batch pairs."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dist_contrastive.losses.blocks import by_autograd, mean_over_anchors, samples_of_rows


def margin_loss(
    anchors: Float[Tensor, "n e"],
    everyone: Float[Tensor, "m e"],
    *,
    offset: int,
    num_views: int,
    margin: float,
    hinge: Literal["squared", "linear"] = "squared",
    negatives: Literal["all", "hardest"] = "all",
) -> Float[Tensor, ""]:
    """Pull positives together, push negatives beyond a margin; the mean over this rank's anchors, a float32 scalar.

    Chopra, Hadsell and LeCun 2005 ("Learning a similarity metric discriminatively") with the hinge of Hadsell, Chopra and
    LeCun 2006 (equation 4): a pair of distance d costs d² / 2 if positive and max(0, margin - d)² / 2 if negative. An
    anchor costs the mean over its positives plus the mean over its negatives, so that both weigh the same at any batch.

    Args:
        anchors: [V·B, E] this rank's embeddings, view by view.
        everyone: [W·V·B, E] all ranks' embeddings in rank order, with gradient.
        offset: the row of `everyone` at which this rank's own embeddings start.
        num_views: V, at least 2.
        margin: the distance from which a negative no longer counts.
        hinge: squared as above, or linear: max(0, margin - d) / 2.
        negatives: the mean over all of them, or the hardest: each anchor's nearest negative alone.
    """
    samples = samples_of_rows(len(everyone), len(anchors), num_views, everyone.device)

    def block_sum(block: Tensor, others: Tensor, rows: slice) -> Tensor:
        own = torch.arange(offset + rows.start, offset + rows.stop, device=block.device)[:, None]
        same = samples[own] == samples
        squared = block.square().sum(1, keepdim=True) + others.square().sum(1) - 2 * (block @ others.T)
        # An anchor's pair with itself is in `same` and costs nothing: its distance is exactly zero, with no gradient.
        squared = squared.clamp_min(0.0).scatter(1, own, 0.0)
        pull = 0.5 * squared.where(same, 0.0).sum(1) / (num_views - 1)
        # The root has no gradient at zero; two equal embeddings have no direction to be pushed apart in.
        distance = squared.clamp_min(torch.finfo(squared.dtype).eps).sqrt()
        if negatives == "hardest":
            distance = distance.masked_fill(same, torch.inf).amin(1)
            push = 0.5 * _hinge(distance, margin, hinge)
        else:
            push = 0.5 * _hinge(distance, margin, hinge).where(~same, 0.0).sum(1) / (len(others) - num_views)
        return (pull + push).sum()

    return mean_over_anchors(by_autograd(block_sum), anchors, everyone)


def _hinge(distance: Tensor, margin: float, hinge: Literal["squared", "linear"]) -> Tensor:
    missing = (margin - distance).clamp_min(0.0)
    return missing.square() if hinge == "squared" else missing
