"""SigLIP's loss: each pair of an image and a text is a question of its own, whether they belong together."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive.losses.blocks import mean_over_anchors, of_products


def sigmoid_loss(images: Float[Tensor, "n e"], texts: Float[Tensor, "m e"], *, offset: int) -> Float[Tensor, ""]:
    """SigLIP (Zhai et al. 2023, equation 1 and algorithm 1), a float32 scalar.

    Σ -log sigmoid(label · logit) over this rank's n images and all m texts, divided by n, where the label of an image and its
    own text is 1, of all other pairs -1. The logits are the plain inner products. The paper's scale t and bias b are learnt;
    they get their gradients as parts of the embeddings, the bias by one more dimension:

        images = torch.cat([log_scale.exp() * images, bias.expand(len(images), 1)], dim=1)
        texts = torch.cat([texts, torch.ones(len(texts), 1)], dim=1)

    Args:
        images: [n, E] this rank's embeddings, with gradient.
        texts: [m, E] all ranks' embeddings in rank order, with gradient.
        offset: the row of `texts` at which those of this rank's images start.
    """

    def loss(logits: Tensor, rows: slice) -> Tensor:
        own = torch.arange(offset + rows.start, offset + rows.stop, device=logits.device)[:, None]
        # -log sigmoid(-x) = log(1 + exp(x)), whose derivative is sigmoid(x): only an image's own text has x = -logit.
        logits.scatter_(1, own, -logits.gather(1, own))
        value = F.softplus(logits).sum()
        logits.sigmoid_()
        logits.scatter_(1, own, -logits.gather(1, own))
        return value

    return mean_over_anchors(of_products(loss, 1.0), images, texts)
