"""`python -m benchmarks.augment`: how fast is the augmentation, beside kornia's, torchvision's and a mere copy?

SimCLR's operations (horizontal flip, colour jitter, grayscale, Gaussian blur, normalization) with the same probabilities and
strengths, from uint8 images that are cropped already: this package's pass and kornia's modules on whole batches, on the device;
torchvision's v2 transforms image by image, as the workers of a `DataLoader` apply them, one worker a core. Beside them the bytes
that any such pass has to move (the images in and out, once) against the bandwidth of a copy in the same rounds.

    python -m benchmarks.augment
    python -m benchmarks.augment --shapes 512x96 --blur 0
    python -m benchmarks.augment --device cpu --shapes 64x32 --rounds 2
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from benchmarks.frame import (
    Budget,
    Record,
    Turns,
    at_least,
    bars,
    begin,
    choose_device,
    comparison,
    ratios,
    timed_turns,
)
from dist_contrastive.batch import Batch, Samples
from dist_contrastive.cli import main_guard
from dist_contrastive.config import AugmentConfig, ViewConfig, require
from dist_contrastive.data.augment import Augment
from dist_contrastive.data.augment.draws import Drawer, blur_size

QUESTION = "how fast is the augmentation, beside kornia's, torchvision's and a mere copy?"
IMAGES, TRAFFIC, SHARE, BANDWIDTH = (
    "images/s",
    "GB/s, images in and out",
    "% of the copy's bandwidth",
    "GB/s, read and written",
)
OURS, DRAWING = "ours", "ours, drawing included"
KORNIA, TORCHVISION, COPY = "kornia", "torchvision v2, image by image", "copy"
GB = 1e9
COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Far more than the caches hold."""
MIN_S = 0.2
"""Calls that are shorter are repeated until they take as long."""
CASE_S = 60.0
"""What all rounds of a shape may take."""


@dataclass(frozen=True)
class Command(Turns):
    shapes: tuple[str, ...] = ("1024x32", "256x224")
    """Batches, each as images x side in pixels."""
    blur: float = 0.5
    """Probability of the blur."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where whole batches are augmented."""
    workers: int = 0
    """Worker processes of torchvision; 0: one for each usable core."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "workers")
        require(0 <= self.blur <= 1, f"--blur {self.blur:g}: give a probability in [0, 1]")
        for shape in self.shapes:
            sizes = shape.split("x")
            require(
                len(sizes) == 2 and all(size.isdigit() and int(size) > 0 for size in sizes),
                f"--shapes {shape}: give images x side in pixels, as in 256x224",
            )


class Images(torch.utils.data.Dataset[Tensor]):
    """What a transform makes of each of `images` uint8 [N, 3, S, S]."""

    def __init__(self, images: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> Tensor:
        return self.transform(self.images[position])


def our_passes(images: Tensor, view: ViewConfig, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Of `images` uint8 [N, S, S, 3] on `device`: with what the loader's threads have drawn before, as in training, and with
    drawing it, as the others do within their passes."""
    config = AugmentConfig((view,))
    augment, drawer = Augment(config), Drawer(config, seed=0)
    numbers = torch.arange(len(images))
    samples = Samples(torch.zeros_like(numbers), numbers, epoch=0)
    batch = Batch((images[None],), samples, draws=drawer.draw(samples))
    return {
        OURS: lambda: augment(batch, device).views[0],
        DRAWING: lambda: augment(replace(batch, draws=drawer.draw(samples)), device).views[0],
    }


def kornia_pass(images: Tensor, view: ViewConfig, device: torch.device) -> Callable[[], Tensor]:
    """The same operations by kornia's modules, each of which draws its numbers for the whole batch."""
    import kornia.augmentation as K

    side, config = images.shape[1], AugmentConfig((view,))
    blur = (blur_size(side), blur_size(side))
    strengths = (view.brightness, view.contrast, view.saturation, view.hue)
    operations = nn.Sequential(
        K.RandomHorizontalFlip(p=view.flip),
        K.ColorJitter(*strengths, p=view.jitter),
        K.RandomGrayscale(p=view.grayscale),
        K.RandomGaussianBlur(blur, view.blur_sigma, p=view.blur),
        K.Normalize(mean=torch.tensor(config.mean), std=torch.tensor(config.std)),
    ).to(device)

    @torch.no_grad()
    def run() -> Tensor:
        augmented: Tensor = operations(images.permute(0, 3, 1, 2).float() / 255)
        return augmented

    return run


