"""What an encoder sees of an image where nothing is random: the centred square, resized and normalized."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_contrastive.config import AugmentConfig, DataConfig
from dist_contrastive.data.beton import Images, require_ffcv
from dist_contrastive.data.crops import crop_samples, make_scratch


@dataclass(frozen=True)
class EvalView:
    """How images are seen in evaluation and use."""

    size: int
    """S: pixels a side of what the encoder sees."""
    crop: float
    """The side of the centred square, as a fraction of the image's shorter side."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Of each channel, of pixels from 0 to 1."""

    @classmethod
    def of(cls, data: DataConfig, augment: AugmentConfig) -> "EvalView":
        return cls(data.image_size, data.eval_crop, augment.mean, augment.std)

    def boxes(self, images: Images, samples: np.ndarray) -> np.ndarray:
        """The centred squares of `samples` int64 [b]: top, left, height, width in pixels, int64 [1, b, 4]."""
        heights, widths = images.heights[samples].astype(np.int64), images.widths[samples].astype(np.int64)
        sides = np.maximum(1, np.rint(self.crop * np.minimum(heights, widths))).astype(np.int64)
        return np.stack([(heights - sides) // 2, (widths - sides) // 2, sides, sides], axis=-1)[None]

    def cut(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """The squares uint8 [n, S, S, 3] of n `pictures` uint8 [h, w, 3] of any sizes, pixel by pixel as the loader cuts them."""
        require_ffcv()
        for picture in pictures:
            is_picture = picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.size
            assert is_picture, f"a picture is uint8 [h, w, 3], this is {picture.dtype} {list(picture.shape)}"
        out = np.empty((len(pictures), self.size, self.size, 3), np.uint8)
        if pictures:
            images, samples = Images.raw(pictures), np.arange(len(pictures))
            crop_samples(
                images.file_bytes, images.pointers, images.sizes, images.is_jpeg, images.heights, images.widths,
                samples, self.boxes(images, samples), out.reshape(-1), np.zeros(1, np.int64), np.array([self.size]), 0,
                make_scratch(images, (self.size,)),
            )  # fmt: skip
        return torch.from_numpy(out)

    def normalized(self, squares: Tensor, device: torch.device) -> Tensor:
        """What the encoder takes of `squares` uint8 [..., S, S, 3]: float32 [..., 3, S, S] on `device`, channels last."""
        scale = torch.tensor([1 / (255 * std) for std in self.std], device=device)
        shift = torch.tensor([-mean / std for mean, std in zip(self.mean, self.std, strict=True)], device=device)
        return torch.addcmul(shift, squares.to(device, non_blocking=True).float(), scale).movedim(-1, -3)

    def displayable(self, views: Tensor) -> Tensor:
        """The pictures uint8 [..., S, S, 3] of normalized `views` float [..., 3, S, S]."""
        mean, std = (torch.tensor(values, device=views.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (views.float() * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)
