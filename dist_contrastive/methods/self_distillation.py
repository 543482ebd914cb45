"""Self-distillation: a student's assignments to prototypes look for a teacher's. What DINO, iBOT and DINOv2 share."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor, nn

from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import HeadConfig, TeacherConfig, require, require_positive
from dist_contrastive.losses.prototypes import assignment_entropies, other_views, prototype_cross_entropy
from dist_contrastive.methods.base import Embeddings, Losses, Method, MethodSettings, Report
from dist_contrastive.models.base import Encoder
from dist_contrastive.models.centering import Centering, describe_collapse
from dist_contrastive.models.heads import PrototypeHead, build_head
from dist_contrastive.models.teacher import Teacher
from dist_contrastive.schedules import Clock, linear


@dataclass(frozen=True)
class SelfDistillationConfig(TeacherConfig):
    """Defaults of DINO, section 3.2, and its authors' code."""

    projector: HeadConfig = field(
        default_factory=lambda: HeadConfig(
            layers=3, hidden_size=2048, output_size=256, activation="gelu", hidden_norm=False
        )
    )
    """The head before the last layer, which is `prototypes`."""
    prototypes: int = 65536
    """K: how many dimensions the assignments have."""
    temperature: float = 0.1
    """The student's; divides the cosine similarities to prototypes."""
    teacher_temperature: float = 0.07
    """The teacher's after its warm-up; smaller than the student's sharpens."""
    teacher_temperature_start: float = 0.04
    """At the start."""
    teacher_temperature_epochs: float = 30.0
    """Length of the linear warm-up from one to the other."""
    freeze_epochs: float = 1.0
    """How long the prototypes stand still at first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.prototypes >= 2, f"--method.prototypes {self.prototypes}: give at least 2")
        for name in ("temperature", "teacher_temperature", "teacher_temperature_start"):
            require_positive(f"--method.{name.replace('_', '-')}", getattr(self, name))
        for name in ("teacher_temperature_epochs", "freeze_epochs"):
            value = getattr(self, name)
            require(value >= 0, f"--method.{name.replace('_', '-')} {value:g}: give 0 or more")


SelfDistillationT = TypeVar("SelfDistillationT", bound=SelfDistillationConfig)


class SelfDistillation(Method[SelfDistillationT], Generic[SelfDistillationT]):
    """Each view's assignment to prototypes looks for what the teacher makes of the other views of the first size.

    Attributes: `centering` of the teacher's assignments; `target_temperature`, settled for the step under way.
    """

    multi_crop = True
    couples_samples = False
    target = "k"  # DINO, algorithm 1
    projector: PrototypeHead

    def __init__(self, settings: MethodSettings[SelfDistillationT]) -> None:
        super().__init__(settings)
        self.centering = self.build_centering()
        self.target_temperature = self.config.teacher_temperature_start

    @abstractmethod
    def build_centering(self) -> Centering:
        """What keeps the teacher's assignments from collapsing."""

    def build_projector(self) -> PrototypeHead:
        return self.build_prototype_head(self.config.prototypes)

    def build_prototype_head(self, num_prototypes: int) -> PrototypeHead:
        """A head for features of the encoder's size."""
        head = build_head(self.config.projector, self.encoder.feature_size, self.norm)
        return PrototypeHead(head, self.config.projector.output_size, num_prototypes)

    @property
    def late_parameters(self) -> tuple[Sequence[nn.Parameter], float]:
        return [self.projector.directions], self.config.freeze_epochs

    @property
    def exported(self) -> Encoder:
        """The teacher's, which is the better one all along (DINO, section 5.2)."""
        return self.own_teacher.encoder

    @property
    def exported_projector(self) -> nn.Module:
        return self.own_teacher.projector

    @property
    def own_teacher(self) -> Teacher:
        assert self.teacher, "its config has a teacher's momentum"
        return self.teacher

    def teacher_prototypes(self) -> Tensor:
        """The teacher's prototypes [K, E]."""
        head = self.own_teacher.projector
        assert isinstance(head, PrototypeHead)
        return head.prototypes().detach()

    def embed(self, batch: Batch) -> Embeddings:
        q = self.project(batch)
        return {"z": q[: len(batch.views[0])].detach(), "q": q}

    def targets(self, batch: Batch) -> Embeddings:
        return {"k": self.teach(batch.views[0])}

    def settle(self, embeddings: Embeddings, clock: Clock) -> None:
        config = self.config
        self.target_temperature = linear(
            clock.epoch, config.teacher_temperature_epochs, config.teacher_temperature_start, config.teacher_temperature
        )
        self.centering.settle(embeddings["k"].flatten(0, 1), self.teacher_prototypes(), self.target_temperature)

    def loss(self, embeddings: Embeddings, samples: Samples) -> Losses:
        q, k = embeddings["q"], embeddings["k"]
        loss = prototype_cross_entropy(
            q,
            self.projector.prototypes(),
            k,
            self.teacher_prototypes(),
            pairs=other_views(len(q), len(k), q.device),
            bias=self.centering.bias,
            temperature=self.config.temperature,
            target_temperature=self.target_temperature,
        )
        return {"loss": loss}

    def report(self, embeddings: Embeddings, *, logged: bool) -> Report:
        report = super().report(embeddings, logged=logged)
        if logged:
            report["target_entropy"], report["mean_target_entropy"] = assignment_entropies(
                embeddings["k"].flatten(0, 1),
                self.teacher_prototypes(),
                bias=self.centering.bias,
                temperature=self.target_temperature,
            )
        return report

    def alarm(self, values: Mapping[str, float], clock: Clock) -> str:
        if clock.epoch < 1:  # at first the encoder tells nothing apart yet
            return ""
        return describe_collapse(values["target_entropy"], values["mean_target_entropy"], self.config.prototypes)

    def after_step(self, clock: Clock, embeddings: Embeddings, done: Tensor) -> None:
        # By the teacher that made these targets, before it moves.
        self.centering.follow(embeddings["k"].flatten(0, 1), self.teacher_prototypes(), done)
        super().after_step(clock, embeddings, done)
