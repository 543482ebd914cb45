"""`python -m benchmarks.loader`: how many images a second does the loader give, and what does it take to do so?

Random views of a packed dataset, without any further augmentation, side by side: this package's loader (on a GPU also with all
images on it), FFCV's own `Loader` with one `RandomResizedCropRGBImageDecoder` pipeline for each view, torchvision's `DataLoader`
over PIL images, and the same with lightly's transform (its crops alone); the last two on fewer samples, being slower.

Cases: `small`, two views of 32 pixels of a dataset of raw pixels (CIFAR-10; the demo's patches where that is not there);
`photographs`, two views of 224 pixels from JPEGs of about 300, cut from the embedded photographs; `multicrop`, eight views of 96
pixels beside them, as DINO cuts them.

Images a second: each has an epoch to warm up (compiled code, worker processes, the file in memory), then they take turns.
Memory and the time to the first batch: each in a fresh process; ours also where nothing is compiled yet.

    python -m benchmarks.loader
    python -m benchmarks.loader --cases small --data data/photos.beton --batch 256 --slow-samples 0
    python -m benchmarks.loader --cases photographs multicrop --photographs 300 --rounds 3 --fresh-rounds 3
"""

import io
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numba
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Compose, PILToTensor, RandomResizedCrop

from benchmarks.frame import (
    Budget,
    Peak,
    Record,
    Turns,
    at_least,
    bars,
    begin,
    choose_device,
    comparison,
    only_known,
    seconds,
    take_turns,
)
from dist_contrastive.batch import Share
from dist_contrastive.cli import main_guard
from dist_contrastive.config import AugmentConfig, DataConfig, ViewConfig, require
from dist_contrastive.data.beton import Dataset, open_dataset
from dist_contrastive.data.crops import make_scratch
from dist_contrastive.data.format import TEST, TRAIN
from dist_contrastive.data.loader import Loader
from dist_contrastive.data.packing import write_dataset
from dist_contrastive.data.resident import ResidentLoader
from dist_contrastive.data.sources import PHOTOS, Sample, Source, open_source, read_photo
from dist_contrastive.rendezvous import fair_cores

QUESTION = "how many images a second does the loader give, and what does it take to do so?"
IMAGES, CROPS = "images/s", "crops/s"
FIRST, RESIDENT, SCRATCH = "s to the first batch", "MB resident", "MB of scratch"
OURS, FFCV, TORCHVISION, LIGHTLY = "ours", "FFCV", "torchvision, PIL", "lightly"
ON_DEVICE, UNCOMPILED = "ours, images on the device", "ours, nothing compiled yet"
PHOTOGRAPH_SIDES = (256, 344)
"""Pixels; both sides are drawn from it."""
MB = 1e6


@dataclass(frozen=True)
class Case:
    """What is cut from which dataset, by all contenders."""

    groups: tuple[ViewConfig, ...]
    batch: int
    """Samples."""
    slow_samples: int
    """How many samples loaders over PIL images get in an epoch."""

    def num_crops(self) -> int:
        """Of a sample."""
        return AugmentConfig(self.groups).num_views

    def describe(self) -> str:
        return " and ".join(f"{group.count} views of {group.size} px" for group in self.groups)


