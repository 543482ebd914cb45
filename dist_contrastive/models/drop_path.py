"""Stochastic depth (Huang et al. 2016, "Deep networks with stochastic depth") that replays by key."""

from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import Float, Int
from torch import Tensor, nn

from dist_contrastive.config import UserError
from dist_contrastive.rng import keep_paths


class PassKeys:
    """The keys int64 [N] of the samples of the forward pass under way, for layers that a library calls without them."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None

    @contextmanager
    def during(self, keys: Int[Tensor, " n"] | None) -> Iterator[None]:
        """Within the context a pass of the samples of `keys` is under way."""
        self.keys = keys
        try:
            yield
        finally:
            self.keys = None


class KeyedDropPath(nn.Module):
    """A residual path that is left out for some samples: which ones, is a pure function of their keys and the layer.

    In the place of timm's DropPath, which draws from torch's generator. A layer that a model calls more than once in a
    pass decides the same each time, so that all branches of a sample's block go together.
    """

    def __init__(self, probability: float, layer: int, pass_keys: PassKeys) -> None:
        super().__init__()
        self.probability = probability
        self.layer = layer
        self.pass_keys = pass_keys

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """Zero what the path adds, or scale it to keep its expectation; in eval mode the identity."""
        if not self.training or self.probability == 0:
            return x
        keys = self.pass_keys.keys
        if keys is None:
            raise ValueError("an encoder that drops paths was called in training mode without the keys of its samples")
        if len(keys) != len(x):
            raise UserError(
                f"--encoder.drop-path: the model has paths of {len(x)} parts of {len(keys)} images; give 0, or choose another "
                "--encoder.name"
            )
        kept = keep_paths(keys, self.layer, self.probability) / (1 - self.probability)
        return x * kept.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
