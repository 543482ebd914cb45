"""A loader that keeps the training images, decoded, in the memory of the device that trains, and cuts the crops there.

Order, crops, draws and captions are those of the loader that reads the file, and so is every pixel: the arithmetic is that of
`crops`, operation by operation and in the same order. The threads have nothing left to do but to draw.
"""

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from dist_contrastive import liveness
from dist_contrastive.batch import Share
from dist_contrastive.config import TrainConfig, require
from dist_contrastive.data.beton import Dataset
from dist_contrastive.data.crops import decode_samples
from dist_contrastive.data.format import TRAIN
from dist_contrastive.data.loader import Begun, Crops, Loader, Scratches, fair_threads, unreadable

MAX_VALUES = 1 << 22
"""Values of views that are cut at a time: each takes an index of 8 bytes and a few floats meanwhile."""
USABLE = 0.8
"""Part of the device's free memory that the images may take: a step needs some, too."""
DECODED_AT_A_TIME = 256


class ResidentLoader(Loader):
    """A `Loader` whose training images lie on a device; of other images it reads the file."""

    def __init__(self, *settings: Any, **options: Any) -> None:
        """What a `Loader` takes. `UserError` where the images do not fit into the memory of `device`."""
        super().__init__(*settings, **options)
        dataset, device = self.dataset, self.device
        train = dataset.indices(TRAIN)
        lengths = 3 * dataset.heights[train].astype(np.int64) * dataset.widths[train]
        size, free = int(lengths.sum()), _free_bytes(device)
        require(
            size <= USABLE * free,
            f"--data.resident: the {len(train)} training images of {dataset.path} take {size / 2**30:.2f} GiB decoded, and the "
            f"{device.type} has {free / 2**30:.2f} GiB free; leave the option out",
        )
        begins = np.full(len(dataset.labels), -1, np.int64)
        begins[train] = np.cumsum(lengths) - lengths
        self._is_resident = begins >= 0
        self._pixels = torch.empty(size, dtype=torch.uint8, device=device)
        """All images, one after the other."""
        self._begins = torch.from_numpy(begins).to(device)
        """int64 [samples]: where in `_pixels` each begins; -1 for those that are not there."""
        self._widths = torch.from_numpy(dataset.widths.astype(np.int64)).to(device)
        with liveness.busy("decodes the training images"):
            for start in range(0, len(train), DECODED_AT_A_TIME):
                self._decode(train[start : start + DECODED_AT_A_TIME], begins)

    def _decode(self, samples: np.ndarray, begins: np.ndarray) -> None:
        """Decode `samples` int64 [n], which follow one another in `_pixels`, on all threads."""
        d = self.dataset
        lengths = 3 * d.heights[samples].astype(np.int64) * d.widths[samples]
        own = np.cumsum(lengths) - lengths
        decoded = np.empty(int(lengths.sum()), np.uint8)

        def work(share: np.ndarray, start: int, scratches: Scratches) -> None:
            begins_of_share = own[start : start + len(share)]
            failed = decode_samples(
                d.file_bytes, d.pointers, d.sizes, d.is_jpeg, d.heights, d.widths, share, begins_of_share, decoded
            )
            if failed >= 0:
                raise unreadable(d, share[failed])

        self.wait_for(self.share_out(samples, work))
        begin = int(begins[samples[0]])
        self._pixels[begin : begin + len(decoded)] = torch.from_numpy(decoded)

    def start(self, crops: Crops, samples: np.ndarray) -> Begun:
        if not self._is_resident[samples].all():
            return super().start(crops, samples)
        boxes = self.tensor(torch.empty((len(crops.sides), len(samples), 4), dtype=torch.int64))
        draws, indices = self.room_for_draws(crops, len(samples)), self.tensor(torch.from_numpy(samples))
        places, drawn = boxes.numpy(), draws.numpy()

        def work(share: np.ndarray, start: int, scratches: Scratches) -> None:
            crops.draw(share, start, drawn)
            places[:, start : start + len(share)] = crops.boxes(share)

        parts = self.share_out(samples, work)
        return Begun(parts, None if crops.drawer is None else draws, lambda: self._cut(crops, indices, boxes))

    def _cut(self, crops: Crops, samples: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
        """The views of `samples` int64 [B], whose `boxes` are int64 [V, B, 4]: uint8 [V, B, S, S, 3] for each size, on the
        device."""
        begins, widths = (x[samples.to(self.device, non_blocking=True)] for x in (self._begins, self._widths))
        views, first = [], 0
        for count, side in crops.views:
            of_size = torch.empty((count, len(samples), side, side, 3), dtype=torch.uint8, device=self.device)
            at_a_time = max(1, MAX_VALUES // (3 * side * side))
            for view, box in zip(of_size, boxes[first : first + count], strict=True):
                for start in range(0, len(samples), at_a_time):
                    part = slice(start, start + at_a_time)
                    cut_views(self._pixels, begins[part], widths[part], box[part], view[part])
            views.append(of_size)
            first += count
        return tuple(views)


def cut_views(pixels: Tensor, begins: Tensor, widths: Tensor, boxes: Tensor, out: Tensor) -> None:
    """Resize the `boxes` int64 [n, 4] of n images that begin at `begins` int64 [n] of `pixels` and whose rows have `widths` int64
    [n] pixels into `out` uint8 [n, S, S, 3]. `boxes` are on the CPU, the others on one device.

    As `crops` does it: where a crop has no more rows than the view its rows are resized first, else its columns.
    """
    side = out.shape[1]
    few = boxes[:, 2] <= side
    for rows_first, chosen in ((True, few), (False, ~few)):
        numbers = chosen.nonzero().flatten()
        if not len(numbers):
            continue
        of_chosen = boxes[numbers]
        num_taps = tuple(_num_taps(int(of_chosen[:, axis].max()), side) for axis in (2, 3))
        if out.is_cuda:
            numbers, of_chosen = numbers.pin_memory(), of_chosen.pin_memory()
        numbers, of_chosen = (x.to(out.device, non_blocking=True) for x in (numbers, of_chosen))
        source = _Source(pixels, begins[numbers], widths[numbers], of_chosen, side, num_taps)
        out[numbers] = (source.rows_first() if rows_first else source.columns_first()).to(torch.int32).to(torch.uint8)


class _Source:
    """What views are made of: taps of crops, and how much each weighs."""

    def __init__(
        self, pixels: Tensor, begins: Tensor, widths: Tensor, boxes: Tensor, side: int, num_taps: tuple[int, ...]
    ) -> None:
        top, left, self._height, self._width = boxes.unbind(1)
        self._row, row_weights = triangle_weights(self._height, side, num_taps[0])
        self._column, column_weights = triangle_weights(self._width, side, num_taps[1])
        self._of_rows = row_weights[:, :, None, None].unbind(-1)
        self._of_columns = column_weights[:, None, :, None].unbind(-1)
        self._pixels, self._widths = pixels, widths
        self._origin = begins + 3 * (top * widths + left)

    def rows_first(self) -> Tensor:
        """Values float32 [n, S, S, 3], a half added."""
        total = torch.full((), 0.5, device=self._pixels.device)
        for i, weight in enumerate(self._of_rows):
            total = total + weight * self._sum(self._of_columns, (self._tap(i, k) for k in self._columns()))
        return total

    def columns_first(self) -> Tensor:
        """The same, where each column is resized before the rows are."""
        rows = range(len(self._of_rows))
        columns = (self._sum(self._of_rows, (self._tap(i, k) for i in rows)) for k in self._columns())
        return self._sum(self._of_columns, columns) + 0.5

    def _columns(self) -> range:
        return range(len(self._of_columns))

    def _tap(self, i: int, k: int) -> Tensor:
        """Tap i of the rows and k of the columns, float32 [n, S, S, 3]; beyond the crop, where weights are 0, its border."""
        y = torch.minimum(self._row + i, self._height[:, None] - 1)
        x = torch.minimum(self._column + k, self._width[:, None] - 1)
        places = (self._origin[:, None] + 3 * self._widths[:, None] * y)[:, :, None] + 3 * x[:, None]
        return self._pixels[places[..., None] + torch.arange(3, device=places.device)].float()

    @staticmethod
    def _sum(weights: Sequence[Tensor], taps: Iterable[Tensor]) -> Tensor:
        """The weighted sum of the taps, in their order; of them one is there at a time."""
        products = (weight * tap for weight, tap in zip(weights, taps, strict=True))
        return reduce(torch.add, products)


def _num_taps(length: int, side: int) -> int:
    """The most that resizing `length` pixels or fewer to `side` takes (`triangle_weights`)."""
    return 2 if length <= side else int(2 * length / side + 1) + 1


def triangle_weights(lengths: Tensor, side: int, num_taps: int) -> tuple[Tensor, Tensor]:
    """The filter of `crops` for each of `lengths` int64 [n] pixels to `side`: the first tap int64 [n, side] and the weights
    float32 [n, side, num_taps], which are 0 beyond a filter's own taps."""
    scale = (lengths.double() / side)[:, None]
    i = torch.arange(side, device=lengths.device, dtype=torch.float64)
    length = lengths[:, None]
    # Enlarged: between two neighbours, at the border one pixel alone.
    position = scale * (i + 0.5) - 0.5
    low = position.floor().clamp(min=0).long()
    share = torch.where(low < length - 1, (position - low).clamp(min=0), 0.0).float()
    enlarged = torch.zeros((*share.shape, num_taps), device=lengths.device)
    enlarged[..., 0], enlarged[..., 1] = 1 - share, share
    # Reduced: a triangle over all that an output covers.
    inverse = (1.0 / scale).float()
    center = scale * (i + 0.5)
    first = (center - scale + 0.5).long().clamp(min=0)
    num = torch.minimum((center + scale + 0.5).long(), length) - first
    offset = (first - center + 0.5).float()
    taps = torch.arange(num_taps, device=lengths.device)
    reduced = (1 - ((taps.float() + offset[..., None]) * inverse[..., None]).abs()).clamp(min=0)
    reduced = torch.where(taps < num[..., None], reduced, 0.0)
    total = torch.zeros_like(share)
    for k in range(num_taps):
        total = total + reduced[..., k]
    is_reduced = scale > 1
    weights = torch.where(is_reduced[..., None], reduced / total[..., None], enlarged)
    return torch.where(is_reduced, first, low), weights


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def loader_of(config: TrainConfig, dataset: Dataset, share: Share, device: torch.device) -> Loader:
    """The loader of a run of `config` on `device`, for the rank whose `share` it is."""
    threads = fair_threads(config.data.threads)
    kind = ResidentLoader if config.data.resident else Loader
    return kind(dataset, config.data, config.augment, seed=config.seed, share=share, threads=threads, device=device)
