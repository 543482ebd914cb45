"""iBOT (Zhou et al. 2022, "iBOT: image BERT pre-training with online tokenizer")."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from dist_contrastive.config import require
from dist_contrastive.methods.masked_distillation import MaskedDistillation, MaskedDistillationConfig
from dist_contrastive.models.centering import MeanCentering


@dataclass(frozen=True)
class IBOTConfig(MaskedDistillationConfig):
    """Defaults of section 4.1 and the authors' code."""

    name: Annotated[str, tyro.conf.Fixed] = "ibot"
    prototypes: int = 8192
    """K: how many dimensions the assignments have."""
    center_momentum: float = 0.9
    """How much of itself each center keeps in a step; 1 leaves it at 0, without centering."""

    def __post_init__(self) -> None:
        super().__post_init__()
        momentum = self.center_momentum
        require(0 <= momentum <= 1, f"--method.center-momentum {momentum}: give a number in [0, 1]")


class IBOT(MaskedDistillation[IBOTConfig]):
    """DINO on views that are masked for the student, and the same for each masked patch, by centers of their own."""

    def build_centering(self) -> MeanCentering:
        return MeanCentering(self.config.prototypes, self.config.center_momentum)

    def build_patch_centering(self) -> MeanCentering:
        return MeanCentering(self.num_patch_prototypes, self.config.center_momentum)
