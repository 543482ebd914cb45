"""A run's report: pictures in `plots/` and one page, `report.html`, that needs nothing else.

The page is for somebody who did not watch the run: the scores beside their baselines on top, then the pictures, each
with what to look for and how a failure would look, then the configuration and the machine. Whatever the run lacks (it
had no probe, it logged one line) leaves its section out and the page says so.

Figures are made without pyplot, so nothing of matplotlib's global state is left behind.
"""

import base64
import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from dist_contrastive.atomic import write_atomic
from dist_contrastive.config import flatten

# Colours that stay apart for colour-blind readers: Okabe and Ito (2008), "Color universal design".
BLUE, ORANGE, GREEN, VERMILION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
INK, GREY = "#1f2933", "#6b7280"
# Classes of the map take these in turn, then again with another marker; labels in place do the rest.
CLASS_COLORS = (
    BLUE, ORANGE, GREEN, PURPLE, VERMILION, "#56B4E9", "#8C564B", "#882255", "#999933", "#4B4BA6", "#444444",
)  # fmt: skip
CLASS_MARKERS = ("o", "^", "s")

STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 10, "axes.edgecolor": "#9aa5b1", "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": GREY, "ytick.color": GREY, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e4e7eb", "grid.linewidth": 0.8, "axes.axisbelow": True, "lines.linewidth": 2.0,
    "figure.facecolor": "white", "axes.facecolor": "white", "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08, "figure.constrained_layout.h_pad": 0.08, "savefig.dpi": 150,
}  # fmt: skip
WIDTH = 9.0  # inches; at 150 dots per inch legible where the page shows it 900 pixels wide

MAX_MAP_SAMPLES = 1000  # t-SNE of as many, 500 iterations, takes about 3 s on two cores
MAX_MAP_LABELS = 40
NUM_QUERIES, NUM_NEIGHBOURS, MAX_VIEW_SAMPLES = 8, 8, 8
PLOT_NAMES = (
    "probe", "loss", "positive_cosine", "learning_rate", "throughput", "spectrum", "map", "neighbours", "views",
)  # fmt: skip


@dataclass(frozen=True)
class RunReport:
    """What a report is made of. N samples of the test split, features of size D, images of side S.

    Everything but `run_dir` may be missing (empty or None): its section is left out then, and the page says so.
    """

    run_dir: Path
    """Where `plots/` and `report.html` are written."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The configuration as nested dicts (`config.to_dict`)."""
    metrics: Sequence[Mapping[str, Any]] = ()
    """The lines of metrics.jsonl, in order."""
    probe: Mapping[str, Any] | None = None
    """What probe.json holds."""
    class_names: Sequence[str] = ()
    features: np.ndarray | None = None
    """Features of test samples, float32 [N, D], of the trained encoder."""
    labels: np.ndarray | None = None
    """Their classes, integers [N]."""
    thumbnails: np.ndarray | None = None
    """Their images, uint8 [N, S, S, 3]; [N, S, S] and [N, S, S, 1] are taken for grey."""
    spectrum: np.ndarray | None = None
    """Eigenvalues of the covariance of the trained encoder's features, [D], descending."""
    untrained_spectrum: np.ndarray | None = None
    """The same of the untrained encoder's features."""
    views: np.ndarray | None = None
    """Augmented views of n training samples, uint8 [n, V, S, S, 3]."""
    originals: np.ndarray | None = None
    """The same samples without augmentation, uint8 [n, S, S, 3]."""
    machine: Mapping[str, Any] = field(default_factory=dict)
    """What the run ran on, name -> value, shown in this order. `duration_s` and `images_per_s` also go on top."""


@dataclass(frozen=True)
class _Section:
    """One part of the page: a picture with its caption, or the sentence that says why it is missing."""

    name: str
    title: str
    caption: str = ""
    missing: str = ""


def write_report(inputs: RunReport) -> Path:
    """Write `plots/*.png` and `report.html` into the run's folder and return the page's path.

    Pictures of an earlier report go first, so that what lies in `plots/` belongs to this page. Takes about 10 s on two
    cores, of which the map takes a third.
    """
    plots = inputs.run_dir / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for name in PLOT_NAMES:
        (plots / f"{name}.png").unlink(missing_ok=True)
    sections = []
    with matplotlib.rc_context(STYLE):
        for draw in SECTIONS:
            section, figure = draw(inputs)
            if figure is not None:
                FigureCanvasAgg(figure).print_figure(plots / f"{section.name}.png")
            sections.append(section)
    page = inputs.run_dir / "report.html"
    write_atomic(page, _page(inputs, sections, plots).encode())
    return page


