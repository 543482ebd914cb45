"""Losses that predict one view's embedding from another's, without negatives."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def cross_view_cosine(predictions: Float[Tensor, "v b e"], targets: Float[Tensor, "v b e"]) -> Float[Tensor, ""]:
    """The mean over samples and ordered pairs of views v != w of cos(prediction of v, target of w); a float32 scalar.

    No gradient reaches the targets. SimSiam's loss is its negative (Chen and He 2021, equation 2); BYOL's is 2 - 2 cos for
    each of the pairs (Grill et al. 2020, equation 2). Inputs are of any length.
    """
    with torch.autocast(predictions.device.type, enabled=False):
        q = F.normalize(predictions.float(), dim=-1)
        k = F.normalize(targets.detach().float(), dim=-1)
        num_views = len(q)
        # Σ over v != w of <q_v, k_w> is <Σ q_v, Σ k_w> - Σ <q_v, k_v>: no loop over pairs.
        pairs = (q.sum(0) * k.sum(0)).sum(-1) - (q * k).sum((0, 2))
        return (pairs / (num_views * (num_views - 1))).mean()
