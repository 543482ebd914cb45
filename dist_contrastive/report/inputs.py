"""What a report is made of, and how its sections read it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np


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
    """One part of the page: a picture with its caption, or the sentence that says why it is missing."""

    name: str
    title: str
    caption: str = ""
    """` [[name]]` in it becomes a link that says where the section `name` stands: above or below; nothing if it is left out."""
    missing: str = ""


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
