"""KoLeo: embeddings spread where each keeps away from its nearest neighbour."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_contrastive.losses.blocks import blocks

EPSILON = 1e-8
"""Added to distances before the logarithm, as DINOv2 does."""


def koleo(anchors: Float[Tensor, "n e"], everyone: Float[Tensor, "m e"], *, offset: int) -> Float[Tensor, ""]:
    """KoLeo (Sablayrolles et al. 2019, equation 2; DINOv2, Oquab et al. 2023, section 4), a float32 scalar.

    Minus the mean over this rank's anchors of log(distance to the nearest other row of all ranks + ε), the
    Kozachenko-Leonenko estimate of their entropy up to a constant. Both the anchor and the neighbour found get the gradient.
    DINOv2 looks for neighbours on the anchor's own rank only; here they are those of the global batch at any number of ranks.

    It is finite whatever comes: two equal rows have no direction to be pushed apart in, they cost -log ε and get no gradient
    from one another; for others the gradient is at most 1 / (n · (distance + ε)). A single row has no neighbour and costs 0.

    Args:
        anchors: [n, E] this rank's embeddings of unit length.
        everyone: [m, E] all ranks' embeddings in rank order, with gradient.
        offset: the row of `everyone` at which this rank's own embeddings start.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, everyone = anchors.float(), everyone.float()
        if len(everyone) < 2:
            return 0 * anchors.sum()  # still of the graph, as other ranks' or batches' losses are
        neighbours = everyone[_nearest(anchors, everyone, offset)]
        # Where it is zero, so is its gradient by torch's definition.
        distance: Tensor = torch.linalg.vector_norm(anchors - neighbours, dim=1)
        return -(distance + EPSILON).log().mean()


@torch.no_grad()
def _nearest(anchors: Float[Tensor, "n e"], everyone: Float[Tensor, "m e"], offset: int) -> Int[Tensor, " n"]:
    """The row of `everyone`, other than its own, with which each anchor has the largest inner product."""
    found = []
    for rows in blocks(len(anchors), len(everyone), anchors.device):
        own = torch.arange(offset + rows.start, offset + rows.stop, device=anchors.device)[:, None]
        products = anchors[rows] @ everyone.T
        found.append(products.scatter_(1, own, -torch.inf).argmax(1))
    return torch.cat(found)
