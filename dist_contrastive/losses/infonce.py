"""InfoNCE losses over all ranks' embeddings."""

import torch
from jaxtyping import Float
from torch import Tensor


def nt_xent(
    anchors: Float[Tensor, "n e"], everyone: Float[Tensor, "m e"], *, offset: int, num_views: int, temperature: float
) -> Float[Tensor, ""]:
    """NT-Xent (SimCLR, Chen et al. 2020, equation 1), the mean over this rank's anchors; a float32 scalar.

    An anchor is told apart from all other embeddings of the global batch: its positives are the other views of its
    sample, everything else but itself is a negative. With more than two views the loss of an anchor is the mean over its
    positives (as in SupCon's L_out, Khosla et al. 2020, equation 2).

    Args:
        anchors: [V·B, E] this rank's embeddings of unit length, view by view.
        everyone: [W·V·B, E] all ranks' embeddings in rank order, with gradient.
        offset: the row of `everyone` at which this rank's own embeddings start.
        num_views: V, at least 2.
        temperature: divides the cosine similarities.
    """
    # Similarities, log-sum-exp and their gradients stay in float32, whatever the encoder runs in.
    with torch.autocast(anchors.device.type, enabled=False):
        num_anchors = len(anchors)
        batch_size = num_anchors // num_views
        logits = anchors.float() @ everyone.float().T / temperature
        rows = torch.arange(num_anchors, device=anchors.device)
        positives = torch.stack(
            [logits[rows, offset + (rows + k * batch_size) % num_anchors] for k in range(1, num_views)]
        )
        is_self = torch.zeros_like(logits, dtype=torch.bool)
        is_self[rows, offset + rows] = True
        denominators = logits.masked_fill(is_self, -torch.inf).logsumexp(dim=1)
        return (denominators - positives.mean(dim=0)).mean()
