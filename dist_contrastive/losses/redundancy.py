"""Losses on the statistics of a batch of embeddings, taken over all ranks.

Sums over samples travel, not the samples: means, variances and the matrix of E × E second moments are summed over ranks
with gradient (`distributed.sum_with_grad`). Every rank then computes the same loss, and DDP's average of the gradients is
that of one rank with the whole batch.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dist_contrastive.distributed import sum_with_grad, world_size

EPSILON = 1e-5
"""Added to variances before the root, as BatchNorm does: a dimension that is constant stays finite."""
VICREG_EPSILON = 1e-4
"""VICReg's ε (equation 2)."""


def barlow_twins(one: Float[Tensor, "b e"], other: Float[Tensor, "b e"], *, off_diagonal: float) -> Float[Tensor, ""]:
    """Barlow Twins (Zbontar et al. 2021, equations 1 and 2), over the global batch; a float32 scalar.

    Σ_i (1 - C_ii)² + off_diagonal · Σ_{i != j} C_ij², where C is the cross-correlation of the dimensions of two views.

    Args:
        one, other: [B, E] this rank's embeddings of two views.
        off_diagonal: λ, the weight of redundancy between dimensions.
    """
    with torch.autocast(one.device.type, enabled=False):
        count = len(one) * world_size()
        # The means first, the variances of what is left: a difference of large sums would lose them in float32.
        both = torch.stack([one.float(), other.float()])
        both = both - sum_with_grad(both.sum(1, keepdim=True)) / count
        variance = sum_with_grad(both.square().sum(1, keepdim=True)) / count
        one, other = (both / (variance + EPSILON).sqrt()).unbind(0)
        correlation = sum_with_grad(one.T @ other) / count
        diagonal = correlation.diagonal()
        redundancy = correlation.square().sum() - diagonal.square().sum()
        return (1 - diagonal).square().sum() + off_diagonal * redundancy


def vicreg(
    one: Float[Tensor, "b e"], other: Float[Tensor, "b e"], *, invariance: float, variance: float, covariance: float
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """VICReg's three terms (Bardes, Ponce and LeCun 2022, equations 1 to 6), weighted; float32 scalars.

    Invariance: this rank's mean over samples of the squared distance of two views, divided by E (as algorithm 1 and the
    authors' code do). Variance: for each view the mean over dimensions of max(0, 1 - standard deviation). Covariance: for
    each view the sum of squared covariances between dimensions, divided by E. The last two are over the global batch and
    summed over the two views, as in algorithm 1; the authors' code takes half of the variance term.

    Args:
        one, other: [B, E] this rank's embeddings of two views; the global batch has at least two samples.
        invariance, variance, covariance: the weights λ, μ and ν.
    """
    with torch.autocast(one.device.type, enabled=False):
        both = torch.stack([one.float(), other.float()])
        distance = (both[0] - both[1]).square().mean()
        count = len(one) * world_size()
        centred = both - sum_with_grad(both.sum(1, keepdim=True)) / count
        moments = sum_with_grad(torch.bmm(centred.mT, centred)) / (count - 1)  # [2, E, E]
        variances = moments.diagonal(dim1=1, dim2=2)
        spread = (1 - (variances + VICREG_EPSILON).sqrt()).clamp_min(0.0).mean(1).sum()
        between = (moments.square().sum() - variances.square().sum()) / one.shape[1]
        return invariance * distance, variance * spread, covariance * between
