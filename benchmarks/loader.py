"""`python -m benchmarks.loader`: how many images a second does the loader give?

Reads a packed dataset and cuts random views, without any further augmentation, three ways side by side: this package's
loader, FFCV's own `Loader` with one `RandomResizedCropRGBImageDecoder` pipeline for each view, and torchvision's
`DataLoader` over PIL images (on fewer samples, being slower). Each has one epoch to warm up (compiled code, worker
processes, the file in memory), then the three take turns, so that a noisy neighbour meets them all.

    python -m benchmarks.loader --data data/cifar10.beton
    python -m benchmarks.loader --data data/photos.beton --views 1 --batch 256 --pil-samples 0

Multi-crop, two views of 224 pixels and eight of 96 as DINO cuts them, from JPEGs of about 300 pixels, which are cut from the
embedded photographs and packed first:

    python -m benchmarks.loader --data data/photographs.beton --photographs 1000 --image-size 224 --small-views 8 --batch 64 \
        --pil-samples 250
"""

import io
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numba
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Compose, PILToTensor, RandomResizedCrop

from benchmarks.frame import Record, Turns, at_least, bars, begin, comparison, seconds, take_turns
from dist_contrastive.batch import Share
from dist_contrastive.cli import main_guard
from dist_contrastive.config import AugmentConfig, DataConfig, ViewConfig, require
from dist_contrastive.data.beton import Dataset, open_dataset
from dist_contrastive.data.format import TEST, TRAIN
from dist_contrastive.data.loader import Loader
from dist_contrastive.data.packing import write_dataset
from dist_contrastive.data.sources import PHOTOS, Sample, Source, read_photo
from dist_contrastive.rendezvous import fair_cores

QUESTION = "how many images a second does the loader give?"
SAMPLES, CROPS = "samples/s", "crops/s"
OURS, FFCV, TORCHVISION = "dist_contrastive", "FFCV", "torchvision, PIL"
LARGE_SCALE, SMALL_SCALE = (0.4, 1.0), (0.05, 0.4)
"""Areas of the crops where there are small ones, as fractions of the image's (DINO, Caron et al. 2021)."""
PHOTOGRAPH_SIDES = (256, 344)
"""Pixels; both sides are drawn from it."""


@dataclass(frozen=True)
class Command(Turns):
    data: Path = Path("data/cifar10.beton")
    """The packed dataset; its training split is read."""
    views: int = 2
    """Random crops of each sample."""
    image_size: int = 32
    """Side of a view, in pixels."""
    small_views: int = 0
    """Smaller views beside them (multi-crop); the two kinds then have DINO's crops."""
    small_size: int = 96
    """Side of a smaller view, in pixels."""
    batch: int = 512
    """Samples of a batch."""
    rounds: int = 5
    """How often each loader is timed, an epoch each time; they take turns, and the order rotates."""
    threads: int = 0
    """Threads (of torchvision: worker processes); 0 takes one for each usable core."""
    pil_samples: int = 5000
    """How many samples torchvision's loader gets in an epoch; 0 leaves it out."""
    photographs: int = 0
    """Pack this many JPEGs of about 300 pixels into `data` first, cut from the embedded photographs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "batch", "views", "image_size", "small_size")
        at_least(self, 0, "photographs", "pil_samples", "small_views")
        most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        require(0 <= self.threads <= most, f"--threads {self.threads}: give 0 (automatic) to {most}, FFCV's limit here")

    def groups(self) -> tuple[ViewConfig, ...]:
        """The views, as crops of every size."""
        if self.small_views == 0:
            return (ViewConfig(count=self.views, size=self.image_size),)
        return (
            ViewConfig(count=self.views, size=self.image_size, crop_scale=LARGE_SCALE),
            ViewConfig(count=self.small_views, size=self.small_size, crop_scale=SMALL_SCALE),
        )

    def num_crops(self) -> int:
        """Of a sample."""
        return AugmentConfig(self.groups()).num_views


def photographs(num_train: int) -> Source:
    """JPEGs of about 300 pixels: rectangles at random places of the embedded photographs that are large enough."""
    low, high = PHOTOGRAPH_SIDES
    photos = [read_photo(name, place) for name, place in PHOTOS.items()]
    photos = [photo for photo in photos if min(photo.shape[:2]) >= low]
    generator = np.random.default_rng(0)
    samples = []
    for number in range(num_train + 1):  # a dataset has at least one sample to test
        photo = photos[number % len(photos)]
        height, width = np.minimum(generator.integers(low, high, 2, endpoint=True), photo.shape[:2])
        y, x = generator.integers(0, (photo.shape[0] - height + 1, photo.shape[1] - width + 1))
        cut = np.ascontiguousarray(photo[y : y + height, x : x + width])
        samples.append(Sample(str(number), 0, TRAIN if number < num_train else TEST, cut))
    return Source("photographs", ("photograph",), tuple(samples), "all but one to train")


class PilDataset(torch.utils.data.Dataset[tuple[list[torch.Tensor], int]]):
    """Views uint8 [V, 3, S, S] of each size and label of a packed dataset's samples, the way torchvision's users make them."""

    def __init__(self, dataset: Dataset, samples: np.ndarray, groups: Sequence[ViewConfig]) -> None:
        self.dataset = dataset
        self.samples = samples
        self.crops = [
            (Compose([RandomResizedCrop(group.size, group.crop_scale), PILToTensor()]), group.count) for group in groups
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> tuple[list[torch.Tensor], int]:
        d, sample = self.dataset, self.samples[position]
        stored = d.file_bytes[d.pointers[sample] : d.pointers[sample] + d.sizes[sample]]
        if d.is_jpeg[sample]:
            image = Image.open(io.BytesIO(stored.tobytes())).convert("RGB")
        else:
            image = Image.fromarray(stored.reshape(d.heights[sample], d.widths[sample], 3))
        views = [torch.stack([crop(image) for _ in range(count)]) for crop, count in self.crops]
        return views, int(d.labels[sample])


def our_epochs(config: Command, dataset: Dataset, threads: int) -> Callable[[int], int]:
    """A function that runs epoch k and returns how many samples it gave."""
    data, augment = DataConfig(image_size=config.image_size), AugmentConfig(config.groups())
    loader = Loader(dataset, data, augment, seed=0, share=Share(config.batch), threads=threads)

    def run(epoch: int) -> int:
        return sum(map(len, loader.epoch(epoch)))

    return run


def ffcv_epochs(config: Command, dataset: Dataset, threads: int) -> Callable[[int], int]:
    """The same by FFCV: one pipeline for each view, random order, the file mapped."""
    # Not at the top: where FFCV is missing, opening the dataset has said so in one line.
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import ToTensor

    pipelines: dict[str, PipelineSpec | None] = {"split": None}
    views = [group for group in config.groups() for _ in range(group.count)]
    for number, view in enumerate(views):
        decoder = RandomResizedCropRGBImageDecoder((view.size, view.size), view.crop_scale, view.crop_ratio)
        pipelines["image" if number == 0 else f"view_{number}"] = PipelineSpec("image", decoder, [ToTensor()])
    loader = Loader(
        str(dataset.path), batch_size=config.batch, num_workers=threads, order=OrderOption.RANDOM, os_cache=True,
        indices=dataset.indices(TRAIN), pipelines=pipelines, drop_last=True,
    )  # fmt: skip

    def run(epoch: int) -> int:
        return sum(len(batch[0]) for batch in loader)

    return run


def torchvision_epochs(config: Command, dataset: Dataset, threads: int) -> Callable[[int], int]:
    """The same by torchvision's DataLoader over PIL images, on `pil_samples` of the samples."""
    samples = dataset.indices(TRAIN)[: config.pil_samples]
    loader = DataLoader(
        PilDataset(dataset, samples, config.groups()), batch_size=min(config.batch, len(samples)),
        shuffle=True, num_workers=threads, drop_last=True, persistent_workers=True,
    )  # fmt: skip

    def run(epoch: int) -> int:
        return sum(len(labels) for _, labels in loader)

    return run


