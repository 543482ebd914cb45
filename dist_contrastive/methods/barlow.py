"""Barlow Twins (Zbontar et al. 2021, "Barlow twins: self-supervised learning via redundancy reduction")."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import HeadConfig, MethodConfig, require
from dist_contrastive.losses.redundancy import barlow_twins
from dist_contrastive.methods.base import Embeddings, Losses, Method


@dataclass(frozen=True)
class BarlowConfig(MethodConfig):
    """Defaults of section 2.2 and the authors' code."""

    name: Annotated[str, tyro.conf.Fixed] = "barlow"
    projector: HeadConfig = field(default_factory=lambda: HeadConfig(layers=3, hidden_size=8192, output_size=8192))
    off_diagonal: float = 0.0051
    """λ: the weight of what different dimensions have in common."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.off_diagonal >= 0, f"--method.off-diagonal {self.off_diagonal}: give 0 or more")


class Barlow(Method[BarlowConfig]):
    """The cross-correlation of two views' embeddings over the global batch should be the identity."""

    max_views = 2

    def embed(self, batch: Batch) -> Embeddings:
        return {"z": self.project(batch)}

    def loss(self, embeddings: Embeddings, samples: Samples) -> Losses:
        one, other = embeddings["z"].unbind(0)
        return {"loss": barlow_twins(one, other, off_diagonal=self.config.off_diagonal)}
