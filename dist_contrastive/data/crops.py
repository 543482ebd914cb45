"""Crops: which part of an image each view takes, and the kernel that decodes an image once and resizes all of them.

A random crop is a pure function of (seed, epoch, sample index, view).
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import extending, types

from dist_contrastive import rng
from dist_contrastive.config import AugmentConfig
from dist_contrastive.data.beton import TURBOJPEG_DECODE, Images
from dist_contrastive.data.compiled import cached

CROP_TRIES = 10  # as torchvision's RandomResizedCrop
CROP = int(rng.Stream.CROP)
_decode_jpeg: Any = TURBOJPEG_DECODE  # called in compiled code alone
_intrinsic: Any = extending.intrinsic  # its type counts the typing context as an argument of the call


class Scratch(NamedTuple):
    """What one thread needs to decode and resize: views of up to S pixels a side, up to K taps a pixel, images W wide."""

    pixels: np.ndarray  # uint8 [bytes of the largest decoded JPEG]
    first_row: np.ndarray  # uint32 [S]: first source row of each output row
    row_weights: np.ndarray  # float32 [S, K]
    first_column: np.ndarray  # uint32 [S]
    column_weights: np.ndarray  # float32 [S, K]
    row: np.ndarray  # float32 [3 max(S, W + K) + 1]: one row of pixels
    lines: np.ndarray  # float32 [S + 2, 3S]: rows that were resized to S columns


def make_scratch(images: Images, sides: Sequence[int], pixels: np.ndarray | None = None) -> Scratch:
    """For views of `sides` pixels a side; `pixels` are those of another scratch for the same images, if there is one."""
    if pixels is None:
        jpegs = images.is_jpeg != 0
        areas = images.heights[jpegs].astype(np.int64) * images.widths[jpegs]
        pixels = np.zeros(3 * int(areas.max(initial=0)), np.uint8)
    widest = int(images.widths.max())
    size = max(sides)
    taps = 2 * math.ceil(max(widest, int(images.heights.max())) / min(sides)) + 2
    return Scratch(
        pixels=pixels,
        first_row=np.zeros(size, np.uint32),
        row_weights=np.zeros((size, taps), np.float32),
        first_column=np.zeros(size, np.uint32),
        column_weights=np.zeros((size, taps), np.float32),
        row=np.zeros(3 * max(size, widest + taps) + 1, np.float32),
        lines=np.zeros((size + 2, 3 * size), np.float32),
    )


@numba.njit(nogil=True)
def _triangle_weights(length, size, first, weights):
    """Taps that resize `length` pixels to `size`: output i is the sum over k of weights[i, k] · pixel[first[i] + k].

    Pillow's and torchvision's antialiased bilinear filter: a triangle whose support grows with the reduction. Returns
    the largest number of taps; `weights` is 0 between an output's own number and that one.
    """
    scale = length / size
    if scale <= 1:  # the same, shorter: between two neighbours, at the border one pixel alone
        for i in range(size):
            position = scale * (i + 0.5) - 0.5
            low = max(math.floor(position), 0)
            share = np.float32(max(position - low, 0.0)) if low < length - 1 else np.float32(0.0)
            first[i] = low
            weights[i, 0] = np.float32(1.0) - share
            weights[i, 1] = share
        return 2
    inverse = np.float32(1.0 / scale)
    most = 0
    for i in range(size):
        center = scale * (i + 0.5)
        low = max(int(center - scale + 0.5), 0)
        num = min(int(center + scale + 0.5), length) - low
        offset = np.float32(low - center + 0.5)
        taps = weights[i]
        total = np.float32(0.0)
        for k in range(num):
            weight = max(np.float32(0.0), np.float32(1.0) - abs((np.float32(k) + offset) * inverse))
            taps[k] = weight
            total += weight
        for k in range(num):
            taps[k] /= total
        for k in range(num, len(taps)):
            taps[k] = np.float32(0.0)
        first[i] = low
        most = max(most, num)
    return most


def _four_at(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """The address of the four values of a float32 array that begin at `index`, as a vector's."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), ir.PointerType(ir.VectorType(ir.FloatType(), 4)))


def _weighted(context: Any, builder: Any, weight: Any, address: Any) -> Any:
    """`weight` times the four values at `address`."""
    lanes = ir.VectorType(ir.FloatType(), 4)
    lane = builder.insert_element(ir.Constant(lanes, ir.Undefined), weight, ir.Constant(ir.IntType(32), 0))
    spread = builder.shuffle_vector(
        lane, ir.Constant(lanes, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), 4), [0] * 4)
    )
    return builder.fmul(spread, builder.load(address, align=4))


# A pixel is three values; four are as fast as one. Where the fourth is written, the next pixel's first comes later.


