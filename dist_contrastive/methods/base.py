"""What every method is: a module that turns a batch into losses."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar, get_args, get_origin

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from dist_contrastive import distributed
from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import HeadConfig, MethodConfig, TeacherConfig
from dist_contrastive.losses.statistics import effective_rank, positive_cosine
from dist_contrastive.models.base import Encoder
from dist_contrastive.models.heads import KeyedDropout, build_head, build_predictor
from dist_contrastive.models.teacher import Teacher
from dist_contrastive.rng import sample_keys
from dist_contrastive.schedules import Clock, ema_momentum

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
    global_batch: int
    """Samples of one update over all ranks."""


class Method(nn.Module, ABC, Generic[ConfigT]):
    """Encoder, projector, and the loss on them; a step goes through these phases:

    1. `embed` and `targets` treat each sample by itself (but for batch statistics), so that they may be called for one
       micro-batch after the other. Where the config is a `TeacherConfig` there is a `teacher` to make targets.
    2. `settle` sees the whole rank batch, may ask the other ranks, and has no gradient.
    3. `loss` sees the whole rank batch where it couples samples (`couples_samples`), else perhaps a micro-batch. It may use
       parameters beside the embeddings. The loss of a rank is the mean over the rank's own anchors, and what it gathers
       from other ranks carries gradient, so that the average over ranks is the gradient of the global batch.
    4. `after_step`, once the optimizer has updated, moves the teacher and whatever else follows; the device alone knows by then
       whether there was an update to be followed.

    Attributes:
        teacher: follows encoder and projector; None where the config has no momentum for one.
        predictor: from embedding to embedding, where the config has a head of this name; else None.
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
    """The embedding that the loss looks for, by the method's paper: `loss` detaches it, and what looks for it is `q`. None:
    gradient reaches all. Where there is one, `z` is for the report alone, without gradient, or is the target itself."""
    needs_patches: ClassVar[bool] = False
    """Whether its encoder must be a vision transformer."""
    needs_text: ClassVar[bool] = False
    """Whether it learns from captions."""
    couples_samples: ClassVar[bool] = True
    """Whether the loss of a sample depends on other samples of its batch. If not, the loss is a mean over samples, and
    micro-batches need no gradient caching."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for base in cls.__dict__.get("__orig_bases__", ()):
            origin, arguments = get_origin(base), get_args(base)
            if isinstance(origin, type) and issubclass(origin, Method) and isinstance(arguments[0], type):
                (cls.Config,) = arguments

    def __init__(self, settings: MethodSettings[ConfigT]) -> None:
        super().__init__()
        self.config = settings.config
        self.seed = settings.seed
        self.encoder = settings.encoder
        self.norm = self.encoder.config.norm
        self.dropout = KeyedDropout(self.encoder.config.dropout)
        self.projector = self.build_projector()
        predictor: HeadConfig | None = getattr(self.config, "predictor", None)
        size = self.config.projector.output_size
        self.predictor = build_predictor(predictor, size, self.norm) if predictor else None
        self.teacher = Teacher(self.encoder, self.projector) if isinstance(self.config, TeacherConfig) else None

    def build_projector(self) -> nn.Module:
        """What maps features [N, D] to embeddings [N, E]; a teacher has its own."""
        return build_head(self.config.projector, self.encoder.feature_size, self.norm)

    @property
    def late_parameters(self) -> tuple[Sequence[nn.Parameter], float]:
        """Parameters that stand still at first, and for how many epochs."""
        return [], 0.0

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

    def settle(self, embeddings: Embeddings, clock: Clock) -> None:
        """Find what the loss needs of the whole global batch's targets, and keep it for this step's `loss`.

        `embeddings` are the rank batch's, without gradient: all of them, or the targets alone. All ranks call it together,
        perhaps again for the same step, so it may set nothing but what depends on its arguments.
        """

    @abstractmethod
    def loss(self, embeddings: Embeddings, samples: Samples) -> Losses:
        """Float32 scalars, means over this rank's anchors; the loop knows `losses["loss"]` alone, the others are logged.

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

    def alarm(self, values: Mapping[str, float], clock: Clock) -> str:
        """What is to be said of a logged step's losses and report, means over ranks, where the run goes wrong; else nothing."""
        return ""

    def groups_of_norm(self, num_samples: int) -> int:
        """In how many groups BatchNorm sees the samples of a forward pass of `num_samples`."""
        return 1

    def after_step(self, clock: Clock, embeddings: Embeddings, done: Bool[Tensor, ""]) -> None:
        """Move the teacher, and whatever else follows, after an optimizer update.

        `clock` counts the update; `embeddings` are its own, detached, of the whole rank batch. Where `done` is false, for
        which no host may wait, the update was left out, the embeddings may be anything, and nothing moves.
        """
        momentum = self.teacher_momentum(clock.progress)
        if self.teacher and momentum is not None:
            self.teacher.follow(self.encoder, self.projector, momentum, done)

    def teacher_momentum(self, progress: float) -> float | None:
        """How much of itself the teacher keeps in `after_step` at `progress`; None where there is no teacher."""
        return ema_momentum(progress, self.config.momentum) if isinstance(self.config, TeacherConfig) else None

    @property
    def settles(self) -> bool:
        """Whether `settle` does anything."""
        return type(self).settle is not Method.settle

    @property
    def exported(self) -> Encoder:
        """The encoder that is scored, drawn and saved for use."""
        return self.encoder

    @property
    def exported_projector(self) -> nn.Module:
        """The projector that is saved beside it."""
        return self.projector

    def embeddings(self, features: Tensor) -> Tensor:
        """Embeddings float32 [N, E] of features [N, D] of `exported`, for use after training."""
        embeddings: Tensor = self.exported_projector(features)
        return embeddings.float()

    def predict(self, z: Tensor) -> Tensor:
        """The predictor's output of embeddings [V, B, E], of the same shape, in float32."""
        assert self.predictor, "the config has a predictor"
        return self.predictor(z.flatten(0, 1)).float().view_as(z)

    def teach(self, views: Tensor) -> Tensor:
        """The teacher's embeddings [V, B, E] of views [V, B, 3, S, S], in float32."""
        assert self.teacher, "the config has a teacher's momentum"
        return self.teacher(views.flatten(0, 1)).float().unflatten(0, views.shape[:2])

    def project(self, batch: Batch) -> Tensor:
        """The projector's embeddings [V, B, E] in float32; views of one size go through encoder and projector at once."""
        return torch.cat([self.project_views(views, batch.samples, first) for views, first in numbered(batch.views)])

    def project_views(self, views: Tensor, samples: Samples, first: int = 0) -> Tensor:
        """As `project`, of views [V, B, 3, S, S] of one size, which are numbered from `first`."""
        keys = self.keys_of_views(samples, len(views), first)
        features = self.dropout(self.encoder(views.flatten(0, 1), keys), keys)
        return self.projector(features).float().unflatten(0, views.shape[:2])

    def keys(self, samples: Samples, view: int) -> Tensor:
        """int64 [B]: what keys everything random about a view of these samples."""
        return sample_keys(self.seed, samples.epoch, samples.indices, view)

    def keys_of_views(self, samples: Samples, num_views: int, first: int = 0) -> Tensor:
        """int64 [V·B]: those of the views from number `first` on, view by view."""
        return torch.cat([self.keys(samples, view) for view in range(first, first + num_views)])


def numbered(views: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """The tensors of a batch's views, each with the number of its first view among all."""
    firsts = itertools.accumulate(map(len, views), initial=0)
    return list(zip(views, firsts, strict=False))
