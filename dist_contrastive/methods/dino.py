"""DINO (Caron et al. 2021, "Emerging properties in self-supervised vision transformers")."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from dist_contrastive.config import require
from dist_contrastive.methods.self_distillation import SelfDistillation, SelfDistillationConfig
from dist_contrastive.models.centering import MeanCentering


@dataclass(frozen=True)
class DINOConfig(SelfDistillationConfig):
    """Defaults of section 3.2 and the authors' code."""

    name: Annotated[str, tyro.conf.Fixed] = "dino"
    center_momentum: float = 0.9
    """How much of itself the center keeps in a step; 1 leaves it at 0, without centering."""

    def __post_init__(self) -> None:
        super().__post_init__()
        momentum = self.center_momentum
        require(0 <= momentum <= 1, f"--method.center-momentum {momentum}: give a number in [0, 1]")


class DINO(SelfDistillation[DINOConfig]):
    """The teacher's assignments are kept from one prototype by a center, and from all alike by a lower temperature."""

    def build_centering(self) -> MeanCentering:
        return MeanCentering(self.config.prototypes, self.config.center_momentum)
