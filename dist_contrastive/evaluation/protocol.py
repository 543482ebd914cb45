"""What a run is scored by, and how: linear and kNN accuracy on the test split, beside two baselines, and what needs no
labels: alignment, uniformity and effective rank of the test images' features, beside the untrained encoder's.

The encoder is frozen, features come without augmentation, hyper-parameters are chosen on a held-out part of the training
split, the last epoch is the result, and beside each score stand raw pixels and the untrained encoder.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_contrastive import distributed, liveness, rng
from dist_contrastive.config import ProbeConfig, require
from dist_contrastive.data.format import TEST, TRAIN
from dist_contrastive.data.loader import Loader
from dist_contrastive.evaluation.features import extract, extract_views, raw_pixels
from dist_contrastive.evaluation.knn import AUTOMATIC_K, BY_K, automatic_k, knn_predict
from dist_contrastive.evaluation.linear import linear_probe
from dist_contrastive.losses.statistics import alignment, effective_rank, uniformity
from dist_contrastive.models.base import Encoder

LABEL_SCORES = ("linear_top1", "knn_top1")
"""Fractions of the test split; they need labels."""
FREE_SCORES = ("alignment", "uniformity", "effective_rank")
"""Of the test images' features; they need none."""
MAX_FREE_SAMPLES = 2048
"""Of how many test images the latter are taken."""

RAW_SIDE = 32
"""Raw pixels are taken at this side at most: at 224 a linear classifier would have 150,000 inputs."""
PER_CLASS = ("linear_per_class", "knn_per_class")


