"""Gathers what a run's report shows: features of test images, their spectra, the images, some augmented views."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dist_contrastive import distributed, liveness, rng
from dist_contrastive.batch import Share
from dist_contrastive.config import TrainConfig, to_dict
from dist_contrastive.data.augment import Augment, to_displayable
from dist_contrastive.data.beton import Dataset
from dist_contrastive.data.format import TEST, TRAIN
from dist_contrastive.data.loader import eval_pass, train_epoch
from dist_contrastive.evaluation.features import extract
from dist_contrastive.losses.statistics import covariance_spectrum
from dist_contrastive.metrics import read_metrics
from dist_contrastive.models.base import Encoder
from dist_contrastive.report.inputs import RunReport

MAX_SAMPLES = 5000  # enough for a spectrum and a map, little enough to hold the thumbnails of ImageNet's test images
THUMBNAIL_SIDE = 64
NUM_EXAMPLES = 8


def collect_report(
    config: TrainConfig,
    dataset: Dataset,
    *,
    encoder: Encoder,
    untrained: Encoder,
    device: torch.device,
    threads: int,
    schedules: Mapping[str, Sequence[float]],
    probe: Mapping[str, Any] | None,
    machine: Mapping[str, Any],
    starts: Sequence[Mapping[str, Any]],
    seconds: Callable[[], Mapping[str, float]],
) -> RunReport | None:
    """The report's inputs on rank 0, None elsewhere; all ranks call it, since all of them encode."""
    split, samples = (TEST, "test images") if dataset.manifest.num_test else (TRAIN, "training images")
    indices = dataset.indices(split)
    indices = np.sort(indices[rng.permutation(config.seed, 0, len(indices))[:MAX_SAMPLES]])

    def features_of(module: Encoder) -> torch.Tensor:
        return extract(
            module, dataset, indices, data=config.data, augment=config.augment, device=device, threads=threads
        )

    features, untrained_features = features_of(encoder), features_of(untrained)

    def collect() -> RunReport | None:
        if not distributed.is_main():
            return None
        with liveness.busy("collects what the report shows"):
            views, originals = example_views(config, dataset)
            has_labels = dataset.manifest.has_labels
            return RunReport(
                run_dir=config.run_dir,
                config=to_dict(config),
                metrics=read_metrics(config.run_dir / "metrics.jsonl"),
                schedules=schedules,
                probe=probe,
                learns_from_labels=config.method.needs_labels,
                class_names=dataset.manifest.classes if has_labels else (),
                samples=samples,
                features=features.cpu().numpy(),
                labels=dataset.labels[indices] if has_labels else None,
                thumbnails=_images(config, dataset, indices, min(THUMBNAIL_SIDE, config.data.image_size)),
                spectrum=covariance_spectrum(features).cpu().numpy(),
                untrained_spectrum=covariance_spectrum(untrained_features).cpu().numpy(),
                views=views,
                originals=originals,
                machine=machine,
                starts=starts,
                seconds=seconds,
            )

    return distributed.together(collect)


def example_views(config: TrainConfig, dataset: Dataset) -> tuple[list[np.ndarray], np.ndarray]:
    """Views uint8 [n, V, S, S, 3], for each size, of the first samples of the first epoch as training sees them, and the
    originals uint8 [n, S, S, 3]."""
    num_examples = min(NUM_EXAMPLES, dataset.manifest.num_train)
    with train_epoch(
        dataset, config.data, config.augment,
        seed=config.seed, epoch=0, share=Share(num_examples), threads=1,
    ) as batches:  # fmt: skip
        batch = Augment(config.augment, config.seed)(next(batches), torch.device("cpu"))
    views = [to_displayable(of_size, config.augment).transpose(0, 1).numpy() for of_size in batch.views]
    return views, _images(config, dataset, batch.samples.indices.numpy(), config.data.image_size)


def _images(config: TrainConfig, dataset: Dataset, indices: np.ndarray, side: int) -> np.ndarray:
    """The images `indices` int64 [n] as evaluation sees them, uint8 [n, side, side, 3]."""
    data = replace(config.data, image_size=side)
    batches = eval_pass(dataset, data, indices, batch_size=256, threads=1)
    return np.concatenate([batch.views[0][0].numpy() for batch in batches])
