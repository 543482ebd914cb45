"""The augmentation on a CUDA device: a few Triton kernels that read bytes and write normalized images.

What limits such a device is as much the arithmetic as the memory: a pixel costs 9 or 15 bytes and about a hundred
instructions, and three times as many where it is blurred. So what an image's draws leave out is skipped, by branches that all
threads of a program take alike. Two operations need more than the pixel: contrast a mean, which is summed beforehand (the image
is read twice, and what comes before contrast is done twice, rather than stored), and the blur its neighbours, which it reads
from scratch memory. Neither depends on the order in which programs run. The host asks for nothing: every image has its place in
the scratch, and the programs of images without contrast or blur end at once.
"""

from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_contrastive.data.augment.draws import NUM_DRAWS, Draw, blur_size

# Rec. 601 luma, in the digits that torchvision uses.
RED, GREEN, BLUE = tl.constexpr(0.2989), tl.constexpr(0.587), tl.constexpr(0.114)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
LOG2_E = tl.constexpr(1.4426950408889634)
DRAWS = tl.constexpr(NUM_DRAWS)
FLIP, HUE_TURN, HUE, BLEND = (tl.constexpr(int(d)) for d in (Draw.FLIP, Draw.HUE_TURN, Draw.HUE, Draw.BLEND))
GRAYSCALE, SIGMA, THRESHOLD = (tl.constexpr(int(d)) for d in (Draw.GRAYSCALE, Draw.SIGMA, Draw.THRESHOLD))

WHOLE_PIXELS = 4096
"""An image of so many pixels fits in the registers of one program, which then needs no sums from before."""
PIXELS = 1024
"""Of larger ones, what a program takes."""
TILE = 32
"""Side of the square that a program blurs."""
PIXELS_A_PROCESSOR = 1 << 15
"""Less work for each multiprocessor is over sooner than the next kernel is launched."""


@triton.jit
@no_type_check
def _luma(red, green, blue):
    return red * RED + green * GREEN + blue * BLUE


@triton.jit
@no_type_check
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
@no_type_check
def _load(image, pixels, inside, flip, SIDE: tl.constexpr):
    """`pixels` of an image uint8 [S, S, 3], mirrored perhaps, in [0, 1]; 0 outside."""
    source = pixels
    if flip > 0.0:
        source = pixels + (SIDE - 1) - 2 * (pixels % SIDE)
    where = image + 3 * source
    red = tl.load(where, mask=inside, other=0).to(tl.float32) * (1 / 255)
    green = tl.load(where + 1, mask=inside, other=0).to(tl.float32) * (1 / 255)
    blue = tl.load(where + 2, mask=inside, other=0).to(tl.float32) * (1 / 255)
    return red, green, blue


@triton.jit
@no_type_check
def _turn_hue(red, green, blue, shift):
    """The turn keeps value v = max and chroma c = max - min of HSV, so a channel becomes v - c · (1 - share of the hue in that
    channel), which is piecewise linear in the hue; a grey pixel has c = 0 and stays as it is."""
    value = tl.maximum(red, tl.maximum(green, blue))
    chroma = value - tl.minimum(red, tl.minimum(green, blue))
    scale = 1.0 / tl.maximum(chroma, TINY)
    # In sixths of a turn from red. Where two channels are both the largest, their branches agree.
    hue = tl.where(value == green, (blue - red) * scale + 2.0, (red - green) * scale + 4.0)
    hue = tl.where(value == red, (green - blue) * scale, hue) + 6.0 * shift
    hue -= 6.0 * tl.floor(hue * (1 / 6))
    red = value - chroma * (1.0 - _clamp(tl.abs(hue - 3.0) - 1.0))
    green = value - chroma * (1.0 - _clamp(2.0 - tl.abs(hue - 2.0)))
    blue = value - chroma * (1.0 - _clamp(2.0 - tl.abs(hue - 4.0)))
    return red, green, blue


