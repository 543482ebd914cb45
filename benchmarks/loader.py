"""`python -m benchmarks.loader`: how many images a second does the loader give?

Reads a packed dataset and cuts random views, without any further augmentation, three ways side by side: this package's
loader, FFCV's own `Loader` with one `RandomResizedCropRGBImageDecoder` pipeline for each view, and torchvision's
`DataLoader` over PIL images (on fewer samples, being slower). Each has one epoch to warm up (compiled code, worker
processes, the file in memory), then the three take turns, so that a noisy neighbour meets them all.

    python -m benchmarks.loader --data data/cifar10.beton --out loader.json
    python -m benchmarks.loader --data data/photos.beton --views 1 --batch 256 --pil-samples 0
"""

import io
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numba
import numpy as np
import psutil
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Compose, PILToTensor, RandomResizedCrop

from dist_contrastive.atomic import write_atomic
from dist_contrastive.batch import Share
from dist_contrastive.cli import main_guard, parse
from dist_contrastive.config import AugmentConfig, DataConfig, ViewConfig, require
from dist_contrastive.data.beton import Dataset, open_dataset
from dist_contrastive.data.format import TRAIN
from dist_contrastive.data.loader import fair_threads, train_epoch

OURS, FFCV, TORCHVISION = "dist_contrastive", "FFCV", "torchvision, PIL"


@dataclass(frozen=True)
class LoaderBenchmark:
    data: Path = Path("data/cifar10.beton")
    """The packed dataset; its training split is read."""
    views: int = 2
    """Random crops of each sample."""
    image_size: int = 32
    """Side of a view, in pixels."""
    batch: int = 512
    """Samples of a batch."""
    epochs: int = 5
    """How often each loader is timed."""
    threads: int = 0
    """Threads (of torchvision: worker processes); 0 takes one for each usable core."""
    pil_samples: int = 5000
    """How many samples torchvision's loader gets in an epoch; 0 leaves it out."""
    out: Path | None = None
    """Where to write the raw numbers as JSON."""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"--epochs {self.epochs}: give at least 1")
        require(self.batch >= 1, f"--batch {self.batch}: give at least 1")
        require(self.pil_samples >= 0, f"--pil-samples {self.pil_samples}: give 0 (leave it out) or more")
        require(
            self.out is None or self.out.parent.is_dir(), f"--out {self.out}: its folder does not exist, make it first"
        )
        most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        require(0 <= self.threads <= most, f"--threads {self.threads}: give 0 (automatic) to {most}, FFCV's limit here")


