"""A trained run as a module: images in, features and embeddings out."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from dist_contrastive.config import UserError
from dist_contrastive.data.pictures import to_rgb
from dist_contrastive.evaluation.precision import full_precision
from dist_contrastive.methods.image_text import ImageText
from dist_contrastive.run_folder.trained import TrainedRun

BATCH_SIZE = 256
Picture = Image.Image | np.ndarray | Tensor


class Embedder(nn.Module):
    """Encoder and projector of a run, frozen, with the way in which the run's evaluation sees images.

    Images are given as PIL images, or as uint8 arrays or tensors [h, w, 3] or [3, h, w] (one whose last side is 3 is the former);
    of any size, one alone, several in a sequence, or several of one size in one array with an axis more.

    Attributes:
        run: what it is of.
        view: how images are seen.
    """

    def __init__(self, run: TrainedRun) -> None:
        super().__init__()
        self.run, self.view = run, run.view
        self.method = run.method()
        super().train(False)

    @property
    def feature_size(self) -> int:
        """D"""
        return self.method.exported.feature_size

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> "Embedder":
        """It stays as it is: BatchNorm would change with each image otherwise. To train on, start a run with `--from`."""
        return self

    def forward(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Features float32 [n, D]; one image is n = 1."""
        return self.of_squares(self.view.cut(pictures(images)))

    def embed(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Embeddings float32 [n, E], which the run's loss compared; by cosine, as everything here does."""
        return self.embeddings(self(images))

    def of_squares(self, squares: Tensor, batch_size: int = BATCH_SIZE) -> Tensor:
        """Features float32 [n, D] of what `view` has cut, uint8 [n, S, S, 3]; `batch_size` go through the encoder at once."""
        parts = []
        with full_precision(self.device):
            for part in squares.split(batch_size):
                images = self.view.normalized(part, self.device)
                parts.append(self.method.exported(images.contiguous(memory_format=torch.channels_last)).float())
        return torch.cat(parts) if parts else torch.empty(0, self.feature_size, device=self.device)

    def embeddings(self, features: Tensor) -> Tensor:
        """Embeddings float32 [n, E] of features [n, D]."""
        with full_precision(self.device):
            return self.method.embeddings(features)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings float32 [n, E] of `texts`, in the space of the images'; `UserError` where the run has no text tower."""
        method = self.method
        if not isinstance(method, ImageText):
            raise UserError(
                f"{self.run.path} has no text tower: {self.run.config.method.name} learns from images alone"
            )
        tokens, _ = self.run.tokenizer().encode(texts)
        with full_precision(self.device):
            return method.embed_text(torch.from_numpy(tokens).long().to(self.device))


def pictures(images: Picture | Sequence[Picture]) -> list[np.ndarray]:
    """Each image as uint8 [h, w, 3]; `TypeError` or `ValueError` for what is none."""
    if isinstance(images, Image.Image):
        return [_picture(images)]
    if isinstance(images, np.ndarray | Tensor):
        return [_picture(images)] if images.ndim == 3 else [_picture(image) for image in images]
    return [_picture(image) for image in images]


def _picture(image: Picture) -> np.ndarray:
    if isinstance(image, Image.Image):
        return np.asarray(to_rgb(ImageOps.exif_transpose(image), image.format))
    if not isinstance(image, np.ndarray | Tensor):
        raise TypeError(f"an image is a PIL image, an array or a tensor, not {type(image).__name__}")
    values = image.cpu().numpy() if isinstance(image, Tensor) else image
    if values.dtype != np.uint8 or values.ndim != 3 or 3 not in (values.shape[-1], values.shape[0]) or not values.size:
        raise ValueError(f"an image is uint8 [h, w, 3] or [3, h, w], not {values.dtype} {list(values.shape)}")
    return values if values.shape[-1] == 3 else np.moveaxis(values, 0, -1)
