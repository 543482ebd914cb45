"""MoCo v3 (Chen, Xie and He 2021, "An empirical study of training self-supervised vision transformers")."""

from dataclasses import dataclass, field
from typing import Annotated

import torch
import tyro
from torch.nn import functional as F

from dist_contrastive import distributed
from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import HeadConfig, MethodConfig, require_momentum, require_positive
from dist_contrastive.losses.infonce import indexed_nce
from dist_contrastive.methods.base import Embeddings, Losses, Method, MethodSettings
from dist_contrastive.models.heads import build_predictor
from dist_contrastive.models.teacher import Teacher
from dist_contrastive.schedules import ema_momentum


@dataclass(frozen=True)
class MoCoV3Config(MethodConfig):
    """Defaults of the authors' code for ResNet-50."""

    name: Annotated[str, tyro.conf.Fixed] = "mocov3"
    projector: HeadConfig = field(
        default_factory=lambda: HeadConfig(layers=2, hidden_size=4096, output_size=256, output_norm=True)
    )
    predictor: HeadConfig = field(default_factory=lambda: HeadConfig(layers=2, hidden_size=4096))
    """Its output has the size of the embedding."""
    momentum: float = 0.99
    """The teacher's at the start; it rises to 1 on a cosine."""
    temperature: float = 1.0
    """Divides the cosine similarities (0.2 for vision transformers)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_momentum("--method.momentum", self.momentum)
        require_positive("--method.temperature", self.temperature)


class MoCoV3(Method[MoCoV3Config]):
    """Each view's prediction looks for the teacher's embedding of the other view among those of the global batch."""

    max_views = 2
    target = "k"  # algorithm 1

    def __init__(self, settings: MethodSettings[MoCoV3Config]) -> None:
        super().__init__(settings)
        self.predictor = build_predictor(self.config.predictor, self.config.projector.output_size, self.norm)
        self.teacher = Teacher(self.student)

    def embed(self, batch: Batch) -> Embeddings:
        z = self.project(batch)
        queries = F.normalize(self.predictor(z.flatten(0, 1)).float().view_as(z), dim=-1)
        return {"z": z.detach(), "q": queries}

    def targets(self, batch: Batch) -> Embeddings:
        (views,) = batch.views
        keys = F.normalize(self.teacher(views.flatten(0, 1)).float(), dim=-1)
        return {"k": keys.unflatten(0, views.shape[:2])}

    def loss(self, embeddings: Embeddings, samples: Samples) -> Losses:
        queries, keys = embeddings["q"], embeddings["k"]
        temperature = self.config.temperature
        own = torch.arange(queries.shape[1], device=queries.device) + distributed.row_offset(queries.shape[1])
        # Algorithm 1: the sum of both directions; 2 T keeps the gradient's size independent of the temperature.
        directions = [
            indexed_nce(query, distributed.all_gather(key), own, temperature=temperature)
            for query, key in ((queries[0], keys[1]), (queries[1], keys[0]))
        ]
        return {"loss": 2 * temperature * torch.stack(directions).sum()}

    def teacher_momentum(self, progress: float) -> float:
        return ema_momentum(progress, self.config.momentum)

    def after_step(self, progress: float, embeddings: Embeddings) -> None:
        self.teacher.follow(self.student, self.teacher_momentum(progress))
