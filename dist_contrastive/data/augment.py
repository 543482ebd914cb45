"""Random views, made on the batch's device: one batched pass with each image's own parameters.

The operations, their order and default strengths are SimCLR's (Chen et al. 2020, appendix A): the crop comes from the
loader, then horizontal flip, colour jitter, grayscale, Gaussian blur; solarization follows as in BYOL (Grill et al.
2020, appendix B), whose two views differ in the probabilities of blur and solarization. Each operation computes what
torchvision's functional form does with the same parameters on float images.

Which images are flipped, jittered or blurred, and how much, is drawn on the CPU from (seed, epoch, sample index, view):
a few numbers an image, moved to the device in one go. So the subsets are known without asking the device, which never
makes the host wait, and an image's result does not depend on the batch around it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_contrastive import rng
from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import AugmentConfig, ViewConfig
from dist_contrastive.rng import Stream

# Rec. 601 luma, in the digits that torchvision uses.
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
# The order in which torchvision's ColorJitter numbers its four operations.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
# Images of about this many values (1 MiB of float32) are taken at a time on the CPU, so that they stay in a core's
# cache from the first operation to the last; on an accelerator the whole batch is one chunk.
CPU_CHUNK_VALUES = 1 << 18


def horizontal_flip(images: Tensor) -> Tensor:
    """`images` float [N, 3, S, S] mirrored left to right."""
    return images.flip(-1)


def gray(images: Tensor) -> Tensor:
    """The luma of `images` float [N, 3, S, S] as [N, 1, S, S]."""
    red, green, blue = images.unbind(1)
    return red.mul(GRAY_WEIGHTS[0]).add_(green, alpha=GRAY_WEIGHTS[1]).add_(blue, alpha=GRAY_WEIGHTS[2]).unsqueeze(1)


def grayscale(images: Tensor) -> Tensor:
    """`images` float [N, 3, S, S] without colour: three equal channels, as a view of one."""
    return gray(images).expand_as(images)


def blend_weights(operation: Tensor, factor: Tensor) -> Tensor:
    """The weights [N, 3] with which `blend` adjusts brightness, contrast or saturation by `factor` float [N].

    `operation` int [N] is BRIGHTNESS, CONTRAST, SATURATION or, where nothing is to change, HUE.
    """
    zero = torch.zeros_like(factor)
    return torch.stack(
        [
            torch.where(operation == HUE, 1.0, factor),
            torch.where(operation == SATURATION, 1 - factor, zero),
            torch.where(operation == CONTRAST, 1 - factor, zero),
        ],
        dim=-1,
    )


def blend(images: Tensor, weights: Tensor) -> Tensor:
    """clamp(a · x + b · gray(x) + c · mean of gray(x)) for `images` x float [N, 3, S, S]; `weights` [N, 3] are a, b, c.

    Brightness blends with black (b = c = 0), saturation with the luma (b = 1 - a), contrast with its mean (c = 1 - a).
    Changes `images` and returns it.
    """
    own, of_gray, of_mean = (column.view(-1, 1, 1, 1) for column in weights.unbind(1))
    luma = gray(images)
    # Row means first: a reduction over all of a single image could be split otherwise than over one of many.
    mean = luma.mean(-1, keepdim=True).mean(-2, keepdim=True)
    return images.mul_(own).add_(luma.mul_(of_gray).add_(mean * of_mean)).clamp_(0, 1)


def _where(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`torch.where` with a float `condition` of 0 and 1: exact, and 20 times as fast as the boolean form on the CPU."""
    return torch.lerp(no, yes, condition)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of `images` float [N, 3, S, S] in [0, 1] by `shift` float [N], in turns (-0.5 to 0.5).

    The turn keeps value v = max and chroma c = max - min of HSV, so a channel becomes v - c · (1 - share of the hue in
    that channel), which is piecewise linear in the hue; a grey pixel has c = 0 and stays as it is.
    """
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    scale = chroma.clamp(min=torch.finfo(images.dtype).tiny).reciprocal_()
    is_red = torch.eq(value, red, out=torch.empty_like(value))
    is_green = torch.eq(value, green, out=torch.empty_like(value))
    # In sixths of a turn from red. Where two channels are both the largest, their branches agree.
    from_green = (blue - red).mul_(scale).add_(2)
    from_blue = (red - green).mul_(scale).add_(4)
    hue = _where(is_red, (green - blue).mul_(scale), _where(is_green, from_green, from_blue))
    hue.add_(shift.view(-1, 1, 1), alpha=6)
    hue.sub_(hue.div(6).floor_(), alpha=6)
    out = torch.empty_like(images)
    torch.sub(hue, 3, out=out[:, 0]).abs_().sub_(1)
    torch.sub(hue, 2, out=out[:, 1]).abs_().neg_().add_(2)
    torch.sub(hue, 4, out=out[:, 2]).abs_().neg_().add_(2)
    return out.clamp_(0, 1).sub_(1).mul_(chroma.unsqueeze(1)).add_(value.unsqueeze(1))


def blur_size(side: int) -> int:
    """The blur's kernel for views of `side` pixels: the odd number nearest to a tenth of the side, at least 3."""
    return max(3, 2 * round((side / 10 - 1) / 2) + 1)


