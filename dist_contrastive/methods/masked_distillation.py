"""Self-distillation of masked patches beside that of whole views. What iBOT and DINOv2 share."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import require
from dist_contrastive.losses.prototypes import assignment_entropies, prototype_cross_entropy
from dist_contrastive.methods.base import Embeddings, Losses, MethodSettings, Report, numbered
from dist_contrastive.methods.self_distillation import SelfDistillation, SelfDistillationConfig
from dist_contrastive.models.base import Features
from dist_contrastive.models.centering import Centering, describe_collapse
from dist_contrastive.models.heads import PrototypeHead
from dist_contrastive.models.masks import block_masks, masked_places, most_masked
from dist_contrastive.schedules import Clock


@dataclass(frozen=True)
class MaskedDistillationConfig(SelfDistillationConfig):
    """Defaults of iBOT, section 4.1, and its authors' code."""

    patch_prototypes: int = 0
    """K of patches, which then have a head of their own; 0: they share that of the whole views."""
    patch_weight: float = 1.0
    """How much the loss of the patches counts beside that of the whole views."""
    mask_probability: float = 0.5
    """How many of the student's views of the first size are masked."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """From what the share of a masked view's patches is drawn that are masked, in blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.patch_prototypes == 0 or self.patch_prototypes >= 2,
            f"--method.patch-prototypes {self.patch_prototypes}: give at least 2, or 0 (the same head)",
        )
        require(self.patch_weight >= 0, f"--method.patch-weight {self.patch_weight:g}: give 0 or more")
        probability, (low, high) = self.mask_probability, self.mask_ratio
        require(
            0 < probability <= 1,
            f"--method.mask-probability {probability:g}: give a probability in (0, 1]; dino learns without masks",
        )
        require(
            0 < low <= high < 1,
            f"--method.mask-ratio {low:g} {high:g}: give 0 < low <= high < 1: some patches must be masked, and some not",
        )


MaskedT = TypeVar("MaskedT", bound=MaskedDistillationConfig)


