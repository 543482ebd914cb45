"""Pictures of images: nearest neighbours, where an encoder looks, and augmented views."""

import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from dist_contrastive.report.inputs import RunReport, Section, class_name, shorten, spread_over_classes, unit_rows
from dist_contrastive.report.style import GREEN, INK, VERMILION, WIDTH

NUM_QUERIES, NUM_NEIGHBOURS, MAX_VIEW_SAMPLES = 8, 8, 8
MAX_HEADS = 12  # with a picture each: of a ViT-B all; more would be too small to see anything
MIN_BRIGHTEST = 4  # times the even share: so that attention that is nearly even is not drawn as if it looked everywhere
HEAT = 0.7  # how much the colours of attention hide of the image under them


def as_rgb(images: np.ndarray) -> np.ndarray:
    """uint8 [..., S, S, 3], from images of this kind or grey ones ([..., S, S, 1] or [N, S, S])."""
    images = images[..., None] if images.ndim == 3 else images
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


def neighbours(inputs: RunReport) -> tuple[Section, Figure | None]:
    """Images of the test split (or what stands for it) and those nearest to them."""
    title = f"{inputs.samples.capitalize()} and their nearest neighbours"
    features, labels, thumbnails = inputs.features, inputs.labels, inputs.thumbnails
    if features is None or thumbnails is None or len(features) < 2:
        return Section(
            "neighbours", title, missing=f"there are no features and images of at least two {inputs.samples}"
        ), None
    classes = np.zeros(len(features), np.int64) if labels is None else np.asarray(labels)
    images = as_rgb(thumbnails)
    queries = spread_over_classes(classes, NUM_QUERIES)
    unit = np.nan_to_num(unit_rows(features))
    similarity = unit[queries] @ unit.T
    similarity[np.arange(len(queries)), queries] = -np.inf
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, : min(NUM_NEIGHBOURS, len(unit) - 1)]
    pitch, left = 1.08 if labels is None else 1.28, 0.25
    columns = left + 1.3 + NUM_NEIGHBOURS * 1.08 + 0.1
    figure, ax = _tile_figure(columns, len(queries) * pitch + 0.45)
    ax.set_xlim(0, columns)
    ax.set_ylim(len(queries) * pitch, -0.45)
    ax.text(left, -0.15, inputs.samples.removesuffix("s"), fontweight="bold")
    ax.text(left + 1.3, -0.15, "its neighbours, nearest first", fontweight="bold")
    for row, (query, found) in enumerate(zip(queries, nearest, strict=True)):
        name = "" if labels is None else shorten(class_name(inputs, int(classes[query])), 13)
        _tile(ax, images[query], left, row * pitch, text=name)
        for column, neighbour in enumerate(found):
            x = left + 1.3 + 1.08 * column
            if labels is None:
                _tile(ax, images[neighbour], x, row * pitch)
                continue
            right = classes[neighbour] == classes[query]
            color = GREEN if right else VERMILION
            name = shorten(class_name(inputs, int(classes[neighbour])), 11)
            _tile(
                ax, images[neighbour], x, row * pitch, frame=color, color=color, text=f"{'✓' if right else '✗'} {name}"
            )
    if labels is None:
        return Section(
            "neighbours",
            title,
            f"{len(queries)} {inputs.samples} drawn at random, each with those whose features are most similar to its "
            "own (cosine). Neighbours should show the same kind of thing; ones that look like nothing of the kind say "
            "that the features miss the content.",
        ), figure
    hits = classes[nearest] == classes[queries][:, None]
    return Section(
        "neighbours",
        title,
        f"{len(queries)} {inputs.samples} drawn at random, of different classes as far as there are, each with those "
        "whose features are most similar to its own (cosine). Green and ✓: the same class; orange and ✗: another. "
        f"{100 * hits.mean():.0f} % of those shown are right. Orange ones that look alike (colour, texture) are honest "
        "confusions; orange ones that look like nothing of the kind say that the features miss the content.",
    ), figure


