"""SwAV (Caron et al. 2020, "Unsupervised learning of visual features by contrasting cluster assignments")."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn

from dist_contrastive import distributed
from dist_contrastive.batch import Batch, Samples, balanced_slices
from dist_contrastive.config import HeadConfig, MethodConfig, require, require_positive
from dist_contrastive.losses.prototypes import assignment_entropies, other_views, prototype_cross_entropy
from dist_contrastive.methods.base import Embeddings, Losses, Method, MethodSettings, Report
from dist_contrastive.models.centering import SinkhornKnopp, describe_collapse
from dist_contrastive.models.heads import PrototypeHead
from dist_contrastive.schedules import Clock

ASSIGNED = 2
"""Views, of the first size, whose assignments are predicted."""


@dataclass(frozen=True)
class SwAVConfig(MethodConfig):
    """Defaults of section 4 and the authors' code."""

    name: Annotated[str, tyro.conf.Fixed] = "swav"
    projector: HeadConfig = field(default_factory=lambda: HeadConfig(layers=2, hidden_size=2048, output_size=128))
    prototypes: int = 3000
    """K: among how many the samples of a step are shared out."""
    temperature: float = 0.1
    """Divides the cosine similarities to prototypes in predictions."""
    epsilon: float = 0.05
    """Divides them in the assignments that are predicted; larger is smoother."""
    iterations: int = 3
    """Of Sinkhorn-Knopp."""
    queue: int = 0
    """Past samples that are shared out beside the step's own, for batches much smaller than K; a multiple of the global batch."""
    queue_epochs: float = 15.0
    """After how many epochs the queue begins to fill; once it is full it is used."""
    freeze_epochs: float = 1.0
    """How long the prototypes stand still at first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.prototypes >= 2, f"--method.prototypes {self.prototypes}: give at least 2")
        require(self.iterations >= 1, f"--method.iterations {self.iterations}: give at least 1")
        require(self.queue >= 0, f"--method.queue {self.queue}: give 0 (none) or more")
        for name in ("temperature", "epsilon"):
            require_positive(f"--method.{name}", getattr(self, name))
        for name in ("queue_epochs", "freeze_epochs"):
            value = getattr(self, name)
            require(value >= 0, f"--method.{name.replace('_', '-')} {value:g}: give 0 or more")

    def check_global_batch(self, size: int) -> None:
        require(
            self.queue % size == 0,
            f"--method.queue {self.queue}: must be a multiple of --batch.global {size}; give "
            f"{max(size, self.queue // size * size)}, or 0 for none",
        )
        enough = math.ceil((self.prototypes - size) / size) * size
        require(
            self.prototypes <= size + self.queue,
            f"--method.prototypes {self.prototypes}: a step shares out {size + self.queue:,} samples, so that some would have "
            f"none; --method.queue {enough} is enough, or at most {size + self.queue} prototypes are",
        )


class SwAV(Method[SwAVConfig]):
    """Each view predicts the other views' assignments to prototypes, which share the samples of all ranks out equally.

    Assignments come from the first two views, each on its own. The queue is a buffer that all ranks fill with the embeddings of
    all ranks; each rank shares out its own part of it.
    """

    max_views = ASSIGNED
    multi_crop = True
    target = "z"  # section 3.1: the codes are held constant
    projector: PrototypeHead
    assigned: Tensor
    queue: Tensor

    def __init__(self, settings: MethodSettings[SwAVConfig]) -> None:
        super().__init__(settings)
        config = self.config
        self.centerings = nn.ModuleList(SinkhornKnopp(config.prototypes, config.iterations) for _ in range(ASSIGNED))
        # Those that the assignments were made with: the codes of a step are held constant.
        self.register_buffer("assigned", self.projector.prototypes().detach(), persistent=False)
        self.register_buffer("queue", torch.zeros(ASSIGNED, config.queue, config.projector.output_size))

    def build_projector(self) -> nn.Module:
        return PrototypeHead(super().build_projector(), self.config.projector.output_size, self.config.prototypes)

    @property
    def late_parameters(self) -> tuple[Sequence[nn.Parameter], float]:
        return [self.projector.directions], self.config.freeze_epochs

    @property
    def _of_views(self) -> list[SinkhornKnopp]:
        return [centering for centering in self.centerings if isinstance(centering, SinkhornKnopp)]

    def embed(self, batch: Batch) -> Embeddings:
        q = self.project(batch)
        return {"z": q[:ASSIGNED].detach(), "q": q}

    def queued(self, clock: Clock) -> int:
        """How many steps have gone into the queue once `clock.step` updates are done."""
        return max(0, clock.step - round(self.config.queue_epochs * clock.steps_per_epoch))

    def settle(self, embeddings: Embeddings, clock: Clock) -> None:
        rows, rank = embeddings["z"], distributed.rank()
        if self.queued(clock) * rows.shape[1] * distributed.world_size() >= self.config.queue:
            own = balanced_slices(self.config.queue, distributed.world_size())[rank]
            rows = torch.cat([rows, self.queue[:, own]], dim=1)
        self.assigned = self.projector.prototypes().detach()
        for centering, of_view in zip(self._of_views, rows, strict=True):
            centering.settle(of_view, self.assigned, self.config.epsilon)

    def loss(self, embeddings: Embeddings, samples: Samples) -> Losses:
        q, z = embeddings["q"], embeddings["z"]
        prototypes = self.projector.prototypes()
        # Equation 2: each assigned view with all others.
        pairs = other_views(len(q), ASSIGNED, q.device)
        losses = [
            prototype_cross_entropy(
                q,
                prototypes,
                z[view : view + 1],
                self.assigned,
                pairs=pairs[:, view : view + 1],
                bias=centering.bias,
                temperature=self.config.temperature,
                target_temperature=self.config.epsilon,
            )
            for view, centering in enumerate(self._of_views)
        ]
        return {"loss": torch.stack(losses).mean()}

    def report(self, embeddings: Embeddings, *, logged: bool) -> Report:
        report = super().report(embeddings, logged=logged)
        if logged:
            report["target_entropy"], report["mean_target_entropy"] = assignment_entropies(
                embeddings["z"][0],
                self.assigned,
                bias=self._of_views[0].bias,
                temperature=self.config.epsilon,
            )
        return report

    def alarm(self, values: Mapping[str, float], clock: Clock) -> str:
        if clock.epoch < 1:  # at first the encoder tells nothing apart yet
            return ""
        return describe_collapse(values["target_entropy"], values["mean_target_entropy"], self.config.prototypes)

    def after_step(self, clock: Clock, embeddings: Embeddings, done: Tensor) -> None:
        steps = self.queued(clock)
        if self.config.queue and steps > 0:
            rows = distributed.all_gather(embeddings["z"].transpose(0, 1).contiguous()).transpose(0, 1)
            start = (steps - 1) * rows.shape[1] % self.config.queue
            part = self.queue[:, start : start + rows.shape[1]]
            part.copy_(rows.where(done, part))
        super().after_step(clock, embeddings, done)