@triton.jit
@no_type_check
def _turn(red, green, blue, draw, offset, TURN: tl.constexpr):
    """One turn of colour jitter, where `offset` is the mean's share in it."""
    own = tl.load(draw + BLEND + 3 * TURN)
    of_luma = tl.load(draw + BLEND + 3 * TURN + 1)
    if tl.load(draw + HUE_TURN) == TURN:
        red, green, blue = _turn_hue(red, green, blue, tl.load(draw + HUE))
    elif of_luma != 0.0:
        shared = of_luma * _luma(red, green, blue) + offset
        red, green, blue = _clamp(own * red + shared), _clamp(own * green + shared), _clamp(own * blue + shared)
    elif own != 1.0:
        red, green, blue = _clamp(own * red + offset), _clamp(own * green + offset), _clamp(own * blue + offset)
    return red, green, blue


@triton.jit
@no_type_check
def _finish(x, threshold, scale, shift):
    """Solarized and normalized."""
    return tl.where(x >= threshold, 1.0 - x, x) * scale + shift


@triton.jit
@no_type_check
def _store_planes(planes, pixels, red, green, blue, inside, SIDE: tl.constexpr):
    """Into a picture [3, S, S] that is to be blurred."""
    where = planes + pixels
    tl.store(where, red, mask=inside)
    tl.store(where + SIDE * SIDE, green, mask=inside)
    tl.store(where + 2 * SIDE * SIDE, blue, mask=inside)


@triton.jit
@no_type_check
def _both(above, below, inside):
    above = tl.load(above, mask=inside, other=0.0).to(tl.float32)
    return above + tl.load(below, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["first"])
