"""BYOL (Grill et al. 2020, "Bootstrap your own latent: a new approach to self-supervised learning")."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import HeadConfig, MethodConfig, require_momentum
from dist_contrastive.losses.regression import cross_view_cosine
from dist_contrastive.methods.base import Embeddings, Losses, Method, MethodSettings
from dist_contrastive.models.heads import build_predictor
from dist_contrastive.models.teacher import Teacher
from dist_contrastive.schedules import ema_momentum


@dataclass(frozen=True)
class BYOLConfig(MethodConfig):
    """Defaults of section 3.2."""

    name: Annotated[str, tyro.conf.Fixed] = "byol"
    projector: HeadConfig = field(default_factory=lambda: HeadConfig(layers=2, hidden_size=4096, output_size=256))
    predictor: HeadConfig = field(default_factory=lambda: HeadConfig(layers=2, hidden_size=4096))
    """Its output has the size of the embedding."""
    momentum: float = 0.996
    """The teacher's at the start; it rises to 1 on a cosine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_momentum("--method.momentum", self.momentum)


class BYOL(Method[BYOLConfig]):
    """Each view's prediction looks for what the teacher makes of the other view."""

    couples_samples = False
    target = "k"  # equation 3

    def __init__(self, settings: MethodSettings[BYOLConfig]) -> None:
        super().__init__(settings)
        self.predictor = build_predictor(self.config.predictor, self.config.projector.output_size, self.norm)
        self.teacher = Teacher(self.student)

    def embed(self, batch: Batch) -> Embeddings:
        z = self.project(batch)
        predictions = self.predictor(z.flatten(0, 1)).float().view_as(z)
        return {"z": z.detach(), "q": predictions}

    def targets(self, batch: Batch) -> Embeddings:
        (views,) = batch.views
        return {"k": self.teacher(views.flatten(0, 1)).float().unflatten(0, views.shape[:2])}

    def loss(self, embeddings: Embeddings, samples: Samples) -> Losses:
        # Equation 2 summed over both directions: two ordered pairs of views, each 2 - 2 cos.
        return {"loss": 2 * (2 - 2 * cross_view_cosine(embeddings["q"], embeddings["k"]))}

    def teacher_momentum(self, progress: float) -> float:
        return ema_momentum(progress, self.config.momentum)

    def after_step(self, progress: float, embeddings: Embeddings) -> None:
        self.teacher.follow(self.student, self.teacher_momentum(progress))
