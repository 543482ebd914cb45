"""Small packed datasets for tests, written through `BetonWriter` and `Manifest` alone, and pictures to put into them."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dist_contrastive.batch import Share
from dist_contrastive.config import AugmentConfig, DataConfig
from dist_contrastive.data.beton import BetonWriter, Dataset
from dist_contrastive.data.captions import CaptionOptions, write_captions
from dist_contrastive.data.format import NO_LABEL, TEST, TRAIN, Manifest, captions_path, manifest_path
from dist_contrastive.data.loader import Loader


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """A photograph-like image uint8 [height, width, 3]: smooth colours with some grain."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return np.clip(smooth + generator.integers(-12, 13, (height, width, 3)), 0, 255).astype(np.uint8)


def jpeg(image: np.ndarray, quality: int = 90) -> bytes:
    """`image` uint8 [H, W, 3] as a JPEG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=quality)
    return file.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """What Pillow makes of a JPEG: uint8 [H, W, 3]."""
    return np.array(Image.open(io.BytesIO(data)))


def write_beton(
    path: Path,
    images: Sequence[np.ndarray | bytes],
    *,
    num_test: int = 0,
    num_classes: int = 3,
    captions: CaptionOptions | None = None,
) -> Path:
    """Write `images`, arrays uint8 [H, W, 3] (stored raw) or JPEGs, and their manifest; returns `path`.

    The label of sample i is i modulo `num_classes` (0: no labels); the last `num_test` samples are the test split. With options
    for them, every image has two captions.
    """
    shapes = []
    with open(path, "wb") as file:
        writer = BetonWriter(file, len(images))
        for index, image in enumerate(images):
            split = TEST if index >= len(images) - num_test else TRAIN
            if isinstance(image, bytes):
                data, is_jpeg = image, True
                width, height = Image.open(io.BytesIO(image)).size
            else:
                data, is_jpeg = image.tobytes(), False
                height, width = image.shape[:2]
            label = index % num_classes if num_classes else NO_LABEL
            writer.add(data, is_jpeg=is_jpeg, height=height, width=width, label=label, split=split)
            shapes.append((height, width))
        writer.finish()
    heights, widths = zip(*shapes, strict=True)
    content = path.read_bytes()
    entry = None
    if captions:
        texts = [[f"{index} of {index % 3}", f"sample {index}"] for index in range(len(images))]
        entry = write_captions(captions_path(path), texts, np.arange(len(images) - num_test), captions, None)
    manifest = Manifest(
        num_samples=len(images),
        num_train=len(images) - num_test,
        num_test=num_test,
        classes=tuple(f"class {label}" for label in range(num_classes)),
        num_jpeg=sum(isinstance(image, bytes) for image in images),
        smallest_width=min(widths),
        largest_width=max(widths),
        smallest_height=min(heights),
        largest_height=max(heights),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        source="tests",
        left_out=(),
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        captions=entry,
    )
    manifest_path(path).write_text(manifest.to_json(), encoding="utf-8")
    return path


def open_loader(
    dataset: Dataset,
    data: DataConfig,
    augment: AugmentConfig | None = None,
    *,
    seed: int = 0,
    share: Share | None = None,
    threads: int = 1,
) -> Loader:
    """Of one rank, which takes one sample an update."""
    return Loader(dataset, data, augment or AugmentConfig(), seed=seed, share=share or Share(1), threads=threads)
