"""What the loader hands to the method."""

import itertools
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step. V views, B samples, S pixels a side."""

    views: Tensor
    """uint8 [V, B, S, S, 3] as the loader cropped them; float32 [V, B, 3, S, S] once augmented."""
    labels: Tensor
    """int64 [B]; a method that learns without labels does not read them."""
    indices: Tensor
    """int64 [B]: positions of the samples in the `.beton`, which key everything random about them."""
    epoch: int
    """The epoch the samples belong to, counted from 0."""
    wants_report: bool = True
    """Whether this step is logged; where it is not, a method may leave costly entries out of its report."""

    def samples(self, part: slice) -> "Batch":
        """The samples `part` of it, all their views."""
        return replace(self, views=self.views[:, part], labels=self.labels[part], indices=self.indices[part])

    def view(self, number: int) -> "Batch":
        """All samples, one of their views."""
        return replace(self, views=self.views[number : number + 1])


def balanced_slices(num_samples: int, count: int) -> list[slice]:
    """`count` slices over `num_samples`, in order, whose sizes differ by at most one."""
    bounds = [num_samples * number // count for number in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