@_intrinsic
def _blend_pixel(typing_context, row, i, weight, next_weight, line, o):
    """line[o : o + 4] = weight · row[i : i + 4] + next_weight · row[i + 3 : i + 7]."""

    def generate(context, builder, signature, arguments):
        row, i, weight, next_weight, line, o = arguments
        here = _four_at(context, builder, signature.args[0], row, i)
        there = _four_at(context, builder, signature.args[0], row, builder.add(i, ir.Constant(i.type, 3)))
        both = builder.fadd(_weighted(context, builder, weight, here), _weighted(context, builder, next_weight, there))
        builder.store(both, _four_at(context, builder, signature.args[4], line, o), align=4)
        return context.get_dummy_value()

    return types.none(row, types.intp, types.float32, types.float32, line, types.intp), generate


@_intrinsic
def _add_pixel(typing_context, row, i, weight, line, o):
    """line[o : o + 4] += weight · row[i : i + 4]."""

    def generate(context, builder, signature, arguments):
        row, i, weight, line, o = arguments
        more = _weighted(context, builder, weight, _four_at(context, builder, signature.args[0], row, i))
        address = _four_at(context, builder, signature.args[3], line, o)
        builder.store(builder.fadd(builder.load(address, align=4), more), address, align=4)
        return context.get_dummy_value()

    return types.none(row, types.intp, types.float32, line, types.intp), generate


@numba.njit(nogil=True)
def _resize_row(row, first, weights, num_taps, line):
    """Resize `row` float32 [3 · width] of pixels into `line` float32 [3S]; `num_taps` is at least 2. Both have a value more.

    Pixel by pixel: the gather instructions with which a compiler would vectorise this are slower on many processors.
    """
    for x in range(len(first)):
        i = 3 * np.intp(first[x])
        _blend_pixel(row, i, weights[x, 0], weights[x, 1], line, 3 * x)
        for k in range(2, num_taps):
            _add_pixel(row, i + 3 * k, weights[x, k], line, 3 * x)


@numba.njit(nogil=True)
def _resize_crop(image, image_width, top, left, height, width, out, size, s):
    """Resize the crop of `image` uint8 [image height · image width · 3] into `out` uint8 [size · size · 3], with scratch `s`.

    Sums of whole rows run over contiguous memory, so they are cheap beside `_resize_row`: it is done on the source rows
    or on the output rows, whichever are fewer. Nothing depends on other crops, and no sum is reordered.
    """
    num_row_taps = _triangle_weights(height, size, s.first_row, s.row_weights)
    num_column_taps = _triangle_weights(width, size, s.first_column, s.column_weights)
    first_column = s.first_column[:size]
    row, lines = s.row, s.lines
    elements, stride = 3 * width, 3 * image_width
    if height <= size:
        for y in range(height):
            start = (top + y) * stride + 3 * left
            source = image[start : start + elements]
            for e in range(elements):
                row[e] = np.float32(source[e])
            _resize_row(row, first_column, s.column_weights, num_column_taps, lines[y])
    for y in range(size):
        first, weight, next_weight = int(s.first_row[y]), s.row_weights[y, 0], s.row_weights[y, 1]
        if height <= size:
            upper, lower = lines[first], lines[first + 1]  # beyond the last one the weight is 0
            for e in range(3 * size):
                row[e] = np.float32(0.5) + weight * upper[e] + next_weight * lower[e]
        else:
            start = (top + first) * stride + 3 * left
            source, below = image[start : start + elements], image[start + stride : start + stride + elements]
            for e in range(elements):
                row[e] = weight * np.float32(source[e]) + next_weight * np.float32(below[e])
            for k in range(2, num_row_taps):
                weight = s.row_weights[y, k]
                if weight == 0:
                    break
                source = image[start + k * stride : start + k * stride + elements]
                for e in range(elements):
                    row[e] += weight * np.float32(source[e])
            _resize_row(row, first_column, s.column_weights, num_column_taps, lines[0])
            for e in range(3 * size):
                row[e] = np.float32(0.5) + lines[0, e]
        target = out[3 * size * y : 3 * size * (y + 1)]
        for e in range(3 * size):
            target[e] = np.uint8(np.int32(row[e]))  # rounds: the half is in the sum


@numba.njit(nogil=True)
def _cut_views(image, width, boxes, out, places, sides, place, s):
    """Resize the `boxes` int64 [V, 4] of one decoded `image`, whose rows have `width` pixels, each to its own size."""
    for view in range(len(boxes)):
        top, left, box_height, box_width = boxes[view]
        side = sides[view]
        length = 3 * side * side
        begin = places[view] + place * length
        _resize_crop(image, width, top, left, box_height, box_width, out[begin : begin + length], side, s)


