"""CPC for images (van den Oord, Li and Vinyals 2018, "Representation learning with contrastive predictive coding", section
3.2; Henaff et al. 2020, "Data-efficient image recognition with contrastive predictive coding")."""

from dataclasses import dataclass, field
from typing import Annotated

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive import distributed
from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import HeadConfig, MethodConfig, UserError, require, require_positive
from dist_contrastive.losses.infonce import indexed_nce
from dist_contrastive.methods.base import Embeddings, Losses, Method, MethodSettings, Report
from dist_contrastive.models.patches import RowContext, RowPredictions, cut_patches, grid_side
from dist_contrastive.rng import fold


@dataclass(frozen=True)
class CPCConfig(MethodConfig):
    """The grid is the paper's: patches of a quarter of the image's side, half overlapping, 7 × 7 of them."""

    name: Annotated[str, tyro.conf.Fixed] = "cpc"
    projector: HeadConfig = field(default_factory=lambda: HeadConfig(layers=1, output_size=256))
    """From a patch's feature to its embedding; a linear map, as CPC has no projector that is thrown away."""
    patch_size: int = 0
    """Side of a patch in pixels; 0 takes a quarter of the image's (64 of 256 in the paper)."""
    patch_stride: int = 0
    """From one patch to the next, in pixels; 0 takes half a patch."""
    rows_ahead: int = 3
    """How many rows ahead are predicted (5 in the first paper; the next rows alone are mostly overlap)."""
    context_layers: int = 3
    """Each lets the context see one row further up."""
    context_size: int = 256
    """Size of the summary of the rows above, from which is predicted."""
    temperature: float = 0.1
    """Divides the cosine similarities of prediction and patch; the papers have inner products of free length instead, which
    need their long schedules to grow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patch_size", "patch_stride"):
            option = name.replace("_", "-")
            require(getattr(self, name) >= 0, f"--method.{option} {getattr(self, name)}: give 0 (automatic) or pixels")
        for name in ("rows_ahead", "context_layers", "context_size"):
            option = name.replace("_", "-")
            require(getattr(self, name) >= 1, f"--method.{option} {getattr(self, name)}: give at least 1")
        require_positive("--method.temperature", self.temperature)

    def grid(self, image_size: int) -> tuple[int, int]:
        """Side of a patch, and from one to the next, in pixels of images of `image_size`."""
        patch_size = self.patch_size or max(1, image_size // 4)
        return patch_size, self.patch_stride or max(1, patch_size // 2)


class CPC(Method[CPCConfig]):
    """From the rows of patches above, tell which patch comes `k` rows below, among those of the global batch.

    The candidates of a prediction are the patches of all positions that a prediction of that k may be about, of all images
    and views of all ranks: other positions of the same image and other images are its negatives. Context and patches both
    receive gradient. Attributes: `patch_size`, `patch_stride` in pixels; `side`, the grid's.
    """

    min_views = 1

    def __init__(self, settings: MethodSettings[CPCConfig]) -> None:
        super().__init__(settings)
        config, encoder = self.config, self.encoder
        self.patch_size, self.patch_stride = config.grid(encoder.image_size)
        self.side = grid_side(encoder.image_size, self.patch_size, self.patch_stride)
        if self.side <= config.rows_ahead:
            raise UserError(
                f"--method.rows-ahead {config.rows_ahead}: patches of {self.patch_size} pixels, {self.patch_stride} apart, make "
                f"{max(0, self.side)} rows of an image of {encoder.image_size} pixels; give more rows than are predicted"
            )
        self._check_that_all_is_seen()
        size = config.projector.output_size
        self.context = RowContext(size, config.context_size, config.context_layers)
        self.predictions = RowPredictions(config.context_size, size, config.rows_ahead)

    def _check_that_all_is_seen(self) -> None:
        size, patch, stride = self.encoder.image_size, self.patch_size, self.patch_stride
        require(
            stride <= patch,
            f"--method.patch-stride {stride}: patches of {patch} pixels would leave gaps; give at most {patch}",
        )

        def unseen(side: int) -> int:
            patch, stride = self.config.grid(side)
            return (side - patch) % stride

        if unseen(size):
            near = [side for side in range(size // 2, 2 * size + 1) if not unseen(side)]
            fits = [max((s for s in near if s < size), default=0), min((s for s in near if s > size), default=0)]
            advice = " or ".join(
                [f"--data.image-size {side}" for side in fits if side] + ["another --method.patch-stride"]
            )
            raise UserError(
                f"--data.image-size {size}: patches of {patch} pixels, {stride} apart, never see the last "
                f"{unseen(size)}; give {advice}"
            )

    def embed(self, batch: Batch) -> Embeddings:
        (views,) = batch.views
        num_views, batch_size = views.shape[:2]
        patches = cut_patches(views.flatten(0, 1), self.patch_size, self.patch_stride)
        keys = self._patch_keys(batch.samples, num_views)
        features = self.dropout(self.encoder(patches.contiguous(memory_format=torch.channels_last), keys), keys)
        z = self.projector(features).float().unflatten(0, (num_views * batch_size, self.side, self.side))
        predictions = self.predictions(self.context(z))

        def unit(x: Tensor) -> Tensor:
            return F.normalize(x.float(), dim=-1).unflatten(0, (num_views, batch_size))

        return {"z": unit(z), **{f"prediction_{k}": unit(p) for k, p in enumerate(predictions, start=1)}}

    def _patch_keys(self, samples: Samples, num_views: int) -> Tensor:
        """A key int64 [V·B·G·G] for each patch."""
        keys = self.keys_of_views(samples, num_views)
        return fold(keys[:, None], torch.arange(self.side**2, device=keys.device)).flatten()

    def loss(self, embeddings: Embeddings, samples: Samples) -> Losses:
        z = embeddings["z"].flatten(0, 1)
        losses = {}
        for k in range(1, self.config.rows_ahead + 1):
            candidates = z[:, k:].flatten(0, 2)
            own = torch.arange(len(candidates), device=z.device) + distributed.row_offset(len(candidates))
            losses[f"{k}_rows_ahead"] = indexed_nce(
                embeddings[f"prediction_{k}"].flatten(0, 3),
                distributed.gather_with_grad(candidates),
                own,
                temperature=self.config.temperature,
            )
        return {"loss": torch.stack(list(losses.values())).mean(), **losses}

    def report(self, embeddings: Embeddings, *, logged: bool) -> Report:
        cosines = [
            (embeddings[f"prediction_{k}"] * embeddings["z"][:, :, k:]).detach().sum(-1).mean()
            for k in range(1, self.config.rows_ahead + 1)
        ]
        # As one view: what two crops show at one position of their grids are no positives of each other.
        one_view = {"z": embeddings["z"].flatten(0, 1)[None]}
        return {**super().report(one_view, logged=logged), "positive_cosine": torch.stack(cosines).mean()}