# --- the curves -------------------------------------------------------------------------------------------------------


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric, float64 each, without the lines that lack it or hold no finite number."""
    pairs = [
        (float(line["step"]), float(line[name]))
        for line in metrics
        if _is_number(line.get("step")) and _is_number(line.get(name))
    ]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _smooth(values: np.ndarray) -> np.ndarray:
    """The running median over a tenth of the curve, narrower towards its ends so that they do not bend.

    Unlike the mean it does not spread a single slow step over its neighbours.
    """
    half = min(len(values) // 20, 50)
    smooth = values.copy()
    for reach in range(1, half):
        smooth[reach] = np.median(values[: 2 * reach + 1])
        smooth[-1 - reach] = np.median(values[-2 * reach - 1 :])
    smooth[half : len(values) - half] = np.median(
        np.lib.stride_tricks.sliding_window_view(values, 2 * half + 1), axis=1
    )
    return smooth


def _curve(ax: Axes, inputs: RunReport, name: str, color: str, *, noisy: bool = True) -> bool:
    """Draw one metric against the step: where it is noisy, pale with its running median over it. False if there is none."""
    steps, values = _series(inputs.metrics, name)
    if len(steps) == 0:
        return False
    if len(steps) < 20:
        ax.plot(steps, values, color=color, marker="o", markersize=4)
    elif noisy:
        ax.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
        ax.plot(steps, _smooth(values), color=color)
    else:
        ax.plot(steps, values, color=color)
    ax.set_xlabel("step (optimizer updates)")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return True


def _label_end(ax: Axes, text: str, *, above: bool) -> None:
    """The name of the curve drawn last, beside its right end, instead of a legend."""
    curve = ax.get_lines()[-1]
    x, y = (float(np.asarray(data)[-1]) for data in curve.get_data())
    ax.annotate(
        text, (x, y), (6, 0), textcoords="offset points", va="bottom" if above else "top", color=curve.get_color(),
        fontweight="bold",
    )  # fmt: skip


def _baseline(ax: Axes, value: float, text: str, color: str, *, above: bool) -> None:
    """A horizontal line with its name at the left, above or below it."""
    ax.axhline(value, color=color, linewidth=1.4, linestyle=(0, (5, 3)))
    ax.annotate(
        text, (0.01, value), (0, 3 if above else -3), xycoords=("axes fraction", "data"), textcoords="offset points",
        color=color, va="bottom" if above else "top", fontsize=8.5,
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )  # fmt: skip


def _new_figure(height: float, *, columns: int = 1, width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height))
    return figure, list(np.ravel(figure.subplots(1, columns, squeeze=False)))


def _loss(inputs: RunReport) -> tuple[_Section, Figure | None]:
    title = "Loss"
    figure, (ax,) = _new_figure(3.2)
    if not _curve(ax, inputs, "loss", BLUE):
        return _Section("loss", title, missing="the run logged no loss"), None
    ax.set_ylabel("training loss (nats)")
    return _Section(
        "loss",
        title,
        "Look for a steep fall at first and a slow one after it. A curve that stays flat from the first step means that "
        "the model only guesses; one that jumps up and stays there means that training broke down, mostly because "
        "the learning rate is too high. The loss alone says little about the features: the probe below does.",
    ), figure


def _positive_cosine(inputs: RunReport) -> tuple[_Section, Figure | None]:
    title = "Agreement of views, and how many directions the embeddings use"
    figure, (left, right) = _new_figure(3.2, columns=2)
    has_cosine = _curve(left, inputs, "positive_cosine", BLUE)
    has_rank = _curve(right, inputs, "effective_rank", PURPLE)
    if not has_cosine and not has_rank:
        return _Section("positive_cosine", title, missing="the run logged neither quantity"), None
    left.set_title("Positive cosine")
    left.set_ylabel("cosine of two views of one image")
    right.set_title("Effective rank of the embeddings")
    right.set_ylabel("directions in use")
    for ax, drawn in ((left, has_cosine), (right, has_rank)):
        if not drawn:
            ax.set_axis_off()
            ax.text(0.5, 0.5, "not logged", ha="center", va="center", color=GREY, transform=ax.transAxes)
    if has_cosine:
        left.set_ylim(top=max(1.0, left.get_ylim()[1]))
    if has_rank:
        right.set_ylim(bottom=0)
    return _Section(
        "positive_cosine",
        title,
        "Left: how alike the embeddings of two views of one image are; 1 is the same direction. It should rise well "
        "above 0 and stay below 1. Right: over how many directions the embeddings spread. A cosine next to 1 together with "
        "an effective rank next to 1 is collapse: every image gets the same embedding, and nothing was learned.",
    ), figure


def _learning_rate(inputs: RunReport) -> tuple[_Section, Figure | None]:
    title = "Learning rate and gradient norm"
    figure, (left, right) = _new_figure(3.0, columns=2)
    has_rate = _curve(left, inputs, "learning_rate", BLUE, noisy=False)
    has_norm = _curve(right, inputs, "grad_norm", VERMILION)
    if not has_rate and not has_norm:
        return _Section("learning_rate", title, missing="the run logged neither quantity"), None
    left.set_title("Learning rate")
    left.set_ylabel("learning rate")
    left.yaxis.set_major_formatter("{x:g}")
    left.set_ylim(bottom=0)
    right.set_title("Gradient norm")
    right.set_ylabel("L2 norm of the whole gradient")
    norms = _series(inputs.metrics, "grad_norm")[1]
    # Norms that span decades are read on a logarithmic axis.
    if has_norm and norms.min() > 0 and norms.max() > 30 * norms.min():
        right.set_yscale("log")
    elif has_norm:
        right.set_ylim(bottom=0)
    return _Section(
        "learning_rate",
        title,
        "Left: the plan, a warm-up to the peak and a cosine down to zero. Right: the size of the updates' raw material, "
        "before clipping. Single spikes are harmless; a norm that grows step by step announces a breakdown, one that is "
        "practically zero from the start means that no signal reaches the encoder.",
    ), figure


def _throughput(inputs: RunReport) -> tuple[_Section, Figure | None]:
    title = "Speed"
    figure, (left, right) = _new_figure(3.0, columns=2)
    has_rate = _curve(left, inputs, "images_per_s", GREEN)
    has_step = _curve(right, inputs, "step_time_ms", INK)
    if has_step:
        _label_end(right, "whole step", above=True)
    has_wait = _curve(right, inputs, "loader_wait_ms", VERMILION)
    if not has_rate and not has_step and not has_wait:
        return _Section("throughput", title, missing="the run logged no times"), None
    left.set_title("Throughput, all ranks")
    left.set_ylabel("images / s")
    right.set_title("Where a step's time goes")
    right.set_ylabel("ms")
    for ax, drawn in ((left, has_rate), (right, has_step or has_wait)):
        if drawn:
            ax.set_ylim(0, _headroom(ax))
    if has_wait:
        # Below its line, away from the step's label, unless the line lies on the floor.
        on_floor = float(np.asarray(right.get_lines()[-1].get_ydata())[-1]) < 0.25 * right.get_ylim()[1]
        _label_end(right, "waiting\nfor data", above=on_floor)
    return _Section(
        "throughput",
        title,
        "The waiting line should lie on the floor: then the loader keeps up and the model is what takes the time. Where it "
        "comes near the line of the whole step, the run is starved of data: give the loader more threads or store smaller "
        "images. Dips of the throughput are other work, such as probes and checkpoints, or another program on the machine.",
    ), figure


def _headroom(ax: Axes) -> float:
    """An upper limit that leaves outliers out: the slow first step would squeeze all others onto the floor."""
    curves = [np.asarray(line.get_ydata(), dtype=np.float64) for line in ax.get_lines()]
    highest, typical = np.concatenate(curves).max(), max(np.median(curve) for curve in curves)
    return float(max(1e-9, 1.15 * min(highest, 2.5 * typical)))


# --- the probe --------------------------------------------------------------------------------------------------------


def _probe(inputs: RunReport) -> tuple[_Section, Figure | None]:
    title = "What the features are worth: the probe"
    probe = inputs.probe or {}
    if not _is_number(probe.get("linear_top1")) and not _is_number(probe.get("knn_top1")):
        return _Section("probe", title, missing="the run was not probed"), None
    figure, axes = _new_figure(3.8, columns=2)
    shown: list[float] = []
    for ax, name, title_of_ax in zip(axes, ("linear", "knn"), ("Linear classifier", "Nearest neighbours"), strict=True):
        points = [
            (float(line["epoch"]), float(line[f"{name}_top1"]))
            for line in [*probe.get("history", ()), probe]
            if _is_number(line.get("epoch")) and _is_number(line.get(f"{name}_top1"))
        ]
        points = sorted(dict(points).items())
        if not points and _is_number(probe.get(f"{name}_top1")):
            points = [(0.0, float(probe[f"{name}_top1"]))]  # a probe file that names no epoch
        baselines = [
            (float(probe[key]), text, color)
            for key, text, color in (
                (f"raw_{name}_top1", "raw pixels", GREY),
                (f"init_{name}_top1", "untrained encoder", VERMILION),
            )
            if _is_number(probe.get(key))
        ]
        for value, text, color in baselines:
            # The higher line has its name above it, the lower one below it: so they keep clear of each other.
            highest = value == max(baselines)[0]
            _baseline(ax, value, f"{text} {100 * value:.1f} %", color, above=highest)
            shown.append(value)
        if points:
            epochs, scores = np.array(points).T
            ax.plot(epochs, scores, color=BLUE, marker="o", markersize=5, clip_on=False, zorder=3)
            ax.annotate(
                f"{100 * scores[-1]:.1f} %", (epochs[-1], scores[-1]), (0, 9), textcoords="offset points", ha="right",
                color=BLUE, fontweight="bold", fontsize=11, path_effects=[withStroke(linewidth=3, foreground="white")],
            )  # fmt: skip
            shown.extend(scores)
            last = max(1.0, float(epochs[-1]))
            ax.set_xlim(0, last * 1.03)
        ax.set_title(title_of_ax)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    for ax in axes:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        ax.set_ylim(max(0.0, min(shown) - 0.08), min(1.06, max(shown) + 0.08))
    axes[0].set_ylabel("test images classified right (top-1)")
    return _Section(
        "probe",
        title,
        "A simple classifier is trained on the frozen features and tested on images that the run never saw. The blue line "
        "should rise above both dashed lines: above raw pixels, or the encoder is useless, and above the same "
        "network before training, or the training was. A line that falls towards the end means that the features get "
        "worse while the loss still improves.",
    ), figure


# --- the features -----------------------------------------------------------------------------------------------------


def _effective_rank(eigenvalues: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values, from a covariance's eigenvalues (Roy and Vetterli 2007)."""
    singular = np.sqrt(np.clip(eigenvalues, 0.0, None))
    if singular.sum() == 0:
        return 0.0
    p = singular[singular > 0] / singular.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def _spectrum(inputs: RunReport) -> tuple[_Section, Figure | None]:
    title = "Spectrum of the features"
    figure, (ax,) = _new_figure(3.6)
    floor = 1e-8  # of the total variance: below it is rounding
    drawn = []
    for values, name, color in (
        (inputs.untrained_spectrum, "untrained", VERMILION),
        (inputs.spectrum, "trained", BLUE),
    ):
        if values is None or not np.isfinite(values).all() or np.sum(values) <= 0:
            continue
        shares = np.asarray(values, dtype=np.float64) / np.sum(values)
        visible = np.where(shares > floor, shares, np.nan)
        ax.plot(np.arange(1, len(shares) + 1), visible, color=color, marker="o" if len(shares) < 20 else None)
        drawn.append((visible, f"{name}: effective rank {_effective_rank(shares):.1f} of {len(shares)}", color))
    if not drawn:
        return _Section("spectrum", title, missing="there are no features to take it from"), None
    for row, (_, text, color) in enumerate(reversed(drawn)):
        ax.text(
            0.985, 0.93 - 0.09 * row, text, color=color, transform=ax.transAxes, ha="right", va="center",
            fontweight="bold", path_effects=[withStroke(linewidth=4, foreground="white")],
        )  # fmt: skip
    ax.set_yscale("log")
    ax.set_xlabel("direction, by falling variance")
    ax.set_ylabel("share of the variance")
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _Section(
        "spectrum",
        title,
        "How the variance of the test images' features spreads over their directions. A flat, long curve means that many "
        "directions carry information; training should lift its right part above the untrained encoder's. A curve that "
        "drops to nothing after a few directions is dimensional collapse: the features are redundant.",
    ), figure