# Areas of the crops as fractions of the image's: SimCLR's, and where there are small ones DINO's (Caron et al. 2021).
CASES = {
    "small": Case((ViewConfig(count=2, size=32),), 512, 4000),
    "photographs": Case((ViewConfig(count=2, size=224),), 64, 256),
    "multicrop": Case(
        (ViewConfig(count=2, size=224, crop_scale=(0.4, 1.0)), ViewConfig(count=8, size=96, crop_scale=(0.05, 0.4))), 64, 256
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Command(Turns):
    cases: tuple[str, ...] = tuple(CASES)
    """What to measure: small, photographs, multicrop."""
    data: Path = Path("data/cifar10.beton")
    """Packed dataset of the case small; without one, the patches of the demo are packed for it."""
    photographs: int = 1000
    """How many JPEGs of about 300 pixels are packed for the other cases."""
    batch: int = 0
    """Samples of a batch; 0: 512 in the case small, 64 in the others."""
    threads: int = 0
    """Threads (of the loaders over PIL images: worker processes); 0 takes one for each usable core."""
    slow_samples: int = -1
    """How many samples loaders over PIL images get in an epoch; -1: 4000 in the case small, 256 in the others; 0 leaves these
    loaders out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where our loader keeps images in one of its forms; on cpu it is left out, and auto takes a GPU where there is one."""
    fresh_rounds: int = 1
    """How often each loader is started in a fresh process, for memory and the time to the first batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        only_known(self.cases, CASES, "--cases")
        at_least(self, 0, "batch", "fresh_rounds")
        at_least(self, 2, "photographs")
        at_least(self, -1, "slow_samples")
        most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        require(0 <= self.threads <= most, f"--threads {self.threads}: give 0 (automatic) to {most}, FFCV's limit here")


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


class PilDataset(torch.utils.data.Dataset[tuple[Any, int]]):
    """What `transform` makes of a packed dataset's samples as PIL images, and their labels."""

    def __init__(self, dataset: Dataset, samples: np.ndarray, transform: Callable[[Image.Image], Any]) -> None:
        self.dataset = dataset
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        d, sample = self.dataset, self.samples[position]
        stored = d.file_bytes[d.pointers[sample] : d.pointers[sample] + d.sizes[sample]]
        if d.is_jpeg[sample]:
            image = Image.open(io.BytesIO(stored.tobytes())).convert("RGB")
        else:
            image = Image.fromarray(stored.reshape(d.heights[sample], d.widths[sample], 3))
        return self.transform(image), int(d.labels[sample])


class Crop:
    """Views uint8 [V, 3, S, S] of each size, the way torchvision's users make them."""

    def __init__(self, groups: Sequence[ViewConfig]) -> None:
        self.crops = [
            (Compose([RandomResizedCrop(group.size, group.crop_scale), PILToTensor()]), group.count) for group in groups
        ]

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        return [torch.stack([crop(image) for _ in range(count)]) for crop, count in self.crops]


Epochs = Callable[[int], Iterator[int]]
"""Epoch k, as the number of samples of one batch after the other."""


def our_epochs(case: Case, dataset: Dataset, threads: int) -> Epochs:
    data = DataConfig(image_size=case.groups[0].size)
    loader = Loader(dataset, data, AugmentConfig(case.groups), seed=0, share=Share(case.batch), threads=threads)
    return lambda epoch: map(len, loader.epoch(epoch))


def resident_epochs(case: Case, dataset: Dataset, threads: int) -> Epochs:
    """Ours with all images decoded on the device, where they are cut."""
    data, share = DataConfig(image_size=case.groups[0].size), Share(case.batch)
    loader = ResidentLoader(
        dataset, data, AugmentConfig(case.groups), seed=0, share=share, threads=threads, device=choose_device("auto")
    )
    return lambda epoch: map(len, loader.epoch(epoch))


def ffcv_loader(case: Case, dataset: Dataset, threads: int) -> Any:
    """One pipeline for each view, random order, the file mapped."""
    # Not at the top: where FFCV is missing, opening the dataset has said so in one line.
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import ToTensor

    pipelines: dict[str, PipelineSpec | None] = {"split": None}
    views = [group for group in case.groups for _ in range(group.count)]
    for number, view in enumerate(views):
        decoder = RandomResizedCropRGBImageDecoder((view.size, view.size), view.crop_scale, view.crop_ratio)
        pipelines["image" if number == 0 else f"view_{number}"] = PipelineSpec("image", decoder, [ToTensor()])
    return Loader(
        str(dataset.path), batch_size=case.batch, num_workers=threads, order=OrderOption.RANDOM, os_cache=True,
        indices=dataset.indices(TRAIN), pipelines=pipelines, drop_last=True,
    )  # fmt: skip


def ffcv_epochs(case: Case, dataset: Dataset, threads: int) -> Epochs:
    loader = ffcv_loader(case, dataset, threads)
    return lambda epoch: (len(batch[0]) for batch in loader)


def pil_epochs(transform: Callable[[Image.Image], Any], case: Case, dataset: Dataset, threads: int) -> Epochs:
    """Of `slow_samples` of the samples."""
    samples = dataset.indices(TRAIN)[: case.slow_samples]
    loader = DataLoader(
        PilDataset(dataset, samples, transform), batch_size=min(case.batch, len(samples)), shuffle=True,
        num_workers=threads, drop_last=True, persistent_workers=True,
        multiprocessing_context="fork",  # in a fresh process, too, whose own default is the way that it was started
    )  # fmt: skip
    return lambda epoch: (len(batch[1]) for batch in loader)


def torchvision_epochs(case: Case, dataset: Dataset, threads: int) -> Epochs:
    return pil_epochs(Crop(case.groups), case, dataset, threads)


def lightly_epochs(case: Case, dataset: Dataset, threads: int) -> Epochs:
    """Its transform of any number of crops; what it makes is float32."""
    from lightly.transforms.multi_crop_transform import MultiCropTranform
    from torchvision.transforms import ToTensor

    crops = MultiCropTranform(
        crop_sizes=tuple(group.size for group in case.groups),
        crop_counts=tuple(group.count for group in case.groups),
        crop_min_scales=tuple(group.crop_scale[0] for group in case.groups),
        crop_max_scales=tuple(group.crop_scale[1] for group in case.groups),
        transforms=ToTensor(),
    )
    return pil_epochs(crops, case, dataset, threads)


CONTENDERS: dict[str, Callable[[Case, Dataset, int], Epochs]] = {
    OURS: our_epochs,
    ON_DEVICE: resident_epochs,
    FFCV: ffcv_epochs,
    TORCHVISION: torchvision_epochs,
    LIGHTLY: lightly_epochs,
}
SLOW = (TORCHVISION, LIGHTLY)


def fresh(contender: str, case: Case, path: Path, threads: int) -> dict[str, float]:
    """In this process, in which nothing has been read yet: an epoch's first batch, and the memory of that epoch."""
    dataset = open_dataset(path)
    result: dict[str, float] = {}
    with Peak() as peak:
        begin = time.perf_counter()
        batches = CONTENDERS[contender](case, dataset, threads)(0)
        next(batches)
        result[FIRST] = time.perf_counter() - begin
        for _ in batches:
            pass
    return result | {RESIDENT: peak.mb}


def scratch_bytes(contender: str, case: Case, dataset: Dataset, threads: int) -> int:
    """What a loader allocates to decode and resize, its batches not included."""
    if contender == OURS:
        sides = [group.size for group in case.groups for _ in range(group.count)]
        return threads * sum(array.nbytes for array in make_scratch(dataset, sides))
    loader = ffcv_loader(case, dataset, threads)
    iterator = iter(loader)
    held = [*flat(iterator.memory_allocations["operation"].values())]
    iterator.close()
    iterator.join()
    outputs = {(group.size, group.size, 3) for group in case.groups}
    return sum(array.nbytes for array in held if tuple(array.shape[2:]) not in outputs)


def flat(values: Any) -> Iterator[np.ndarray]:
    """The arrays in tuples of tuples."""
    for value in values:
        if isinstance(value, tuple):
            yield from flat(value)
        elif value is not None:
            yield value


@contextmanager
def compiled_code_elsewhere() -> Iterator[None]:
    """Within the context new processes find no compiled code."""
    before = os.environ.get("NUMBA_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NUMBA_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["NUMBA_CACHE_DIR"]
            if before is not None:
                os.environ["NUMBA_CACHE_DIR"] = before


def in_fresh_process(contender: str, case: Case, path: Path, threads: int) -> dict[str, float]:
    # Not a Pool's process, which may have no children of its own.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(fresh, contender, case, path, threads).result()


def measure_rates(
    names: Sequence[str], case: Case, dataset: Dataset, threads: int, command: Command, budget: Budget, record: Record
) -> None:
    numbers = itertools.count()

    def rate(run: Epochs) -> float:
        given: list[int] = []
        took = seconds(lambda: given.append(sum(run(next(numbers)))), choose_device("auto"))
        return given[0] / took

    epochs = {name: CONTENDERS[name](case, dataset, threads) for name in names}
    rates = take_turns({name: partial(rate, run) for name, run in epochs.items()}, command.rounds, budget=budget)
    for name, values in rates.items():
        record.add(case.describe(), name, IMAGES, values)
        record.add(case.describe(), name, CROPS, [case.num_crops() * value for value in values])


def measure_fresh(
    names: Sequence[str], case: Case, path: Path, threads: int, command: Command, budget: Budget, record: Record
) -> None:
    def uncompiled() -> dict[str, float]:
        with compiled_code_elsewhere():
            return in_fresh_process(OURS, case, path, threads)

    calls: dict[str, Callable[[], dict[str, float]]] = {
        name: partial(in_fresh_process, name, case, path, threads) for name in names
    }
    calls[UNCOMPILED] = uncompiled
    found = take_turns(calls, command.fresh_rounds, warmup=0, budget=budget)
    for name, runs in found.items():
        for metric in (FIRST, RESIDENT):
            record.add(case.describe(), name, metric, [run[metric] for run in runs])


def chosen_case(command: Command, name: str) -> Case:
    case = CASES[name]
    slow = case.slow_samples if command.slow_samples < 0 else command.slow_samples
    return Case(case.groups, command.batch or case.batch, slow)


def measure(name: str, path: Path, command: Command, budget: Budget, record: Record) -> None:
    """One case."""
    case = chosen_case(command, name)
    dataset = open_dataset(path)
    manifest = dataset.manifest
    require(
        case.batch <= manifest.num_train, f"--batch {case.batch} is more than the {manifest.num_train} training samples"
    )
    threads = command.threads or fair_cores()
    names = [OURS, FFCV]
    if choose_device(command.device).type == "cuda":
        names.insert(1, ON_DEVICE)
    else:
        record.leave_out(ON_DEVICE, "no GPU takes part")
    if case.slow_samples:
        names.append(TORCHVISION)
        if record.has_peer("lightly", "lightly.transforms"):
            names.append(LIGHTLY)
    record.details[name] = {
        "batch": case.batch, "threads": threads, "slow_samples": case.slow_samples,
        "dataset": path.name, "sha256": manifest.sha256, "num_train": manifest.num_train, "num_jpeg": manifest.num_jpeg,
        "largest": [manifest.largest_height, manifest.largest_width],
        "mean_pixels": float(np.mean(dataset.heights.astype(np.int64) * dataset.widths)),
        "mean_bytes": float(np.mean(dataset.sizes)),
    }  # fmt: skip
    measure_rates(names, case, dataset, threads, command, budget, record)
    for contender in (OURS, FFCV):
        record.add(case.describe(), contender, SCRATCH, [scratch_bytes(contender, case, dataset, threads) / MB])
    if command.fresh_rounds:
        measure_fresh(names, case, path, threads, command, budget, record)


def dataset_of(name: str, command: Command, folder: Path) -> Path:
    """The packed dataset of a case; packed now into `folder`, unless it is there."""
    if name == "small" and command.data.exists():
        return command.data
    path = folder / f"{'patches' if name == 'small' else 'photographs'}.beton"
    if not path.exists():
        write_dataset(open_source("photos") if name == "small" else photographs(command.photographs), path)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    command, record = begin(
        Command, "loader", argv, __doc__, question=QUESTION, packages=("torchvision", "ffcv", "numba", "pillow")
    )
    budget = Budget(command.minutes)
    with tempfile.TemporaryDirectory() as folder:
        for name in command.cases:
            if record.series and budget.is_over():
                record.leave_out(f"the case {name}", "the time was over")
                continue
            measure(name, dataset_of(name, command, Path(folder)), command, budget, record)
    datasets = "\n".join(
        f"- {chosen_case(command, name).describe()}: {found['dataset']}, {found['num_train']:,} samples of "
        f"{found['mean_pixels']:,.0f} pixels and {found['mean_bytes']:,.0f} bytes in the mean ({found['num_jpeg']:,} JPEGs); "
        f"batches of {found['batch']}, {found['threads']} threads or worker processes"
        for name, found in record.details.items()
    )
    body = (
        f"{comparison(record, (IMAGES, CROPS), OURS)}\n{comparison(record, (FIRST, RESIDENT), OURS)}\n"
        f"{comparison(record, (SCRATCH,), OURS)}\n{datasets}\n\n"
        "Resident: how far anonymous memory (batches, scratch, compiled code; of worker processes what is their own) rose in an "
        "epoch in a fresh process, over that with everything imported and the dataset open. Scratch: what is allocated to decode "
        "and resize, batches not included. The first batch: from making the loader; all is imported by then.\n"
    )
    record.write("The loader beside others", body, {"images": bars(record, IMAGES), "memory": bars(record, RESIDENT)})


if __name__ == "__main__":
    sys.exit(main_guard(main))
