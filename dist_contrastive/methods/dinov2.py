"""DINOv2 (Oquab et al. 2023, "DINOv2: learning robust visual features without supervision")."""

from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive import distributed
from dist_contrastive.batch import Samples
from dist_contrastive.config import require
from dist_contrastive.losses.koleo import koleo
from dist_contrastive.methods.base import Embeddings, Losses
from dist_contrastive.methods.masked_distillation import MaskedDistillation, MaskedDistillationConfig
from dist_contrastive.models.centering import SinkhornKnopp


@dataclass(frozen=True)
class DINOv2Config(MaskedDistillationConfig):
    """Defaults of section 4 and the authors' short schedule (ViT-L/16 on ImageNet)."""

    name: Annotated[str, tyro.conf.Fixed] = "dinov2"
    momentum: float = 0.992
    patch_prototypes: int = 65536
    """K of patches, which have a head of their own; 0: they share that of the whole views."""
    iterations: int = 3
    """Of Sinkhorn-Knopp."""
    koleo: float = 0.1
    """How much the spread of the features of whole views counts, the mean of both views (the authors' code has the sum)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.iterations >= 1, f"--method.iterations {self.iterations}: give at least 1")
        require(self.koleo >= 0, f"--method.koleo {self.koleo:g}: give 0 or more")


class DINOv2(MaskedDistillation[DINOv2Config]):
    """iBOT with untied heads, Sinkhorn-Knopp instead of centers, and features that are spread out (KoLeo).

    Sinkhorn-Knopp and KoLeo are those of the global batch, where the authors' KoLeo is that of one GPU's views.
    """

    couples_samples = True

    def build_centering(self) -> SinkhornKnopp:
        return SinkhornKnopp(self.config.prototypes, self.config.iterations)

    def build_patch_centering(self) -> SinkhornKnopp:
        return SinkhornKnopp(self.num_patch_prototypes, self.config.iterations)

    def embed_features(self, pooled: Tensor) -> Embeddings:
        return {"feature": F.normalize(pooled.float(), dim=-1)}

    def loss(self, embeddings: Embeddings, samples: Samples) -> Losses:
        losses = super().loss(embeddings, samples)
        # Each view with the same view of other samples: views of one sample are meant to be close.
        spread = torch.stack(
            [
                koleo(view, distributed.gather_with_grad(view), offset=distributed.row_offset(len(view)))
                for view in embeddings["feature"]
            ]
        ).mean()
        return {**losses, "loss": losses["loss"] + self.config.koleo * spread, "koleo": spread}
