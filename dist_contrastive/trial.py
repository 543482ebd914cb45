"""An encoder, its heads and a method are tried at the configured image size before a run begins."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from torch import nn

from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import TrainConfig, UserError
from dist_contrastive.methods import Method
from dist_contrastive.trainer import build_method

ENOUGH = 2
"""Samples with which each method can compute a forward pass, whatever its normalization."""
SIZE_STEPS = (16, 32, 64)
"""Image sizes that are tried in search of one that fits are multiples of these."""


class _Unseen(Exception):
    """Patches of `patch` pixels, one each `stride` pixels, do not end where images of `size` pixels do."""

    def __init__(self, size: int, patch: int, stride: int) -> None:
        self.size, self.patch, self.stride = size, patch, stride


def fewest_samples(config: TrainConfig) -> int:
    """How few samples a forward pass of the method can take, by trying: 1, or 2 where BatchNorm would see a single value.

    With `--encoder.norm sync` samples of all ranks together. The method, encoder and heads included, embeds images of the
    configured size and sends a gradient back, without data: on the meta device, in less than a second, and on the CPU
    where a model can't be computed there. `UserError` where it can't, with image sizes near by that fit. Leaves torch's random
    state as it was.
    """
    problem: Exception | None = None
    for device in ("meta", "cpu"):
        try:
            return _try(config, device)
        except UserError:
            raise
        except Exception as error:  # whatever a library says of sizes that it can't take
            problem = error
        if isinstance(problem, _Unseen):
            break
    assert problem is not None
    raise UserError(_describe(config, problem))


def _try(config: TrainConfig, device: str) -> int:
    """Embed blank samples and back-propagate, encode whole images as a probe does, then see whether a single sample will do.

    What `fewest_samples` returns; raises whatever the model does.
    """
    encoder, side = config.encoder, config.data.image_size
    if encoder.norm == "sync":  # takes the same sizes, and asks no other rank
        encoder = replace(encoder, norm="batch")
    with torch.random.fork_rng(devices=[]), torch.device(device):
        method = build_method(replace(config, encoder=encoder)).train()
        samples = Samples(labels=torch.zeros(ENOUGH, dtype=torch.int64), indices=torch.arange(ENOUGH), epoch=0)
        layout, tower = config.augment.layout(side), config.method.text_tower
        text = torch.ones(ENOUGH, tower.context, dtype=torch.int64) if tower else None
        batch = Batch(tuple(torch.zeros(len(views), ENOUGH, 3, size, size) for size, _, views in layout), samples, text)
        with _watched(method):
            embeddings = [z for z in method.embed_all(batch).values() if z.requires_grad]
            torch.autograd.backward(embeddings, [torch.ones_like(z) for z in embeddings])
            with torch.no_grad():
                method.eval().encoder(torch.zeros(ENOUGH, 3, side, side))
        try:
            with torch.no_grad():
                method.train().embed_all(batch.part(slice(1)))
        except ValueError:  # BatchNorm's, of a single value for each channel
            return ENOUGH
        return 1


@contextmanager
def _watched(method: Method) -> Iterator[None]:
    """Within the context an encoder that leaves pixels out raises."""

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        conv = module.proj if isinstance(module, PatchEmbed) else module
        assert isinstance(conv, nn.Conv2d)
        (patch, _), (stride, _), padding = conv.kernel_size, conv.stride, conv.padding
        size = inputs[0].shape[-1]
        # A convolution of 3 pixels is no grid of patches: what it leaves at the border is one pixel.
        is_grid = stride > 1 and (patch > 3 or stride >= patch) and padding in ((0, 0), "valid")
        if is_grid and (size < patch or (size - patch) % stride):
            raise _Unseen(size, patch, stride)

    # timm's patch embedding would refuse the size before its convolution sees it, in words of its own.
    reading = [
        m
        for m in method.encoder.body.modules()
        if isinstance(m, PatchEmbed) or (isinstance(m, nn.Conv2d) and m.in_channels == 3)
    ]
    hooks = [module.register_forward_pre_hook(before) for module in reading]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _describe(config: TrainConfig, problem: Exception) -> str:
    """One line that says what does not fit, and what would."""
    size, name = config.data.image_size, config.encoder.name
    sizes = [of_size.size for of_size in config.augment.layout(size)]
    if isinstance(problem, _Unseen) and problem.size in (size, *sizes):
        size = problem.size
        patch, stride = problem.patch, problem.stride
        below = patch + (size - patch) // stride * stride
        fits = f"{below} or {below + stride}" if below >= patch else f"such as {patch}"
        multiples = f"a multiple of {patch}" if patch == stride else f"{patch} and any number of times {stride} more"
        return (
            f"{config.size_option(size)}: {name} cuts images into patches of {patch} pixels and would never see the rest; give "
            f"{multiples}, {fits}"
        )
    if isinstance(problem, _Unseen):
        return (
            f"--encoder.name {name} cuts what {config.method.name} gives it, {problem.size} pixels of images of {size}, into "
            f"patches of {problem.patch} pixels and would never see the rest; choose another encoder"
        )
    reason = (str(problem).strip() or type(problem).__name__).splitlines()[0].rstrip(".")
    if len(sizes) > 1 and _fits(replace(config, augment=config.augment.of_first_size(size))):
        return (
            f"{config.size_option(sizes[1])}: {name}, built for images of {size} pixels, can't be trained on others "
            f"({reason}); choose another --encoder.name, or leave out the smaller views with --augment.count 0 for their group"
        )
    fits = " or ".join(str(other) for other in _sizes_that_fit(config))
    advice = f"give {fits}" if fits else "choose another --encoder.name"
    return f"--data.image-size {size}: {name} can't be trained on such images with {config.method.name} ({reason}); {advice}"


def _sizes_that_fit(config: TrainConfig) -> list[int]:
    """The nearest image sizes below and above that the method can take, of those that are tried."""
    size = config.data.image_size
    multiples = {step * (size // step + offset) for step in SIZE_STEPS for offset in (0, 1, 2)}
    pretrained = timm.get_pretrained_cfg(config.encoder.name, allow_unregistered=True)
    if pretrained is not None:
        multiples.add(pretrained.input_size[-1])

    def fits(other: int) -> bool:
        return _fits(replace(config, data=replace(config.data, image_size=other)))

    below = (other for other in sorted(multiples, reverse=True) if 0 < other < size)
    above = (other for other in sorted(multiples) if other > size)
    found = (next(filter(fits, others), None) for others in (below, above))
    return [other for other in found if other is not None]


def _fits(config: TrainConfig) -> bool:
    """Whether it can be trained, as far as shapes tell."""
    try:
        _try(config, "meta")
    except Exception:  # whatever a library says of sizes that it can't take
        return False
    return True