class MaskedDistillation(SelfDistillation[MaskedT], Generic[MaskedT]):
    """What the student makes of masked patches looks for what the teacher, who sees them, makes of the same patches.

    The student's views of the first size are masked for both losses. Attributes: `mask_token`, in place of a masked patch's
    embedding; `patch_centering` of the teacher's assignments of patches, over the masked ones (a center of iBOT's authors is over
    all patches, of which the masked ones are a random part).
    """

    needs_patches = True

    def __init__(self, settings: MethodSettings[MaskedT]) -> None:
        super().__init__(settings)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(self.encoder.width), std=0.02))
        self.patch_centering = self.build_patch_centering()

    @abstractmethod
    def build_patch_centering(self) -> Centering:
        """As `build_centering`, of patches."""

    @property
    def num_patch_prototypes(self) -> int:
        return self.config.patch_prototypes or self.config.prototypes

    def build_projector(self) -> PrototypeHead:
        head = super().build_projector()
        if self.config.patch_prototypes:
            head.of_patches = self.build_prototype_head(self.config.patch_prototypes)
        return head

    @property
    def late_parameters(self) -> tuple[Sequence[nn.Parameter], float]:
        heads = {self.projector, _of_patches(self.projector)}
        return [head.directions for head in heads], self.config.freeze_epochs

    def masks(self, views: Tensor, samples: Samples) -> Tensor:
        """Which patches of `views` [W, B, 3, S, S] are masked, bool [W·B, T]: a function of the samples alone."""
        keys = self.keys_of_views(samples, len(views))
        side = self.encoder.grid(views.shape[-1])
        return block_masks(keys, side, probability=self.config.mask_probability, ratio=self.config.mask_ratio)

    def masked(self, mask: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """Where the masked patches of each view are, int64 [W·B, M], and how they count, [W·B, M]."""
        return masked_places(mask, most_masked(self.encoder.grid(views.shape[-1]), self.config.mask_ratio))

    def embed(self, batch: Batch) -> Embeddings:
        views, samples = batch.views[0], batch.samples
        mask, shape = self.masks(views, samples), views.shape[:2]
        keys = self.keys_of_views(samples, len(views))
        features = self.encoder.features(views.flatten(0, 1), keys=keys, mask=mask, mask_token=self.mask_token)
        q = self.projector(self.dropout(features.pooled, keys)).unflatten(0, shape)
        others = [self.project_views(more, samples, first) for more, first in numbered(batch.views)[1:]]
        places, _ = self.masked(mask, views)
        return {
            "z": q.detach(),
            "q": torch.cat([q, *others]),
            "patch_q": _patches(self.projector, features, places).unflatten(0, shape),
            **self.embed_features(features.pooled.unflatten(0, shape)),
        }

    def embed_features(self, pooled: Tensor) -> Embeddings:
        """What else the loss needs of the student's features [W, B, D] of the first size."""
        return {}

    def targets(self, batch: Batch) -> Embeddings:
        views = batch.views[0]
        places, weights = self.masked(self.masks(views, batch.samples), views)
        teacher = self.own_teacher
        features, shape = teacher.features(views.flatten(0, 1)), views.shape[:2]
        with torch.no_grad():
            k, patches = teacher.projector(features.pooled), _patches(teacher.projector, features, places)
        of_views = {"k": k, "patch_k": patches, "patch_weight": weights}
        return {name: value.unflatten(0, shape) for name, value in of_views.items()}

    def settle(self, embeddings: Embeddings, clock: Clock) -> None:
        super().settle(embeddings, clock)
        self.patch_centering.settle(
            embeddings["patch_k"].flatten(0, 2),
            _of_patches(self.own_teacher.projector).prototypes().detach(),
            self.target_temperature,
            embeddings["patch_weight"].flatten(),
        )

    def loss(self, embeddings: Embeddings, samples: Samples) -> Losses:
        of_views = super().loss(embeddings, samples)["loss"]
        num_views, num_samples = embeddings["patch_q"].shape[:2]
        of_patches = prototype_cross_entropy(
            embeddings["patch_q"].flatten(0, 2)[None],
            _of_patches(self.projector).prototypes(),
            embeddings["patch_k"].flatten(0, 2)[None],
            _of_patches(self.own_teacher.projector).prototypes().detach(),
            pairs=torch.ones(1, 1, device=of_views.device),
            bias=self.patch_centering.bias,
            temperature=self.config.temperature,
            target_temperature=self.target_temperature,
            # iBOT, equation 2: the mean over the masked patches of a view, then over all views, also those without any.
            weights=embeddings["patch_weight"].flatten() / (num_views * num_samples),
        )
        loss = of_views + self.config.patch_weight * of_patches
        return {"loss": loss, "of_views": of_views, "of_patches": of_patches}

    def report(self, embeddings: Embeddings, *, logged: bool) -> Report:
        report = super().report(embeddings, logged=logged)
        if logged:
            report["patch_target_entropy"], report["mean_patch_target_entropy"] = assignment_entropies(
                embeddings["patch_k"].flatten(0, 2),
                _of_patches(self.own_teacher.projector).prototypes().detach(),
                bias=self.patch_centering.bias,
                temperature=self.target_temperature,
                weights=embeddings["patch_weight"].flatten(),
            )
        return report

    def alarm(self, values: Mapping[str, float], clock: Clock) -> str:
        of_views = super().alarm(values, clock)
        entropies = values["patch_target_entropy"], values["mean_patch_target_entropy"]
        if of_views or clock.epoch < 1 or not any(entropies):  # both are 0 where no patch of the step is masked
            return of_views
        of_patches = describe_collapse(*entropies, self.num_patch_prototypes)
        return f"of patches: {of_patches}" if of_patches else ""

    def after_step(self, clock: Clock, embeddings: Embeddings, done: Tensor) -> None:
        self.patch_centering.follow(
            embeddings["patch_k"].flatten(0, 2),
            _of_patches(self.own_teacher.projector).prototypes().detach(),
            done,
            embeddings["patch_weight"].flatten(),
        )
        super().after_step(clock, embeddings, done)


def _of_patches(projector: nn.Module) -> PrototypeHead:
    """The head of patches: one of its own, or that of the whole views."""
    assert isinstance(projector, PrototypeHead)
    return projector.of_patches or projector


def _patches(projector: nn.Module, features: Features, places: Tensor) -> Tensor:
    """Embeddings [N, M, E] of the tokens at `places` int64 [N, M]."""
    tokens = features.tokens.gather(1, places[:, :, None].expand(-1, -1, features.tokens.shape[-1]))
    embeddings: Tensor = _of_patches(projector)(tokens.flatten(0, 1))
    return embeddings.unflatten(0, places.shape)
