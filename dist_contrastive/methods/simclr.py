"""SimCLR (Chen et al. 2020, "A simple framework for contrastive learning of visual representations")."""

from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from torch.nn import functional as F

from dist_contrastive import distributed
from dist_contrastive.batch import Batch
from dist_contrastive.config import EncoderConfig, MethodConfig, require
from dist_contrastive.losses.infonce import nt_xent
from dist_contrastive.losses.statistics import effective_rank, positive_cosine
from dist_contrastive.methods.base import Losses, Method, Report
from dist_contrastive.rng import sample_keys


@dataclass(frozen=True)
class SimCLRConfig(MethodConfig):
    name: Annotated[str, tyro.conf.Fixed] = "simclr"
    temperature: float = 0.1
    """Divides the cosine similarities; smaller weighs the hardest negatives more."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"--method.temperature {self.temperature}: give a positive number")


class SimCLR(Method):
    """NT-Xent over the embeddings of all ranks, all views in one forward pass."""

    Config = SimCLRConfig

    def __init__(self, config: SimCLRConfig, encoder: EncoderConfig, *, image_size: int, seed: int) -> None:
        super().__init__(config, encoder, image_size=image_size, seed=seed)
        self.temperature = config.temperature

    def forward(self, batch: Batch) -> tuple[Losses, Report]:
        num_views, batch_size = batch.views.shape[:2]
        keys = torch.cat([sample_keys(self.seed, batch.epoch, batch.indices, view) for view in range(num_views)])
        features = self.encoder(batch.views.flatten(0, 1))
        embeddings = F.normalize(self.projector(self.dropout(features, keys)).float(), dim=1)
        everyone = distributed.gather_with_grad(embeddings)
        loss = nt_xent(
            embeddings,
            everyone,
            offset=distributed.rank() * len(embeddings),
            num_views=num_views,
            temperature=self.temperature,
        )
        report = {"positive_cosine": positive_cosine(embeddings.detach().view(num_views, batch_size, -1))}
        if batch.wants_report:
            report["effective_rank"] = effective_rank(everyone.detach())
        return {"loss": loss}, report
