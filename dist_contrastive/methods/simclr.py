"""SimCLR (Chen et al. 2020, "A simple framework for contrastive learning of visual representations")."""

from dataclasses import dataclass
from typing import Annotated

import tyro
from torch.nn import functional as F

from dist_contrastive import distributed
from dist_contrastive.batch import Batch
from dist_contrastive.config import EncoderConfig, MethodConfig, require
from dist_contrastive.losses.infonce import nt_xent
from dist_contrastive.methods.base import Embeddings, Losses, Method


@dataclass(frozen=True)
class SimCLRConfig(MethodConfig):
    name: Annotated[str, tyro.conf.Fixed] = "simclr"
    temperature: float = 0.1
    """Divides the cosine similarities; smaller weighs the hardest negatives more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, f"--method.temperature {self.temperature}: give a positive number")


class SimCLR(Method):
    """NT-Xent over the embeddings of all ranks, all views in one forward pass."""

    Config = SimCLRConfig

    def __init__(self, config: SimCLRConfig, encoder: EncoderConfig, *, image_size: int, seed: int) -> None:
        super().__init__(config, encoder, image_size=image_size, seed=seed)
        self.temperature = config.temperature

    def embed(self, batch: Batch) -> Embeddings:
        return {"z": F.normalize(self.project(batch), dim=-1)}

    def loss(self, embeddings: Embeddings, batch: Batch) -> Losses:
        anchors = embeddings["z"].flatten(0, 1)
        loss = nt_xent(
            anchors,
            distributed.gather_with_grad(anchors),
            offset=distributed.rank() * len(anchors),
            num_views=len(embeddings["z"]),
            temperature=self.temperature,
        )
        return {"loss": loss}
