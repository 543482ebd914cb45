"""All that a run's method is scored by on one dataset: probes of its image encoder, and what two towers find of each other."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dist_contrastive.config import ProbeConfig
from dist_contrastive.data.loader import Loader
from dist_contrastive.evaluation.image_text import ImageTextRunner
from dist_contrastive.evaluation.protocol import ProbeRunner
from dist_contrastive.methods import Method
from dist_contrastive.methods.image_text import ImageText


class Scorer:
    """All ranks call the same methods at the same time and get the same results.

    Attributes:
        has_towers: whether zero-shot classification and retrieval are among the scores.
    """

    def __init__(self, loader: Loader, *, probe: ProbeConfig, device: torch.device, has_towers: bool) -> None:
        """`has_towers`: the methods to be scored have a text tower, which reads the captions of the loader's dataset.

        `UserError` as `ProbeRunner` says.
        """
        self._probe = ProbeRunner(loader, probe=probe, device=device)
        self._towers = ImageTextRunner(loader, device=device) if has_towers else None
        self._device = device
        self.has_towers = has_towers

    @property
    def has_labels(self) -> bool:
        return self._probe.has_labels

    def score(self, method: Method) -> dict[str, Any]:
        """What `ProbeRunner.score` and, with towers, `ImageTextRunner.score` give."""
        return {**self._probe.score(method.exported.to(self._device)), **self._score_towers(method)}

    def baselines(self, untrained: Method) -> dict[str, Any]:
        """The same of the untrained method (`init_…`), of raw pixels (`raw_…`), and by chance (`chance_…`)."""
        chances = self._towers.chances() if self._towers else {}
        scores = {f"init_{name}": value for name, value in self._score_towers(untrained).items()}
        scores |= {f"chance_{name}": value for name, value in chances.items()}
        return {**self._probe.baselines(untrained.exported.to(self._device)), **scores}

    def protocol(self) -> dict[str, Any]:
        """How the scores come about."""
        return {**self._probe.protocol(), **(self._towers.protocol() if self._towers else {})}

    def summary(self, baselines: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What probe.json holds (`ProbeRunner.summary`)."""
        return {**self._probe.summary(baselines, history), "protocol": self.protocol()}

    def _score_towers(self, method: Method) -> dict[str, float]:
        if not self._towers:
            return {}
        assert isinstance(method, ImageText)
        return self._towers.score(method.to(self._device))
