"""Where the images of a packed dataset come from: embedded photographs, CIFAR-10, or a folder of images.

A source is the list of its samples in a fixed order; the same source gives the same list on every machine. Images that
lie in files are read later, one by one, by `packing`, which also chooses the test split where the source has none.
"""

import importlib.util
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from dist_contrastive import rng
from dist_contrastive.config import UserError
from dist_contrastive.data.folders import Layout, Tree, Walk, class_folders, files_of, no_labels, recognise
from dist_contrastive.data.format import TEST, TRAIN, LeftOut
from dist_contrastive.data.spec import read_spec

LAYOUTS: dict[str, Callable[[Tree], Layout]] = {
    "folder": recognise,
    "classes": class_folders,
    "images": no_labels,
}
"""What the sub-folders of DIR stand for, by the source's kind."""

PATCH_SIDE = 32
"""Pixels."""
NUM_PATCHES = {TRAIN: 400, TEST: 100}
"""Patches of each photograph."""
TRAIN_WIDTH = 0.7
"""Training patches come from this left part of a photograph, test patches from the rest."""

PHOTOS = {
    "astronaut": "skimage/data/astronaut.png",
    "chelsea": "skimage/data/chelsea.png",
    "coffee": "skimage/data/coffee.png",
    "hubble_deep_field": "skimage/data/hubble_deep_field.jpg",
    "immunohistochemistry": "skimage/data/ihc.png",
    "retina": "skimage/data/retina.jpg",
    "rocket": "skimage/data/rocket.jpg",
    "brick": "skimage/data/brick.png",
    "grass": "skimage/data/grass.png",
    "gravel": "skimage/data/gravel.png",
    "coins": "skimage/data/coins.png",
    "moon": "skimage/data/moon.png",
    "page": "skimage/data/page.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "text": "skimage/data/text.png",
    "camera": "skimage/data/camera.png",
    "cell": "skimage/data/cell.png",
    "china": "sklearn/datasets/images/china.jpg",
    "flower": "sklearn/datasets/images/flower.jpg",
}
"""Class name to file, within the installed packages. Read by path: `skimage.data` downloads what it does not find."""

CIFAR10_ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
DOWNLOAD_TIMEOUT_S = 60.0
"""The longest wait for the next bytes of a download."""


@dataclass(frozen=True)
class Sample:
    name: str
    """Unique within the source; of a file, its path within the folder."""
    label: int
    """Position of its class; `NO_LABEL` in a source without classes."""
    split: int | None
    """`TRAIN` or `TEST`; None where packing chooses, among the samples that turn out to be images."""
    image: np.ndarray | Path
    """uint8 [H, W, 3], or the file that holds the image."""
    key: str = ""
    """What the choice of the split depends on: the file's path within its class."""


@dataclass(frozen=True)
class Source:
    spec: str
    """As it was given: `photos`, `folder:DIR`, ..."""
    classes: tuple[str, ...]
    """Empty without labels."""
    samples: tuple[Sample, ...]
    split_note: str
    """Where the splits come from, in words."""
    left_out: tuple[LeftOut, ...] = ()
    """What is not among the samples because it is there under another name."""


def open_source(spec: str) -> Source:
    """The source that `spec` names: photos, cifar10, cifar10:DIR, folder:DIR, classes:DIR or images:DIR.

    Raises `UserError` where it is none of these, or its images can't be found.
    """
    kind, folder = read_spec(spec)
    if kind == "photos":
        return open_photos()
    return open_cifar10(spec, folder) if kind == "cifar10" else open_folder(spec, folder, LAYOUTS[kind])


