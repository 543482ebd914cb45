"""How the pictures look."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    "agg.path.chunksize": 10_000,  # a curve of a million steps is more than the renderer takes at once
}  # fmt: skip
WIDTH = 9.0  # inches; at 150 dots per inch legible where the page shows it 900 pixels wide


def new_figure(height: float, *, columns: int = 1, width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height))
    return figure, list(np.ravel(figure.subplots(1, columns, squeeze=False)))
