"""CLIP (Radford et al. 2021, "Learning transferable visual models from natural language supervision")."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn

from dist_contrastive import distributed
from dist_contrastive.batch import Samples
from dist_contrastive.config import require_positive
from dist_contrastive.losses.infonce import paired_nce
from dist_contrastive.methods.base import Embeddings, Losses, MethodSettings, Report
from dist_contrastive.methods.image_text import ImageText, ImageTextConfig
from dist_contrastive.schedules import Clock

LARGEST_SCALE = 100.0
"""Of the logits (section 2.5)."""
SUNKEN_SCALE = 2.0
"""A scale that has come down to this, or to half of where it began if that is less, says that no pair is told from others; one
that rises to the largest is as it should be."""


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
        everyones = distributed.gather_with_grad(texts)
        offset = distributed.row_offset(len(images))
        loss, of_images, of_texts = paired_nce(self._held_scale().exp() * images, everyones, offset=offset)
        return {"loss": loss, "of_images": of_images, "of_texts": of_texts}

    def _held_scale(self) -> Tensor:
        """The logarithm of the scale [1], at most that of the largest; its gradient is that of one without a limit, or it would
        stay there for good where something else than `after_step` has moved it beyond (ZeRO updates a copy of its own)."""
        held = self.log_scale.clamp(max=math.log(LARGEST_SCALE))
        return self.log_scale + (held - self.log_scale).detach()

    def after_step(self, clock: Clock, embeddings: Embeddings, done: Tensor) -> None:
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(LARGEST_SCALE))
        super().after_step(clock, embeddings, done)

    def report(self, embeddings: Embeddings, *, logged: bool) -> Report:
        scale = self._held_scale().detach()[0].exp()
        return {**super().report(embeddings, logged=logged), "logit_scale": scale}

    def alarm(self, values: Mapping[str, float], clock: Clock) -> str:
        if values["logit_scale"] > min(SUNKEN_SCALE, 0.5 / self.config.temperature):
            return ""
        return (
            f"the learnt scale of the logits has sunk to {values['logit_scale']:.2f}: pairs are not told apart; are captions "
            "those of their images? A smaller learning rate or a larger batch may help"
        )
