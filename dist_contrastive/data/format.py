"""What a packed dataset is, as far as it is known without opening it: its splits, its manifest, how it is packed."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from dist_contrastive.config import UserError, require

TRAIN, TEST = 0, 1
"""Values of the field `split`."""

NO_LABEL = -1
"""The label of every sample of a dataset without classes."""

FORMAT = 1
"""The manifest's format; a file of another one has to be packed again."""

PACK_COMMAND = "python -m dist_contrastive.pack SOURCE OUT.beton"

# What pack does unless told otherwise.
QUALITY = 90
MAX_SIDE = 512
MAX_BAD = 100
LARGEST_SIDE = 65500
"""Pixels: libjpeg's limit."""


def manifest_path(path: Path) -> Path:
    """Where the manifest of the packed dataset `path` lies."""
    return path.with_name(path.name + ".json")


@dataclass(frozen=True)
class LeftOut:
    """Something of the source that is not in the dataset: a bad image, or what is there under another name."""

    name: str
    """Its path, or its name within the source."""
    reason: str


@dataclass(frozen=True)
class Manifest:
    """What a packed dataset should be; written last, so that a dataset with a manifest is complete."""

    num_samples: int
    num_train: int
    num_test: int
    classes: tuple[str, ...]
    """Names of the classes; a label is a position here. Empty where the samples have no labels."""
    num_jpeg: int
    """How many samples are JPEGs; the others are raw RGB."""
    smallest_width: int
    largest_width: int
    smallest_height: int
    largest_height: int
    mean: tuple[float, float, float]
    """Of each channel over all pixels of the training split (of all samples where there is none), in [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation of each channel over the same pixels, in units of the full range."""
    source: str
    """Where the images came from, as it was given to pack."""
    left_out: tuple[LeftOut, ...]
    num_bytes: int
    sha256: str
    """Of the whole `.beton`, in hexadecimal."""
    format: int = FORMAT
    split: str = ""
    """Where the splits come from, in words; empty in a manifest of an older version."""
    not_images: dict[str, int] = field(default_factory=dict)
    """How many files of each suffix lay beside the images and are none."""

    @property
    def has_labels(self) -> bool:
        """Whether the labels tell samples apart: one class is as good as none."""
        return len(self.classes) > 1

    def describe_labels(self) -> str:
        """What to say of a dataset whose labels tell nothing apart."""
        return f"has one class only ({self.classes[0]})" if self.classes else "has no labels"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @staticmethod
    def read(path: Path) -> "Manifest":
        """Read the manifest file `path`; raises `UserError` where it is not one that this version writes."""
        again = f"pack the dataset again: {PACK_COMMAND}"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found = data["format"]
            require(found == FORMAT, f"{path} has format {found}, this version reads format {FORMAT}; {again}")
            data["left_out"] = tuple(LeftOut(**entry) for entry in data["left_out"])
            for name in ("classes", "mean", "std"):
                data[name] = tuple(data[name])
            manifest = Manifest(**data)
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a manifest that pack wrote; {again}") from error
        for item in fields(Manifest):
            if item.type is int:
                value = getattr(manifest, item.name)
                require(type(value) is int and value >= 0, f"{path}: {item.name} is {value!r}; {again}")
        return manifest


def pack_again(path: Path) -> str:
    """What to do where the packed dataset `path` is not what it should be."""
    return f"pack it again: {PACK_COMMAND.replace('OUT.beton', str(path))}"


def find_manifest(path: Path) -> Manifest:
    """The manifest of the packed dataset `path`.

    Raises `UserError` where one of the two files is missing or unreadable, or their sizes don't match.
    """
    try:
        require(
            path.is_file(), f"no packed dataset at {path}; write one: {PACK_COMMAND.replace('OUT.beton', str(path))}"
        )
        beside = manifest_path(path)
        require(beside.is_file(), f"{path} has no manifest ({beside.name}), it may be incomplete; {pack_again(path)}")
        manifest = Manifest.read(beside)
        num_bytes = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    require(
        num_bytes == manifest.num_bytes,
        f"{path} has {num_bytes} bytes, its manifest says {manifest.num_bytes}: truncated or replaced; {pack_again(path)}",
    )
    return manifest
