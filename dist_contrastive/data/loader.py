"""The loader: reads samples of a `.beton` file, decodes each once and cuts all its views from it, on threads of the CPU.

FFCV's file format and its libjpeg-turbo decoder are used (through `beton`); the threads are our own, because FFCV's
consumer waits for ever once its thread fails, its batches are overwritten later, and it compiles anew in every process.

Threads. An epoch owns a few daemon threads. Each takes slices of batches from one queue and fills them with a compiled
kernel that holds no lock. `batches_ahead` batches are under way; the consumer waits for the oldest, at most
`DataConfig.timeout_s` seconds. An error in a thread reaches the consumer as itself, and an epoch's threads end with it.

Memory. A batch owns its tensors: B × S × S × 3 bytes a view, `batches_ahead` + 1 times; views of several sizes lie in one piece,
one tensor after the other. Beside them each thread keeps one scratch buffer of the size of the largest JPEG, decoded, so
scratch is threads × largest image, not batch × largest.

Randomness. The order of an epoch is `rng.permutation`; a crop is a pure function of (seed, epoch, sample index, view), the
caption that is drawn one of (seed, epoch, sample index). So neither threads, ranks nor restarts change what a sample looks
like at an epoch, or what is said of it.
"""

import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from threading import Thread, current_thread
from types import TracebackType
from typing import Any, NamedTuple, Self

import numba
import numpy as np
import torch
from numba.core import event
from torch import Tensor

from dist_contrastive import rng
from dist_contrastive.batch import Batch, Samples, Share, steps_per_epoch
from dist_contrastive.config import AugmentConfig, DataConfig, require
from dist_contrastive.data.beton import TURBOJPEG_DECODE, Dataset
from dist_contrastive.data.format import TRAIN
from dist_contrastive.rendezvous import fair_cores

CROP_TRIES = 10  # as torchvision's RandomResizedCrop
CROP = int(rng.Stream.CROP)
_decode_jpeg: Any = TURBOJPEG_DECODE  # called in compiled code alone
# How long close() waits for threads to end their slices; one stuck in a read ends by itself when the read returns.
JOIN_TIMEOUT_S = 5.0


