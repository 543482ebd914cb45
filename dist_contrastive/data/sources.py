"""Where the images of a packed dataset come from: embedded photographs, CIFAR-10, a folder of images, or pairs with captions.

A source is the list of its samples in a fixed order; the same source gives the same list on every machine. Images that
lie in files are read later, one by one, by `packing`, which also chooses the test split where the source has none.
"""

import importlib.util
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from dist_contrastive import rng
from dist_contrastive.config import UserError, require, user_path
from dist_contrastive.data.folders import (
    TEST_SHARE,
    Layout,
    Role,
    Tree,
    Walk,
    class_folders,
    files_of,
    no_labels,
    recognise,
    split_role,
)
from dist_contrastive.data.format import NO_LABEL, TEST, TRAIN, LeftOut, spoken
from dist_contrastive.data.pairs import Columns, Member, Pair, list_pairs
from dist_contrastive.data.photo_captions import captions_of
from dist_contrastive.data.spec import EMBEDDED_KINDS, read_spec

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

USUAL_COLUMNS = Columns()
HELD_OUT_NOTE = f"{100 * TEST_SHARE:g} % of the pairs held out for test by a hash of the path"
CLASS_PLACE = "{class}"
TEMPLATES = (
    "a photo of a {class}.",
    "a picture of a {class}.",
    "an image of a {class}.",
    "a photo of the {class}.",
    "a {class}.",
)
"""Captions of an image of which only the class is known."""

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
    image: np.ndarray | Path | Member
    """uint8 [H, W, 3], or the file, or the member of a tar, that holds the image."""
    key: str = ""
    """What the choice of the split depends on: the file's path within its class."""
    captions: tuple[str, ...] = ()
    """All samples of a source have some, or none has."""
    where: str = ""
    """Where the source says that this is an image (a row of a table); empty for a file that was only found."""


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
    bad: tuple[LeftOut, ...] = ()
    """What the source lists and lacks something, such as a caption."""
    not_images: Mapping[str, int] = field(default_factory=dict)
    """How many files of each suffix lie beside the images and are none."""


def open_source(spec: str, columns: Columns = USUAL_COLUMNS) -> Source:
    """The source that `spec` names, such as photos, cifar10:DIR, folder:DIR or pairs:FILE; `columns` are those of pairs.

    Raises `UserError` where it is none of these, or its images can't be found.
    """
    kind, folder = read_spec(spec)
    if kind in EMBEDDED_KINDS:
        return open_photos(spec, with_captions=kind == "photo_captions")
    if kind == "pairs":
        return open_pairs(spec, folder, columns)
    return open_cifar10(spec, folder) if kind == "cifar10" else open_folder(spec, folder, LAYOUTS[kind])


def with_templates(source: Source, templates: Sequence[str]) -> Source:
    """`source` with a caption from each of `templates`, in which the class of the image takes the place of `{class}`.

    Raises `UserError` where it has no classes, or captions of its own.
    """
    require(
        len(source.classes) > 1,
        f"--caption-templates: {source.spec} has no classes to name; leave it out, or give labels",
    )
    require(
        not any(sample.captions for sample in source.samples),
        f"--caption-templates: {source.spec} has captions of its own; leave it out",
    )
    names = [spoken(name) for name in source.classes]
    captions = [tuple(template.replace(CLASS_PLACE, name) for template in templates) for name in names]
    return replace(source, samples=tuple(replace(s, captions=captions[s.label]) for s in source.samples))