def gaussian_kernels(sigma: Tensor, size: int) -> Tensor:
    """Half kernels [N, size // 2 + 1] of `sigma` float [N] pixels, the centre first; both halves together sum to 1."""
    distance = torch.arange(size // 2 + 1, dtype=sigma.dtype, device=sigma.device)
    half = torch.exp(-0.5 * (distance / sigma[:, None]).square())
    return half / (2 * half.sum(1, keepdim=True) - half[:, :1])


def blur_matrices(kernels: Tensor, side: int) -> Tensor:
    """Matrices M [N, side, side], where row @ M is the row blurred by `kernels` [N, R + 1] and reflected at both ends.

    The pixel at j weighs with the kernel at its distance from i, and so do its mirror images at -j and
    2 (side - 1) - j, which a pixel on that border does not have. R must be less than `side`.
    """
    radius = kernels.shape[1] - 1
    assert radius < side, "a reflection reaches no further than the image"
    padded = torch.nn.functional.pad(kernels, (0, 1))  # the weight beyond the radius
    output = torch.arange(side, device=kernels.device)
    source = output[:, None]
    beyond = radius + 1
    own = (source - output).abs()
    before = (source + output).masked_fill(source == 0, beyond)
    after = (2 * (side - 1) - source - output).masked_fill(source == side - 1, beyond)
    distances = torch.stack([own, before, after]).clamp(max=beyond)
    first, second, third = padded[:, distances].unbind(1)
    return first.add_(second).add_(third)


def gaussian_blur(images: Tensor, sigma: Tensor, size: int) -> Tensor:
    """Blur `images` float [N, 3, S, S] with kernels of `size` (odd) taps and `sigma` float [N] pixels, reflect padding.

    Rows and columns are each one batched product with a banded matrix that holds the kernel and the padding.
    """
    num, _, side, _ = images.shape
    matrices = blur_matrices(gaussian_kernels(sigma, size), side)
    rows = torch.bmm(images.reshape(num, 3 * side, side), matrices).view(num, 3, side, side)
    return torch.matmul(matrices.transpose(1, 2).contiguous().unsqueeze(1), rows)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """`images` float [N, 3, S, S] in [0, 1] with the values from `threshold` float [N] up inverted."""
    threshold = threshold.view(-1, 1, 1, 1)
    bright = torch.ge(images, threshold, out=torch.empty_like(images))
    return _where(bright, 1 - images, images)


def normalize(images: Tensor, mean: Tensor, std: Tensor, out: Tensor | None = None) -> Tensor:
    """(images - mean) / std for `images` float [N, 3, S, S] with `mean` and `std` float [3], perhaps into `out`."""
    mean, std = mean.view(3, 1, 1), std.view(3, 1, 1)
    return torch.addcmul(-mean / std, images, 1 / std, out=out)


def to_float(views: Tensor) -> Tensor:
    """`views` uint8 [N, S, S, 3] as float32 [N, 3, S, S] in [0, 1]."""
    return views.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)


def to_normalized(views: Tensor, config: AugmentConfig, device: torch.device) -> Tensor:
    """What an encoder sees of un-augmented `views` uint8 [..., S, S, 3]: float32 [..., 3, S, S] on `device`."""
    flat = views.to(device, non_blocking=True).reshape(-1, *views.shape[-3:])
    mean, std = (torch.tensor(values, device=device) for values in (config.mean, config.std))
    images = normalize(to_float(flat), mean, std)
    return images.view(*views.shape[:-3], *images.shape[1:])


def to_displayable(views: Tensor, config: AugmentConfig) -> Tensor:
    """The pictures uint8 [..., S, S, 3] of normalized `views` float [..., 3, S, S]."""
    mean, std = (torch.tensor(values, device=views.device).view(3, 1, 1) for values in (config.mean, config.std))
    return (views.float() * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)