def _cached(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled at its first call; the code is kept on disk for other processes.

    Each function compiled so is called with one signature alone: two processes that compile it at once then write the
    same code, whichever comes last. The cache does not notice changes in the functions of other files.
    """
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder that numba could write to: compile in every process
        return numba.njit(nogil=True)(function)


class _Announcement(event.Listener):
    """Says once that something is being compiled."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._said = False

    def on_start(self, event: event.Event) -> None:
        if not self._said:
            self._said = True
            self._say("compiling the loader: about 20 s, the first time on this machine")

    def on_end(self, event: event.Event) -> None:
        pass


def announced_compilation(say: Callable[[str], object]) -> AbstractContextManager[object]:
    """Within it, `say` is called with one line when the loader has to be compiled: what one waits for then."""
    return event.install_listener("numba:compile", _Announcement(say))


class Scratch(NamedTuple):
    """What one thread needs to decode and resize: views of up to S pixels a side, up to K taps a pixel, images W wide."""

    pixels: np.ndarray  # uint8 [bytes of the largest decoded JPEG]
    first_row: np.ndarray  # uint32 [S]: first source row of each output row
    row_weights: np.ndarray  # float32 [S, K]
    first_column: np.ndarray  # uint32 [S]
    column_weights: np.ndarray  # float32 [S, K]
    row: np.ndarray  # float32 [3 max(S, W + K)]: one row of pixels
    lines: np.ndarray  # float32 [S + 1, 3S]: rows that were resized to S columns


def _make_scratch(dataset: Dataset, sizes: np.ndarray) -> Scratch:
    """For views of `sizes` int64 [V] pixels a side."""
    jpegs = dataset.is_jpeg != 0
    areas = dataset.heights[jpegs].astype(np.int64) * dataset.widths[jpegs]
    widest = int(dataset.widths.max())
    size = int(sizes.max())
    taps = 2 * math.ceil(max(widest, int(dataset.heights.max())) / int(sizes.min())) + 2
    return Scratch(
        pixels=np.zeros(3 * int(areas.max(initial=0)), np.uint8),
        first_row=np.zeros(size, np.uint32),
        row_weights=np.zeros((size, taps), np.float32),
        first_column=np.zeros(size, np.uint32),
        column_weights=np.zeros((size, taps), np.float32),
        row=np.zeros(3 * max(size, widest + taps), np.float32),
        lines=np.zeros((size + 1, 3 * size), np.float32),
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


@numba.njit(nogil=True)
def _resize_row(row, first, weights, num_taps, line):
    """Resize `row` float32 [3 · width] of pixels into `line` float32 [3S]; `num_taps` is at least 2.

    Pixel by pixel: the gather instructions with which a compiler would vectorise this are slower on many processors.
    """
    for x in range(len(first)):
        i = 3 * first[x]
        weight, next_weight = weights[x, 0], weights[x, 1]
        red = weight * row[i] + next_weight * row[i + 3]
        green = weight * row[i + 1] + next_weight * row[i + 4]
        blue = weight * row[i + 2] + next_weight * row[i + 5]
        for k in range(2, num_taps):
            weight = weights[x, k]
            red += weight * row[i + 3 * k]
            green += weight * row[i + 3 * k + 1]
            blue += weight * row[i + 3 * k + 2]
        line[3 * x], line[3 * x + 1], line[3 * x + 2] = red, green, blue


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


@_cached
def _crop_samples(file_bytes, pointers, sizes, is_jpeg, heights, widths, samples, boxes, out, places, sides, start, s):
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


@_cached
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


def random_boxes(dataset: Dataset, augment: AugmentConfig, *, seed: int, epoch: int, samples: np.ndarray) -> np.ndarray:
    """The random crops of `samples` int64 [b] at `epoch`: top, left, height, width in pixels, int64 [V, b, 4].

    Area and aspect ratio as torchvision's RandomResizedCrop draws them (Szegedy et al. 2015): up to ten tries, then
    the largest centred crop within the ratios.
    """
    boxes = np.empty((augment.num_views, len(samples), 4), np.int64)
    views = [group for group in augment.groups for _ in range(group.count)]
    scale = np.array([view.crop_scale for view in views], np.float64)
    ratio = np.array([view.crop_ratio for view in views], np.float64)
    _draw_boxes(seed, epoch, samples, dataset.heights, dataset.widths, scale, ratio, boxes)
    return boxes


def center_boxes(dataset: Dataset, fraction: float, samples: np.ndarray) -> np.ndarray:
    """The centred square whose side is `fraction` of the shorter side: top, left, height, width, int64 [1, b, 4]."""
    heights, widths = dataset.heights[samples].astype(np.int64), dataset.widths[samples].astype(np.int64)
    sides = np.maximum(1, np.rint(fraction * np.minimum(heights, widths))).astype(np.int64)
    return np.stack([(heights - sides) // 2, (widths - sides) // 2, sides, sides], axis=-1)[None]


@dataclass
class _Slice:
    """Some consecutive samples of one batch, for one thread."""

    samples: np.ndarray  # int64 [b]
    out: np.ndarray  # uint8, flat: all views of the whole batch
    places: np.ndarray  # int64 [V]: where in it those of each view begin
    start: int  # position of the first sample in the batch
    done: Future[None] = field(default_factory=Future)


@dataclass(frozen=True)
class _Filler:
    """How a slice is filled; shared by the threads, so that they hold no reference to the epoch."""

    dataset: Dataset
    sides: np.ndarray  # int64 [V]: pixels a side of each view
    boxes: Callable[[np.ndarray], np.ndarray]

    def fill(self, part: _Slice, scratch: Scratch) -> None:
        d = self.dataset
        failed = _crop_samples(
            d.file_bytes, d.pointers, d.sizes, d.is_jpeg, d.heights, d.widths,
            part.samples, self.boxes(part.samples), part.out, part.places, self.sides, part.start, scratch,
        )  # fmt: skip
        if failed >= 0:
            raise RuntimeError(f"sample {part.samples[failed]} of {d.path} is not a readable JPEG: pack the file again")


def _work(slices: SimpleQueue[_Slice | None], filler: _Filler) -> None:
    """A thread's whole life: fill slices until None comes."""
    scratch = None
    while (part := slices.get()) is not None:
        if not part.done.set_running_or_notify_cancel():
            continue
        try:
            scratch = scratch or _make_scratch(filler.dataset, filler.sides)
            filler.fill(part, scratch)
        except BaseException as error:  # whatever it is, it is the consumer who must see it
            part.done.set_exception(error)
        else:
            part.done.set_result(None)
        del part  # its batch must not live on while this thread waits for the next slice


def _stop(
    slices: SimpleQueue[_Slice | None], threads: list[Thread], pending: deque[tuple[Batch, list[_Slice]]]
) -> None:
    """Cancel what has not begun, and end and join the threads."""
    while pending:
        for part in pending.popleft()[1]:
            part.done.cancel()
    for _ in threads:
        slices.put(None)
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    for thread in threads:
        if thread is not current_thread():  # the garbage collector may run this on one of them
            thread.join(max(0.0, deadline - time.monotonic()))


class Epoch(Iterator[Batch]):
    """One pass over some samples, as batches in a fixed order; views are uint8 [V, B, S, S, 3] for each size.

    Use it in a `with` block or to its end: both join its threads, as does `close()`, an error, or dropping the last
    reference. `len()` is the number of batches still to come.
    """

    def __init__(
        self,
        dataset: Dataset,
        data: DataConfig,
        batches: Callable[[int], np.ndarray],
        boxes: Callable[[np.ndarray], np.ndarray],
        *,
        epoch: int,
        views: Sequence[tuple[int, int]],
        first_batch: int,
        num_batches: int,
        threads: int,
        pin_memory: bool,
        text: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`batches(k)` gives the sample indices int64 [B] of batch k, `boxes` their crops int64 [V, b, 4] of all views; `views`
        says of each size how many there are, and how many pixels a side; `text` gives captions int64 [B, L] of indices [B]."""
        assert 0 <= first_batch <= num_batches, "an epoch starts at one of its batches"
        assert threads >= 1, "an epoch needs a thread"
        self.wait_ms = 0.0
        """How long the last `next()` waited for its batch, in milliseconds."""
        self._data = data
        self._path = dataset.path
        self._batches = batches
        self._views = views
        self._labels = dataset.labels
        self._text = text
        self._epoch = epoch
        self._submitted, self._returned, self._num_batches = first_batch, first_batch, num_batches
        self._pin_memory = pin_memory
        self._pending: deque[tuple[Batch, list[_Slice]]] = deque()
        self._slices: SimpleQueue[_Slice | None] = SimpleQueue()
        filler = _Filler(dataset, np.array([size for count, size in views for _ in range(count)]), boxes)
        self._threads = [
            Thread(target=_work, args=(self._slices, filler), name=f"loader-{number}", daemon=True)
            for number in range(threads)
        ]
        started: list[Thread] = []
        self._finalizer = weakref.finalize(self, _stop, self._slices, started, self._pending)
        for thread in self._threads:
            thread.start()
            started.append(thread)
        self._submit()

    def __len__(self) -> int:
        return self._num_batches - self._returned

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End and join the threads; a second call does nothing. The epoch gives no batch afterwards."""
        self._returned = self._submitted = self._num_batches
        self._finalizer()

    def __next__(self) -> Batch:
        """The next batch.

        Errors: whatever a thread raised, as itself; TimeoutError when no batch came within `timeout_s`.
        """
        if not self._pending:
            self.close()
            raise StopIteration
        batch, parts = self._pending.popleft()
        try:
            self._submit()
            begin = time.perf_counter()
            finished, unfinished = wait(
                [part.done for part in parts], timeout=self._data.timeout_s, return_when=FIRST_EXCEPTION
            )
            for done in finished:
                done.result()
            if unfinished:
                raise TimeoutError(
                    f"no batch within {self._data.timeout_s:g} s (--data.timeout-s): the threads that read "
                    f"{self._path} are stuck; is its file system still there?"
                )
        except BaseException:
            for part in parts:
                part.done.cancel()
            self.close()
            raise
        self.wait_ms = (time.perf_counter() - begin) * 1e3
        self._returned += 1
        if not self._pending:
            self.close()
        return batch

    def _submit(self) -> None:
        """Put batches under way until `batches_ahead` of them are."""
        while len(self._pending) < self._data.batches_ahead and self._submitted < self._num_batches:
            samples = np.array(self._batches(self._submitted), dtype=np.int64)  # a copy: the batch's own
            out, places, views = _empty_views(self._views, len(samples), pin_memory=self._pin_memory)
            labels, indices = torch.from_numpy(self._labels[samples]), torch.from_numpy(samples)
            text = None if self._text is None else self._text(indices)
            if self._pin_memory:
                labels, indices = labels.pin_memory(), indices.pin_memory()
                text = None if text is None else text.pin_memory()
            # Two slices a thread: the threads end a batch nearly together even where its images differ in size.
            num_parts = min(len(samples), 2 * len(self._threads))
            parts = []
            for start, share in _shares(samples, num_parts):
                parts.append(_Slice(share, out, places, start))
                self._slices.put(parts[-1])
            self._pending.append((Batch(views, Samples(labels, indices, self._epoch), text), parts))
            self._submitted += 1


def _empty_views(
    views: Sequence[tuple[int, int]], num_samples: int, *, pin_memory: bool
) -> tuple[np.ndarray, np.ndarray, tuple[Tensor, ...]]:
    """Room for the `views` (how many, pixels a side) of so many samples, as a tensor [V, B, S, S, 3] for each size.

    Returns the room, uint8 and flat, where in it each view begins, int64 [V], and the tensors in it.
    """
    lengths = [num_samples * size * size * 3 for count, size in views for _ in range(count)]
    places = np.cumsum([0, *lengths])
    flat = torch.empty(int(places[-1]), dtype=torch.uint8, pin_memory=pin_memory)
    shapes = [(count, num_samples, size, size, 3) for count, size in views]
    parts = flat.split([math.prod(shape) for shape in shapes])
    tensors = tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))
    return flat.numpy(), places[:-1], tensors


def _shares(samples: np.ndarray, num_parts: int) -> Iterator[tuple[int, np.ndarray]]:
    """`samples` in `num_parts` nearly equal runs, each with the position of its first."""
    start = 0
    for share in np.array_split(samples, num_parts):
        yield start, share
        start += len(share)


def fair_threads(configured: int) -> int:
    """Loader threads of this rank: `configured`, or where that is 0 its share of the usable cores (`rendezvous.fair_cores`)."""
    return configured or fair_cores()


def train_epoch(
    dataset: Dataset,
    data: DataConfig,
    augment: AugmentConfig,
    *,
    seed: int,
    epoch: int,
    share: Share,
    threads: int,
    start_step: int = 0,
    pin_memory: bool = False,
) -> Epoch:
    """This rank's share of an epoch over the training split: the random crops of each sample, and one of its captions where
    the dataset has any, from step `start_step` on.

    The epoch's order is one permutation of the training samples for all ranks; each update takes the next global batch
    of it, and of that this rank its `share`.

    Errors: UserError where the global batch can't be filled; see `Epoch` for those of its batches.
    """
    train = dataset.indices(TRAIN)
    num_steps = steps_per_epoch(len(train), share.global_batch)
    order = train[rng.permutation(seed, epoch, len(train))]

    def batches(number: int) -> np.ndarray:
        return order[share.of_update(number)]

    def boxes(samples: np.ndarray) -> np.ndarray:
        return random_boxes(dataset, augment, seed=seed, epoch=epoch, samples=samples)

    text = None if dataset.captions is None else partial(dataset.captions.tokens, seed=seed, epoch=epoch)
    return Epoch(
        dataset, data, batches, boxes, epoch=epoch, views=_views_of(augment, data), first_batch=start_step,
        num_batches=num_steps, threads=threads, pin_memory=pin_memory, text=text,
    )  # fmt: skip


def eval_pass(
    dataset: Dataset, data: DataConfig, indices: np.ndarray, *, batch_size: int, threads: int, pin_memory: bool = False
) -> Epoch:
    """One un-augmented pass over the samples `indices` int64 [n] in their order; the last batch may be smaller.

    The one view is the centred square of `eval_crop` of the shorter side, resized; an image that needs no resize is
    copied exactly.
    """

    def boxes(samples: np.ndarray) -> np.ndarray:
        return center_boxes(dataset, data.eval_crop, samples)

    return _pass_in_order(
        dataset, data, indices, boxes, views=[(1, data.image_size)], batch_size=batch_size, threads=threads,
        pin_memory=pin_memory,
    )  # fmt: skip


def view_pass(
    dataset: Dataset,
    data: DataConfig,
    augment: AugmentConfig,
    indices: np.ndarray,
    *,
    seed: int,
    batch_size: int,
    threads: int,
    pin_memory: bool = False,
) -> Epoch:
    """One pass over the samples `indices` int64 [n] in their order, each with the random crops that training would cut in
    epoch 0; the last batch may be smaller."""

    def boxes(samples: np.ndarray) -> np.ndarray:
        return random_boxes(dataset, augment, seed=seed, epoch=0, samples=samples)

    return _pass_in_order(
        dataset, data, indices, boxes, views=_views_of(augment, data), batch_size=batch_size, threads=threads,
        pin_memory=pin_memory,
    )  # fmt: skip


def _views_of(augment: AugmentConfig, data: DataConfig) -> list[tuple[int, int]]:
    """Of each size of views: how many, and how many pixels a side."""
    return [(len(views), size) for size, _, views in augment.layout(data.image_size)]


def _pass_in_order(
    dataset: Dataset,
    data: DataConfig,
    indices: np.ndarray,
    boxes: Callable[[np.ndarray], np.ndarray],
    *,
    views: Sequence[tuple[int, int]],
    batch_size: int,
    threads: int,
    pin_memory: bool,
) -> Epoch:
    """One pass over the samples `indices` int64 [n] in their order, with the crops `boxes` gives."""
    require(batch_size >= 1, f"batch size {batch_size}: give at least 1")
    indices = np.asarray(indices, dtype=np.int64)

    def batches(number: int) -> np.ndarray:
        return indices[number * batch_size : (number + 1) * batch_size]

    return Epoch(
        dataset, data, batches, boxes, epoch=0, views=views, first_batch=0,
        num_batches=math.ceil(len(indices) / batch_size), threads=threads, pin_memory=pin_memory,
    )  # fmt: skip
