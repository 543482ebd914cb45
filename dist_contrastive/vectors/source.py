"""What is embedded: the images of a packed dataset, or of a folder at any depth, in a fixed order, cut as evaluation sees them.

Images are decoded on threads, a bounded number ahead of the consumer; of each image the square that the encoder sees is cut at
once, and the rest is dropped. So memory grows neither with the number of images nor, beyond one image for each thread, with
their size. What grows is the list of their names, or the dataset's index.
"""

import hashlib
import json
import os
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from dist_contrastive.batch import Share
from dist_contrastive.config import TrainConfig, UserError, require
from dist_contrastive.data.beton import open_verified, require_ffcv
from dist_contrastive.data.eval_view import EvalView
from dist_contrastive.data.folders import Walk, looks_like_image
from dist_contrastive.data.format import TEST, TRAIN, LeftOut
from dist_contrastive.data.loader import Batches, Loader, fair_threads
from dist_contrastive.data.packing import too_many
from dist_contrastive.data.pictures import BadImageError, NotAnImageError, read_rgb
from dist_contrastive.vectors.options import Split

PIECE = 16
"""Images of a folder that a thread takes at once."""
PIECES_AHEAD = 3
"""How many pieces are under way for each thread."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Chunk:
    """The images of some consecutive items, without those that can't be read: n of them."""

    items: range
    """Which items of the source these are, whether they could be read or not."""
    indices: np.ndarray
    """int64 [n]: positions in the `.beton`, or in the order of paths."""
    squares: Tensor
    """uint8 [n, S, S, 3], as `EvalView` cuts them."""
    paths: Sequence[str] | None
    """Of each image, relative to the folder, POSIX; None for a `.beton`. Bytes that are no UTF-8 are written as `\\xe9`."""
    labels: np.ndarray | None
    """int64 [n]; None where the images have none."""
    bad: Sequence[LeftOut] = ()
    """Images that can't be read."""
    num_passed_over: int = 0
    """Files whose first bytes are an image's by chance, and that are none."""


class BadImages:
    """The images that could not be read so far, all in all at most a number of them."""

    def __init__(self, at_most: int) -> None:
        self.at_most = at_most
        self.found: list[LeftOut] = []

    def add(self, bad: Iterable[LeftOut]) -> None:
        """`UserError` where they are too many now."""
        self.found += bad
        if len(self.found) > self.at_most:
            raise UserError(too_many(self.found, self.at_most, "read"))


