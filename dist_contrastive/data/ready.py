"""Everything compiled that a run's data passes through, before its first batch."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from dist_contrastive.config import AugmentConfig
from dist_contrastive.data.augment.cpu import augment_on_cpu
from dist_contrastive.data.augment.draws import NUM_DRAWS, Drawer
from dist_contrastive.data.beton import Dataset
from dist_contrastive.data.compiled import compile_in_turns
from dist_contrastive.data.crops import crop_samples, decode_samples, make_scratch, random_boxes


def get_ready(
    dataset: Dataset, augment: AugmentConfig, device: torch.device, *, resident: bool, process: int
) -> Future[None]:
    """Begin to compile what the loader (one with `resident` images decodes them first) and, on a CPU, the augmentation call;
    `process` is this one's number among those of this machine that do so together. The result says that it is done."""
    d, nothing = dataset, np.empty(0, np.int64)

    def crops() -> None:
        crop_samples(
            d.file_bytes, d.pointers, d.sizes, d.is_jpeg, d.heights, d.widths, nothing, np.empty((1, 0, 4), np.int64),
            np.empty(0, np.uint8), np.zeros(1, np.int64), np.ones(1, np.int64), 0, make_scratch(d, (1,)),
        )  # fmt: skip

    def decoding() -> None:
        decode_samples(
            d.file_bytes, d.pointers, d.sizes, d.is_jpeg, d.heights, d.widths, nothing, nothing, np.empty(0, np.uint8)
        )

    def draws() -> None:
        drawer = Drawer(augment, seed=0)
        drawer.fill(np.empty((drawer.num_views, 0, NUM_DRAWS), np.float32), nothing, 0, 0)

    def boxes() -> None:
        random_boxes(d, augment, nothing, seed=0, epoch=0)

    def views() -> None:
        images = torch.empty((0, 1, 1, 3), dtype=torch.uint8)
        augment_on_cpu(images, torch.empty((0, NUM_DRAWS)), augment.mean, augment.std)

    # What takes long comes first, for as many processes as there may be.
    calls = [crops, *([views] if device.type == "cpu" else []), draws, boxes, *([decoding] if resident else [])]
    thread = ThreadPoolExecutor(1, thread_name_prefix="compile")
    done = thread.submit(compile_in_turns, calls, process)
    thread.shutdown(wait=False)
    return done
