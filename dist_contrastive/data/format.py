"""What a packed dataset is, as far as it is known without opening it: its splits, its manifest, how it is packed."""

import hashlib
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
MAX_TOKENS = 32
VOCABULARY = 8192
FEWEST_TOKENS = 3
"""Start, end and one between them."""
SMALLEST_VOCABULARY = 512
"""Twice the bytes, which a tokenizer knows in any case."""
LARGEST_SIDE = 65500
"""Pixels: libjpeg's limit."""


def manifest_path(path: Path) -> Path:
    """Where the manifest of the packed dataset `path` lies."""
    return path.with_name(path.name + ".json")


def captions_path(path: Path) -> Path:
    """Where the captions of the packed dataset `path` lie, if it has any."""
    return path.with_name(path.name + ".captions")


def spoken(name: str) -> str:
    """The name of a class as captions and prompts say it."""
    return name.replace("_", " ")


@dataclass(frozen=True)
class LeftOut:
    """Something of the source that is not in the dataset: a bad image, or what is there under another name."""

    name: str
    """Its path, or its name within the source."""
    reason: str


@dataclass(frozen=True)
class CaptionsEntry:
    """What the file of captions beside a packed dataset should be."""

    num_captions: int
    vocabulary_size: int
    """Token ids are below it."""
    max_tokens: int
    """Token ids of each caption: start, end and padding included."""
    num_cut: int
    """How many captions were longer and lost their end."""
    num_bytes: int
    sha256: str
    """Of the whole file, in hexadecimal."""


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
    captions: CaptionsEntry | None = None
    """None where the images have no captions."""

    @property
    def total_bytes(self) -> int:
        """Of the dataset's files without this manifest."""
        return self.num_bytes + (self.captions.num_bytes if self.captions else 0)

    @property
    def identity(self) -> str:
        """What tells the dataset from others, in hexadecimal: the checksum of the images and, if there are any, captions."""
        if self.captions is None:
            return self.sha256
        return hashlib.sha256(bytes.fromhex(self.sha256 + self.captions.sha256)).hexdigest()

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
            if data.get("captions") is not None:
                data["captions"] = CaptionsEntry(**data["captions"])
            manifest = Manifest(**data)
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a manifest that pack wrote; {again}") from error
        for part in (manifest, manifest.captions):
            for item in fields(part) if part is not None else ():
                if item.type is int:
                    value = getattr(part, item.name)
                    require(type(value) is int and value >= 0, f"{path}: {item.name} is {value!r}; {again}")
        return manifest


def pack_again(path: Path) -> str:
    """What to do where the packed dataset `path` is not what it should be."""
    return f"pack it again: {PACK_COMMAND.replace('OUT.beton', str(path))}"


def find_manifest(path: Path) -> Manifest:
    """The manifest of the packed dataset `path`.

    Raises `UserError` where one of its files is missing or unreadable, or their sizes don't match.
    """
    try:
        require(
            path.is_file(), f"no packed dataset at {path}; write one: {PACK_COMMAND.replace('OUT.beton', str(path))}"
        )
        beside = manifest_path(path)
        require(beside.is_file(), f"{path} has no manifest ({beside.name}), it may be incomplete; {pack_again(path)}")
        manifest = Manifest.read(beside)
        files = {path: manifest.num_bytes}
        if manifest.captions is not None:
            files[captions_path(path)] = manifest.captions.num_bytes
        for file, expected in files.items():
            require(file.is_file(), f"{path} has captions, and their file {file.name} is missing; {pack_again(path)}")
            found = file.stat().st_size
            require(
                found == expected,
                f"{file} has {found} bytes, its manifest says {expected}: truncated or replaced; {pack_again(path)}",
            )
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    return manifest