class PilDataset(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Views uint8 [V, 3, S, S] and label of a packed dataset's samples, the way torchvision's users make them."""

    def __init__(self, dataset: Dataset, samples: np.ndarray, num_views: int, size: int) -> None:
        self.dataset = dataset
        self.samples = samples
        self.num_views = num_views
        self.crop = Compose([RandomResizedCrop(size), PILToTensor()])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        d, sample = self.dataset, self.samples[position]
        stored = d.file_bytes[d.pointers[sample] : d.pointers[sample] + d.sizes[sample]]
        if d.is_jpeg[sample]:
            image = Image.open(io.BytesIO(stored.tobytes())).convert("RGB")
        else:
            image = Image.fromarray(stored.reshape(d.heights[sample], d.widths[sample], 3))
        return torch.stack([self.crop(image) for _ in range(self.num_views)]), int(d.labels[sample])


def our_epochs(config: LoaderBenchmark, dataset: Dataset, threads: int) -> Callable[[int], int]:
    """A function that runs epoch k and returns how many samples it gave."""
    data, augment = DataConfig(image_size=config.image_size), AugmentConfig((ViewConfig(count=config.views),))

    def run(epoch: int) -> int:
        num_samples = 0
        with train_epoch(
            dataset, data, augment, seed=0, epoch=epoch, share=Share(config.batch), threads=threads
        ) as batches:
            for batch in batches:
                num_samples += len(batch)
        return num_samples

    return run


def ffcv_epochs(config: LoaderBenchmark, dataset: Dataset, threads: int) -> Callable[[int], int]:
    """The same by FFCV: one pipeline for each view, random order, the file mapped."""
    # Not at the top: where FFCV is missing, opening the dataset has said so in one line.
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import ToTensor

    side = (config.image_size, config.image_size)
    pipelines: dict[str, PipelineSpec | None] = {"split": None}
    for view in range(config.views):
        decoder = RandomResizedCropRGBImageDecoder(side)
        pipelines["image" if view == 0 else f"view_{view}"] = PipelineSpec("image", decoder, [ToTensor()])
    loader = Loader(
        str(dataset.path), batch_size=config.batch, num_workers=threads, order=OrderOption.RANDOM, os_cache=True,
        indices=dataset.indices(TRAIN), pipelines=pipelines, drop_last=True,
    )  # fmt: skip

    def run(epoch: int) -> int:
        return sum(len(batch[0]) for batch in loader)

    return run


def torchvision_epochs(config: LoaderBenchmark, dataset: Dataset, threads: int) -> Callable[[int], int]:
    """The same by torchvision's DataLoader over PIL images, on `pil_samples` of the samples."""
    samples = dataset.indices(TRAIN)[: config.pil_samples]
    loader = DataLoader(
        PilDataset(dataset, samples, config.views, config.image_size), batch_size=min(config.batch, len(samples)),
        shuffle=True, num_workers=threads, drop_last=True, persistent_workers=True,
    )  # fmt: skip

    def run(epoch: int) -> int:
        return sum(len(labels) for _, labels in loader)

    return run


def measure(config: LoaderBenchmark, dataset: Dataset, threads: int) -> dict[str, list[float]]:
    """Samples/s of each loader, a number for each repeat."""
    contenders = {OURS: our_epochs(config, dataset, threads), FFCV: ffcv_epochs(config, dataset, threads)}
    if config.pil_samples > 0:
        contenders[TORCHVISION] = torchvision_epochs(config, dataset, threads)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for epoch in range(config.epochs + 1):
        for name, run in contenders.items():
            begin = time.perf_counter()
            num_samples = run(epoch)
            if epoch > 0:  # the first one warms up
                rates[name].append(num_samples / (time.perf_counter() - begin))
    return rates


def hardware() -> dict[str, Any]:
    """What the numbers were measured on; the load average tells whether the machine was idle."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average_1min": os.getloadavg()[0],
    }


def table(config: LoaderBenchmark, threads: int, rates: dict[str, list[float]]) -> Table:
    title = f"{config.views} views of {config.image_size} pixels, batch {config.batch}, {threads} threads"
    result = Table("loader", title=title)
    for column in (f"samples/s: median (min-max) of {config.epochs}", "crops/s", "ratio"):
        result.add_column(column, justify="right")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        spread = f"{medians[name]:,.0f} ({min(values):,.0f}-{max(values):,.0f})"
        crops = f"{config.views * medians[name]:,.0f}"
        result.add_row(name, spread, crops, f"{medians[name] / medians[OURS]:.3g}")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(LoaderBenchmark, argv, prog="python -m benchmarks.loader", about=__doc__)
    machine = hardware()  # before this program makes a load of its own
    dataset = open_dataset(config.data)
    num_train = dataset.manifest.num_train
    require(config.batch <= num_train, f"--batch {config.batch} is more than the {num_train} training samples")
    threads = fair_threads(config.threads)
    rates = measure(config, dataset, threads)
    Console().print(table(config, threads, rates))
    if config.out is not None:
        record = {
            "question": "how many images a second does the loader give?",
            "dataset": {
                "name": config.data.name, "sha256": dataset.manifest.sha256, "num_train": num_train,
                "num_jpeg": dataset.manifest.num_jpeg, "largest": [
                    dataset.manifest.largest_height, dataset.manifest.largest_width,
                ],
            },
            "views": config.views, "image_size": config.image_size, "batch": config.batch, "threads": threads,
            "pil_samples": config.pil_samples,
            "samples_per_s": rates,
            "hardware": machine,
            "versions": {"python": platform.python_version()} | {
                name: version(name) for name in ("torch", "torchvision", "ffcv", "numba", "numpy", "pillow")
            },
        }  # fmt: skip
        write_atomic(config.out, (json.dumps(record, indent=2) + "\n").encode())
        print(f"written: {config.out}")


if __name__ == "__main__":
    sys.exit(main_guard(main))
