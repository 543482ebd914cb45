"""VICReg (Bardes, Ponce and LeCun 2022, "VICReg: variance-invariance-covariance regularization")."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import HeadConfig, MethodConfig, require
from dist_contrastive.losses.redundancy import vicreg
from dist_contrastive.methods.base import Embeddings, Losses, Method


@dataclass(frozen=True)
class VICRegConfig(MethodConfig):
    """Defaults of section 4.2."""

    name: Annotated[str, tyro.conf.Fixed] = "vicreg"
    projector: HeadConfig = field(default_factory=lambda: HeadConfig(layers=3, hidden_size=8192, output_size=8192))
    invariance: float = 25.0
    """λ: weight of the distance between views."""
    variance: float = 25.0
    """μ: weight of dimensions whose standard deviation is below 1."""
    covariance: float = 1.0
    """ν: weight of what different dimensions have in common."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("invariance", "variance", "covariance"):
            require(getattr(self, name) >= 0, f"--method.{name} {getattr(self, name)}: give 0 or more")
        require(
            self.invariance > 0 or self.variance > 0 or self.covariance > 0,
            "--method.invariance 0 with --method.variance 0 and --method.covariance 0: a loss of nothing; give one of them more",
        )


class VICReg(Method[VICRegConfig]):
    """Views close, dimensions spread out and unlike one another, over the global batch."""

    max_views = 2

    def embed(self, batch: Batch) -> Embeddings:
        return {"z": self.project(batch)}

    def loss(self, embeddings: Embeddings, samples: Samples) -> Losses:
        one, other = embeddings["z"].unbind(0)
        invariance, variance, covariance = vicreg(
            one,
            other,
            invariance=self.config.invariance,
            variance=self.config.variance,
            covariance=self.config.covariance,
        )
        return {
            "loss": invariance + variance + covariance,
            "invariance": invariance,
            "variance": variance,
            "covariance": covariance,
        }