def patch_positions(photo: int, split: int, height: int, width: int) -> np.ndarray:
    """Top left corners (y, x) int64 [`NUM_PATCHES[split]`, 2] of the patches of photograph number `photo`.

    Distinct positions, uniform over all at which a patch lies wholly within the split's part of the photograph: columns
    up to 70 % of its width to train, the others to test. So no test pixel is ever trained on.
    """
    border = int(TRAIN_WIDTH * width)
    left, right = (0, border) if split == TRAIN else (border, width)
    rows, columns = height - PATCH_SIDE + 1, right - left - PATCH_SIDE + 1
    order = rng.permutation(photo, split, rows * columns)[: NUM_PATCHES[split]]
    return np.stack([order // columns, left + order % columns], axis=1)


def open_photos() -> Source:
    """32×32 RGB patches of the photographs that scikit-image and scikit-learn carry; the label is the photograph."""
    photos = [_read_photo(name, place) for name, place in PHOTOS.items()]
    samples = [
        Sample(f"{name} {y},{x}", label, split, photo[y : y + PATCH_SIDE, x : x + PATCH_SIDE])
        for split in (TRAIN, TEST)
        for label, (name, photo) in enumerate(zip(PHOTOS, photos, strict=True))
        for y, x in patch_positions(label, split, *photo.shape[:2])
    ]
    note = f"the left {100 * TRAIN_WIDTH:g} % of each photograph to train, the rest to test"
    return Source("photos", tuple(PHOTOS), tuple(samples), note)


def _read_photo(name: str, place: str) -> np.ndarray:
    """A photograph as uint8 [H, W, 3]; `place` starts with the name of the package that carries it."""
    package, _, within = place.partition("/")
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec is not None else None) or []
    path = next((Path(folder) / within for folder in folders if (Path(folder) / within).is_file()), None)
    if path is None:
        distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
        raise UserError(
            f"the photograph {name} ({place}) is not among the installed packages: "
            f"`pip install --force-reinstall {distribution}`, with the version of constraints.txt"
        )
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def open_cifar10(spec: str, folder: Path) -> Source:
    """CIFAR-10 (Krizhevsky 2009): 50,000 training images and 10,000 test images in the order of torchvision.

    Nothing is downloaded where `folder` has torchvision's files (`cifar-10-batches-py`); otherwise they are fetched
    into it, unless the archive lies there already. Raises `UserError` where that fails or a checksum does not match.
    """
    download = not (folder / CIFAR10.base_folder).is_dir()
    usual_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # torchvision gives none: a silent server would be waited for for ever
    try:
        parts = {split: CIFAR10(folder, train=split == TRAIN, download=download) for split in (TRAIN, TEST)}
    except (OSError, RuntimeError, EOFError) as error:
        if download:
            raise UserError(
                f"CIFAR-10 can't be downloaded into {folder} ({' '.join(str(error).split())}): put {CIFAR10_ARCHIVE} "
                "there and run again, or give folder:DIR with the images in class folders"
            ) from error
        raise UserError(
            f"{folder / CIFAR10.base_folder} is not what torchvision unpacks: remove it to download CIFAR-10 again"
        ) from error
    finally:
        socket.setdefaulttimeout(usual_timeout)
    samples = [
        Sample(f"{('train', 'test')[split]} {index}", label, split, image)
        for split, part in parts.items()
        for index, (image, label) in enumerate(zip(part.data, part.targets, strict=True))
    ]
    return Source(spec, tuple(parts[TRAIN].classes), tuple(samples), "CIFAR-10's own")


def open_folder(spec: str, folder: Path, understand: Callable[[Tree], Layout]) -> Source:
    """The images below `folder`; `understand` says what its sub-folders stand for.

    All files below a class folder count, however deep (hidden ones do not): which of them are images shows when they are
    decoded. Where a folder brings no test split, packing holds a part out.

    Raises `UserError` where what the sub-folders stand for is not clear, or a file has its place in two of them.
    """
    walk = Walk(folder)
    layout = understand(walk.tree)
    parts, left_out = files_of(walk, layout)
    order = {TRAIN: 0, None: 0, TEST: 1}
    parts.sort(key=lambda found: (order[found[0].split], found[0].label))
    samples = [
        Sample(f"{part.tree.name}/{path}".lstrip("/"), part.label, part.split, part.tree.path / path, path)
        for part, paths in parts
        for path in paths
    ]
    return Source(spec, layout.classes, tuple(samples), layout.note, tuple(left_out))
