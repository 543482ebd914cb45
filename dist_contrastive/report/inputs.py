"""What a report is made of, and how its sections read it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np


@dataclass(frozen=True)
class Attention:
    """Where an encoder's class token looks in n images of side S, over G × G patches and through H heads."""

    images: np.ndarray
    """uint8 [n, S, S, 3]: what the encoder sees, before it is normalized"""
    heads: np.ndarray
    """float32 [n, H, G, G]: of what a head gives to patches, the share of each; sums to 1"""
    untrained: np.ndarray
    """float32 [n, G, G]: the same of the untrained encoder, as the mean over its heads"""


@dataclass(frozen=True)
class FoundCaption:
    """A caption as an image finds it."""

    text: str
    cosine: float
    """Of the two embeddings."""
    place: int
    """1 where no caption is nearer."""


@dataclass(frozen=True)
class ImageSearch:
    """The captions that one image finds."""

    image: int
    """Its position among `RunReport.samples`."""
    own: Sequence[FoundCaption]
    """All of its own, the nearest first."""
    nearest: Sequence[FoundCaption]


@dataclass(frozen=True)
class CaptionSearch:
    """The images that one caption finds."""

    text: str
    nearest: Sequence[tuple[int, float, bool]]
    """Position among `RunReport.samples`, cosine of the embeddings, and whether the caption is one of that image's own."""


@dataclass(frozen=True)
class Retrieval:
    """What image tower and text tower find of each other for some examples."""

    num_images: int
    """Among how many images, those of `RunReport.samples`."""
    num_captions: int
    """Among how many captions: theirs, each text once."""
    images: Sequence[ImageSearch]
    captions: Sequence[CaptionSearch]


@dataclass(frozen=True)
class RunReport:
    """What a report is made of. N samples of a split, features of size D, images of side S.

    Everything but `run_dir` may be missing (empty or None): its section is left out then, and the page says so.
    """

    run_dir: Path
    """Where `plots/` and `report.html` are written."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The configuration as nested dicts (`config.to_dict`)."""
    metrics: Sequence[Mapping[str, Any]] = ()
    """The lines of metrics.jsonl, in order."""
    schedules: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """What each update of the whole run was to use, from the first: `learning_rate`, `teacher_momentum`."""
    probe: Mapping[str, Any] | None = None
    """What probe.json holds."""
    learns_from_labels: bool = False
    """Whether the loss reads the labels."""
    class_names: Sequence[str] = ()
    samples: str = "test images"
    """What the features are of: test images, or training images where the dataset has no others."""
    num_in_split: int = 0
    """How many of them the dataset has; `samples` are all of these or a part drawn at random."""
    features: np.ndarray | None = None
    """Features of `samples`, float32 [N, D], of the trained encoder."""
    labels: np.ndarray | None = None
    """Their classes, integers [N]; None where the dataset has no labels."""
    thumbnails: np.ndarray | None = None
    """Their images, uint8 [N, S, S, 3]; [N, S, S] and [N, S, S, 1] are taken for grey."""
    spectrum: np.ndarray | None = None
    """Eigenvalues of the covariance of the trained encoder's features, [D], descending."""
    untrained_spectrum: np.ndarray | None = None
    """The same of the untrained encoder's features."""
    attention: Attention | None = None
    """Of some of `samples`; None where the encoder has no class token that attends to patches."""
    retrieval: Retrieval | None = None
    """None where there is no text tower."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """Why the inputs of a section, by its name, are missing although the run should have them."""
    views: Sequence[np.ndarray] = ()
    """Augmented views of n training samples, uint8 [n, V, S, S, 3] for each size."""
    originals: np.ndarray | None = None
    """The same samples without augmentation, uint8 [n, S, S, 3]."""
    machine: Mapping[str, Any] = field(default_factory=dict)
    """What the run ran on, name -> value, shown in this order."""
    starts: Sequence[Mapping[str, Any]] = ()
    """When it was started and each time resumed: after which `step`, and at what `time`."""
    seconds: Callable[[], Mapping[str, float]] = dict
    """Where its time went up to the call: seconds by part, all of them together its duration. Asked when the pictures, which
    take long, are drawn."""


@dataclass(frozen=True)
class Section:
    """One part of the page: a picture or a table with its caption, or the sentence that says why it is missing."""

    name: str
    title: str
    caption: str = ""
    """` [[name]]` in it becomes a link that says where the section `name` stands: above or below; nothing if it is left out."""
    missing: str = ""
    table: str = ""
    """What stands in the place of a picture, as HTML, in which whatever comes from outside is escaped."""


def failure(error: Exception) -> str:
    """Why something is missing, where that is no lack of the run's."""
    return f"it failed ({type(error).__name__}: {one_line(str(error), 200)})"


def series(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric, float64 each, without the lines that lack it or hold no finite number."""
    pairs = [
        (float(line["step"]), float(line[name]))
        for line in metrics
        if is_number(line.get("step")) and is_number(line.get(name))
    ]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float32; zero rows stay zero."""
    rows = np.asarray(features, dtype=np.float64)  # in which no square of a float32 is lost
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1.0)).astype(np.float32)


def class_name(inputs: RunReport, label: int) -> str:
    return str(inputs.class_names[label]) if 0 <= label < len(inputs.class_names) else f"class {label}"


def spread_over_classes(labels: np.ndarray, count: int) -> np.ndarray:
    """Positions int64 of `count` samples with `labels` [N] (fewer where there are no more), of different classes as far as
    there are, always the same ones: sections that show examples show the same."""
    order = np.random.default_rng(1).permutation(len(labels))
    first_of_class = np.sort(np.unique(labels[order], return_index=True)[1])
    return np.concatenate([order[first_of_class], np.delete(order, first_of_class)])[:count]


def one_line(text: str, length: int) -> str:
    """One printable line of at most `length` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def shorten(text: str, length: int) -> str:
    """`one_line` for matplotlib, in which a dollar sign would start a formula."""
    return one_line(text, length).replace("$", r"\$")
