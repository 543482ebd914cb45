"""What is drawn for each view: a few numbers that say all that the augmentation does to it.

They are a pure function of (seed, epoch, sample index, view), drawn by compiled code that holds no lock: on the loader's threads,
so that they are there with the crops, and nobody has to wait for them.
"""

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from dist_contrastive import rng
from dist_contrastive.batch import Samples
from dist_contrastive.config import AugmentConfig
from dist_contrastive.data.compiled import cached
from dist_contrastive.rng import Stream


class Draw(IntEnum):
    """The numbers of a view, float32, by their place."""

    FLIP = 0
    """1: mirrored left to right, or else 0."""
    HUE_TURN = 1
    """At which of the four turns of colour jitter the hue is turned, 0 to 3; -1: it is not."""
    HUE = 2
    """By how much, in turns of the circle of hues."""
    BLEND = 3
    """From here on, for each of the four turns, three numbers a, b, c: an image x becomes
    clamp(a · x + b · luma(x) + c · mean of luma(x)), which is x itself for 1, 0, 0."""
    GRAYSCALE = 15
    """1: without colour, or else 0."""
    SIGMA = 16
    """Standard deviation of the Gaussian blur in pixels; 0: none."""
    THRESHOLD = 17
    """Values from it up are inverted; NEVER: none is."""


NUM_DRAWS = 18
NUM_TURNS = 4
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(NUM_TURNS)
"""The order in which torchvision's ColorJitter numbers its four operations."""
NEVER = 2.0
"""A threshold that no value reaches."""

# The enums' numbers as compiled code takes them in.
_FLIP, _JITTER, _GRAYSCALE = int(Stream.FLIP), int(Stream.JITTER), int(Stream.GRAYSCALE)
_BLUR, _SOLARIZE = int(Stream.BLUR), int(Stream.SOLARIZE)
_AT_FLIP, _AT_HUE_TURN, _AT_HUE, _AT_BLEND = int(Draw.FLIP), int(Draw.HUE_TURN), int(Draw.HUE), int(Draw.BLEND)
_AT_GRAYSCALE, _AT_SIGMA, _AT_THRESHOLD = int(Draw.GRAYSCALE), int(Draw.SIGMA), int(Draw.THRESHOLD)
# Columns of the table that a configuration becomes.
_P_FLIP, _P_JITTER, _P_GRAYSCALE, _P_BLUR, _P_SOLARIZE, _STRENGTH, _SIGMA, _LIMIT = 0, 1, 2, 3, 4, 5, 9, 11
_NUM_COLUMNS = 12


@cached
def _draw(seed, epoch, samples, views, table, out, start):
    """Fill out[:, start:], float32 [V, B, NUM_DRAWS], for `samples` int64 [b] and the views of numbers `views` int64 [V], made as
    `table` float64 [V, 12] says."""
    times = np.empty(4, np.float64)
    for v in range(len(views)):
        t = table[v]
        for position in range(len(samples)):
            key = rng.sample_key_jit(seed, epoch, samples[position], views[v])
            draw = out[v, start + position]
            draw[_AT_FLIP] = 1.0 if rng.unit_jit(rng.fold_jit(key, _FLIP)) < t[_P_FLIP] else 0.0
            draw[_AT_GRAYSCALE] = 1.0 if rng.unit_jit(rng.fold_jit(key, _GRAYSCALE)) < t[_P_GRAYSCALE] else 0.0
            draw[_AT_HUE_TURN] = -1.0
            draw[_AT_HUE] = 0.0
            for turn in range(4):
                draw[_AT_BLEND + 3 * turn] = 1.0
                draw[_AT_BLEND + 3 * turn + 1] = 0.0
                draw[_AT_BLEND + 3 * turn + 2] = 0.0
            if rng.unit_jit(rng.fold_jit(key, _JITTER)) < t[_P_JITTER]:
                for operation in range(4):
                    times[operation] = rng.unit_jit(rng.fold_jit(key, _JITTER + 5 + operation))
                for operation in range(4):
                    strength = t[_STRENGTH + operation]
                    if strength == 0.0:
                        continue
                    turn = 0  # how many come before it; of equal ones the one of the smaller number
                    for other in range(4):
                        before = times[other] < times[operation]
                        if before or (times[other] == times[operation] and other < operation):
                            turn += 1
                    share = rng.unit_jit(rng.fold_jit(key, _JITTER + 1 + operation))
                    if operation == 3:
                        draw[_AT_HUE_TURN] = turn
                        draw[_AT_HUE] = -strength + 2 * strength * share
                    else:
                        low = max(0.0, 1 - strength)
                        factor = low + (1 + strength - low) * share
                        draw[_AT_BLEND + 3 * turn] = factor
                        if (
                            operation == 1
                        ):  # contrast blends with the mean, saturation with the luma, brightness with black
                            draw[_AT_BLEND + 3 * turn + 2] = 1 - factor
                        elif operation == 2:
                            draw[_AT_BLEND + 3 * turn + 1] = 1 - factor
            sigma = 0.0
            if rng.unit_jit(rng.fold_jit(key, _BLUR)) < t[_P_BLUR]:
                sigma = t[_SIGMA] + (t[_SIGMA + 1] - t[_SIGMA]) * rng.unit_jit(rng.fold_jit(key, _BLUR + 1))
            draw[_AT_SIGMA] = sigma
            happens = rng.unit_jit(rng.fold_jit(key, _SOLARIZE)) < t[_P_SOLARIZE]
            draw[_AT_THRESHOLD] = t[_LIMIT] if happens else 2.0


class Drawer:
    """Draws for the views of a configuration."""

    def __init__(self, config: AugmentConfig, seed: int) -> None:
        views = [view for group in config.groups for view in [group] * group.count]
        self._seed = seed
        self._numbers = np.arange(len(views))
        self._table = np.array(
            [
                (
                    v.flip, v.jitter, v.grayscale, v.blur, v.solarize, v.brightness, v.contrast, v.saturation, v.hue,
                    *v.blur_sigma, v.solarize_threshold,
                )
                for v in views
            ]
        ).reshape(len(views), _NUM_COLUMNS)  # fmt: skip

    @property
    def num_views(self) -> int:
        return len(self._numbers)

    def fill(self, out: np.ndarray, samples: np.ndarray, epoch: int, start: int) -> None:
        """What happens to the views of `samples` int64 [b] at `epoch`, into out[:, start : start + b], `out` float32
        [V, B, NUM_DRAWS]."""
        _draw(self._seed, epoch, samples, self._numbers, self._table, out, start)

    def draw(self, samples: Samples) -> Tensor:
        """The same for all `samples` at once, float32 [V, B, NUM_DRAWS] on the CPU."""
        out = np.empty((self.num_views, len(samples), NUM_DRAWS), np.float32)
        self.fill(out, samples.indices.numpy(), samples.epoch, 0)
        return torch.from_numpy(out)


def blur_size(side: int) -> int:
    """The blur's kernel for views of `side` pixels: the odd number nearest to a tenth of the side, at least 3."""
    return max(3, 2 * round((side / 10 - 1) / 2) + 1)