def measure(config: Command, dataset: Dataset, threads: int, record: Record) -> None:
    """Samples/s and crops/s of each loader."""
    contenders = {OURS: our_epochs(config, dataset, threads), FFCV: ffcv_epochs(config, dataset, threads)}
    if config.pil_samples > 0:
        contenders[TORCHVISION] = torchvision_epochs(config, dataset, threads)
    numbers = itertools.count()

    def rate(run: Callable[[int], int]) -> float:
        given: list[int] = []
        took = seconds(lambda: given.append(run(next(numbers))), torch.device("cpu"))
        return given[0] / took

    rates = take_turns({name: partial(rate, run) for name, run in contenders.items()}, config.rounds)
    views = " and ".join(f"{group.count} views of {group.size} px" for group in config.groups())
    for name, values in rates.items():
        record.add(views, name, SAMPLES, values)
        record.add(views, name, CROPS, [config.num_crops() * value for value in values])


def main(argv: Sequence[str] | None = None) -> None:
    config, record = begin(
        Command, "loader", argv, __doc__, question=QUESTION, packages=("torchvision", "ffcv", "numba", "pillow")
    )
    if config.photographs > 0:
        write_dataset(photographs(config.photographs), config.data)
    dataset = open_dataset(config.data)
    manifest = dataset.manifest
    require(
        config.batch <= manifest.num_train,
        f"--batch {config.batch} is more than the {manifest.num_train} training samples",
    )
    threads = config.threads or fair_cores()
    measure(config, dataset, threads, record)
    record.details["dataset"] = {
        "name": config.data.name, "sha256": manifest.sha256, "num_train": manifest.num_train, "num_jpeg": manifest.num_jpeg,
        "largest": [manifest.largest_height, manifest.largest_width],
        "mean_pixels": float(np.mean(dataset.heights.astype(np.int64) * dataset.widths)),
        "mean_bytes": float(np.mean(dataset.sizes)),
    }  # fmt: skip
    body = f"Batch {config.batch}, {threads} threads.\n\n{comparison(record, (SAMPLES, CROPS), OURS)}"
    record.write("The loader beside others", body, {"samples": bars(record, SAMPLES)})


if __name__ == "__main__":
    sys.exit(main_guard(main))
