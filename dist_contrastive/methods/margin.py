"""The contrastive margin loss (Chopra, Hadsell and LeCun 2005) on in-batch pairs: the ancestor of what follows it."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from torch.nn import functional as F

from dist_contrastive import distributed
from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import MethodConfig, require
from dist_contrastive.losses.margin import margin_loss
from dist_contrastive.methods.base import Embeddings, Losses, Method


@dataclass(frozen=True)
class MarginConfig(MethodConfig):
    """Pairs of views against pairs of samples, by their distance."""

    name: Annotated[str, tyro.conf.Fixed] = "margin"
    margin: float = 1.0
    """The distance beyond which a negative costs nothing; embeddings of unit length are 0 to 2 apart, √2 on average where
    they are spread out."""
    hinge: Literal["squared", "linear"] = "squared"
    """squared: Hadsell, Chopra and LeCun 2006, equation 4; linear: half the hinge itself, which
    pushes near the margin as hard as far from it."""
    negatives: Literal["all", "hardest"] = "all"
    """The mean over all negatives of an anchor, or its nearest one alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.margin <= 2, f"--method.margin {self.margin}: give a distance in (0, 2]")


class Margin(Method[MarginConfig]):
    """Pairs over the embeddings of all ranks, all views in one forward pass.

    Embeddings are of unit length: the margin then has a scale, and the loss cannot be lowered by growing them.
    """

    def embed(self, batch: Batch) -> Embeddings:
        return {"z": F.normalize(self.project(batch), dim=-1)}

    def loss(self, embeddings: Embeddings, samples: Samples) -> Losses:
        anchors = embeddings["z"].flatten(0, 1)
        loss = margin_loss(
            anchors,
            distributed.gather_with_grad(anchors),
            offset=distributed.row_offset(len(anchors)),
            num_views=len(embeddings["z"]),
            margin=self.config.margin,
            hinge=self.config.hinge,
            negatives=self.config.negatives,
        )
        return {"loss": loss}