class ProbeRunner:
    """Scores encoders on one dataset. All ranks call the same methods at the same time and get the same results.

    Encoding is shared out over the ranks; rank 0 alone fits the classifier.
    """

    def __init__(
        self,
        loader: Loader,
        *,
        probe: ProbeConfig,
        device: torch.device,
    ) -> None:
        """`UserError` where the loader's dataset has nothing to tell apart or to test on, or fewer samples than `probe` wants."""
        dataset, seed = loader.dataset, loader.seed
        manifest = dataset.manifest
        require(
            manifest.num_test > 0 and manifest.num_train > 0,
            f"{dataset.path} can't be probed on: it has no {'test' if manifest.num_train else 'training'} split; give "
            "one that has (a run without scores: --probe.no-enabled)",
        )
        self.loader, self.dataset, self.probe, self.device = loader, dataset, probe, device
        self._indices = [dataset.indices(split) for split in (TRAIN, TEST)]
        test = self._indices[TEST]
        self._few = np.sort(rng.permutation(seed, 0, len(test))[:MAX_FREE_SAMPLES])
        """Which of the test images, int64, serve for what needs no labels."""
        self._labels = [torch.from_numpy(dataset.labels[indices]).to(device) for indices in self._indices]
        require(
            not self.has_labels or len(self._labels[0].unique()) > 1,
            f"{dataset.path} can't be probed on: its training samples are all of one class; give one with more (a run "
            "without scores: --probe.no-enabled)",
        )
        require(
            probe.knn_k <= manifest.num_train,
            f"--probe.knn-k {probe.knn_k}: {dataset.path} has {manifest.num_train} training samples; give at most as many, "
            "or 0 (automatic)",
        )
        self.knn_k = (probe.knn_k or automatic_k(self._labels[0])) if self.has_labels else 0

    @property
    def has_labels(self) -> bool:
        return self.dataset.manifest.has_labels

    def score(self, encoder: Encoder) -> dict[str, Any]:
        """`alignment`, `uniformity` and `effective_rank` of `encoder`'s features of test images; with labels also
        `linear_top1` and `knn_top1` (fractions of the test split), what they are class by class and for other k, and how
        the linear fit went.

        `UserError` on all ranks where features are not finite.
        """
        splits = (TRAIN, TEST) if self.has_labels else (TEST,)
        features = [extract(encoder, self.loader, self._indices[split], self.device) for split in splits]
        test_images = self._indices[TEST][self._few]
        views = extract_views(encoder, self.loader, test_images, self.device)
        free = self._score_without_labels(features[-1], views)
        return {**self._score(lambda: features), **free} if self.has_labels else free

    def baselines(self, untrained: Encoder) -> dict[str, Any]:
        """The same scores of the untrained encoder (`init_…`), and with labels those of raw pixels (`raw_…`)."""
        found = {}
        if self.has_labels:
            side = min(RAW_SIDE, self.loader.data.image_size)

            def pixels() -> list[Tensor]:
                return [raw_pixels(self.loader, indices, side) for indices in self._indices]

            found = {f"raw_{name}": value for name, value in self._score(pixels).items()}
        found |= {f"init_{name}": value for name, value in self.score(untrained).items()}
        return {name: value for name, value in found.items() if not name.endswith(PER_CLASS)}

    def _score_without_labels(self, features: Tensor, views: Tensor) -> dict[str, Any]:
        """Of `features` [M, D] of all test images without augmentation and of `views` [V, n, D] of few, both on rank 0's host."""

        def measure() -> dict[str, Any] | None:
            if not distributed.is_main():
                return None
            with liveness.busy("looks at what needs no labels"):
                few, of_views = features[torch.from_numpy(self._few)].to(self.device), views.to(self.device)
                require(
                    bool(torch.isfinite(few).all() and torch.isfinite(of_views).all()),
                    "the encoder's features are not finite: the run diverged",
                )
                values = (alignment(of_views), uniformity(few), effective_rank(few))
            return {name: value.item() for name, value in zip(FREE_SCORES, values, strict=True)}

        result: dict[str, Any] = distributed.broadcast_object(distributed.together(measure))
        return result

    def _score(self, features: Callable[[], list[Tensor]]) -> dict[str, Any]:
        """`features()`, which rank 0 alone calls, gives those of the training and the test split, on its host."""

        def fit() -> dict[str, Any] | None:
            if not distributed.is_main():
                return None
            with liveness.busy("fits the probe's classifiers"), _all_cores(self.device):
                (train_x, test_x), (train_y, test_y) = features(), self._labels
                linear = linear_probe(
                    train_x, train_y, test_x, test_y,
                    strengths=self.probe.strengths, holdout=self.probe.holdout, seed=self.loader.seed, device=self.device,
                )  # fmt: skip
                by_k = knn_predict(
                    train_x, train_y, test_x, num_classes=len(self.dataset.manifest.classes),
                    ks={self.knn_k, *(k for k in BY_K if k <= len(train_y))}, temperature=self.probe.knn_temperature,
                    device=self.device,
                )  # fmt: skip
            top1_by_k = {k: (found == test_y).double().mean().item() for k, found in by_k.items()}
            return {
                "linear_top1": linear.top1,
                "knn_top1": top1_by_k[self.knn_k],
                "linear_strength": linear.strength,
                "linear_holdout_top1": linear.holdout_top1,
                "linear_converged": linear.converged,
                "knn_top1_by_k": {str(k): top1 for k, top1 in top1_by_k.items()},  # JSON's names are text
                "linear_per_class": self._per_class(linear.predictions),
                "knn_per_class": self._per_class(by_k[self.knn_k]),
            }

        result: dict[str, Any] = distributed.broadcast_object(distributed.together(fit))
        return result

    def _per_class(self, predictions: Tensor) -> list[float | None]:
        """Of each class's test samples, the fraction that `predictions` int64 [M] got right; None where it has none."""
        test_y, num_classes = self._labels[1], len(self.dataset.manifest.classes)
        counts = torch.bincount(test_y, minlength=num_classes).tolist()
        right = torch.bincount(test_y[predictions == test_y], minlength=num_classes).tolist()
        return [r / count if count else None for r, count in zip(right, counts, strict=True)]

    def protocol(self) -> dict[str, Any]:
        """How the scores come about, in words and numbers, for whoever compares them."""
        data = self.loader.data
        with_labels = {
            "linear": "L2-regularised logistic regression by L-BFGS on standardised features",
            "linear_strengths": list(self.probe.strengths),
            "linear_strength_chosen_on": f"{self.probe.holdout:g} of the training split, held out",
            "knn": "weighted vote of the k nearest by cosine s, weight exp(s / temperature)",
            "knn_k": self.knn_k,
            "knn_k_chosen": "given" if self.probe.knn_k else AUTOMATIC_K,
            "knn_temperature": self.probe.knn_temperature,
            "raw_pixels": f"{min(RAW_SIDE, data.image_size)} px",
        }
        return {
            **(
                with_labels
                if self.has_labels
                else {"labels": "none: linear classifier and nearest neighbours need them"}
            ),
            "alignment": "mean |x - y|² of two augmented views on the unit sphere",
            "uniformity": "log of the mean of exp(-2 |x - y|²) over pairs of test images on the unit sphere",
            "effective_rank": "exponential of the entropy of the features' singular values",
            "num_without_labels": len(self._few),
            "encoder": "frozen, in eval mode, fp32",
            "images": f"centre crop {data.eval_crop:g}, {data.image_size} px, without augmentation",
            "num_train": self.dataset.manifest.num_train,
            "num_test": self.dataset.manifest.num_test,
            "dataset_sha256": self.dataset.manifest.identity,
            "classes": list(self.dataset.manifest.classes),
        }

    def summary(self, baselines: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What probe.json holds: the last entry of `history` (each with `epoch`, epochs done, and `step`) as the result,
        the one with the best linear score beside it, if there are any, the baselines and the protocol. Accuracies of
        single classes are the result's alone."""
        scored = [entry for entry in history if "linear_top1" in entry]
        best = max(scored, key=lambda entry: entry["linear_top1"], default=None)
        return {
            **history[-1],
            **baselines,
            **({"best": {name: best[name] for name in ("epoch", "step", *LABEL_SCORES)}} if best else {}),
            "history": [{name: value for name, value in entry.items() if name not in PER_CLASS} for entry in history],
            "protocol": self.protocol(),
        }


@contextmanager
def _all_cores(device: torch.device) -> Iterator[None]:
    """On the CPU the other ranks wait while rank 0 fits: within the context it computes on all cores."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
