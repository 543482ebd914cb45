"""Pictures of the features: their spectrum and a map of them."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from dist_contrastive.losses.statistics import effective_rank_of_spectrum
from dist_contrastive.report.inputs import RunReport, Section, class_name, shorten, unit_rows
from dist_contrastive.report.style import BLUE, CLASS_COLORS, CLASS_MARKERS, VERMILION, new_figure

MAX_MAP_SAMPLES = 1000  # t-SNE of as many, 500 iterations, takes about 3 s on two cores
MAX_MAP_LABELS = 40


def spectrum(inputs: RunReport) -> tuple[Section, Figure | None]:
    """The spectrum of the features' covariance, trained and untrained."""
    title = "Spectrum of the features"
    figure, (ax,) = new_figure(3.6)
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
        effective_rank = effective_rank_of_spectrum(torch.from_numpy(np.clip(shares, 0.0, None)))
        drawn.append((visible, f"{name}: effective rank {effective_rank:.1f} of {len(shares)}", color))
    if not drawn:
        return Section("spectrum", title, missing="there are no features to take it from"), None
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
    return Section(
        "spectrum",
        title,
        f"How the variance of the {inputs.samples}' features spreads over their directions. A flat, long curve means that many "
        "directions carry information; training should lift its right part above the untrained encoder's. A curve that "
        "drops to nothing after a few directions is dimensional collapse: the features are redundant. The effective ranks here "
        "are without the features' mean, and so are not the score of that name, which counts the mean as a direction.",
    ), figure


def _stratified(labels: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` indices with every class represented as evenly as it can be, sorted, always the same ones."""
    order = np.random.default_rng(0).permutation(len(labels))
    shuffled = labels[order]
    by_class = np.argsort(shuffled, kind="stable")
    counts = np.unique(shuffled, return_counts=True)[1]
    # A sample's place within its class decides: the first of every class, then the second, ...
    place_in_class = np.concatenate([np.arange(count) for count in counts]) if len(counts) else np.zeros(0, np.int64)
    chosen = by_class[np.argsort(place_in_class, kind="stable")[:limit]]
    return np.sort(order[chosen])


def _embed_2d(features: np.ndarray) -> np.ndarray:
    """t-SNE of unit features, float32 [N, 2] (van der Maaten and Hinton 2008), started from their principal components."""
    rows = unit_rows(features)
    rows = rows - rows.mean(0)
    size = min(50, *rows.shape)
    reduced = PCA(size, svd_solver="randomized", random_state=0).fit_transform(rows)
    perplexity = min(30.0, (len(rows) - 1) / 3)
    return TSNE(2, init="pca", perplexity=perplexity, max_iter=500, random_state=0, n_jobs=-1).fit_transform(reduced)


def embedding_map(inputs: RunReport) -> tuple[Section, Figure | None]:
    """Images of the test split (or what stands for it) laid out by their features."""
    title = f"Map of the {inputs.samples}"
    features, labels = inputs.features, inputs.labels
    if features is None:
        return Section("map", title, missing=f"there are no features of {inputs.samples}"), None
    has_labels = labels is not None
    labels = np.zeros(len(features), np.int64) if labels is None else np.asarray(labels)
    keep = np.flatnonzero(np.isfinite(features).all(1))
    keep = keep[_stratified(labels[keep], MAX_MAP_SAMPLES)]
    features, labels = features[keep], labels[keep]
    if len(features) < 8 or features.shape[1] < 2 or float(np.ptp(unit_rows(features), axis=0).max()) < 1e-6:
        return Section("map", title, missing="there are too few different features for a map"), None
    points = _embed_2d(features)
    classes = np.unique(labels)
    labelled = has_labels and len(classes) <= MAX_MAP_LABELS
    figure, (ax,) = new_figure(6.6)
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
                    x, y, shorten(class_name(inputs, int(label)), 22), color=color, fontsize=9, fontweight="bold",
                    ha="center", va="center", path_effects=[withStroke(linewidth=3.5, foreground="white")],
                )
            )  # fmt: skip
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_aspect("equal", adjustable="datalim")
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    _spread_labels(figure, ax, texts)
    layout = f"{len(points)} {inputs.samples}, laid out by t-SNE so that images with similar features lie together"
    meaningless = "Axes, distances between islands and their sizes mean nothing."
    if not has_labels:
        return Section(
            "map",
            title,
            f"{layout}. Look for islands; one even cloud means that the features put nothing apart. {meaningless}",
        ), figure
    names = (
        "Each name stands where its class is densest." if labelled else f"Colours repeat among {len(classes)} classes."
    )
    seen = "which training saw, too" if inputs.learns_from_labels else "which training never saw"
    return Section(
        "map",
        title,
        f"{layout}; the colour is the class, {seen}. {names} Look for islands of one colour. One mixed cloud means that the "
        "features do not tell the classes apart; classes that share an island are those that the encoder mixes up. "
        f"{meaningless}",
    ), figure


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