# The random numbers of an image, one for each: the columns of what `_Views.draw` returns.
_CHOICES = (Stream.FLIP, Stream.JITTER, Stream.GRAYSCALE, Stream.BLUR, Stream.SOLARIZE)
_FACTORS = tuple(Stream.JITTER + 1 + k for k in range(4))
_ORDER = tuple(Stream.JITTER + 5 + k for k in range(4))
_SIGMA = Stream.BLUR + 1


@dataclass(frozen=True)
class _Plan:
    """What happens to n images: which are taken (positions among the n), and with what parameters."""

    flipped: Tensor  # int64, as all positions
    jittered: Tensor  # [J]
    turned: tuple[Tensor, ...]  # at each of the four turns, the positions among the jittered that now change hue
    grayed: Tensor
    blurred: Tensor
    solarized: Tensor
    weights: Tensor  # float32 [4, J, 3]: of `blend` at each turn
    shifts: Tensor  # float32 [J]: of `adjust_hue`
    sigma: Tensor  # float32, of the blurred
    thresholds: Tensor  # float32, of the solarized
    mean: Tensor  # float32 [3]
    std: Tensor  # float32 [3]

    def to(self, device: torch.device) -> "_Plan":
        """On `device`: two copies in all, of which the host waits for none."""
        if device.type == "cpu":
            return self
        positions = (self.flipped, self.jittered, *self.turned, self.grayed, self.blurred, self.solarized)
        flipped, jittered, *turned, grayed, blurred, solarized = _move(positions, device)
        numbers = (self.weights, self.shifts, self.sigma, self.thresholds, self.mean, self.std)
        return _Plan(flipped, jittered, tuple(turned), grayed, blurred, solarized, *_move(numbers, device))


