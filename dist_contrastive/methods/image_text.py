"""Image-text contrast: an image tower and a text tower with one space of embeddings. What CLIP and SigLIP share."""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_contrastive.batch import Batch
from dist_contrastive.config import HeadConfig, MethodConfig, TextConfig
from dist_contrastive.losses.statistics import positive_cosine
from dist_contrastive.methods.base import Embeddings, Method, MethodSettings, Report
from dist_contrastive.models.text import TextEncoder


@dataclass(frozen=True)
class ImageTextConfig(MethodConfig):
    """Two towers."""

    projector: HeadConfig = field(default_factory=lambda: HeadConfig(layers=1, output_size=512))
    """From the image's feature to the embedding; the text's has a linear layer of the same size."""
    text: TextConfig = field(default_factory=TextConfig)

    @property
    def text_tower(self) -> TextConfig:
        return self.text


ImageTextT = TypeVar("ImageTextT", bound=ImageTextConfig)


class ImageText(Method[ImageTextT], Generic[ImageTextT]):
    """An image's embedding and its caption's are close, those of different samples far; both of unit length.

    Attributes: `text`, the text tower; `text_projector`.
    """

    min_views = 1
    max_views = 1
    needs_text = True

    def __init__(self, settings: MethodSettings[ImageTextT]) -> None:
        super().__init__(settings)
        self.text = TextEncoder(self.config.text)
        self.text_projector = nn.Linear(self.text.feature_size, self.config.projector.output_size, bias=False)

    def embed(self, batch: Batch) -> Embeddings:
        assert batch.text is not None, "the dataset has captions"
        return {"z": F.normalize(self.project(batch), dim=-1), "text": self.embed_text(batch.text)[None]}

    def embeddings(self, features: Tensor) -> Tensor:
        return F.normalize(super().embeddings(features), dim=-1)

    @property
    def text_tower(self) -> nn.ModuleDict:
        """What maps captions to embeddings."""
        return nn.ModuleDict({"text": self.text, "projector": self.text_projector})

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Embeddings [N, E] of captions int64 [N, L], of unit length, in float32."""
        return F.normalize(self.text_projector(self.text(tokens)).float(), dim=-1)

    def report(self, embeddings: Embeddings, *, logged: bool) -> Report:
        pair = torch.cat([embeddings["z"], embeddings["text"]]).detach()
        return {**super().report(embeddings, logged=logged), "positive_cosine": positive_cosine(pair)}
