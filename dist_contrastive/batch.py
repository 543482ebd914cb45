"""What the loader hands to the method, and whose it is."""

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_contrastive.config import require


@dataclass(frozen=True)
class Samples:
    """Whose the views of a batch are: all that a loss knows of its B samples."""

    labels: Tensor
    """int64 [B]; a method that learns without labels does not read them."""
    indices: Tensor
    """int64 [B]: positions of the samples in the `.beton`, which key everything random about them."""
    epoch: int
    """The epoch the samples belong to, counted from 0."""

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, part: slice) -> "Samples":
        """Some of them."""
        return replace(self, labels=self.labels[part], indices=self.indices[part])

    def to(self, device: torch.device) -> "Samples":
        """The same ones on `device`, which the host does not wait for."""
        labels, indices = (x.to(device, non_blocking=True) for x in (self.labels, self.indices))
        return replace(self, labels=labels, indices=indices)


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step: B samples, each with all its views."""

    views: tuple[Tensor, ...]
    """One tensor for each size of views, of V views of S pixels a side: uint8 [V, B, S, S, 3] as the loader cropped them,
    float32 [V, B, 3, S, S] once augmented."""
    samples: Samples
    text: Tensor | None = None
    """int64 [B, L]: a caption of each sample as L token ids, padded with `config.PADDING`; None where the dataset has no
    captions."""
    draws: Tensor | None = None
    """float32 [V, B, ...]: what the augmentation is to do with each view, all sizes together (`data.augment.draws`); None where
    views are not to be augmented, or are already."""

    def __len__(self) -> int:
        return len(self.samples)

    def part(self, part: slice) -> "Batch":
        """Some of its samples, all their views."""
        text = None if self.text is None else self.text[part]
        draws = None if self.draws is None else self.draws[:, part]
        return Batch(tuple(views[:, part] for views in self.views), self.samples.part(part), text, draws)


@dataclass(frozen=True)
class Share:
    """Which samples of each global batch are one rank's: the `rank`-th of `num_ranks` equal runs."""

    global_batch: int
    """Samples of one update over all ranks."""
    rank: int = 0
    num_ranks: int = 1

    def __post_init__(self) -> None:
        require(
            self.global_batch % self.num_ranks == 0,
            f"--batch.global {self.global_batch} can't be shared equally by {self.num_ranks} ranks; give a multiple of "
            f"{self.num_ranks}",
        )

    @property
    def rank_batch(self) -> int:
        """Samples of one update on one rank."""
        return self.global_batch // self.num_ranks

    def of_update(self, number: int) -> slice:
        """This rank's part of an epoch's order in update `number` (from 0) of the epoch."""
        start = number * self.global_batch + self.rank * self.rank_batch
        return slice(start, start + self.rank_batch)


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Whole global batches in an epoch of `num_samples`; the incomplete last one is dropped.

    Errors: UserError where there is not one.
    """
    require(
        global_batch <= num_samples,
        f"--batch.global {global_batch} is more than the {num_samples} training samples: give at most {num_samples}",
    )
    return num_samples // global_batch


def balanced_slices(num_samples: int, count: int) -> list[slice]:
    """`count` slices over `num_samples`, in order, whose sizes differ by at most one."""
    bounds = [num_samples * number // count for number in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def smallest_part(num_samples: int, micro: int) -> int:
    """Samples of the smallest of as few balanced parts as hold at most `micro` each; with `micro` 0 there is one part."""
    return num_samples // math.ceil(num_samples / micro) if micro else num_samples


def largest_micro(num_samples: int, at_most: int, fewest: int) -> int:
    """The largest part of `num_samples` up to `at_most`, where they are cut into as few balanced parts as that allows and none
    has fewer than `fewest`; 0 if there is no such cut."""
    fitting = (m for m in range(min(at_most, num_samples), 0, -1) if smallest_part(num_samples, m) >= fewest)
    largest = next(fitting, 0)
    return math.ceil(num_samples / math.ceil(num_samples / largest)) if largest else 0
