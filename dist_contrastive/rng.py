"""Counter-based random numbers: whatever is random is a pure function of where it is used.

A random number here has no state. It is the hash of a key (seed, epoch, sample index, view, stream), so that the same
sample at the same epoch gets the same views at any number of threads, ranks or restarts (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"). The mixer is the finaliser of splitmix64 (Steele, Lea and Flood 2014).

One definition serves NumPy, numba and torch: `mix`, `fold` and `unit` use only operators that wrap modulo 2**64 on
int64 in all three, with the logical shifts spelled as an arithmetic shift and a mask.
"""

from enum import IntEnum

import numba
import numpy as np
import torch
from torch import Tensor

# splitmix64's constants as signed 64-bit integers (torch has no full uint64 arithmetic).
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)


class Stream(IntEnum):
    """What a random number is for. A stream may use the numbers from its own value up to the next stream's."""

    ORDER = 0
    CROP = 0x100
    FLIP = 0x200
    JITTER = 0x300
    GRAYSCALE = 0x400
    BLUR = 0x500
    SOLARIZE = 0x600
    SHUFFLE = 0x700
    MASK = 0x800
    CAPTION = 0x900
    DROPOUT = 0x10000
    SPLIT = 0x20000
    DROP_PATH = 0x30000
    STEP = 0x40000


def mix(x):
    """splitmix64's finaliser on int64 (an array or tensor of any shape, or a numba scalar); a bijection."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * MULTIPLIER_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * MULTIPLIER_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


mix_jit = numba.njit(mix, inline="always")


def fold(key, word):
    """The key that follows `key` once `word` is taken in.

    `key` is an int64 array or tensor; `word` one that broadcasts against it, or a Python int.
    """
    step = (word + 1) * GOLDEN
    if isinstance(word, int):  # Python's integers do not wrap
        step = (step + (1 << 63)) % (1 << 64) - (1 << 63)
    return mix(key + step)


@numba.njit(inline="always")
def fold_jit(key, word):
    """`fold` for compiled code: int64 scalars in, int64 out."""
    return mix_jit(np.int64(key) + (np.int64(word) + np.int64(1)) * np.int64(GOLDEN))


def unit(key):
    """The top 24 bits of `key` as a number in [0, 1): exact in float32, so equal on every backend and device."""
    return ((key >> 40) & 0xFFFFFF) * (1.0 / (1 << 24))


unit_jit = numba.njit(unit, inline="always")


def below(key, bound):
    """An integer in [0, `bound`) from the top 24 bits of `key`; `bound` is up to 2**24, and may differ for each key."""
    return (((key >> 40) & 0xFFFFFF) * bound) >> 24


def sample_keys(seed: int, epoch: int, indices: Tensor, view: int) -> Tensor:
    """Keys int64 [B] of the samples `indices` int64 [B] at `epoch`, for one view; fold a stream in to draw from them."""
    start = fold(fold(torch.tensor(seed, dtype=torch.int64), epoch), indices)
    return fold(start, view)


@numba.njit(inline="always")
def sample_key_jit(seed, epoch, index, view):
    """`sample_keys` for compiled code: int64 scalars in, one key out."""
    return fold_jit(fold_jit(fold_jit(np.int64(seed), epoch), index), view)


def keep_mask(keys: Tensor, num_features: int, drop_probability: float) -> Tensor:
    """Dropout's mask bool [B, num_features]: True where a feature is kept; `keys` int64 [B] on the wanted device."""
    units = torch.arange(num_features, device=keys.device) + int(Stream.DROPOUT)
    return unit(fold(keys[:, None], units[None, :])) >= drop_probability


def keep_paths(keys: Tensor, layer: int, drop_probability: float) -> Tensor:
    """Stochastic depth's mask bool [B] of one layer: True for samples whose path is kept; `keys` int64 [B]."""
    return unit(fold(keys, int(Stream.DROP_PATH) + layer)) >= drop_probability


def permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The order of an epoch: one permutation int64 [num_samples] of the sample indices, a pure function of the arguments."""
    key = fold(fold(np.array([seed], dtype=np.int64), epoch), int(Stream.ORDER))
    return np.argsort(fold(key, np.arange(num_samples, dtype=np.int64)), kind="stable")


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed in [0, 2**63) for library code that draws from torch's own generator within one step of one rank."""
    key = np.array([seed], dtype=np.int64)
    for word in (step, rank, Stream.STEP):
        key = fold(key, int(word))
    return int(key[0]) & 0x7FFFFFFFFFFFFFFF
