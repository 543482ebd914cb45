"""MoCo v3 (Chen, Xie and He 2021, "An empirical study of training self-supervised vision transformers")."""

from dataclasses import dataclass, field
from typing import Annotated

import torch
import tyro
from torch.nn import functional as F

from dist_contrastive import distributed
from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import HeadConfig, TeacherConfig, require_positive
from dist_contrastive.losses.infonce import indexed_nce
from dist_contrastive.methods.base import Embeddings, Losses, Method


@dataclass(frozen=True)
class MoCoV3Config(TeacherConfig):
    """Defaults of the authors' code for ResNet-50."""

    name: Annotated[str, tyro.conf.Fixed] = "mocov3"
    projector: HeadConfig = field(
        default_factory=lambda: HeadConfig(layers=2, hidden_size=4096, output_size=256, output_norm=True)
    )
    predictor: HeadConfig = field(default_factory=lambda: HeadConfig(layers=2, hidden_size=4096))
    """Its output has the size of the embedding."""
    momentum: float = 0.99
    temperature: float = 1.0
    """Divides the cosine similarities (0.2 for vision transformers)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("--method.temperature", self.temperature)


class MoCoV3(Method[MoCoV3Config]):
    """Each view's prediction looks for the teacher's embedding of the other view among those of the global batch."""

    max_views = 2
    target = "k"  # algorithm 1

    def embed(self, batch: Batch) -> Embeddings:
        z = self.project(batch)
        return {"z": z.detach(), "q": F.normalize(self.predict(z), dim=-1)}

    def targets(self, batch: Batch) -> Embeddings:
        return {"k": F.normalize(self.teach(batch.views[0]), dim=-1)}

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
