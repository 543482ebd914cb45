"""What every method is: a module that turns a batch into losses."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar, get_args, get_origin

import torch
from torch import Tensor, nn

from dist_contrastive import distributed
from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import MethodConfig
from dist_contrastive.losses.statistics import effective_rank, positive_cosine
from dist_contrastive.models.base import Encoder
from dist_contrastive.models.heads import KeyedDropout, build_head
from dist_contrastive.rng import sample_keys

ConfigT = TypeVar("ConfigT", bound=MethodConfig)
Losses = dict[str, Tensor]
Report = dict[str, Tensor]
Embeddings = dict[str, Tensor]
"""Float32 tensors [V, B, ...]: samples are the second axis, along which micro-batches are put together."""

MAX_SPECTRUM_ROWS = 2048
"""Of how many embeddings of a global batch the effective rank is taken."""


@dataclass(frozen=True)
class MethodSettings(Generic[ConfigT]):
    """What a method is made from."""

    config: ConfigT
    encoder: Encoder
    seed: int
    """The run's, for what is random about a sample."""


class Method(nn.Module, ABC, Generic[ConfigT]):
    """Encoder, projector, and the loss on them, in two halves.

    `embed` and `targets` hold every parameter and treat each sample by itself (but for batch statistics), so that they may
    be called for one micro-batch after the other; `loss` has no parameters, and sees the whole rank batch where it
    couples samples (`couples_samples`), else perhaps a micro-batch. The loss of a rank is the mean over the rank's own
    anchors, and what it gathers from other ranks carries gradient, so that DDP's average over ranks is the gradient of
    the global batch.
    """

    Config: ClassVar[type[MethodConfig]]
    """The class of its config, which a method names in its bases: `class SimCLR(Method[SimCLRConfig])`."""
    min_views: ClassVar[int] = 2
    """How many views of a sample the loss needs, of the first size."""
    max_views: ClassVar[int | None] = None
    """How many of these it can take; None: any number."""
    multi_crop: ClassVar[bool] = False
    """Whether it takes views of other sizes beside them."""
    target: ClassVar[str | None] = None
    """The embedding that the loss looks for and no gradient reaches, by the method's paper; None: gradient reaches all.
    Where there is one, `z` is for the report alone, or is the target itself."""
    couples_samples: ClassVar[bool] = True
    """Whether the loss of a sample depends on other samples of its batch. If not, the loss is a mean over samples, and
    micro-batches need no gradient caching."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for base in cls.__dict__.get("__orig_bases__", ()):
            if get_origin(base) is Method:
                (cls.Config,) = get_args(base)

    def __init__(self, settings: MethodSettings[ConfigT]) -> None:
        super().__init__()
        self.config = settings.config
        self.seed = settings.seed
        self.encoder = settings.encoder
        self.norm = self.encoder.config.norm
        self.dropout = KeyedDropout(self.encoder.config.dropout)
        self.projector = build_head(self.config.projector, self.encoder.feature_size, self.norm)

    @abstractmethod
    def embed(self, batch: Batch) -> Embeddings:
        """What the loss needs of these samples and gradient flows through, and `z`, the student's embeddings [V, B, ...], for
        the report. What of it must not receive gradient is detached.

        May be called twice for the same samples in a step (gradient caching), with the same outcome.
        """

    def targets(self, batch: Batch) -> Embeddings:
        """What else the loss needs of these samples, without gradient: what a teacher makes of them. Called once a step."""
        return {}

    def embed_all(self, batch: Batch) -> Embeddings:
        """Embeddings and targets."""
        return {**self.embed(batch), **self.targets(batch)}

    @abstractmethod
    def loss(self, embeddings: Embeddings, samples: Samples) -> Losses:
        """Float32 scalars, means over this rank's anchors; the loop knows `losses["loss"]` alone.

        `samples` are those of `embeddings`: the whole rank batch, or a micro-batch where the loss does not couple samples.
        """

    def report(self, embeddings: Embeddings, *, logged: bool) -> Report:
        """Float32 scalars without gradient that are means over anchors; what costs, only where the step is `logged`."""
        z = embeddings["z"].detach()
        report = {"positive_cosine": positive_cosine(z)} if len(z) > 1 else {}
        if logged:
            # The spectrum costs the cube of the rows: of the samples (of a grid's: times its positions) the first few are enough.
            rows_of_sample = z[:, 0].numel() // z.shape[-1]
            num_samples = max(1, MAX_SPECTRUM_ROWS // (rows_of_sample * distributed.world_size()))
            report["effective_rank"] = effective_rank(distributed.all_gather(z[:, :num_samples].flatten(0, -2)))
        return report

    def groups_of_norm(self, num_samples: int) -> int:
        """In how many groups BatchNorm sees the samples of a forward pass of `num_samples`."""
        return 1

    def after_step(self, progress: float, embeddings: Embeddings) -> None:
        """Move teachers and queues after an optimizer update.

        `progress` runs from 0 to 1 over the run; `embeddings` are the update's own, detached, of the whole rank batch.
        """

    def teacher_momentum(self, progress: float) -> float | None:
        """How much of itself the teacher keeps in `after_step` at `progress`; None where there is no teacher."""
        return None

    @property
    def student(self) -> nn.Sequential:
        """Encoder and projector, as a teacher follows them."""
        return nn.Sequential(self.encoder, self.projector)

    def project(self, batch: Batch) -> Tensor:
        """Embeddings [V, B, E] in float32, not normalized: all views in one forward pass through encoder and projector."""
        (views,) = batch.views
        return self.project_views(views, batch.samples)

    def project_views(self, views: Tensor, samples: Samples) -> Tensor:
        """As `project`, of views [V, B, 3, S, S], which are the first V of these samples."""
        keys = torch.cat([self.keys(samples, view) for view in range(len(views))])
        features = self.dropout(self.encoder(views.flatten(0, 1), keys), keys)
        return self.projector(features).float().unflatten(0, views.shape[:2])

    def keys(self, samples: Samples, view: int) -> Tensor:
        """int64 [B]: what keys everything random about a view of these samples."""
        return sample_keys(self.seed, samples.epoch, samples.indices, view)
