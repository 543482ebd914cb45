"""The tower of captions: a transformer over tokens."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dist_contrastive.config import PADDING, TextConfig


class TextEncoder(nn.Module):
    """CLIP's text transformer (Radford et al. 2021, section 2.4): causal, in pre-norm, its feature is that of the last token.

    Attributes: `feature_size`, the transformer's width; `config`.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.feature_size = config.width
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Parameter(torch.empty(config.context, config.width))
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            dim_feedforward=4 * config.width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(config.width)
        self._initialize()

    def _initialize(self) -> None:
        """As the authors' code (`CLIP.initialize_parameters`)."""
        width, layers = self.config.width, self.config.layers
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        residual = width**-0.5 * (2 * layers) ** -0.5
        for name, parameter in self.blocks.named_parameters():
            if name.endswith(("out_proj.weight", "linear2.weight")):
                nn.init.normal_(parameter, std=residual)
            elif name.endswith("in_proj_weight"):
                nn.init.normal_(parameter, std=width**-0.5)
            elif name.endswith("linear1.weight"):
                nn.init.normal_(parameter, std=(2 * width) ** -0.5)

    def forward(self, tokens: Int[Tensor, "n l"]) -> Float[Tensor, "n d"]:
        """Features [N, D] of captions int64 [N, L], which end in padding; L is at most the context."""
        length = tokens.shape[1]
        x = self.tokens(tokens) + self.positions[:length]
        # No token sees what follows it, so that padding does not matter.
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=x.device, dtype=x.dtype)
        x = self.norm(self.blocks(x, mask=mask, is_causal=True))
        # The last token that is no padding: a given tokenizer may have a token of the same number within captions.
        last = length - 1 - (tokens != PADDING).flip(1).to(torch.int8).argmax(1)
        return x.gather(1, last[:, None, None].expand(-1, 1, x.shape[-1])).squeeze(1)