def _move(tensors: tuple[Tensor, ...], device: torch.device) -> list[Tensor]:
    """`tensors` of one dtype on `device`, in one copy."""
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    if device.type == "cuda":
        packed = packed.pin_memory()
    parts = packed.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class _Views:
    """How some consecutive views of one size are made: their parameters as tables with a row for each view."""

    def __init__(self, first: int, views: Sequence[ViewConfig], config: AugmentConfig, seed: int) -> None:
        """`first` is the number of the first of them among all views of a sample."""
        self._numbers = range(first, first + len(views))
        self._seed = seed
        self._mean, self._std = torch.tensor(config.mean), torch.tensor(config.std)
        strengths = torch.tensor([[v.brightness, v.contrast, v.saturation, v.hue] for v in views])
        # Jitter that changes nothing is left out, as is a turn of the hue by nothing.
        jitter = torch.tensor([v.jitter for v in views]) * (strengths.amax(1) > 0)
        others = torch.tensor([[v.flip, v.grayscale, v.blur, v.solarize] for v in views])
        self._probabilities = torch.cat([others[:, :1], jitter[:, None], others[:, 1:]], dim=1)
        self._turns_hue = strengths[:, 3] > 0
        self._low = torch.cat([(1 - strengths[:, :3]).clamp(min=0), -strengths[:, 3:]], dim=1)
        self._high = torch.cat([1 + strengths[:, :3], strengths[:, 3:]], dim=1)
        self._sigma = torch.tensor([v.blur_sigma for v in views])
        self._thresholds = torch.tensor([v.solarize_threshold for v in views])

    def draw(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """For the V · B images: which operations they get, bool [VB, 5], and the numbers in [0, 1) of how, [VB, 9]."""
        keys = torch.stack(
            [rng.sample_keys(self._seed, samples.epoch, samples.indices, view) for view in self._numbers]
        )
        words = torch.tensor([int(word) for word in (*_CHOICES, *_FACTORS, *_ORDER, _SIGMA)])
        numbers = rng.unit(rng.fold(keys[:, :, None], words))
        num_choices = len(_CHOICES)
        chosen = numbers[..., :num_choices] < self._probabilities[:, None]
        return chosen.flatten(0, 1), numbers[..., num_choices:].flatten(0, 1)

    def plan(self, chosen: Tensor, numbers: Tensor, views: Tensor) -> _Plan:
        """What to do with n images, from `draw`'s [n, 5] and [n, 9], and int64 [n]: which of the views each is; on the CPU."""
        flipped, jittered, grayed, blurred, solarized = (mask.nonzero().flatten() for mask in chosen.unbind(1))
        factors, order, sigma = numbers.split((4, 4, 1), dim=1)
        of_jittered, of_blurred = views[jittered], views[blurred]
        low, high = self._low[of_jittered], self._high[of_jittered]
        factors = low + (high - low) * factors[jittered]
        operations = order[jittered].argsort(dim=1, stable=True)  # [J, 4]: what each turn does
        turned = (operations == HUE) & self._turns_hue[of_jittered, None]
        weights = blend_weights(operations, factors.gather(1, operations))
        sigma_low, sigma_high = self._sigma[of_blurred].unbind(1)
        return _Plan(
            flipped=flipped,
            jittered=jittered,
            turned=tuple(turn.nonzero().flatten() for turn in turned.unbind(1)),
            grayed=grayed,
            blurred=blurred,
            solarized=solarized,
            weights=weights.transpose(0, 1).contiguous(),
            shifts=factors[:, HUE].contiguous(),
            sigma=sigma_low + (sigma_high - sigma_low) * sigma[blurred, 0],
            thresholds=self._thresholds[views[solarized]],
            mean=self._mean,
            std=self._std,
        )


class Augment:
    """Turns the loader's crops into augmented views: `augment(batch, device) -> Batch`."""

    def __init__(self, config: AugmentConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._views = [view for group in config.groups for view in [group] * group.count]

    def __call__(self, batch: Batch, device: torch.device) -> Batch:
        """`batch` with views uint8 [V, B, S, S, 3] as one on `device`, with normalized float32 [V, B, 3, S, S].

        The views are channels-last in memory. What an image becomes depends on (seed, epoch, sample index, view) alone.
        """
        assert sum(map(len, batch.views)) == len(self._views), "the loader cut another number of views"
        augmented, first = [], 0
        for cropped in batch.views:
            views = _Views(first, self._views[first : first + len(cropped)], self._config, self._seed)
            augmented.append(_augment(cropped, views, batch.samples, device))
            first += len(cropped)
        text = None if batch.text is None else batch.text.to(device, non_blocking=True)
        return Batch(tuple(augmented), batch.samples.to(device), text)


def _augment(cropped: Tensor, views: _Views, samples: Samples, device: torch.device) -> Tensor:
    """`cropped` uint8 [V, B, S, S, 3] as `views` say, float32 [V, B, 3, S, S] on `device`."""
    num_views, num_samples, side = cropped.shape[:3]
    chosen, numbers = views.draw(samples)
    of_view = torch.arange(num_views).repeat_interleave(num_samples)
    images = _flat_on(device, cropped)
    out = torch.empty((len(images), side, side, 3), device=device).permute(0, 3, 1, 2)
    chunk = max(1, CPU_CHUNK_VALUES // (3 * side * side)) if device.type == "cpu" else len(images)
    for start in range(0, len(images), chunk):
        part = slice(start, start + chunk)
        _apply(images[part], views.plan(chosen[part], numbers[part], of_view[part]).to(device), out[part])
    return out.unflatten(0, (num_views, num_samples))


def _apply(views: Tensor, plan: _Plan, out: Tensor) -> None:
    """Augment `views` uint8 [n, S, S, 3] into `out` float32 [n, 3, S, S]."""
    side = views.shape[1]
    images = to_float(views)
    _replace(images, plan.flipped, horizontal_flip)
    _replace(images, plan.jittered, lambda chosen: _jitter(chosen, plan))
    _replace(images, plan.grayed, grayscale)
    if side > 1:  # a single pixel has nothing to blur with
        _replace(images, plan.blurred, lambda chosen: gaussian_blur(chosen, plan.sigma, blur_size(side)))
    _replace(images, plan.solarized, lambda chosen: solarize(chosen, plan.thresholds))
    normalize(images, plan.mean, plan.std, out=out)


def _flat_on(device: torch.device, views: Tensor) -> Tensor:
    """`views` uint8 [V, B, S, S, 3] as [V·B, S, S, 3] on `device`."""
    if device.type == "cpu":
        return views.flatten(0, 1)
    moved = torch.empty(views.shape, dtype=views.dtype, device=device)
    # Of a micro-batch only what belongs to one view is in one piece of the loader's pinned memory, which the device reads by
    # itself; pieces would first be put together on the host.
    for target, source in zip(moved, views, strict=True):
        target.copy_(source, non_blocking=True)
    return moved.flatten(0, 1)


def _replace(images: Tensor, positions: Tensor, operation: Callable[[Tensor], Tensor]) -> None:
    """Put what `operation` makes of images[positions] back in their place."""
    if len(positions) > 0:
        images.index_copy_(0, positions, operation(images.index_select(0, positions)))


def _jitter(images: Tensor, plan: _Plan) -> Tensor:
    """torchvision's ColorJitter on `images` [J, 3, S, S], each in its own order."""
    for weights, turned in zip(plan.weights, plan.turned, strict=True):
        blend(images, weights)
        if len(turned) > 0:
            images.index_copy_(0, turned, adjust_hue(images.index_select(0, turned), plan.shifts[turned]))
    return images
