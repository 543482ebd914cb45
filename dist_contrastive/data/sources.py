"""Where the images of a packed dataset come from: embedded photographs, CIFAR-10, or a folder of class folders.

A source is the list of its samples in a fixed order, training samples first; the same source gives the same list on
every machine. Images that lie in files are read later, one by one, by `packing`.
"""

import hashlib
import importlib.util
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from dist_contrastive import rng
from dist_contrastive.config import UserError, require
from dist_contrastive.data.format import TEST, TRAIN
from dist_contrastive.data.spec import read_spec

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

TEST_SHARE = 0.15
"""Part of each class that becomes the test split of a folder without one."""


@dataclass(frozen=True)
class Sample:
    name: str
    """Unique within the source; of a file, its path within the folder."""
    label: int
    split: int
    """`TRAIN` or `TEST`"""
    image: np.ndarray | Path
    """uint8 [H, W, 3], or the file that holds the image."""


@dataclass(frozen=True)
class Source:
    spec: str
    """As it was given: `photos`, `folder:DIR`, ..."""
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]


def open_source(spec: str) -> Source:
    """The source that `spec` names: photos, cifar10, cifar10:DIR or folder:DIR.

    Raises `UserError` where it is none of these, or its images can't be found.
    """
    kind, folder = read_spec(spec)
    if kind == "photos":
        return open_photos()
    return open_cifar10(spec, folder) if kind == "cifar10" else open_folder(spec, folder)


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
    return Source("photos", tuple(PHOTOS), tuple(samples))


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
    return Source(spec, tuple(parts[TRAIN].classes), tuple(samples))


def open_folder(spec: str, folder: Path) -> Source:
    """Class folders of images: DIR/<class>/..., or DIR/train/<class>/... beside DIR/test/<class>/... or DIR/val/<class>/...

    A class is a folder's name; the classes are the sorted union over both splits. All files below a class folder count,
    however deep (hidden ones do not). Of test and val, test is taken where it has class folders. Where there is neither,
    `TEST_SHARE` of each class is set aside (at least one image of a class that has two), chosen by a hash of the file's
    path within the class: the choice changes neither with the machine nor with other classes.

    Raises `UserError` where there are fewer than two classes or an empty one.
    """
    names = [entry.name for entry in _entries(folder) if entry.is_dir()]
    has_split = "train" in names and ("test" in names or "val" in names or names == ["train"])
    train_files = _class_files(folder / "train" if has_split else folder)
    test_files: dict[str, list[str]] = {}
    for name in ("test", "val") if has_split else ():
        if not test_files and name in names:
            test_files = _class_files(folder / name)
            test_folder = name
    classes = tuple(sorted({*train_files, *test_files}))
    where = folder / "train" if has_split else folder
    require(bool(train_files), f"{where} has no class folders; put the images into {where}/<class>/")
    require(len(classes) > 1, f"{where} has one class only ({classes[0]}); a dataset needs two class folders or more")
    for name in classes:
        require(
            bool(train_files.get(name) or test_files.get(name)),
            f"{where / name} holds no images; fill it or remove it",
        )

    prefixes = {TRAIN: "train/" if has_split else "", TEST: f"{test_folder}/" if test_files else ""}
    files = {TRAIN: train_files, TEST: test_files}
    if not test_files:
        prefixes[TEST] = prefixes[TRAIN]
        held_out = {name: _held_out(paths) for name, paths in train_files.items()}
        files = {
            TRAIN: {
                name: [path for path in paths if path not in held_out[name]] for name, paths in train_files.items()
            },
            TEST: {name: [path for path in paths if path in held_out[name]] for name, paths in train_files.items()},
        }
    samples = [
        Sample(f"{prefixes[split]}{name}/{path}", label, split, folder / prefixes[split] / name / path)
        for split in (TRAIN, TEST)
        for label, name in enumerate(classes)
        for path in files[split].get(name, [])
    ]
    return Source(spec, classes, tuple(samples))


def _held_out(paths: list[str]) -> set[str]:
    """The files of one class that make up its test split."""
    num_test = min(max(1, round(TEST_SHARE * len(paths))), len(paths) - 1)
    return set(sorted(paths, key=lambda path: hashlib.sha256(os.fsencode(path)).digest())[:num_test])


def _class_files(folder: Path) -> dict[str, list[str]]:
    """Each class folder's name with the sorted paths (relative, POSIX) of the files below it."""
    found = {}
    for entry in _entries(folder):
        if entry.is_dir():
            top = folder / entry.name
            found[entry.name] = sorted(path.relative_to(top).as_posix() for path in _files(top, set()))
    return found


def _files(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """The regular files below `folder`; links are followed, folders in `seen` (device, inode) are not read again."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _files(folder / entry.name, seen)
        elif entry.is_file() or entry.is_symlink():  # a dangling link is listed as unreadable; no pipes, no devices
            yield folder / entry.name


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in `folder`, by name, without hidden entries and what macOS packs beside the files."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]
    except OSError as error:
        raise UserError(f"{folder} can't be listed: {error.strerror}") from error
    return sorted(found, key=lambda entry: entry.name)