def torchvision_epoch(images: Tensor, view: ViewConfig, workers: int) -> Callable[[], None]:
    """The same operations in worker processes, on images that are tensors already."""
    side, config = images.shape[1], AugmentConfig((view,))
    transform = v2.Compose(
        [
            v2.RandomHorizontalFlip(view.flip),
            v2.RandomApply([v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)], view.jitter),
            v2.RandomGrayscale(view.grayscale),
            v2.RandomApply([v2.GaussianBlur(blur_size(side), view.blur_sigma)], view.blur),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config.mean, config.std),
        ]
    )
    dataset = Images(images.permute(0, 3, 1, 2).contiguous().cpu(), transform)
    batch = max(1, len(images) // (4 * workers))
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size=batch, num_workers=workers, persistent_workers=True, multiprocessing_context="fork"
    )

    def run() -> None:
        for _ in loader:
            pass

    return run


def copy_pass(device: torch.device) -> tuple[Callable[[], object], int]:
    """A copy within the device's memory, and how many bytes it reads and writes."""
    source = torch.ones(COPIED_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return partial(target.copy_, source), 2 * COPIED_BYTES[device.type]


def measure(shape: str, command: Command, device: torch.device, budget: Budget, record: Record) -> None:
    num_images, side = map(int, shape.split("x"))
    case = f"{num_images}×3×{side}×{side}"
    view = replace(ViewConfig(), blur=command.blur)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_images, side, side, 3), dtype=torch.uint8, generator=generator).to(device)
    copy, copied = copy_pass(device)
    ours = our_passes(images, view, device)
    contenders: dict[str, Callable[[], object]] = {**ours}
    if record.has_peer("kornia", "kornia.augmentation"):
        contenders[KORNIA] = kornia_pass(images, view, device)
    contenders[TORCHVISION] = torchvision_epoch(images, view, command.workers or len(os.sched_getaffinity(0)))
    contenders[COPY] = copy
    times = timed_turns(contenders, device, command.rounds, at_least_s=MIN_S, at_most_s=CASE_S, budget=budget)
    bandwidth = [copied / took / GB for took in times.pop(COPY)]
    moved = images.nbytes + ours[OURS]().nbytes
    for name, values in times.items():
        record.add(case, name, IMAGES, [num_images / took for took in values])
        traffic = [moved / took / GB for took in values]
        record.add(case, name, TRAFFIC, traffic)
        record.add(case, name, SHARE, [100 * share for share in ratios(traffic, bandwidth)])
    record.add(case, COPY, BANDWIDTH, bandwidth)


def main(argv: Sequence[str] | None = None) -> None:
    command, record = begin(Command, "augment", argv, __doc__, question=QUESTION, packages=("torchvision",))
    device = choose_device(command.device)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    budget = Budget(command.minutes)
    for shape in command.shapes:
        if record.series and budget.is_over():
            record.leave_out(f"the shape {shape}", "the time was over")
            continue
        measure(shape, command, device, budget, record)
    body = (
        f"On {device.type}; SimCLR's operations, blur with probability {command.blur:g}.\n\n"
        f"{comparison(record, (IMAGES, TRAFFIC, SHARE), OURS)}\n{comparison(record, (BANDWIDTH,), COPY)}\n"
        "Images in and out: uint8 in, what ours gives out, once each: no pass can move fewer bytes.\n"
    )
    record.write("Augmentation beside kornia and torchvision", body, {"images": bars(record, IMAGES)})


if __name__ == "__main__":
    sys.exit(main_guard(main))
