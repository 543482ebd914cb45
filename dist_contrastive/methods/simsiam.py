"""SimSiam (Chen and He 2021, "Exploring simple Siamese representation learning")."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import HeadConfig, MethodConfig
from dist_contrastive.losses.regression import cross_view_cosine
from dist_contrastive.methods.base import Embeddings, Losses, Method


@dataclass(frozen=True)
class SimSiamConfig(MethodConfig):
    """Sizes of the heads as in section 3 of the paper (baseline settings) and the authors' code."""

    name: Annotated[str, tyro.conf.Fixed] = "simsiam"
    projector: HeadConfig = field(
        default_factory=lambda: HeadConfig(layers=3, hidden_size=2048, output_size=2048, output_norm=True)
    )
    predictor: HeadConfig = field(default_factory=lambda: HeadConfig(layers=2, hidden_size=512))
    """Its output has the size of the embedding."""


class SimSiam(Method[SimSiamConfig]):
    """Each view's prediction looks for the other view's embedding, which stands still (section 3, algorithm 1)."""

    couples_samples = False
    target = "z"  # algorithm 1

    def embed(self, batch: Batch) -> Embeddings:
        z = self.project(batch)
        return {"z": z.detach(), "q": self.predict(z)}

    def loss(self, embeddings: Embeddings, samples: Samples) -> Losses:
        return {"loss": -cross_view_cosine(embeddings["q"], embeddings["z"])}
