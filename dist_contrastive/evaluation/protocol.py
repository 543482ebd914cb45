"""What a run is scored by, and how: linear and kNN accuracy on the test split, beside two baselines.

The encoder is frozen, features come without augmentation, hyper-parameters are chosen on a held-out part of the training
split, the last epoch is the result, and beside each score stand raw pixels and the untrained encoder.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dist_contrastive import distributed
from dist_contrastive.config import AugmentConfig, DataConfig, ProbeConfig, require
from dist_contrastive.data.beton import Dataset
from dist_contrastive.data.format import TEST, TRAIN
from dist_contrastive.evaluation.features import extract, raw_pixels
from dist_contrastive.evaluation.knn import AUTOMATIC_K, BY_K, automatic_k, knn_predict_by_k
from dist_contrastive.evaluation.linear import linear_probe
from dist_contrastive.models.base import Encoder

RAW_SIDE = 32
"""Raw pixels are taken at this side at most: at 224 a linear classifier would have 150,000 inputs."""
PER_CLASS = ("linear_per_class", "knn_per_class")


class ProbeRunner:
    """Scores encoders on one dataset. All ranks call the same methods at the same time and get the same results.

    Encoding is shared out over the ranks; rank 0 alone fits the classifier.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        data: DataConfig,
        augment: AugmentConfig,
        probe: ProbeConfig,
        seed: int,
        device: torch.device,
        threads: int,
    ) -> None:
        """`UserError` where the dataset has nothing to tell apart or to test on, or fewer samples than the probe wants."""
        manifest = dataset.manifest
        require(
            manifest.num_test > 0 and manifest.num_train > 0,
            f"{dataset.path} can't be probed on: it has no {'test' if manifest.num_train else 'training'} split; give "
            "one that has (a run without scores: --probe.no-enabled)",
        )
        self.dataset, self.data, self.augment, self.probe = dataset, data, augment, probe
        self.seed, self.device, self.threads = seed, device, threads
        self._indices = [dataset.indices(split) for split in (TRAIN, TEST)]
        self._labels = [torch.from_numpy(dataset.labels[indices]).to(device) for indices in self._indices]
        require(
            len(self._labels[0].unique()) > 1,
            f"{dataset.path} can't be probed on: its training samples have no labels, or all the same; give one "
            "with classes (a run without scores: --probe.no-enabled)",
        )
        require(
            probe.knn_k <= manifest.num_train,
            f"--probe.knn-k {probe.knn_k}: {dataset.path} has {manifest.num_train} training samples; give at most as many, "
            "or 0 (automatic)",
        )
        self.knn_k = probe.knn_k or automatic_k(self._labels[0])

    def score(self, encoder: Encoder) -> dict[str, Any]:
        """`linear_top1` and `knn_top1` (fractions of the test split) of `encoder`, what they are class by class, for other
        k, and how the linear fit went.

        `UserError` on all ranks where features are not finite.
        """
        return self._score(
            [
                extract(
                    encoder, self.dataset, indices,
                    data=self.data, augment=self.augment, device=self.device, threads=self.threads,
                )
                for indices in self._indices
            ]
        )  # fmt: skip

    def baselines(self, untrained: Encoder) -> dict[str, Any]:
        """The same two scores of raw pixels (`raw_…`) and of the untrained encoder (`init_…`)."""
        small = replace(self.data, image_size=min(RAW_SIDE, self.data.image_size))
        raw = [
            raw_pixels(self.dataset, indices, data=small, device=self.device, threads=self.threads)
            if distributed.is_main()
            else torch.empty(0)
            for indices in self._indices
        ]
        found = {f"raw_{name}": value for name, value in self._score(raw).items()}
        found |= {f"init_{name}": value for name, value in self.score(untrained).items()}
        return {name: value for name, value in found.items() if not name.endswith(PER_CLASS)}

    def _score(self, features: list[Tensor]) -> dict[str, Any]:
        def fit() -> dict[str, Any] | None:
            if not distributed.is_main():
                return None
            (train_x, test_x), (train_y, test_y) = features, self._labels
            with _all_cores(self.device):
                linear = linear_probe(
                    train_x, train_y, test_x, test_y,
                    strengths=self.probe.strengths, holdout=self.probe.holdout, seed=self.seed,
                )  # fmt: skip
                by_k = knn_predict_by_k(
                    train_x, train_y, test_x, num_classes=len(self.dataset.manifest.classes),
                    ks={self.knn_k, *(k for k in BY_K if k <= len(train_y))}, temperature=self.probe.knn_temperature,
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
        return {
            "linear": "L2-regularised logistic regression by L-BFGS on standardised features",
            "linear_strengths": list(self.probe.strengths),
            "linear_strength_chosen_on": f"{self.probe.holdout:g} of the training split, held out",
            "knn": "weighted vote of the k nearest by cosine s, weight exp(s / temperature)",
            "knn_k": self.knn_k,
            "knn_k_chosen": "given" if self.probe.knn_k else AUTOMATIC_K,
            "knn_temperature": self.probe.knn_temperature,
            "encoder": "frozen, in eval mode, fp32",
            "images": f"centre crop {self.data.eval_crop:g}, {self.data.image_size} px, without augmentation",
            "raw_pixels": f"{min(RAW_SIDE, self.data.image_size)} px",
            "num_train": self.dataset.manifest.num_train,
            "num_test": self.dataset.manifest.num_test,
            "dataset_sha256": self.dataset.manifest.sha256,
            "classes": list(self.dataset.manifest.classes),
        }

    def summary(self, baselines: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What probe.json holds: the last entry of `history` (each with `epoch`, epochs done, and `step`) as the result,
        the best one beside it, the baselines and the protocol. Accuracies of single classes are the result's alone."""
        best = max(history, key=lambda entry: entry["linear_top1"])
        return {
            **history[-1],
            **baselines,
            "best": {name: best[name] for name in ("epoch", "step", "linear_top1", "knn_top1")},
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
