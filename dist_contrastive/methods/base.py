"""What every method is: a module that turns a batch into losses."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from dist_contrastive.batch import Batch
from dist_contrastive.config import EncoderConfig, MethodConfig
from dist_contrastive.models.encoders import Encoder, build_encoder
from dist_contrastive.models.heads import KeyedDropout, build_projector

Losses = dict[str, Tensor]
Report = dict[str, Tensor]


class Method(nn.Module, ABC):
    """Encoder, projector, and the loss on them.

    The loss of a rank is the mean over the rank's own anchors, and what it gathers from other ranks carries gradient, so
    that DDP's average over ranks is the gradient of the global batch.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    min_views: ClassVar[int] = 2
    """How many views of a sample the loss needs."""

    def __init__(self, config: MethodConfig, encoder: EncoderConfig, *, image_size: int, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.encoder: Encoder = build_encoder(encoder, image_size)
        self.dropout = KeyedDropout(encoder.dropout)
        self.projector = build_projector(config.projector, self.encoder.feature_size, encoder.norm)

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Losses, Report]:
        """Losses (the loop knows `losses["loss"]` alone) and a report of float32 scalars that are means over anchors."""

    def after_step(self, progress: float) -> None:
        """Move teachers and queues after an optimizer update; `progress` runs from 0 to 1 over the run."""
