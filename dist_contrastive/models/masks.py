"""Masks over a grid of patches, a pure function of each image's key."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dist_contrastive.rng import Stream, fold, unit

ROUNDS = 16
"""Blocks that are tried for an image; each is put in where it fits into what is left to mask."""
SMALLEST_BLOCK = 4
"""Patches of a block, at least."""
ASPECT = 0.3
"""A block's height over its width is between this and its inverse."""
NUMBERS = 4
"""Random numbers of a block: area, aspect, top, left."""


def block_masks(
    keys: Int[Tensor, " n"], side: int, *, probability: float, ratio: tuple[float, float]
) -> Bool[Tensor, "n t"]:
    """Which of side × side patches of each image are masked, in blocks: bool [N, side²], on the device of `keys`.

    BEiT's block-wise masking (Bao et al. 2022, algorithm 1), as iBOT uses it (Zhou et al. 2022, section 4.1): with `probability`
    an image is masked, to a share of its patches that is drawn from `ratio`, in rectangles of random area and aspect. A block is
    put in where it masks something new and no more than is left of the share, so the share is a limit. No masked image is
    without a masked patch.
    """
    numbers = [unit(fold(keys, int(Stream.MASK) + number)) for number in range(2 + NUMBERS * ROUNDS)]
    low, high = ratio
    share = low + (high - low) * numbers[1]
    wanted = (share * side**2).floor().clamp(min=1) * (numbers[0] < probability)
    rows = torch.arange(side, device=keys.device)
    mask = torch.zeros(len(keys), side, side, dtype=torch.bool, device=keys.device)
    for area, aspect, top, left in (numbers[2 + NUMBERS * k : 2 + NUMBERS * (k + 1)] for k in range(ROUNDS)):
        remaining = wanted - mask.sum((1, 2))
        smallest = remaining.clamp(max=SMALLEST_BLOCK)
        size = smallest + (remaining - smallest) * area
        stretch = torch.exp((2 * aspect - 1) * math.log(1 / ASPECT) / 2)
        height, width = ((size.sqrt() * s).round().clamp(1, side) for s in (stretch, 1 / stretch))
        first_row, first_column = (torch.floor(u * (side - s + 1)) for u, s in ((top, height), (left, width)))
        in_rows, in_columns = (
            (rows >= first[:, None]) & (rows < (first + length)[:, None])
            for first, length in ((first_row, height), (first_column, width))
        )
        with_block = mask | (in_rows[:, :, None] & in_columns[:, None, :])
        fits = with_block.sum((1, 2)) <= wanted
        mask = torch.where(fits[:, None, None], with_block, mask)
    # Where no block fitted, one patch is masked.
    empty = (wanted > 0) & ~mask.any(2).any(1)
    mask[:, 0, 0] |= empty
    return mask.flatten(1)


def most_masked(side: int, ratio: tuple[float, float]) -> int:
    """How many patches of an image `block_masks` masks at the most."""
    return max(1, math.floor(ratio[1] * side**2))


def masked_places(mask: Bool[Tensor, "n t"], most: int) -> tuple[Int[Tensor, "n {most}"], Float[Tensor, "n {most}"]]:
    """Where each image's masked patches are, int64 [N, most], and how each counts, float32 [N, most].

    A masked patch counts as one over the number of masked patches of its image. Where there are fewer than `most`, other places
    fill up, which count 0: so all images have as many, and no device is asked how many there are.
    """
    places = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    chosen = mask.gather(1, places)
    return places, chosen / mask.sum(1, keepdim=True).clamp(min=1)