@cached
def crop_samples(file_bytes, pointers, sizes, is_jpeg, heights, widths, samples, boxes, out, places, sides, start, s):
    """Decode `samples` int64 [b], each once, and resize their `boxes` int64 [V, b, 4] to views of `sides` int64 [V] pixels.

    View v of the sample at position i goes to the place `start` + i of those that begin at `places[v]` of `out`, uint8, each of
    sides[v] · sides[v] · 3.

    Returns the position in `samples` of the first that can't be decoded, or -1.
    """
    for position in range(len(samples)):
        sample = samples[position]
        height, width = int(heights[sample]), int(widths[sample])
        stored = file_bytes[pointers[sample] : pointers[sample] + sizes[sample]]
        place = start + position
        if is_jpeg[sample] != 0:
            failed = _decode_jpeg(
                stored.ctypes.data, sizes[sample], height, width, s.pixels.ctypes.data, height, width, 0, 0, 1, 1, 0, 0
            )
            if failed != 0:
                return position
            _cut_views(s.pixels, width, boxes[:, position], out, places, sides, place, s)
        else:
            _cut_views(stored, width, boxes[:, position], out, places, sides, place, s)
    return -1


@cached
def decode_samples(file_bytes, pointers, sizes, is_jpeg, heights, widths, samples, begins, out):
    """Decode `samples` int64 [b] to where they begin, `begins` int64 [b], in `out` uint8.

    Returns the position in `samples` of the first that can't be decoded, or -1.
    """
    for position in range(len(samples)):
        sample = samples[position]
        height, width = int(heights[sample]), int(widths[sample])
        stored = file_bytes[pointers[sample] : pointers[sample] + sizes[sample]]
        decoded = out[begins[position] : begins[position] + 3 * height * width]
        if is_jpeg[sample] != 0:
            failed = _decode_jpeg(
                stored.ctypes.data, sizes[sample], height, width, decoded.ctypes.data, height, width, 0, 0, 1, 1, 0, 0
            )
            if failed != 0:
                return position
        else:
            decoded[:] = stored
    return -1


@cached
def _draw_boxes(seed, epoch, samples, heights, widths, scale, ratio, boxes):
    """Fill `boxes` int64 [V, b, 4] by `scale` and `ratio` float64 [V, 2]: torchvision's RandomResizedCrop.get_params, four
    random numbers a try."""
    for view in range(len(boxes)):
        scale_low, scale_high = scale[view]
        ratio_low, ratio_high = ratio[view]
        log_low, log_high = math.log(ratio_low), math.log(ratio_high)
        for position in range(len(samples)):
            sample = samples[position]
            height, width = int(heights[sample]), int(widths[sample])
            key = rng.sample_key_jit(seed, epoch, sample, view)
            box = boxes[view, position]
            found = False
            for attempt in range(CROP_TRIES):
                number = CROP + 4 * attempt
                share = scale_low + (scale_high - scale_low) * rng.unit_jit(rng.fold_jit(key, number))
                aspect = math.exp(log_low + (log_high - log_low) * rng.unit_jit(rng.fold_jit(key, number + 1)))
                w = round(math.sqrt(height * width * share * aspect))
                h = round(math.sqrt(height * width * share / aspect))
                if 0 < w <= width and 0 < h <= height:
                    box[0] = int(rng.unit_jit(rng.fold_jit(key, number + 2)) * (height - h + 1))
                    box[1] = int(rng.unit_jit(rng.fold_jit(key, number + 3)) * (width - w + 1))
                    box[2], box[3] = h, w
                    found = True
                    break
            if not found:  # the largest centred crop within the ratios
                h, w = height, width
                if width < ratio_low * height:
                    h = max(1, round(width / ratio_low))
                elif width > ratio_high * height:
                    w = max(1, round(height * ratio_high))
                box[0], box[1], box[2], box[3] = (height - h) // 2, (width - w) // 2, h, w


def random_boxes(images: Images, augment: AugmentConfig, samples: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """The random crops of `samples` int64 [b] at `epoch`: top, left, height, width in pixels, int64 [V, b, 4].

    Area and aspect ratio as torchvision's RandomResizedCrop draws them (Szegedy et al. 2015): up to ten tries, then
    the largest centred crop within the ratios.
    """
    scale, ratio = _limits(augment)
    boxes = np.empty((len(scale), len(samples), 4), np.int64)
    _draw_boxes(seed, epoch, samples, images.heights, images.widths, scale, ratio, boxes)
    return boxes


@cache
def _limits(augment: AugmentConfig) -> tuple[np.ndarray, np.ndarray]:
    """Of areas and of aspect ratios, float64 [V, 2]."""
    views = [group for group in augment.groups for _ in range(group.count)]
    scale, ratio = [view.crop_scale for view in views], [view.crop_ratio for view in views]
    return np.array(scale, np.float64).reshape(-1, 2), np.array(ratio, np.float64).reshape(-1, 2)