class VectorSource(ABC):
    """Images in a fixed order, by number: its items. Use it in a `with` block, which ends its threads.

    Attributes:
        path: the dataset's file, or the folder.
        identity: what tells the source, with its content and order, from others; hexadecimal.
        num_items: how many items there are; some may turn out to be unreadable.
        num_passed_over: files in the folder that are no images.
        classes: the names of labels 0, 1, ...; empty where the images have none.
    """

    path: Path
    identity: str
    num_items: int
    num_passed_over: int = 0
    classes: tuple[str, ...] = ()
    has_paths: bool

    def chunks(self, items: range, size: int) -> Generator[Chunk]:
        """The images of the contiguous range `items`, `size` items at a time."""
        return self.chunks_of([items], size)

    @abstractmethod
    def chunks_of(self, ranges: Sequence[range], size: int) -> Generator[Chunk]:
        """Those of several ranges, one after the other without a pause; no chunk has items of two ranges."""

    @abstractmethod
    def close(self) -> None:
        """End the threads; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_vector_source(
    path: Path, config: TrainConfig, *, split: Split = "all", threads: int = 0, device: torch.device = CPU
) -> VectorSource:
    """What lies at `path`, a `.beton` or a folder of images, as the encoder of a run of `config` sees it.

    `split` takes a part of a `.beton`; `threads` decode (0: one for each usable core but one); `device` is where the squares are
    going. `UserError` where there is no such source, or nothing in it.
    """
    threads = fair_threads(threads)
    if path.is_dir():
        require(split == "all", f"--split {split}: {path} is a folder, which has no splits; leave it out")
        return FolderSource(path, EvalView.of(config.data, config.augment), threads)
    require(
        path.suffix == ".beton" or path.is_file(),
        f"there is no {path}; give a .beton that pack wrote, or a folder of images",
    )
    require(path.suffix == ".beton", f"{path} is neither a .beton nor a folder of images")
    return BetonSource(path, config, split, threads, device)


class BetonSource(VectorSource):
    """The samples of a packed dataset, or of one of its splits."""

    has_paths = False

    def __init__(self, path: Path, config: TrainConfig, split: Split, threads: int, device: torch.device) -> None:
        dataset = open_verified(path)
        manifest = dataset.manifest
        every = np.arange(dataset.num_samples)
        self.path, self.classes = path, manifest.classes
        self.samples = every if split == "all" else dataset.indices(TRAIN if split == "train" else TEST)
        self.num_items = len(self.samples)
        require(self.num_items > 0, f"--split {split}: {path} has no such images")
        self.identity = manifest.sha256 if split == "all" else _sum([manifest.sha256, split])
        share = Share(config.batch.size)
        self._loader = Loader(
            dataset, config.data, config.augment, seed=config.seed, share=share, threads=threads, device=device
        )

    def chunks_of(self, ranges: Sequence[range], size: int) -> Generator[Chunk]:
        passes: deque[tuple[range, Batches]] = deque()
        waiting = iter(ranges)
        try:
            while True:
                # The next range's first batches are under way before this one's last is through.
                for items in islice(waiting, 2 - len(passes)):
                    batches = self._loader.centered(self.samples[items.start : items.stop], batch_size=size)
                    passes.append((items, batches))
                if not passes:
                    return
                items, batches = passes[0]
                for start, batch in zip(range(items.start, items.stop, size), batches, strict=True):
                    indices, labels = batch.samples.indices.numpy(), batch.samples.labels.numpy()
                    squares = batch.views[0][0]
                    yield Chunk(
                        range(start, start + len(indices)), indices, squares, None, labels if self.classes else None
                    )
                passes.popleft()
        finally:
            for _, batches in passes:
                batches.close()

    def close(self) -> None:
        self._loader.close()


class FolderSource(VectorSource):
    """The images below a folder, in the order of their paths.

    A file is an item if its name or its first bytes call it an image; others are passed over. Links are followed, to no folder
    that is there anyway.
    """

    has_paths = True

    def __init__(self, path: Path, view: EvalView, threads: int) -> None:
        require_ffcv()
        self.path, self._view, self._threads = path, view, threads
        names = Walk(path).tree.all_files()
        self.names = [name for name in names if looks_like_image(path / name)]
        self.num_items, self.num_passed_over = len(self.names), len(names) - len(self.names)
        require(self.num_items > 0, f"{path} holds no images")
        # Names, sizes and times: a picture that was exchanged is another one.
        self.identity = _sum([name, *_state(path / name)] for name in self.names)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pictures")

    def chunks_of(self, ranges: Sequence[range], size: int) -> Generator[Chunk]:
        pieces = (piece for chunk in _split(ranges, size) for piece in _split([chunk], PIECE))
        pending: deque[Future[list[np.ndarray | BadImageError]]] = deque()
        # Pillow warns of large images and odd metadata, file by file; what matters is in the reasons.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                for chunk in _split(ranges, size):
                    found: list[np.ndarray | BadImageError] = []
                    for _ in _split([chunk], PIECE):
                        for piece in islice(pieces, PIECES_AHEAD * self._threads - len(pending)):
                            pending.append(self._pool.submit(self._cut, piece))
                        found += pending.popleft().result()
                    yield self._chunk(chunk, found)
            finally:
                for piece_done in pending:
                    piece_done.cancel()

    def _cut(self, items: range) -> list[np.ndarray | BadImageError]:
        """The square uint8 [S, S, 3] of each image, or what is wrong with it."""
        return [self._cut_one(self.path / self.names[item]) for item in items]

    def _cut_one(self, path: Path) -> np.ndarray | BadImageError:
        try:
            return self._view.cut([np.asarray(read_rgb(path))]).numpy()[0]
        except BadImageError as error:
            return error

    def _chunk(self, items: range, found: list[np.ndarray | BadImageError]) -> Chunk:
        read = [(item, square) for item, square in zip(items, found, strict=True) if isinstance(square, np.ndarray)]
        errors = [(item, error) for item, error in zip(items, found, strict=True) if isinstance(error, BadImageError)]
        squares = np.empty((len(read), self._view.size, self._view.size, 3), np.uint8)
        for place, (_, square) in enumerate(read):
            squares[place] = square
        return Chunk(
            items,
            np.array([item for item, _ in read], np.int64),
            torch.from_numpy(squares),
            [_text(self.names[item]) for item, _ in read],
            None,
            [
                LeftOut(_text(self.names[item]), str(error))
                for item, error in errors
                if not isinstance(error, NotAnImageError)
            ],
            sum(isinstance(error, NotAnImageError) for _, error in errors),
        )

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _split(ranges: Iterable[range], size: int) -> Iterator[range]:
    """The items of each of `ranges`, `size` at a time."""
    return (items[start : start + size] for items in ranges for start in range(0, len(items), size))


def _text(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _state(path: Path) -> tuple[int, int]:
    """Size in bytes and time of change in nanoseconds; zeros of a link to nowhere."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _sum(parts: Iterable[object]) -> str:
    """SHA-256 of `parts`, whatever can be written as JSON."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part).encode() + b"\n")
    return digest.hexdigest()
