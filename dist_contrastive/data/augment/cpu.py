"""The augmentation on a CPU: compiled code that takes one image after the other through all that happens to it, while it lies in
a core's cache. It holds no lock, so that threads share a batch.

Sums are reassociated (`fastmath`), always in the same way: an image's result depends on nothing but the image.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

from dist_contrastive.data.augment.draws import Draw, blur_size
from dist_contrastive.data.compiled import cached

# Rec. 601 luma, in the digits that torchvision uses.
RED, GREEN, BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)
MIN_PIXELS_A_THREAD = 1 << 14
"""Less is not worth the way to another thread."""
FAST = {"nnan", "nsz", "contract", "reassoc"}
_ZERO, _ONE = np.float32(0), np.float32(1)
_TINY = np.finfo(np.float32).tiny
_AT_FLIP, _AT_HUE_TURN, _AT_HUE, _AT_BLEND = int(Draw.FLIP), int(Draw.HUE_TURN), int(Draw.HUE), int(Draw.BLEND)
_AT_GRAYSCALE, _AT_SIGMA, _AT_THRESHOLD = int(Draw.GRAYSCALE), int(Draw.SIGMA), int(Draw.THRESHOLD)


@numba.njit(nogil=True, fastmath=FAST)
def _load(image, flip, red, green, blue):
    """`image` uint8 [S, S, 3], mirrored perhaps, as three planes float32 [S · S] in [0, 1]."""
    side = image.shape[0]
    scale = np.float32(1 / 255)
    for y in range(side):
        row, begin = image[y], y * side
        if flip:
            for x in range(side):
                red[begin + x] = np.float32(row[side - 1 - x, 0]) * scale
                green[begin + x] = np.float32(row[side - 1 - x, 1]) * scale
                blue[begin + x] = np.float32(row[side - 1 - x, 2]) * scale
        else:
            for x in range(side):
                red[begin + x] = np.float32(row[x, 0]) * scale
                green[begin + x] = np.float32(row[x, 1]) * scale
                blue[begin + x] = np.float32(row[x, 2]) * scale


@numba.njit(nogil=True, fastmath=FAST)
def _clamp(x):
    return min(max(x, _ZERO), _ONE)


@numba.njit(nogil=True, fastmath=FAST)
def _blend(red, green, blue, own, of_luma, of_mean):
    """x becomes clamp(own · x + of_luma · luma(x) + of_mean · mean of luma(x))."""
    offset = _ZERO
    if of_mean != _ZERO:
        total = _ZERO
        for i in range(len(red)):
            total += RED * red[i] + GREEN * green[i] + BLUE * blue[i]
        offset = of_mean * (total / np.float32(len(red)))
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        shared = of_luma * (RED * r + GREEN * g + BLUE * b) + offset
        red[i] = _clamp(own * r + shared)
        green[i] = _clamp(own * g + shared)
        blue[i] = _clamp(own * b + shared)


@numba.njit(nogil=True, fastmath=FAST)
def _turn_hue(red, green, blue, shift):
    """The turn keeps value v = max and chroma c = max - min of HSV, so a channel becomes v - c · (1 - share of the hue in that
    channel), which is piecewise linear in the hue; a grey pixel has c = 0 and stays as it is."""
    sixths = np.float32(6) * shift
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        value = max(r, max(g, b))
        chroma = value - min(r, min(g, b))
        scale = _ONE / max(chroma, _TINY)
        # In sixths of a turn from red. Where two channels are both the largest, their branches agree.
        hue = (r - g) * scale + np.float32(4)
        hue = (b - r) * scale + np.float32(2) if value == g else hue
        hue = (g - b) * scale if value == r else hue
        hue += sixths
        hue -= np.float32(6) * np.floor(hue * np.float32(1 / 6))
        red[i] = value - chroma * (_ONE - _clamp(abs(hue - np.float32(3)) - _ONE))
        green[i] = value - chroma * (_ONE - _clamp(np.float32(2) - abs(hue - np.float32(2))))
        blue[i] = value - chroma * (_ONE - _clamp(np.float32(2) - abs(hue - np.float32(4))))


@numba.njit(nogil=True, fastmath=FAST)
def _drop_color(red, green, blue):
    for i in range(len(red)):
        luma = RED * red[i] + GREEN * green[i] + BLUE * blue[i]
        red[i], green[i], blue[i] = luma, luma, luma


@numba.njit(nogil=True)
def _half_kernel(sigma, weights):
    """The Gaussian's weights float32 [R + 1], the centre first, which with their mirror images sum to 1; how many are not 0."""
    total = 0.0
    for k in range(len(weights)):
        weight = math.exp(-0.5 * (k / sigma) ** 2)
        weights[k] = weight
        total += weight if k == 0 else 2 * weight
    num = 0
    for k in range(len(weights)):
        weights[k] = np.float32(weights[k] / total)
        if weights[k] > _ZERO:
            num = k + 1
    return num


