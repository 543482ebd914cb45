"""How good a form of a model is beside torch's: probes, similarities of pairs, neighbours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive import rng
from dist_contrastive.batch import Share
from dist_contrastive.config import ProbeConfig, TrainConfig, require
from dist_contrastive.data.beton import Dataset
from dist_contrastive.data.format import TEST, TRAIN
from dist_contrastive.data.resident import loader_of
from dist_contrastive.evaluation.features import BATCH_SIZE
from dist_contrastive.evaluation.knn import automatic_k, knn_predict
from dist_contrastive.evaluation.linear import linear_probe
from dist_contrastive.exporting.names import EMBEDDING, FEATURE

NUM_PAIRS = 10_000
NUM_NEIGHBOURS = 10
MAX_QUERIES = 2_000
"""Of how many test images neighbours are looked for."""
NUM_QUANTILES = 1001
CPU = torch.device("cpu")

MAX_LOSS = 0.01
"""Of the linear probe and of kNN: one point."""
MIN_SPEARMAN = 0.99
MIN_RECALL = 0.95
TOLERANCE = 1e-4
"""How far ONNX's fp32 may be from torch's."""

Vectors = Mapping[str, Tensor]
"""`FEATURE` float32 [n, D] and `EMBEDDING` float32 [n, E] of n images."""


@dataclass(frozen=True)
class Images:
    """Some images of a dataset, as evaluation cuts them."""

    train: Tensor
    """uint8 [n, S, S, 3]"""
    test: Tensor
    """uint8 [m, S, S, 3]: of the test split, or training images that are not in `train`, where there is none."""
    labels: tuple[Tensor, Tensor] | None
    """int64 [n] and [m]; None where there are none, or no test split."""
    samples: np.ndarray
    """int64 [n]: which samples `train` are."""


def read_images(config: TrainConfig, dataset: Dataset, at_most: int) -> Images:
    """At most as many of the training and of the test images of `dataset`, by the seed of the run of `config`."""
    splits = [dataset.indices(split) for split in (TRAIN, TEST)]
    require(len(splits[0]) >= 2, f"{dataset.path} has no training images, on which int8 could be calibrated")
    chosen = [np.sort(rng.permutation(config.seed, 0, len(samples))[:at_most]) for samples in splits]
    train, test = (samples[places] for samples, places in zip(splits, chosen, strict=True))
    has_test = len(test) > 1
    if not has_test:
        train, test = train[: -max(1, len(train) // 5)], train[-max(1, len(train) // 5) :]
    with loader_of(config, dataset, Share(config.batch.size), CPU) as loader:
        squares = []
        for samples in (train, test):
            with loader.centered(samples, batch_size=BATCH_SIZE) as batches:
                squares.append(torch.cat([batch.views[0][0].clone() for batch in batches]))
    labels = None
    if has_test and dataset.manifest.has_labels:
        labels = (torch.from_numpy(dataset.labels[train]), torch.from_numpy(dataset.labels[test]))
        if len(labels[0].unique()) < 2:
            labels = None
    return Images(squares[0], squares[1], labels, train)


@dataclass(frozen=True)
class Form:
    """What one form of a model (torch, ONNX, int8) makes of the images."""

    train: Vectors
    test: Vectors


def form_of(images: Images, encode: Callable[[Tensor], Vectors]) -> Form:
    """`encode` gives the vectors of squares uint8 [n, S, S, 3]."""
    return Form(encode(images.train), encode(images.test))


def probe_scores(form: Form, images: Images, probe: ProbeConfig, *, num_classes: int, seed: int) -> dict[str, float]:
    """`linear_top1` and `knn_top1`, fractions of the test images, and `linear_strength`, of features; empty without labels."""
    if images.labels is None:
        return {}
    train_y, test_y = images.labels
    train_x, test_x = form.train[FEATURE], form.test[FEATURE]
    linear = linear_probe(train_x, train_y, test_x, test_y, strengths=probe.strengths, holdout=probe.holdout, seed=seed)
    k = min(probe.knn_k, len(train_y)) or automatic_k(train_y)
    found = knn_predict(train_x, train_y, test_x, num_classes=num_classes, ks=[k], temperature=probe.knn_temperature)[k]
    return {
        "linear_strength": linear.strength,
        "linear_top1": linear.top1,
        "knn_top1": (found == test_y).double().mean().item(),
    }


def likeness(form: Form, reference: Form, seed: int) -> dict[str, float]:
    """How alike two forms' vectors are, features and embeddings.

    `spearman`: of the cosines of random pairs of test images. `recall_at_10`: how many of the reference's nearest training images
    of a test image are among the form's.
    """
    found = {}
    for name in (FEATURE, EMBEDDING):
        one, other = ({split: unit(getattr(x, split)[name]) for split in ("train", "test")} for x in (form, reference))
        pairs = random_pairs(len(one["test"]), seed)
        found[f"{name}_spearman"] = float(
            spearmanr(*(cosines(x["test"], pairs).numpy() for x in (one, other))).statistic
        )
        k = min(NUM_NEIGHBOURS, len(one["train"]))
        nearest = [(x["test"][:MAX_QUERIES] @ x["train"].T).topk(k).indices for x in (one, other)]
        shared = (nearest[0][:, :, None] == nearest[1][:, None, :]).any(2)
        found[f"{name}_recall_at_10"] = shared.double().mean().item()
    return found


def failures(scores: Mapping[str, float], reference: Mapping[str, float]) -> list[str]:
    """What of `scores` (`probe_scores` and `likeness`) the gate does not let pass, in words."""
    found = []
    for name in ("linear_top1", "knn_top1"):
        if name in scores and (loss := reference[name] - scores[name]) > MAX_LOSS + 1e-9:
            found.append(f"{name} loses {100 * loss:.1f} points of {100 * reference[name]:.1f}")
    for ending, least in (("spearman", MIN_SPEARMAN), ("recall_at_10", MIN_RECALL)):
        for name in (FEATURE, EMBEDDING):
            value = scores[f"{name}_{ending}"]
            if not value >= least:  # no number passes neither
                found.append(f"{name} {ending} {value:.3f} is below {least}")
    return found


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def random_pairs(num: int, seed: int) -> np.ndarray:
    """int64 [2, `NUM_PAIRS`]: pairs of different numbers below `num`, which is at least 2."""
    generator = np.random.default_rng(seed)
    first = generator.integers(0, num, NUM_PAIRS)
    return np.stack([first, (first + generator.integers(1, num, NUM_PAIRS)) % num])


def cosines(x: Tensor, pairs: np.ndarray) -> Tensor:
    """float32 [p] of `pairs` int64 [2, p] of unit `x` [n, D]."""
    first, second = torch.from_numpy(pairs)
    return (x[first] * x[second]).sum(1)


def quantiles(values: Tensor) -> list[float]:
    """`NUM_QUANTILES` of them, from the smallest to the largest."""
    return [round(float(value), 6) for value in np.quantile(values.double().numpy(), np.linspace(0, 1, NUM_QUANTILES))]
