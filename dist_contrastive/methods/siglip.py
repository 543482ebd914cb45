"""SigLIP (Zhai et al. 2023, "Sigmoid loss for language image pre-training")."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn

from dist_contrastive import distributed
from dist_contrastive.batch import Samples
from dist_contrastive.config import require, require_positive
from dist_contrastive.losses.sigmoid import sigmoid_loss
from dist_contrastive.methods.base import Embeddings, Losses, MethodSettings, Report
from dist_contrastive.methods.image_text import ImageText, ImageTextConfig

FAR_BIAS = 2.0
"""From where on a bias is not about the one with which both kinds of pairs weigh the same: e² times as much."""


@dataclass(frozen=True)
class SigLIPConfig(ImageTextConfig):
    """Defaults of section 3.2."""

    name: Annotated[str, tyro.conf.Fixed] = "siglip"
    scale: float = 10.0
    """Multiplies the cosine similarities at the start; it is learnt."""
    bias: float | Literal["auto"] = "auto"
    """Is added to the logits at the start; it is learnt. auto: -ln(global batch - 1), with which both kinds of pairs weigh the
    same (the paper has -10, for batches of 32,768)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("--method.scale", self.scale)
        require(
            self.bias == "auto" or self.bias <= 0,
            f"--method.bias {self.bias}: give a number that is not above 0, or auto",
        )

    def initial_bias(self, global_batch: int) -> float:
        return -math.log(global_batch - 1) if self.bias == "auto" else self.bias

    def remarks(self, num_train: int, num_seen: int, global_batch: int) -> list[str]:
        balanced = replace(self, bias="auto").initial_bias(global_batch)
        if abs(self.initial_bias(global_batch) - balanced) <= FAR_BIAS:
            return []
        return [
            f"--method.bias {self.bias:g}: with a global batch of {global_batch:,} both kinds of pairs weigh the same at "
            f"{balanced:.2f}; the first steps go into the bias. auto takes that number"
        ]


class SigLIP(ImageText[SigLIPConfig]):
    """Of each image and each caption of the global batch it is told by itself whether they belong together."""

    def __init__(self, settings: MethodSettings[SigLIPConfig]) -> None:
        super().__init__(settings)
        bias = self.config.initial_bias(settings.global_batch)
        # With an axis: DeepSpeed takes no parameters without.
        self.log_scale = nn.Parameter(torch.tensor([math.log(self.config.scale)]))
        self.bias = nn.Parameter(torch.tensor([bias]))

    def loss(self, embeddings: Embeddings, samples: Samples) -> Losses:
        images, texts = embeddings["z"][0], embeddings["text"][0]
        # The bias is one more dimension, against a 1.
        anchors = torch.cat([self.log_scale.exp() * images, self.bias.expand(len(images), 1)], dim=1)
        others = torch.cat([texts, torch.ones_like(texts[:, :1])], dim=1)
        offset = distributed.row_offset(len(images))
        return {"loss": sigmoid_loss(anchors, distributed.gather_with_grad(others), offset=offset)}

    def report(self, embeddings: Embeddings, *, logged: bool) -> Report:
        learnt: dict[str, Tensor] = {
            "logit_scale": self.log_scale.detach()[0].exp(),
            "logit_bias": self.bias.detach()[0],
        }
        return {**super().report(embeddings, logged=logged), **learnt}