@numba.njit(nogil=True, fastmath=FAST)
def _blur(plane, side, weights, num, padded, lines):
    """`plane` float32 [S · S] blurred in both directions with `num` weights of half a kernel, reflected at the border."""
    radius = num - 1
    for y in range(side):
        row, line = plane[y * side : (y + 1) * side], lines[y * side : (y + 1) * side]
        for x in range(side):
            padded[radius + x] = row[x]
        for k in range(1, num):
            padded[radius - k] = row[k]
            padded[radius + side - 1 + k] = row[side - 1 - k]
        for x in range(side):
            line[x] = weights[0] * padded[radius + x]
        for k in range(1, num):
            weight, before, after = weights[k], padded[radius - k :], padded[radius + k :]
            for x in range(side):
                line[x] += weight * (before[x] + after[x])
    for y in range(side):
        row, center = plane[y * side : (y + 1) * side], lines[y * side : (y + 1) * side]
        for x in range(side):
            row[x] = weights[0] * center[x]
        for k in range(1, num):
            up, down = abs(y - k), y + k
            down = 2 * (side - 1) - down if down >= side else down
            above, below, weight = (
                lines[up * side : (up + 1) * side],
                lines[down * side : (down + 1) * side],
                weights[k],
            )
            for x in range(side):
                row[x] += weight * (above[x] + below[x])


@numba.njit(nogil=True, fastmath=FAST)
def _store(red, green, blue, threshold, scale, shift, out):
    """The planes, inverted from `threshold` up, times `scale` plus `shift` of their channels, into `out` float32 [3 · S · S]."""
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        r = _ONE - r if r >= threshold else r
        g = _ONE - g if g >= threshold else g
        b = _ONE - b if b >= threshold else b
        out[3 * i] = r * scale[0] + shift[0]
        out[3 * i + 1] = g * scale[1] + shift[1]
        out[3 * i + 2] = b * scale[2] + shift[2]


@cached
def _augment(images, draws, scale, shift, blur_radius, out):
    """Augment `images` uint8 [n, S, S, 3] as `draws` float32 [n, NUM_DRAWS] say into `out` float32 [n, 3 · S · S], channels
    last."""
    side = images.shape[1]
    planes = np.empty((4, side * side), np.float32)
    red, green, blue, lines = planes[0], planes[1], planes[2], planes[3]
    padded = np.empty(side + 2 * blur_radius, np.float32)
    weights = np.empty(blur_radius + 1, np.float32)
    for n in range(len(images)):
        draw = draws[n]
        _load(images[n], draw[_AT_FLIP] > _ZERO, red, green, blue)
        for turn in range(4):
            own, luma, mean = draw[_AT_BLEND + 3 * turn], draw[_AT_BLEND + 3 * turn + 1], draw[_AT_BLEND + 3 * turn + 2]
            if turn == int(draw[_AT_HUE_TURN]):
                _turn_hue(red, green, blue, draw[_AT_HUE])
            elif own != _ONE:
                _blend(red, green, blue, own, luma, mean)
        if draw[_AT_GRAYSCALE] > _ZERO:
            _drop_color(red, green, blue)
        if draw[_AT_SIGMA] > _ZERO and side > 1:  # a single pixel has nothing to blur with
            num = _half_kernel(draw[_AT_SIGMA], weights)
            if draw[_AT_GRAYSCALE] > _ZERO:
                _blur(red, side, weights, num, padded, lines)
                green[:], blue[:] = red, red
            else:
                for plane in (red, green, blue):
                    _blur(plane, side, weights, num, padded, lines)
        _store(red, green, blue, draw[_AT_THRESHOLD], scale, shift, out[n])


@cache
def _threads(num: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num, thread_name_prefix="augment")


def augment_on_cpu(images: Tensor, draws: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`images` uint8 [n, S, S, 3], contiguous, augmented as `draws` float32 [n, NUM_DRAWS] say and normalized with `mean` and
    `std` of three channels: float32 [n, 3, S, S], channels last, by as many threads as torch uses."""
    num, side = images.shape[:2]
    out = torch.empty((num, side, side, 3))
    deviations = np.array(std)
    scale, shift = (1 / deviations).astype(np.float32), (-np.array(mean) / deviations).astype(np.float32)
    arrays = images.numpy(), draws.numpy(), out.flatten(1).numpy()
    parts = max(1, min(torch.get_num_threads(), num, num * side * side // MIN_PIXELS_A_THREAD))
    bounds = [num * k // parts for k in range(parts + 1)]

    def work(k: int) -> None:
        part = slice(bounds[k], bounds[k + 1])
        _augment(arrays[0][part], arrays[1][part], scale, shift, blur_size(side) // 2, arrays[2][part])

    others = [_threads(parts - 1).submit(work, k) for k in range(1, parts)]
    work(0)
    for other in others:
        other.result()
    return out.permute(0, 3, 1, 2)
