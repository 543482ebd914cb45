"""Where the class token looks."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dist_contrastive.models.base import Encoder


@torch.no_grad()
def last_attention(encoder: Encoder, images: Tensor) -> Tensor | None:
    """The class token's attention [N, heads, T] to the patches in the last block (Caron et al. 2021, "DINO", figure 1).

    Of images [N, 3, S, S] and an encoder in eval mode. What is missing to a sum of 1 is the attention to class and register
    tokens. None where the encoder has no patches, no class token, or no attention of torch's.
    """
    assert not encoder.training
    body: Any = encoder.body
    if encoder.patch_size is None or getattr(body, "cls_token", None) is None:
        return None
    with _LastQueriesAndKeys() as seen:
        encoder(images)
    num_patches = encoder.grid(images.shape[-1]) ** 2
    if seen.last is None or seen.last[1].shape[-2] != body.num_prefix_tokens + num_patches:
        return None
    return _first_querys_attention(*seen.last)[..., -num_patches:]


class _LastQueriesAndKeys(TorchFunctionMode):
    """Within the context: queries, keys, bias and scale of the latest attention, which torch fuses so that it is never seen.

    To be had here, they are those of any of timm's vision transformers: normalized, rotated, with biases for positions.
    """

    last: tuple[Tensor, Tensor, Tensor | None, float | None] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key = args[:2]
            self.last = query, key, kwargs.get("attn_mask"), kwargs.get("scale")
        return func(*args, **kwargs)


def _first_querys_attention(query: Tensor, key: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """Softmax [N, heads, keys] of the first query's logits; `query` and `key` [N, heads, tokens, size of a head]."""
    logits = (query[..., :1, :] @ key.transpose(-2, -1)).float() * (scale or 1 / math.sqrt(query.shape[-1]))
    if bias is not None:
        logits = logits + bias[..., :1, :]
    return logits.softmax(-1)[..., 0, :]