def _stratified(labels: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` indices with every class represented as evenly as it can be, sorted, always the same ones."""
    order = np.random.default_rng(0).permutation(len(labels))
    shuffled = labels[order]
    by_class = np.argsort(shuffled, kind="stable")
    counts = np.unique(shuffled, return_counts=True)[1]
    # A sample's rank within its class decides: the first of every class, then the second, ...
    rank_in_class = np.concatenate([np.arange(count) for count in counts]) if len(counts) else np.zeros(0, np.int64)
    chosen = by_class[np.argsort(rank_in_class, kind="stable")[:limit]]
    return np.sort(order[chosen])


def _unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float32; zero rows stay zero."""
    rows = np.asarray(features, dtype=np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _embed_2d(features: np.ndarray) -> np.ndarray:
    """t-SNE of unit features, float32 [N, 2] (van der Maaten and Hinton 2008), started from their principal components."""
    rows = _unit_rows(features)
    rows = rows - rows.mean(0)
    size = min(50, *rows.shape)
    reduced = PCA(size, svd_solver="randomized", random_state=0).fit_transform(rows)
    perplexity = min(30.0, (len(rows) - 1) / 3)
    return TSNE(2, init="pca", perplexity=perplexity, max_iter=500, random_state=0, n_jobs=-1).fit_transform(reduced)


def _map(inputs: RunReport) -> tuple[_Section, Figure | None]:
    title = "Map of the test images"
    features, labels = inputs.features, inputs.labels
    if features is None or labels is None:
        return _Section("map", title, missing="there are no features of test images"), None
    keep = np.flatnonzero(np.isfinite(features).all(1))
    keep = keep[_stratified(np.asarray(labels)[keep], MAX_MAP_SAMPLES)]
    features, labels = features[keep], np.asarray(labels)[keep]
    if len(features) < 8 or features.shape[1] < 2 or float(np.ptp(_unit_rows(features), axis=0).max()) < 1e-6:
        return _Section("map", title, missing="there are too few different features for a map"), None
    points = _embed_2d(features)
    classes = np.unique(labels)
    labelled = len(classes) <= MAX_MAP_LABELS
    figure, (ax,) = _new_figure(6.6)
    texts = []
    for order, label in enumerate(classes):
        members = points[labels == label]
        color = CLASS_COLORS[order % len(CLASS_COLORS)]
        marker = CLASS_MARKERS[order // len(CLASS_COLORS) % len(CLASS_MARKERS)]
        ax.scatter(
            members[:, 0], members[:, 1], s=16, c=color, marker=marker, alpha=0.75, edgecolors="white", linewidths=0.3
        )
        if labelled:
            x, y = _densest_point(members)
            texts.append(
                ax.text(
                    x, y, _shorten(_class_name(inputs, int(label)), 22), color=color, fontsize=9, fontweight="bold",
                    ha="center", va="center", path_effects=[withStroke(linewidth=3.5, foreground="white")],
                )
            )  # fmt: skip
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_aspect("equal", adjustable="datalim")
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    _spread_labels(figure, ax, texts)
    names = (
        "Each name stands where its class is densest." if labelled else f"Colours repeat among {len(classes)} classes."
    )
    return _Section(
        "map",
        title,
        f"{len(points)} test images, laid out by t-SNE so that images with similar features lie together; the colour is "
        f"the class, which training never saw. {names} Look for islands of one colour. One mixed cloud means that the "
        "features do not tell the classes apart; classes that share an island are those that the encoder mixes up. "
        "Axes, distances between islands and their sizes mean nothing.",
    ), figure


def _class_name(inputs: RunReport, label: int) -> str:
    return str(inputs.class_names[label]) if 0 <= label < len(inputs.class_names) else f"class {label}"


def _shorten(text: str, length: int) -> str:
    """One printable line of at most `length` characters. A dollar sign would start a formula in matplotlib."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split()).replace("$", r"\$")
    return line if len(line) <= length else line[: length - 1] + "…"


def _densest_point(points: np.ndarray) -> np.ndarray:
    """The point with the nearest neighbours of its own class: unlike the mean, it lies on an island, not between two."""
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    k = min(len(points), 1 + len(points) // 4)
    return points[np.sort(distances, axis=1)[:, :k].mean(1).argmin()]


def _spread_labels(figure: Figure, ax: Axes, texts: Sequence[Text]) -> None:
    """Move overlapping labels apart, up or down and by as little as a few rounds of pushing need."""
    FigureCanvasAgg(figure).draw()  # places the axes, and gives the texts their sizes
    figure.set_layout_engine("none")
    boxes = np.array([text.get_window_extent().extents for text in texts]).reshape(-1, 4)
    centers, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    moved = centers.copy()
    for _ in range(200):
        clear = True
        for a in range(len(texts)):
            for b in range(a + 1, len(texts)):
                gap = (sizes[a] + sizes[b]) / 2 - np.abs(moved[a] - moved[b])
                if gap[0] > 0 and gap[1] > 0:
                    clear = False
                    push = gap[1] / 2 + 0.5
                    upper, lower = (a, b) if moved[a, 1] >= moved[b, 1] else (b, a)
                    moved[upper, 1] += push
                    moved[lower, 1] -= push
        if clear:
            break
    for text, position in zip(texts, ax.transData.inverted().transform(moved), strict=True):
        text.set_position((float(position[0]), float(position[1])))


# --- pictures of pictures ---------------------------------------------------------------------------------------------


def _as_rgb(images: np.ndarray) -> np.ndarray:
    """uint8 [..., S, S, 3], from images of this kind or grey ones ([..., S, S, 1])."""
    return np.broadcast_to(images, (*images.shape[:-1], 3)) if images.shape[-1] == 1 else images


def _tile(
    ax: Axes, image: np.ndarray, column: float, row: float, *, frame: str = "", text: str = "", color: str = INK
) -> None:
    """Draw one image as the unit square at (column, row), rows counted downwards, with a frame and a line of text below."""
    smooth = "antialiased" if image.shape[0] >= 96 else "nearest"
    ax.imshow(image, extent=(column, column + 1, row + 1, row), interpolation=smooth)
    if frame:
        ax.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=frame, linewidth=3, clip_on=False))
    if text:
        ax.text(column + 0.5, row + 1.05, text, ha="center", va="top", fontsize=7.5, color=color)


def _tile_figure(columns: float, rows: float) -> tuple[Figure, Axes]:
    """A figure whose axes hold square tiles, one unit each, and which is as wide as the others."""
    figure = Figure(figsize=(WIDTH, max(1.0, WIDTH * rows / columns)))
    figure.set_layout_engine("none")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    return figure, ax


def _neighbours(inputs: RunReport) -> tuple[_Section, Figure | None]:
    title = "Test images and their nearest neighbours"
    features, labels, thumbnails = inputs.features, inputs.labels, inputs.thumbnails
    if features is None or labels is None or thumbnails is None or len(features) < 2:
        return _Section(
            "neighbours", title, missing="there are no features and images of at least two test images"
        ), None
    labels = np.asarray(labels)
    images = _as_rgb(thumbnails if thumbnails.ndim == 4 else thumbnails[..., None])
    order = np.random.default_rng(1).permutation(len(labels))
    first_of_class = np.sort(np.unique(labels[order], return_index=True)[1])
    queries = np.concatenate([order[first_of_class], np.delete(order, first_of_class)])[:NUM_QUERIES]
    unit = np.nan_to_num(_unit_rows(features))
    similarity = unit[queries] @ unit.T
    similarity[np.arange(len(queries)), queries] = -np.inf
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, : min(NUM_NEIGHBOURS, len(unit) - 1)]
    pitch, left = 1.28, 0.25
    columns = left + 1.3 + NUM_NEIGHBOURS * 1.08 + 0.1
    figure, ax = _tile_figure(columns, len(queries) * pitch + 0.45)
    ax.set_xlim(0, columns)
    ax.set_ylim(len(queries) * pitch, -0.45)
    ax.text(left, -0.15, "test image", fontweight="bold")
    ax.text(left + 1.3, -0.15, "its neighbours, nearest first", fontweight="bold")
    for row, (query, found) in enumerate(zip(queries, nearest, strict=True)):
        _tile(ax, images[query], left, row * pitch, text=_shorten(_class_name(inputs, int(labels[query])), 13))
        for column, neighbour in enumerate(found):
            right = labels[neighbour] == labels[query]
            color = GREEN if right else VERMILION
            name = _shorten(_class_name(inputs, int(labels[neighbour])), 11)
            _tile(
                ax, images[neighbour], left + 1.3 + 1.08 * column, row * pitch, frame=color, color=color,
                text=f"{'✓' if right else '✗'} {name}",
            )  # fmt: skip
    hits = labels[nearest] == labels[queries][:, None]
    return _Section(
        "neighbours",
        title,
        f"{len(queries)} test images drawn at random, of different classes as far as there are, each with the test images "
        "whose features are most similar to its own (cosine). Green and ✓: the same class; red and ✗: another. "
        f"{100 * hits.mean():.0f} % of those shown are right. Red ones that look alike (colour, texture) are honest "
        "confusions; red ones that look like nothing of the kind say that the features miss the content.",
    ), figure


def _views(inputs: RunReport) -> tuple[_Section, Figure | None]:
    title = "What the encoder is trained on: augmented views"
    if inputs.views is None or inputs.originals is None or len(inputs.views) == 0:
        return _Section("views", title, missing="there are no example views"), None
    views, originals = _as_rgb(inputs.views), _as_rgb(inputs.originals)
    samples, num_views = min(MAX_VIEW_SAMPLES, len(views)), views.shape[1]
    pitch, left = 1.08, 0.95
    columns = left + MAX_VIEW_SAMPLES * pitch + 0.1
    rows = (1 + num_views) * pitch + 0.15
    figure, ax = _tile_figure(columns, rows)
    ax.set_xlim(0, columns)
    ax.set_ylim(rows - 0.05, -0.1)
    for row in range(1 + num_views):
        name = "original" if row == 0 else f"view {row}"
        y = row * pitch + (0.07 if row else 0.0)  # the original stands a little apart
        ax.text(left - 0.1, y + 0.5, name, ha="right", va="center", fontweight="bold" if row == 0 else "normal")
        for column in range(samples):
            _tile(ax, originals[column] if row == 0 else views[column, row - 1], left + column * pitch, y)
    return _Section(
        "views",
        title,
        "The views below one original must get similar embeddings, the views of different originals different ones. You "
        "should still recognise most views. Views that are all alike make the task trivial; views in which nothing is left "
        "of the image make it impossible.",
    ), figure


SECTIONS: tuple[Callable[[RunReport], tuple[_Section, Figure | None]], ...] = (
    _probe, _loss, _positive_cosine, _map, _neighbours, _spectrum, _views, _learning_rate, _throughput,
)  # fmt: skip


# --- the page ---------------------------------------------------------------------------------------------------------

CSS = """
:root { color-scheme: light dark; --page: #f5f7fa; --card: #ffffff; --ink: #1f2933; --dim: #52606d; --line: #d9e2ec;
  --blue: #0067a3; --warn: #fff4e5; --warn-ink: #7a3e00; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --card: #1e242b; --ink: #e4e7eb; --dim: #a3b1bf;
  --line: #36414d; --blue: #6cb8ee; --warn: #3b2a12; --warn-ink: #f7d19b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .8rem; }
p { margin: .5rem 0; }
section, header { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 22px 24px;
  margin: 0 0 20px; }
nav { color: var(--dim); font-size: .9rem; margin-top: 1rem; }
a { color: var(--blue); }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: 6px; padding: 6px; }
figcaption { color: var(--dim); margin-top: .8rem; max-width: 76ch; }
.verdict { font-size: 1.05rem; }
.dim, .missing { color: var(--dim); }
.notice { background: var(--warn); color: var(--warn-ink); border-radius: 6px; padding: .6rem .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
td.value, table.names td:last-child { font-family: ui-monospace, monospace; font-size: .88rem; }
.scores th, .scores td { text-align: right; padding: 8px 14px; font-variant-numeric: tabular-nums; }
.scores th:first-child, .scores td:first-child { text-align: left; padding-left: 0; }
.scores td { font-size: 1.15rem; }
.scores td:first-child { font-size: 1rem; }
.scores .own { font-size: 1.7rem; font-weight: 700; color: var(--blue); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px 20px; margin: 1.2rem 0 0; }
dt { color: var(--dim); font-size: .85rem; }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
details summary { cursor: pointer; font-weight: 600; font-size: 1.15rem; }
details table { margin-top: .8rem; }
@media print { body { background: #fff; font-size: 11pt; } main { max-width: none; padding: 0; } nav { display: none; }
  section, header { border: 0; padding: 0; break-inside: avoid; } }
""".strip()


def _page(inputs: RunReport, sections: Sequence[_Section], plots: Path) -> str:
    """The whole page; whatever comes from outside is escaped here and in `_table`."""
    flat = flatten(inputs.config)
    name = str(flat.get("recipe") or inputs.run_dir.name)
    shown = [section for section in sections if not section.missing]
    left_out = [section for section in sections if section.missing]
    nav = " · ".join(f'<a href="#{section.name}">{html.escape(section.title)}</a>' for section in shown)
    body = [
        f"<header><h1>{html.escape(_headline(flat, name))}</h1>",
        _summary(inputs, flat),
        f"<nav>{nav}</nav>" if nav else "",
        "</header>",
    ]
    for section in shown:
        picture = base64.b64encode((plots / f"{section.name}.png").read_bytes()).decode("ascii")
        body.append(
            f'<section id="{section.name}"><h2>{html.escape(section.title)}</h2><figure>'
            f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{picture}">'
            f"<figcaption>{html.escape(section.caption)}</figcaption></figure></section>"
        )
    if left_out:
        items = "".join(f"<li>{html.escape(s.title)}: {html.escape(s.missing)}.</li>" for s in left_out)
        body.append(f'<section class="missing"><h2>Left out</h2><ul>{items}</ul></section>')
    for title, values in (
        ("Machine", _with_units(inputs.machine)),
        ("Protocol of the probe", flatten((inputs.probe or {}).get("protocol") or {})),
        ("Configuration", flat),
    ):
        if values:
            body.append(f"<section><details open><summary>{title}</summary>{_table(values)}</details></section>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(name)}: report</title><style>\n{CSS}\n</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _headline(flat: Mapping[str, Any], name: str) -> str:
    method, encoder = flat.get("method.name"), flat.get("encoder.name")
    return f"{name}: what {method} taught {encoder}" if method and encoder else name


def _summary(inputs: RunReport, flat: Mapping[str, Any]) -> str:
    """The scores beside their baselines in words and as a table, then the run in a few facts."""
    probe = inputs.probe or {}
    parts = []
    linear, raw, init = (probe.get(key) for key in ("linear_top1", "raw_linear_top1", "init_linear_top1"))
    if _is_number(linear) and _is_number(raw) and _is_number(init):
        text = (
            f"A linear classifier on the frozen features gets {_percent(linear)} of the test images right, where raw pixels "
            f"give {_percent(raw)} and the same network untrained {_percent(init)}."
        )
        parts.append(f'<p class="verdict">{html.escape(text)}</p>')
        if linear <= max(raw, init):
            parts.append(
                '<p class="notice">The training did not pay: the features are no better than a baseline. Look at the loss and at '
                "the agreement of views below for the reason.</p>"
            )
    rows = [
        (label, [probe.get(f"{prefix}{kind}_top1") for prefix in ("", "init_", "raw_")])
        for label, kind in (("Linear classifier", "linear"), (_knn_label(probe), "knn"))
    ]
    rows = [(label, scores) for label, scores in rows if any(_is_number(score) for score in scores)]
    if rows:
        cells = "".join(
            f"<tr><td>{html.escape(label)}</td>"
            + "".join(
                f"<td{' class=own' if column == 0 else ''}>{_percent(score)}</td>"
                for column, score in enumerate(scores)
            )
            + "</tr>"
            for label, scores in rows
        )
        parts.append(
            '<div class="scroll"><table class="scores"><thead><tr><th>Test images classified right</th><th>This run</th>'
            f"<th>Untrained encoder</th><th>Raw pixels</th></tr></thead><tbody>{cells}</tbody></table></div>"
        )
        parts.append(_best(probe))
    else:
        parts.append('<p class="notice">This run was not probed, so there are no scores.</p>')
    facts = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in _facts(inputs, flat).items())
    return "".join(parts) + "<dl>" + facts.replace("<dt>", "<div><dt>").replace("</dd>", "</dd></div>") + "</dl>"


def _knn_label(probe: Mapping[str, Any]) -> str:
    protocol = probe.get("protocol")
    k = protocol.get("knn_k") if isinstance(protocol, Mapping) else None
    return f"Nearest neighbours, k = {k}" if k is not None else "Nearest neighbours"


def _best(probe: Mapping[str, Any]) -> str:
    """The best epoch's score, when it is not the last one's: reported beside it, never instead of it."""
    best = probe.get("best")
    if (
        not isinstance(best, Mapping)
        or not _is_number(best.get("linear_top1"))
        or best.get("epoch") == probe.get("epoch")
    ):
        return ""
    text = f"These are the last epoch's scores. The best linear score was {_percent(best['linear_top1'])}"
    text += f", after epoch {best['epoch']:g}." if _is_number(best.get("epoch")) else "."
    return f'<p class="dim">{html.escape(text)}</p>'


def _facts(inputs: RunReport, flat: Mapping[str, Any]) -> dict[str, str]:
    """The run in a few words, label -> text, without what is not known."""
    facts: dict[str, str] = {}

    def add(label: str, value: Any, text: str = "{}") -> None:
        if value not in (None, ""):
            facts[label] = text.format(value)

    add("Method", flat.get("method.name"))
    add("Encoder", flat.get("encoder.name"))
    add("Dataset", Path(str(flat["data.path"])).name if flat.get("data.path") else None)
    add("Classes", len(inputs.class_names) or None)
    add("Epochs", flat.get("epochs"))
    steps = _series(inputs.metrics, "step")[1]
    add("Steps", int(steps[-1]) if len(steps) else None, "{:,}")
    add("Global batch", flat.get("batch.size"), "{} images")
    add("Ranks", inputs.machine.get("ranks"))
    duration, rate = inputs.machine.get("duration_s"), inputs.machine.get("images_per_s")
    if not _is_number(rate):
        rates = _series(inputs.metrics, "images_per_s")[1]
        rate = float(np.median(rates)) if len(rates) else None
    add("Duration", _duration(float(duration)) if _is_number(duration) else None)
    add("Throughput", rate, "{:,.0f} images/s")
    memory = _series(inputs.metrics, "peak_memory_mib")[1]
    add("Peak memory of a rank", float(memory.max()) if len(memory) else None, "{:,.0f} MiB")
    return facts


def _with_units(machine: Mapping[str, Any]) -> dict[str, Any]:
    """The machine's values as they are read best; names that are not known stay as they came."""
    values = dict(machine)
    if _is_number(values.get("duration_s")):
        values["duration_s"] = _duration(float(values["duration_s"]))
    return {name.removesuffix("_s") if name == "duration_s" else name: value for name, value in values.items()}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _percent(score: Any) -> str:
    return f"{100 * float(score):.1f} %" if _is_number(score) else "–"


def _table(values: Mapping[str, Any]) -> str:
    """Names and values, one row each."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.4g}" if abs(value) >= 1 else f"{value:.4g}"
        if isinstance(value, (list, tuple)):
            return ", ".join(text(item) for item in value)
        return str(value)

    rows = "".join(
        f'<tr><td>{html.escape(str(name))}</td><td class="value">{html.escape(text(value))}</td></tr>'
        for name, value in values.items()
    )
    return f'<div class="scroll"><table class="names"><tbody>{rows}</tbody></table></div>'
