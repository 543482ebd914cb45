"""What every encoder is. `encoders` builds one, and needs timm for it, which takes seconds to import."""

from jaxtyping import Float
from torch import Tensor, nn

from dist_contrastive.config import EncoderConfig


class Encoder(nn.Module):
    """f: image to feature.

    Attributes:
        body: the timm model, pooled and without classifier.
        feature_size: D, the number of features of one image.
        config: what it was built from.
        image_size: the side S, in pixels, of the images that it was built for.
    """

    def __init__(self, body: nn.Module, feature_size: int, config: EncoderConfig, image_size: int) -> None:
        super().__init__()
        self.body = body
        self.feature_size = feature_size
        self.config = config
        self.image_size = image_size

    def forward(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n d"]:
        """Features [N, D] of normalized images [N, 3, S, S], in the dtype of the encoder's last layer."""
        features: Tensor = self.body(images)
        return features
