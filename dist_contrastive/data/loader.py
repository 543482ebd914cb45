"""The loader: reads samples of a `.beton` file, decodes each once and cuts all its views from it, on threads of the CPU.

FFCV's file format and its libjpeg-turbo decoder are used (through `beton`); the threads are our own, because FFCV's
consumer waits for ever once its thread fails, its batches are overwritten later, and it compiles anew in every process.

Threads. A `Loader` owns a few daemon threads as long as it lives; all its passes share them. Each takes parts of batches from
one queue and fills them with a compiled kernel that holds no lock. Of a pass `batches_ahead` batches are under way; the
consumer waits for the oldest, at most `DataConfig.timeout_s` seconds. An error in a thread reaches the consumer as itself, and
ends the pass: the threads go on with what others ask for.

Memory. A batch owns its tensors: B × S × S × 3 bytes a view, `batches_ahead` + 1 times; views of several sizes lie in one piece,
one tensor after the other. Beside them each thread keeps one scratch buffer of the size of the largest JPEG, decoded, so
scratch is threads × largest image, not batch × largest.

Randomness. The order of an epoch is `rng.permutation`; a crop and what is drawn for the augmentation (`draws`) are pure functions
of (seed, epoch, sample index, view), the caption that is drawn one of (seed, epoch, sample index). So neither threads, ranks nor
restarts change what a sample looks like at an epoch, or what is said of it.
"""

import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from threading import Thread, current_thread
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from dist_contrastive import rng
from dist_contrastive.batch import Batch, Samples, Share, steps_per_epoch
from dist_contrastive.config import AugmentConfig, DataConfig, require
from dist_contrastive.data.augment.draws import NUM_DRAWS, Drawer
from dist_contrastive.data.beton import Dataset
from dist_contrastive.data.crops import Scratch, crop_samples, make_scratch, random_boxes
from dist_contrastive.data.eval_view import EvalView
from dist_contrastive.data.format import TRAIN
from dist_contrastive.rendezvous import fair_cores

CPU = torch.device("cpu")
# How long close() waits for threads to end their slices; one stuck in a read ends by itself when the read returns.
JOIN_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Crops:
    """What a pass cuts from each sample."""

    views: Sequence[tuple[int, int]]
    """Of each size of views: how many, and how many pixels a side."""
    boxes: Callable[[np.ndarray], np.ndarray]
    """Of samples int64 [b]: top, left, height, width of each view's part, int64 [V, b, 4]."""
    drawer: Drawer | None = None
    """What draws for the augmentation of the views, where they are to be augmented."""
    epoch: int = 0
    """At which it draws."""

    @property
    def sides(self) -> tuple[int, ...]:
        """Pixels a side of each view."""
        return tuple(size for count, size in self.views for _ in range(count))

    def cut(
        self,
        dataset: Dataset,
        samples: np.ndarray,
        start: int,
        scratches: "Scratches",
        out: np.ndarray,
        places: np.ndarray,
    ) -> None:
        """Decode `samples` int64 [b] and cut their views to the places from `start` on of those that begin at `places` int64 [V]
        of `out`, uint8 and flat."""
        d = dataset
        failed = crop_samples(
            d.file_bytes, d.pointers, d.sizes, d.is_jpeg, d.heights, d.widths,
            samples, self.boxes(samples), out, places, np.array(self.sides), start, scratches.of(self.sides),
        )  # fmt: skip
        if failed >= 0:
            raise unreadable(d, samples[failed])

    def draw(self, samples: np.ndarray, start: int, draws: np.ndarray) -> None:
        """What is drawn for `samples` int64 [b], if anything is, into draws[:, start:], float32 [V, B, NUM_DRAWS]."""
        if self.drawer is not None:
            self.drawer.fill(draws, samples, self.epoch, start)


def unreadable(dataset: Dataset, sample: int) -> RuntimeError:
    return RuntimeError(f"sample {sample} of {dataset.path} is not a readable JPEG: pack the file again")


class Scratches:
    """What one thread needs for its work, kept as long as it lives; made when it is needed."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._of_sides: dict[tuple[int, ...], Scratch] = {}
        self._pixels: np.ndarray | None = None

    def of(self, sides: tuple[int, ...]) -> Scratch:
        """For views of `sides` pixels a side."""
        if sides not in self._of_sides:
            self._of_sides[sides] = make_scratch(self._dataset, sides, self._pixels)
            self._pixels = self._of_sides[sides].pixels
        return self._of_sides[sides]


@dataclass
class _Task:
    """Some consecutive samples of one batch, for one thread."""

    work: Callable[[Scratches], None]
    done: Future[None] = field(default_factory=Future)


def _work(tasks: SimpleQueue[_Task | None], dataset: Dataset) -> None:
    """A thread's whole life: work until None comes. It holds no reference to the loader."""
    scratches = Scratches(dataset)
    while (task := tasks.get()) is not None:
        if not task.done.set_running_or_notify_cancel():
            del task
            continue
        try:
            task.work(scratches)
        except BaseException as error:  # whatever it is, it is the consumer who must see it
            task.done.set_exception(error)
        else:
            task.done.set_result(None)
        del task  # its batch must not live on while this thread waits for the next one