def attention(inputs: RunReport) -> tuple[Section, Figure | None] | None:
    """Where the class token of a vision transformer looks (Caron et al. 2021, "DINO", figure 1); None for other encoders."""
    title, seen = "Where the encoder looks", inputs.attention
    if "attention" in inputs.problems:
        return Section("attention", title, missing=inputs.problems["attention"]), None
    if seen is None:
        return None
    if not (np.isfinite(seen.heads).all() and np.isfinite(seen.untrained).all()):
        return Section("attention", title, missing="the encoder's attention is not finite"), None
    num_heads, num_patches = seen.heads.shape[1], seen.heads[0, 0].size
    shown = min(num_heads, MAX_HEADS)
    names = ["image", *(f"head {head}" for head in range(1, shown + 1)), "mean", "untrained"]
    maps = np.concatenate([seen.heads[:, :shown], seen.heads.mean(1, keepdims=True), seen.untrained[:, None]], axis=1)
    brightest = np.maximum(maps.max((1, 2, 3)), MIN_BRIGHTEST / num_patches)
    # Few pictures to an image leave room for two images beside one another.
    blocks = 2 if len(names) <= 8 else 1
    width = 1.05 * len(names) + 0.4
    columns, rows = blocks * width - 0.25, math.ceil(len(maps) / blocks)
    pitch, top = 1.1 + 0.015 * columns, 0.022 * columns  # text does not shrink with the tiles
    figure, ax = _tile_figure(columns, rows * pitch + top)
    ax.set_xlim(0, columns)
    ax.set_ylim(rows * pitch, -top)
    for number, (image, of_image, most) in enumerate(zip(seen.images, maps, brightest, strict=True)):
        x, y = width * (number // rows) + 0.1, pitch * (number % rows)
        tiles = [image, *(_overlay(image, shares / most) for shares in of_image)]
        for column, (name, tile) in enumerate(zip(names, tiles, strict=True)):
            _tile(ax, tile, x + 1.05 * column, y, text="" if column else f"0 to {100 * most:.2g} %")
            if y == 0:
                ax.text(x + 1.05 * column + 0.5, -0.06, name, ha="center", va="bottom", fontsize=7.5, fontweight="bold")
    which = f"the first {shown} of {num_heads} heads" if shown < num_heads else f"each of the {num_heads} heads"
    spread = ", of different classes as far as there are" if inputs.labels is not None else ""
    return Section(
        "attention",
        title,
        f"The attention of the class token over the patches in the encoder's last layer, on {len(maps)} {inputs.samples}"
        f"{spread}: {which}, the mean over all heads, and that of the untrained encoder (Caron et al. 2021, figure 1). Bright "
        "patches are where it looks; the colours beside an image go from 0 to the largest share there, as it says, and "
        f"at least to {MIN_BRIGHTEST} times the {100 / num_patches:.2g} % that each patch has if the attention is spread evenly "
        "(what the class token gives to itself is left out). Heads that pick out the thing in the image, each another part of "
        "it, have learned what belongs together; pictures as even as the untrained ones say that the encoder does not tell its "
        "patches apart.",
    ), figure


def _overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """`image` uint8 [S, S, 3] in grey under the colours of `heat` float [G, G] in [0, 1], a square each; uint8 [S, S, 3]."""
    side = len(image)
    of_pixel = np.arange(side) * len(heat) // side
    colours = matplotlib.colormaps["inferno"](heat[of_pixel][:, of_pixel])[..., :3]
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None] / 255
    return (255 * (HEAT * colours + (1 - HEAT) * grey)).round().astype(np.uint8)


def views(inputs: RunReport) -> tuple[Section, Figure | None]:
    """What augmentation makes of a few images."""
    title = "What the encoder is trained on: augmented views"
    if inputs.originals is None or not inputs.views or len(inputs.originals) == 0:
        return Section("views", title, missing="there are no example views"), None
    originals = as_rgb(inputs.originals)
    views = [view for of_size in inputs.views for view in np.swapaxes(as_rgb(of_size), 0, 1)]
    samples, num_views = min(MAX_VIEW_SAMPLES, len(originals)), len(views)
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
            _tile(ax, originals[column] if row == 0 else views[row - 1][column], left + column * pitch, y)
    aim = (
        "The views of one original, its column, must get similar embeddings, those of different originals different ones."
        if num_views > 1
        else "The view of an original, its column, must get an embedding like its caption's."
    )
    return Section(
        "views",
        title,
        f"{aim} You should still recognise most views. Views that are all alike make the task trivial; views in which nothing is "
        "left of the image make it impossible.",
    ), figure
