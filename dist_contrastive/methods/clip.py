"""CLIP (Radford et al. 2021, "Learning transferable visual models from natural language supervision")."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from torch import nn

from dist_contrastive import distributed
from dist_contrastive.batch import Samples
from dist_contrastive.config import require_positive
from dist_contrastive.losses.infonce import indexed_nce
from dist_contrastive.methods.base import Embeddings, Losses, MethodSettings, Report
from dist_contrastive.methods.image_text import ImageText, ImageTextConfig
from dist_contrastive.schedules import Clock

LARGEST_SCALE = 100.0
"""Of the logits (section 2.5)."""
SUNKEN_SCALE = 2.0
"""A scale that has come down to this says that no pair is told from others; one that rises to the largest is as it should be."""


@dataclass(frozen=True)
class CLIPConfig(ImageTextConfig):
    """Defaults of section 2.5."""

    name: Annotated[str, tyro.conf.Fixed] = "clip"
    temperature: float = 0.07
    """Divides the cosine similarities at the start; it is learnt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("--method.temperature", self.temperature)


class CLIP(ImageText[CLIPConfig]):
    """Each image looks for its caption among those of the global batch, and each caption for its image (figure 3)."""

    def __init__(self, settings: MethodSettings[CLIPConfig]) -> None:
        super().__init__(settings)
        # With an axis: DeepSpeed takes no parameters without.
        self.log_scale = nn.Parameter(torch.tensor([-math.log(self.config.temperature)]))

    def loss(self, embeddings: Embeddings, samples: Samples) -> Losses:
        images, texts = embeddings["z"][0], embeddings["text"][0]
        own = torch.arange(len(images), device=images.device) + distributed.row_offset(len(images))
        scale = self.log_scale.clamp(max=math.log(LARGEST_SCALE)).exp()
        of_images = indexed_nce(scale * images, distributed.gather_with_grad(texts), own, temperature=1.0)
        of_texts = indexed_nce(scale * texts, distributed.gather_with_grad(images), own, temperature=1.0)
        return {"loss": (of_images + of_texts) / 2, "of_images": of_images, "of_texts": of_texts}

    def report(self, embeddings: Embeddings, *, logged: bool) -> Report:
        scale = self.log_scale.detach()[0].exp().clamp(max=LARGEST_SCALE)
        return {**super().report(embeddings, logged=logged), "logit_scale": scale}

    def alarm(self, values: Mapping[str, float], clock: Clock) -> str:
        if values["logit_scale"] > SUNKEN_SCALE:
            return ""
        return (
            f"the learnt scale of the logits has sunk to {values['logit_scale']:.2f}: pairs are not told apart; are captions "
            "those of their images? A smaller learning rate or a larger batch may help"
        )