@dataclass(frozen=True)
class Begun:
    """The views of a batch on which the threads work."""

    parts: list[Future[None]]
    """What has to be done before they are there."""
    draws: Tensor | None
    """What is drawn for them, float32 [V, B, NUM_DRAWS]."""
    views: Callable[[], tuple[Tensor, ...]]
    """Gives them once it is: uint8 [V, B, S, S, 3] for each size."""


def _stop(tasks: SimpleQueue[_Task | None], threads: list[Thread]) -> None:
    """End and join the threads."""
    for _ in threads:
        tasks.put(None)
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    for thread in threads:
        if thread is not current_thread():  # the garbage collector may run this on one of them
            thread.join(max(0.0, deadline - time.monotonic()))


class Loader:
    """Gives the samples of one dataset to one rank, as batches of uint8 views.

    Use it in a `with` block: that ends its threads, as does `close()` or dropping the last reference to it and its passes.
    """

    def __init__(
        self,
        dataset: Dataset,
        data: DataConfig,
        augment: AugmentConfig,
        *,
        seed: int,
        share: Share,
        threads: int,
        device: torch.device = CPU,
    ) -> None:
        """`share` is this rank's of each update's samples, `threads` how many work (`fair_threads`), `device` where the batches
        are going."""
        assert threads >= 1, "a loader needs a thread"
        self.dataset, self.data, self.augment = dataset, data, augment
        self.view = EvalView.of(data, augment)
        self.seed, self.share = seed, share
        self.device = device
        self._pin_memory = device.type == "cuda"  # which a GPU reads by itself
        self._num_threads = threads
        self._parts_a_thread = 2 if dataset.is_jpeg.any() else 1
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        started: list[Thread] = []
        self._finalizer = weakref.finalize(self, _stop, self._tasks, started)
        for number in range(threads):
            thread = Thread(target=_work, args=(self._tasks, dataset), name=f"loader-{number}", daemon=True)
            thread.start()
            started.append(thread)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End and join the threads; a second call does nothing. A pass that is under way would wait in vain: end it before."""
        self._finalizer()

    def epoch(self, number: int, start_step: int = 0) -> "Batches":
        """This rank's share of epoch `number` over the training split, from step `start_step` on: the random crops of each
        sample, and one of its captions where the dataset has any.

        The epoch's order is one permutation of the training samples for all ranks; each update takes the next global batch
        of it, and of that this rank its share.

        Errors: UserError where the global batch can't be filled; see `Batches` for those of its batches.
        """
        train = self.dataset.indices(TRAIN)
        num_steps = steps_per_epoch(len(train), self.share.global_batch)
        order = train[rng.permutation(self.seed, number, len(train))]
        captions = self.dataset.captions
        return Batches(
            self,
            self._random_crops(self.augment, number),
            lambda step: order[self.share.of_update(step)],
            steps=range(start_step, num_steps),
            text=None if captions is None else partial(captions.tokens, seed=self.seed, epoch=number),
        )

    def centered(self, indices: np.ndarray, *, batch_size: int, image_size: int | None = None) -> "Batches":
        """One un-augmented pass over the samples `indices` int64 [n] in their order; the last batch may be smaller.

        The one view is that of evaluation (`EvalView`), or its square resized to `image_size` pixels instead; an image that needs
        no resize is copied exactly.
        """
        boxes = partial(self.view.boxes, self.dataset)
        return self._in_order(Crops([(1, image_size or self.view.size)], boxes), indices, batch_size)

    def views(self, indices: np.ndarray, *, batch_size: int, augment: AugmentConfig | None = None) -> "Batches":
        """One pass over the samples `indices` int64 [n] in their order, each with the random crops that training would cut in
        epoch 0, with another `augment` perhaps; the last batch may be smaller."""
        return self._in_order(self._random_crops(augment or self.augment, 0), indices, batch_size)

    def _in_order(self, crops: Crops, indices: np.ndarray, batch_size: int) -> "Batches":
        require(batch_size >= 1, f"batch size {batch_size}: give at least 1")
        indices = np.asarray(indices, dtype=np.int64)
        return Batches(
            self,
            crops,
            lambda step: indices[step * batch_size : (step + 1) * batch_size],
            steps=range(math.ceil(len(indices) / batch_size)),
        )

    def _random_crops(self, augment: AugmentConfig, epoch: int) -> Crops:
        views = [(len(views), size) for size, _, views in augment.layout(self.data.image_size)]
        boxes = partial(random_boxes, self.dataset, augment, seed=self.seed, epoch=epoch)
        return Crops(views, boxes, Drawer(augment, self.seed), epoch)

    def start(self, crops: Crops, samples: np.ndarray) -> Begun:
        """Let the threads cut the views of a batch of `samples` int64 [B], and draw for them."""
        out, places, views = _empty_views(crops.views, len(samples), pin_memory=self._pin_memory)
        draws = self.room_for_draws(crops, len(samples))
        dataset, drawn = self.dataset, draws.numpy()

        def work(share: np.ndarray, start: int, scratches: Scratches) -> None:
            crops.draw(share, start, drawn)
            crops.cut(dataset, share, start, scratches, out, places)

        return Begun(self.share_out(samples, work), None if crops.drawer is None else draws, lambda: views)

    def room_for_draws(self, crops: Crops, num_samples: int) -> Tensor:
        """For so many samples; empty where nothing is drawn."""
        drawn = (0, 0) if crops.drawer is None else (crops.drawer.num_views, num_samples)
        return torch.empty((*drawn, NUM_DRAWS), pin_memory=self._pin_memory)

    def share_out(self, samples: np.ndarray, work: Callable[[np.ndarray, int, Scratches], None]) -> list[Future[None]]:
        """Let the threads do `work(some of the samples, the position of the first, scratches)` for all `samples` int64 [B]."""
        # Two parts a thread where images differ in size: the threads end a batch nearly together all the same.
        parts = _shares(samples, min(len(samples), self._parts_a_thread * self._num_threads))
        tasks = [_Task(partial(work, share, start)) for start, share in parts]
        for task in tasks:
            self._tasks.put(task)
        return [task.done for task in tasks]

    def wait_for(self, parts: Sequence[Future[None]]) -> None:
        """Until all `parts` of what was shared out are done.

        Errors: whatever a thread raised, as itself; TimeoutError when they are not within `timeout_s`.
        """
        timeout_s = self.data.timeout_s
        try:
            finished, unfinished = wait(parts, timeout=timeout_s, return_when=FIRST_EXCEPTION)
            for done in finished:
                done.result()
            if unfinished:
                raise TimeoutError(
                    f"no batch within {timeout_s:g} s (--data.timeout-s): the threads that read {self.dataset.path} are stuck; "
                    "is its file system still there?"
                )
        except BaseException:
            for done in parts:
                done.cancel()
            raise

    def tensor(self, x: Tensor) -> Tensor:
        """`x` in memory of the kind that batches lie in."""
        return x.pin_memory() if self._pin_memory else x


class Batches(Iterator[Batch]):
    """One pass over some samples, as batches in a fixed order; views are uint8 [V, B, S, S, 3] for each size.

    Use it in a `with` block or to its end: both let go of what is under way, as does `close()`, an error, or dropping the last
    reference. `len()` is the number of batches still to come.
    """

    def __init__(
        self,
        loader: Loader,
        crops: Crops,
        samples: Callable[[int], np.ndarray],
        *,
        steps: range,
        text: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`samples(k)` gives the indices int64 [B] of the batch of each of `steps`; `text` gives captions int64 [B, L] of
        indices [B]."""
        self.wait_ms = 0.0
        """How long the last `next()` waited for its batch, in milliseconds."""
        self._loader = loader
        self._crops = crops
        self._samples = samples
        self._text = text
        self._steps = deque(steps)
        self._pending: deque[tuple[Samples, Tensor | None, Begun]] = deque()
        self._finalizer = weakref.finalize(self, _cancel, self._pending)
        self._submit()

    def __len__(self) -> int:
        return len(self._steps) + len(self._pending)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the batches that are under way; a second call does nothing. The pass gives no batch afterwards."""
        self._steps.clear()
        _cancel(self._pending)

    def __next__(self) -> Batch:
        """The next batch.

        Errors: whatever a thread raised, as itself; TimeoutError when no batch came within `timeout_s`.
        """
        if not self._pending:
            raise StopIteration
        samples, text, begun = self._pending.popleft()
        try:
            self._submit()
            begin = time.perf_counter()
            self._loader.wait_for(begun.parts)
        except BaseException:
            self.close()
            raise
        self.wait_ms = (time.perf_counter() - begin) * 1e3
        return Batch(begun.views(), samples, text, begun.draws)

    def _submit(self) -> None:
        """Put batches under way until `batches_ahead` of them are."""
        loader = self._loader
        while self._steps and len(self._pending) < loader.data.batches_ahead:
            samples = np.array(self._samples(self._steps.popleft()), dtype=np.int64)  # a copy: the batch's own
            # Before compiled code, which doesn't check them, sees the samples: numbers that there are none of raise here.
            labels, indices = torch.from_numpy(loader.dataset.labels[samples]), torch.from_numpy(samples)
            begun = loader.start(self._crops, samples)
            text = None if self._text is None else loader.tensor(self._text(indices))
            of_samples = Samples(loader.tensor(labels), loader.tensor(indices), self._crops.epoch)
            self._pending.append((of_samples, text, begun))


def _cancel(pending: deque[tuple[Samples, Tensor | None, Begun]]) -> None:
    """Let the threads pass over what they have not begun."""
    while pending:
        for done in pending.popleft()[2].parts:
            done.cancel()


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
    """Loader threads of this rank: `configured`, or where that is 0 its share of the usable cores (`rendezvous.fair_cores`) but
    for one, which the training loop keeps busy; at least 1."""
    return configured or max(1, fair_cores() - 1)
