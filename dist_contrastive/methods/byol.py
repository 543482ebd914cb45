"""BYOL (Grill et al. 2020, "Bootstrap your own latent: a new approach to self-supervised learning")."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import HeadConfig, TeacherConfig
from dist_contrastive.losses.regression import cross_view_cosine
from dist_contrastive.methods.base import Embeddings, Losses, Method


@dataclass(frozen=True)
class BYOLConfig(TeacherConfig):
    """Defaults of section 3.2."""

    name: Annotated[str, tyro.conf.Fixed] = "byol"
    projector: HeadConfig = field(default_factory=lambda: HeadConfig(layers=2, hidden_size=4096, output_size=256))
    predictor: HeadConfig = field(default_factory=lambda: HeadConfig(layers=2, hidden_size=4096))
    """Its output has the size of the embedding."""


class BYOL(Method[BYOLConfig]):
    """Each view's prediction looks for what the teacher makes of the other view."""

    couples_samples = False
    target = "k"  # equation 3

    def embed(self, batch: Batch) -> Embeddings:
        z = self.project(batch)
        return {"z": z.detach(), "q": self.predict(z)}

    def targets(self, batch: Batch) -> Embeddings:
        return {"k": self.teach(batch.views[0])}

    def loss(self, embeddings: Embeddings, samples: Samples) -> Losses:
        # Equation 2 summed over both directions: two ordered pairs of views, each 2 - 2 cos.
        return {"loss": 2 * (2 - 2 * cross_view_cosine(embeddings["q"], embeddings["k"]))}