@no_type_check
def sum_luma(
    images,  # uint8 [n, S, S, 3]
    draws,  # float32 [n, NUM_DRAWS]
    sums,  # out, float32 [group, blocks]: of the luma at contrast's turn, where an image has one
    first,  # of the images, the group's first
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program group's image · blocks + block."""
    blocks: tl.constexpr = (SIDE * SIDE + BLOCK - 1) // BLOCK
    image = (first + tl.program_id(0) // blocks).to(tl.int64)
    draw = draws + image * DRAWS
    at = 4  # the turn of contrast
    for turn in tl.static_range(3, -1, -1):
        if tl.load(draw + BLEND + 3 * turn + 2) != 0.0:
            at = turn
    if at < 4:
        pixels = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = pixels < SIDE * SIDE
        picture = images + image * (3 * SIDE * SIDE)
        red, green, blue = _load(picture, pixels, inside, tl.load(draw + FLIP), SIDE)
        for turn in tl.static_range(3):
            if turn < at:
                red, green, blue = _turn(red, green, blue, draw, 0.0, turn)
        tl.store(sums + tl.program_id(0), tl.sum(tl.where(inside, _luma(red, green, blue), 0.0)))


@triton.jit(do_not_specialize=["first"])
@no_type_check
def color(
    images,  # uint8 [n, S, S, 3]
    draws,  # float32 [n, NUM_DRAWS]
    sums,  # float32 [group, blocks] of `sum_luma`, which images of one block do without
    scratch,  # out, [group, 3, S, S]: pictures that are to be blurred
    out,  # out, [n, S, S, 3]: the others, solarized and normalized
    first,  # of the images, the group's first
    scale_red,
    scale_green,
    scale_blue,
    shift_red,
    shift_green,
    shift_blue,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Flip, colour jitter and grayscale. Program group's image · blocks + block."""
    num_pixels: tl.constexpr = SIDE * SIDE
    blocks: tl.constexpr = (num_pixels + BLOCK - 1) // BLOCK
    place = tl.program_id(0) // blocks
    image = (first + place).to(tl.int64)
    draw = draws + image * DRAWS
    pixels = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = pixels < num_pixels
    red, green, blue = _load(images + image * (3 * num_pixels), pixels, inside, tl.load(draw + FLIP), SIDE)
    for turn in tl.static_range(4):
        offset = tl.load(draw + BLEND + 3 * turn + 2)
        if offset != 0.0:
            if blocks == 1:
                total = tl.sum(tl.where(inside, _luma(red, green, blue), 0.0))
            else:
                each = tl.arange(0, triton.next_power_of_2(blocks))
                total = tl.sum(tl.load(sums + place * blocks + each, mask=each < blocks, other=0.0))
            offset *= total * (1 / num_pixels)
        red, green, blue = _turn(red, green, blue, draw, offset, turn)
    if tl.load(draw + GRAYSCALE) > 0.0:
        red = _luma(red, green, blue)
        green = red
        blue = red
    # A single pixel has nothing to blur with.
    if SIDE > 1 and tl.load(draw + SIGMA) > 0.0:
        planes = scratch + place.to(tl.int64) * (3 * num_pixels)
        _store_planes(planes, pixels, red, green, blue, inside, SIDE)
    else:
        threshold = tl.load(draw + THRESHOLD)
        values = out + image * (3 * num_pixels) + 3 * pixels
        tl.store(values, _finish(red, threshold, scale_red, shift_red), mask=inside)
        tl.store(values + 1, _finish(green, threshold, scale_green, shift_green), mask=inside)
        tl.store(values + 2, _finish(blue, threshold, scale_blue, shift_blue), mask=inside)


@triton.jit(do_not_specialize=["first"])
@no_type_check
def blur(
    pictures,  # [group, 3, S, S]
    draws,  # float32 [n, NUM_DRAWS]
    out,  # out, [group, 3, S, S] of pictures, transposed; or, IS_LAST, [n, S, S, 3], solarized and normalized
    first,  # of the images, the group's first
    scale_red,
    scale_green,
    scale_blue,
    shift_red,
    shift_green,
    shift_blue,
    SIDE: tl.constexpr,
    RADIUS: tl.constexpr,
    REACH: tl.constexpr,
    SIZE: tl.constexpr,
    IS_LAST: tl.constexpr,
):
    """Blurs from row to row and swaps rows and columns: done twice, all is blurred and in its place. So neighbours always lie
    a row apart, and several of a row are read at once. Program group's image · tiles + tile.

    The kernel ends after RADIUS pixels or REACH standard deviations: beyond 5 there is 6e-7 of its weight, about a rounding of
    float32, and beyond 4 there is 6e-5, less than one of float16.
    """
    num_pixels: tl.constexpr = SIDE * SIDE
    across: tl.constexpr = (SIDE + SIZE - 1) // SIZE
    place = tl.program_id(0) // (across * across)
    image = (first + place).to(tl.int64)
    draw = draws + image * DRAWS
    sigma = tl.load(draw + SIGMA)
    if sigma > 0.0:
        tile = tl.program_id(0) % (across * across)
        rows = (tile // across) * SIZE + tl.arange(0, SIZE)[:, None]
        columns = (tile % across) * SIZE + tl.arange(0, SIZE)[None, :]
        inside = (rows < SIDE) & (columns < SIDE)
        picture = pictures + place.to(tl.int64) * (3 * num_pixels) + columns
        center = picture + rows * SIDE
        red = tl.load(center, mask=inside, other=0.0).to(tl.float32)
        green = red
        blue = red
        # Without colour one plane is blurred for all three.
        is_colored = tl.load(draw + GRAYSCALE) == 0.0
        if is_colored:
            green = tl.load(center + num_pixels, mask=inside, other=0.0).to(tl.float32)
            blue = tl.load(center + 2 * num_pixels, mask=inside, other=0.0).to(tl.float32)
        total = 1.0
        exponent = -0.5 / (sigma * sigma) * LOG2_E
        for k in range(1, tl.minimum(RADIUS, tl.ceil(sigma * REACH).to(tl.int32)) + 1):
            weight = tl.exp2(exponent * (k * k))
            total += 2.0 * weight
            # Reflected at the border.
            above = picture + tl.abs(rows - k) * SIDE
            below = picture + tl.minimum(rows + k, 2 * (SIDE - 1) - (rows + k)) * SIDE
            red += weight * _both(above, below, inside)
            if is_colored:
                green += weight * _both(above + num_pixels, below + num_pixels, inside)
                blue += weight * _both(above + 2 * num_pixels, below + 2 * num_pixels, inside)
        if not is_colored:
            green = red
            blue = red
        # Now with the pictures' columns as rows.
        norm = 1.0 / total
        red, green, blue, inside = tl.trans(red * norm), tl.trans(green * norm), tl.trans(blue * norm), tl.trans(inside)
        pixels = tl.trans(columns) * SIDE + tl.trans(rows)
        if IS_LAST:
            threshold = tl.load(draw + THRESHOLD)
            values = out + image * (3 * num_pixels) + 3 * pixels
            tl.store(values, _finish(red, threshold, scale_red, shift_red), mask=inside)
            tl.store(values + 1, _finish(green, threshold, scale_green, shift_green), mask=inside)
            tl.store(values + 2, _finish(blue, threshold, scale_blue, shift_blue), mask=inside)
        else:
            planes = out + place.to(tl.int64) * (3 * num_pixels)
            _store_planes(planes, pixels, red, green, blue, inside, SIDE)


def scratch_dtype(dtype: torch.dtype) -> torch.dtype:
    """What pictures that are being blurred are stored in, for a result of `dtype`.

    Of a result of 16 bits they are float16. Twice a value in [0, 1] is rounded by at most 2**-12, and then averaged with its
    neighbours: in all at most an eighth of a level of 255, which are some two roundings of a normalized value of 2 to 4 in
    float16, and a fourth of one in bfloat16.
    """
    return torch.float32 if dtype == torch.float32 else torch.float16


def augment_in_groups(
    images: Tensor, draws: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, max_group: int
) -> Tensor:
    """`augment_on_cuda`, at most `max_group` images at a time."""
    assert images.is_contiguous()
    assert draws.is_contiguous()
    num, side = images.shape[:2]
    num_pixels = side * side
    out = torch.empty((num, side, side, 3), dtype=dtype, device=images.device)
    num_groups = max(1, triton.cdiv(num, max_group))
    group = max(1, triton.cdiv(num, num_groups))
    is_whole = num_pixels <= WHOLE_PIXELS
    block = triton.next_power_of_2(num_pixels) if is_whole else PIXELS
    blocks, tiles = triton.cdiv(num_pixels, block), triton.cdiv(side, TILE) ** 2
    sums = draws.new_empty(group * blocks)
    pictures, transposed = images.new_empty((2, group, 3, side, side), dtype=scratch_dtype(dtype))
    reach = 5.0 if dtype == torch.float32 else 4.0
    normalization = [*(1 / s for s in std), *(-m / s for m, s in zip(mean, std, strict=True))]
    for first in range(0, num, group):
        here = min(group, num - first)
        if not is_whole:
            sum_luma[(here * blocks,)](images, draws, sums, first, side, block)
        color[(here * blocks,)](
            images, draws, sums, pictures, out, first, *normalization, side, block, num_warps=8 if is_whole else 4
        )
        if side > 1:
            for source, target, is_last in ((pictures, transposed, False), (transposed, out, True)):
                blur[(here * tiles,)](
                    source, draws, target, first, *normalization, side, blur_size(side) // 2, reach, TILE, is_last
                )
    return out.permute(0, 3, 1, 2)


def augment_on_cuda(
    images: Tensor, draws: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """`images` uint8 [n, S, S, 3], contiguous, augmented as `draws` float32 [n, NUM_DRAWS] say and normalized with `mean` and
    `std` of three channels: [n, 3, S, S] of `dtype` (float32, float16 or bfloat16), channels last.

    At most one of an image's turns blends with the mean, as is drawn. The arithmetic is float32's.
    """
    properties = torch.cuda.get_device_properties(images.device)
    num_pixels = images.shape[1] * images.shape[2]
    # The blur then reads from the L2 cache: of a group whose pictures would fill it, some half is blurred.
    in_cache = properties.L2_cache_size // (2 * 3 * num_pixels * scratch_dtype(dtype).itemsize)
    worth_a_launch = properties.multi_processor_count * PIXELS_A_PROCESSOR // num_pixels
    with torch.cuda.device(images.device):
        return augment_in_groups(images, draws, mean, std, dtype, max(1, in_cache, worth_a_launch))
