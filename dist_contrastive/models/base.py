"""What every encoder is. `encoders` builds one, and needs timm for it, which takes seconds to import."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dist_contrastive.config import EncoderConfig, UserError
from dist_contrastive.models.drop_path import PassKeys

BACKEND = "inductor"
"""torch.compile's: what makes code of a graph."""


def _run(body: nn.Module, images: Tensor) -> Any:
    return body(images)


class Features(NamedTuple):
    """What an encoder makes of images."""

    pooled: Float[Tensor, "n d"]
    """One feature of each image, in the dtype of the encoder's last layer."""
    tokens: Float[Tensor, "n t e"]
    """One feature of each place, row by row: of a vision transformer the patches after the norm that its tokens get, without
    class and register tokens; of a convolutional network the last map."""


class Encoder(nn.Module):
    """f: image to feature.

    Attributes:
        body: the timm model, pooled and without classifier.
        feature_size: D, the number of features of one image.
        config: what it was built from.
        image_size: the side S, in pixels, of the images that it was built for. Vision transformers (timm's VisionTransformer
            and Eva) take any other multiple of their patches, too, for which their position embeddings are interpolated.
        patch_size: side in pixels of the patches that the tokens stand for; None where tokens are no patches.
    """

    def __init__(
        self,
        body: nn.Module,
        feature_size: int,
        config: EncoderConfig,
        image_size: int,
        *,
        patch_embedding: str | None,
        pass_keys: PassKeys,
    ) -> None:
        """`patch_embedding`: the name in `body` of timm's PatchEmbed, where tokens are patches; `pass_keys`: what the body's
        `KeyedDropPath` layers read."""
        super().__init__()
        self.body = body
        self.feature_size = feature_size
        self.config = config
        self.image_size = image_size
        # By name: a module that two others hold would be in a checkpoint twice.
        self._patch_embedding = patch_embedding
        self._pass_keys = pass_keys
        self._training_pass = _run

    def compile_training(self) -> None:
        """Run `forward` in training mode as compiled code from now on; each shape of images is compiled once, as it comes.

        Evaluation, which has batches of other sizes, stays as it is.
        """
        self._training_pass = torch.compile(_run, backend=BACKEND, dynamic=False)

    def forward(self, images: Float[Tensor, "n 3 s s"], keys: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n d"]:
        """Features [N, D] of normalized images [N, 3, S, S], in the dtype of the encoder's last layer.

        `keys` int64 [N] are the images', for stochastic depth, which can't be had in training mode without them.
        """
        with self._pass_keys.during(keys):
            run = self._training_pass if self.training else _run
            return self._vectors(run(self.body, images), len(images))

    def features(
        self,
        images: Float[Tensor, "n 3 s s"],
        *,
        keys: Int[Tensor, " n"] | None = None,
        mask: Bool[Tensor, "n t"] | None = None,
        mask_token: Float[Tensor, " e"] | None = None,
    ) -> Features:
        """As `forward`, with the tokens beside the pooled feature.

        Where `mask` is True, `mask_token` takes the place of a patch's embedding, before position embeddings are added
        (Bao et al. 2022, "BEiT", section 2.3; Zhou et al. 2022, "iBOT", section 3.1).

        `UserError` for a mask where the encoder has no patches, and where its features have no places.
        """
        body: Any = self.body
        with self._masked(mask, mask_token), self._pass_keys.during(keys):
            maps = body.forward_features(images)
            pooled = body.forward_head(maps)
        return Features(self._vectors(pooled, len(images)), self._tokens(maps))

    @property
    def patch_size(self) -> int | None:
        if self._patch_embedding is None:
            return None
        embedding: Any = self.body.get_submodule(self._patch_embedding)
        return int(embedding.patch_size[0])

    @property
    def width(self) -> int:
        """How many numbers a patch's embedding has; `UserError` where there are no patches."""
        self._patches_side("has no patches")
        body: Any = self.body
        return int(body.embed_dim)

    def grid(self, image_size: int) -> int:
        """How many patches lie along one side of an image of `image_size` pixels; `UserError` where there are no patches."""
        return image_size // self._patches_side("has no patches")

    def _patches_side(self, problem: str) -> int:
        if self.patch_size is None:
            raise UserError(
                f"--encoder.name {self.config.name} {problem}; choose a vision transformer of timm, such as vit_small_patch16_224"
            )
        return self.patch_size

    @contextmanager
    def _masked(self, mask: Tensor | None, mask_token: Tensor | None) -> Iterator[None]:
        """Within the context the embeddings of masked patches are the token."""
        if mask is None:
            yield
            return
        self._patches_side("has no patches that could be masked")
        assert self._patch_embedding is not None
        assert mask_token is not None, "a mask needs a token to put in"
        token = mask_token

        def replace(module: nn.Module, inputs: tuple[Any, ...], embeddings: Tensor) -> Tensor:
            masked = mask.view(*embeddings.shape[:-1], 1)  # embeddings: [N, T, E] or [N, H, W, E]
            return torch.where(masked, token.to(embeddings.dtype), embeddings)

        hook = self.body.get_submodule(self._patch_embedding).register_forward_hook(replace)
        try:
            yield
        finally:
            hook.remove()

    def _vectors(self, pooled: Any, num_images: int) -> Tensor:
        """`pooled`, if it is what `feature_size` promises; timm's models need not have a feature for each image."""
        shape = list(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
        if shape != [num_images, self.feature_size]:
            raise ValueError(
                f"it gives {shape} for {num_images} images, not a feature of {self.feature_size} numbers for each"
            )
        features: Tensor = pooled
        return features

    def _tokens(self, maps: Any) -> Tensor:
        """Tokens [N, T, E] of what timm's `forward_features` gives: maps or sequences."""
        body: Any = self.body
        num_prefix = getattr(body, "num_prefix_tokens", None)
        unknown_prefix = num_prefix is None and getattr(body, "cls_token", None) is not None
        if not isinstance(maps, Tensor) or maps.ndim not in (3, 4) or unknown_prefix:
            raise UserError(
                f"--encoder.name {self.config.name} has no features of places; choose a vision transformer or a ResNet"
            )
        if maps.ndim == 3:
            return maps[:, num_prefix or 0 :]
        is_channels_last = getattr(body, "output_fmt", "NCHW") == "NHWC"
        return maps.flatten(1, 2) if is_channels_last else maps.flatten(2).transpose(1, 2)
