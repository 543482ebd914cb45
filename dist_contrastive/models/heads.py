"""Heads between the feature and the loss."""

import itertools
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dist_contrastive.config import HeadConfig
from dist_contrastive.models.sync_norm import SyncBatchNorm
from dist_contrastive.rng import keep_mask


class KeyedDropout(nn.Module):
    """Dropout whose mask is a pure function of the sample's key, so that it replays at any number of ranks."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, features: Float[Tensor, "n d"], keys: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Drop features [N, D] by the keys int64 [N] of their samples; in eval mode the identity."""
        if not self.training or self.probability == 0:
            return features
        kept = keep_mask(keys, features.shape[1], self.probability)
        return features * kept / (1 - self.probability)


def build_head(config: HeadConfig, input_size: int, norm: Literal["batch", "sync", "group"]) -> nn.Sequential:
    """A head from [N, input_size] to [N, E]: 1 to 3 linear layers with normalization and activation between them.

    As SimCLR's projector (section 2.1 and the authors' code, `model_util.projection_head`): hidden layers without bias
    before their normalization, no non-linearity after the last layer. With `norm` group the head uses LayerNorm, as
    features have no pixels to share a group with.
    """
    hidden_size = config.hidden_size or input_size
    sizes = [input_size, *[hidden_size] * (config.layers - 1)]
    modules: list[nn.Module] = []
    for size_in, size_out in itertools.pairwise(sizes):
        modules.append(nn.Linear(size_in, size_out, bias=not config.hidden_norm))
        if config.hidden_norm:
            modules.append(_norm(norm, size_out))
        modules.append(nn.ReLU(inplace=True) if config.activation == "relu" else nn.GELU())
    modules.append(nn.Linear(sizes[-1], config.output_size, bias=not config.hidden_norm))
    if config.output_norm:
        modules.append(_norm(norm, config.output_size, affine=False))
    return nn.Sequential(*modules)


def build_predictor(config: HeadConfig, size: int, norm: Literal["batch", "sync", "group"]) -> nn.Sequential:
    """A head from embeddings [N, size] to predictions of embeddings, of the same size; `config.output_size` does not count."""
    return build_head(replace(config, output_size=size), size, norm)


class PrototypeHead(nn.Module):
    """A head to embeddings of unit length, and the prototypes that they are compared with by cosine (DINO, SwAV).

    The prototypes are DINO's weight-normed last layer with its length fixed to 1 (Caron et al. 2021, appendix C), SwAV's that are
    normalized before each step (Caron et al. 2020, appendix A). `forward` does not multiply by them: losses do, block by block.
    Attributes: `of_patches`, a head for patches, where they have one of their own (iBOT, DINOv2).
    """

    def __init__(self, head: nn.Module, size: int, num_prototypes: int) -> None:
        """`head` gives embeddings of `size` numbers."""
        super().__init__()
        self.head = head
        self.of_patches: PrototypeHead | None = None
        self.directions = nn.Parameter(torch.empty(num_prototypes, size))
        nn.init.trunc_normal_(self.directions, std=0.02)
        for module in head.modules():
            if isinstance(module, nn.Linear):  # as the authors' code of DINO
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
        """Embeddings [N, E] of unit length, in float32: in fp16 the square of a length can overflow."""
        return F.normalize(self.head(features).float(), dim=-1)

    def prototypes(self) -> Float[Tensor, "k e"]:
        """[K, E] of unit length."""
        return F.normalize(self.directions.float(), dim=-1)


def _norm(norm: Literal["batch", "sync", "group"], size: int, *, affine: bool = True) -> nn.Module:
    if norm == "group":
        return nn.LayerNorm(size, elementwise_affine=affine)
    return {"batch": nn.BatchNorm1d, "sync": SyncBatchNorm}[norm](size, affine=affine)