def read_templates(given: str) -> tuple[str, ...]:
    """The templates of `--caption-templates`: the usual ones (`default`), or those of a file, one a line.

    Raises `UserError` where the file can't be read or one of its lines has no `{class}`.
    """
    if given == "default":
        return TEMPLATES
    try:
        lines = user_path(given).read_bytes().decode().splitlines()
    except OSError as error:
        raise UserError(
            f"--caption-templates {given} can't be read: {error.strerror}; give default or a file"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"--caption-templates {given} is not UTF-8 ({error.reason}); convert it") from error
    templates: dict[str, None] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        require(
            not line or CLASS_PLACE in line,
            f"--caption-templates {given} line {number} has no {CLASS_PLACE}; write a photo of a {CLASS_PLACE}.",
        )
        if line:
            templates[line] = None
    require(
        bool(templates), f"--caption-templates {given} is empty; give one template a line (a photo of a {CLASS_PLACE}.)"
    )
    return tuple(templates)


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


def open_photos(spec: str, *, with_captions: bool) -> Source:
    """32×32 RGB patches of the photographs that scikit-image and scikit-learn carry; the label is the photograph.

    Captions are written from what is measured in the patch and known of its photograph (`photo_captions`).
    """
    photos = [read_photo(name, place) for name, place in PHOTOS.items()]
    samples = []
    for split in (TRAIN, TEST):
        for label, (name, photo) in enumerate(zip(PHOTOS, photos, strict=True)):
            height, width = photo.shape[:2]
            for y, x in patch_positions(label, split, height, width).tolist():
                patch = photo[y : y + PATCH_SIDE, x : x + PATCH_SIDE]
                captions = captions_of(patch, name, y, x, height, width) if with_captions else ()
                samples.append(Sample(f"{name} {y},{x}", label, split, patch, captions=captions))
    note = f"the left {100 * TRAIN_WIDTH:g} % of each photograph to train, the rest to test"
    return Source(spec, tuple(PHOTOS), tuple(samples), note)


def read_photo(name: str, place: str) -> np.ndarray:
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


def open_pairs(spec: str, path: Path, columns: Columns) -> Source:
    """The images and captions of a table or of tar shards. Where it names no splits, packing holds a part out for test.

    Raises `UserError` where it can't be understood; a pair that lacks something is among what is bad.
    """
    listing = list_pairs(path, columns)
    pairs = listing.pairs
    names = {pair.label for pair in pairs if pair.label is not None}
    all_numbers = all(name.isdecimal() for name in names)
    classes = tuple(sorted(names, key=lambda name: (int(name) if all_numbers else 0, name)))
    labels: dict[str | None, int] = {name: label for label, name in enumerate(classes)}
    splits, note = _splits_of(pairs)
    samples = [
        Sample(
            pair.name, labels.get(pair.label, NO_LABEL), splits[pair.split], pair.image, pair.name, tuple(pair.captions),
            pair.where,
        )
        for pair in pairs
        if pair.split in splits
    ]  # fmt: skip
    return Source(spec, classes, tuple(samples), note, bad=tuple(listing.bad), not_images=listing.passed_over)


def _splits_of(pairs: Sequence[Pair]) -> tuple[dict[str | None, int | None], str]:
    """What the names of the splits stand for, without those that are not used, and a note on them."""
    first = {pair.split: pair for pair in reversed(pairs)}
    if not any(first):
        return {None: None}, HELD_OUT_NOTE
    roles = {}
    for name, pair in first.items():
        assert name is not None
        role, rest = split_role(name)
        require(
            role in (Role.TRAIN, Role.VAL, Role.TEST) and not rest,
            f"{pair.where}: its split is {name}; write train, val or test",
        )
        roles[name] = role
    train, test, val = (
        sorted(name for name in roles if roles[name] is role) for role in (Role.TRAIN, Role.TEST, Role.VAL)
    )
    require(
        bool(train), f"{', '.join(sorted(roles))} are all splits that are named, and none is to train on; name it train"
    )
    to_test = test or val
    if not to_test:
        return dict.fromkeys(train, None), HELD_OUT_NOTE
    unused = f"; not used: {', '.join(val)}" if test and val else ""
    note = f"train from {', '.join(train)}, test from {', '.join(to_test)}, as each pair says{unused}"
    return {name: TRAIN if name in train else TEST for name in (*train, *to_test)}, note
