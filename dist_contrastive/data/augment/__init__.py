"""Random views, made on the batch's device: one pass from the loader's uint8 crops to normalized float views, channels last.

The operations, their order and default strengths are SimCLR's (Chen et al. 2020, appendix A): the crop comes from the
loader, then horizontal flip, colour jitter, grayscale, Gaussian blur; solarization follows as in BYOL (Grill et al.
2020, appendix B), whose two views differ in the probabilities of blur and solarization. Each operation computes what
torchvision's functional form does with the same parameters on float images.

Which images are flipped, jittered or blurred, and how much, was drawn where the crops were cut (`draws`), from (seed, epoch,
sample index, view): nothing asks the device, and an image's result does not depend on the batch around it.
"""

import torch
from torch import Tensor

from dist_contrastive.batch import Batch
from dist_contrastive.config import AugmentConfig
from dist_contrastive.data.augment.cpu import augment_on_cpu


@torch.library.custom_op("dist_contrastive::augment", mutates_args=(), device_types="cpu")
def _augment(images: Tensor, draws: Tensor, mean: list[float], std: list[float], dtype: torch.dtype) -> Tensor:
    """`images` uint8 [n, S, S, 3] as `draws` float32 [n, NUM_DRAWS] say: `dtype` [n, 3, S, S], channels last."""
    return augment_on_cpu(images, draws, mean, std).to(dtype)


@_augment.register_fake
def _(images: Tensor, draws: Tensor, mean: list[float], std: list[float], dtype: torch.dtype) -> Tensor:
    return torch.empty(images.shape, dtype=dtype, device=images.device).permute(0, 3, 1, 2)


@_augment.register_kernel("cuda")
def _(images: Tensor, draws: Tensor, mean: list[float], std: list[float], dtype: torch.dtype) -> Tensor:
    from dist_contrastive.data.augment.cuda import augment_on_cuda  # needs Triton, which not every torch comes with

    return augment_on_cuda(images, draws, mean, std, dtype)


class Augment:
    """Turns the loader's crops into augmented views: `augment(batch, device) -> Batch`."""

    def __init__(self, config: AugmentConfig, dtype: torch.dtype = torch.float32) -> None:
        """Views are made in `dtype`; what computes them is float32."""
        self._mean, self._std = list(config.mean), list(config.std)
        self._dtype = dtype

    def __call__(self, batch: Batch, device: torch.device) -> Batch:
        """`batch` with views uint8 [V, B, S, S, 3] and their draws as one on `device`, with normalized views [V, B, 3, S, S].

        The views are channels-last in memory.
        """
        assert batch.draws is not None, "nothing was drawn for these views"
        assert sum(map(len, batch.views)) == len(batch.draws), "the loader cut another number of views"
        augmented, first = [], 0
        for cropped in batch.views:
            draws = batch.draws[first : first + len(cropped)]
            first += len(cropped)
            images = _augment(_flat_on(device, cropped), _flat_on(device, draws), self._mean, self._std, self._dtype)
            augmented.append(images.unflatten(0, cropped.shape[:2]))
        text = None if batch.text is None else batch.text.to(device, non_blocking=True)
        return Batch(tuple(augmented), batch.samples.to(device), text)


def _flat_on(device: torch.device, x: Tensor) -> Tensor:
    """`x` [V, B, ...] as [V·B, ...] on `device`, contiguous."""
    if device.type == "cpu" or x.device.type == device.type:  # what a resident loader has cut is there already
        return x.to(device).flatten(0, 1).contiguous()
    moved = torch.empty(x.shape, dtype=x.dtype, device=device)
    # Of a micro-batch only what belongs to one view is in one piece of the loader's pinned memory, which the device reads by
    # itself; pieces would first be put together on the host.
    for target, source in zip(moved, x, strict=True):
        target.copy_(source, non_blocking=True)
    return moved.flatten(0, 1)
