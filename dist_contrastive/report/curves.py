"""Pictures of what changed during the run: metrics, schedules and scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dist_contrastive.report.inputs import RunReport, Section, class_name, is_number, series, shorten
from dist_contrastive.report.style import BLUE, GREEN, GREY, INK, PURPLE, VERMILION, new_figure

MAX_SMOOTH_POINTS = 1000  # of a running median: more than the picture can show
MAX_CLASSES = 40  # with a bar each; of more, the best and the worst


@dataclass(frozen=True)
class Panel:
    """One of the pictures that stand side by side in a figure."""

    title: str
    draw: Callable[[Axes], None]
    text: str
    """Its part of the caption, without a capital at its start: where it stands goes before it."""


def _side_by_side(panels: Sequence[Panel], height: float) -> tuple[Figure, str]:
    """The panels from left to right, and what their captions say of them, each with its place where there are several."""
    figure, axes = new_figure(height, columns=len(panels))
    for ax, panel in zip(axes, panels, strict=True):
        panel.draw(ax)
        ax.set_title(panel.title)
    if len(panels) == 1:
        return figure, panels[0].text[:1].upper() + panels[0].text[1:]
    places = ("Left", "Middle", "Right") if len(panels) == 3 else ("Left", "Right")
    return figure, " ".join(f"{place}: {panel.text}" for place, panel in zip(places, panels, strict=True))


def _smooth(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions and, at them, the running median over a tenth of the curve, narrower towards its ends so that they do not bend.

    Unlike the mean it does not spread a single slow step over its neighbours.
    """
    last = len(values) - 1
    at = np.unique(np.linspace(0, last, min(len(values), MAX_SMOOTH_POINTS)).round().astype(np.int64))
    reach = np.minimum(len(values) // 20, np.minimum(at, last - at))
    return at, np.array([np.median(values[a - r : a + r + 1]) for a, r in zip(at, reach, strict=True)])


def _curve(ax: Axes, inputs: RunReport, name: str, color: str) -> Line2D:
    """Draw one metric against the step, pale with its running median over it; few points as what they are. The line to name."""
    steps, values = series(inputs.metrics, name)
    if len(steps) < 20:
        (line,) = ax.plot(steps, values, color=color, marker="o", markersize=4)
    else:
        ax.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
        at, smooth = _smooth(values)
        (line,) = ax.plot(steps[at], smooth, color=color)
    _step_axis(ax)
    return line


def _schedule(ax: Axes, values: Sequence[float], color: str) -> None:
    """Draw what each update was to use, from the first."""
    ax.plot(np.arange(1, len(values) + 1), values, color=color, marker="o" if len(values) < 20 else None, markersize=4)
    _step_axis(ax)


def _step_axis(ax: Axes) -> None:
    ax.set_xlabel("step (optimizer updates)")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    low, high = ax.get_xlim()
    if high - low < 1:  # a single step, which else gets fractions of steps beside it
        ax.set_xlim(low - 0.5, high + 0.5)


def _height(ax: Axes, low: float, high: float) -> None:
    """Let the axis show low to high with a little room beyond, so that no point is cut in half at an edge."""
    span = (high - low) or 1.0
    ax.set_ylim(low - 0.02 * span, high + 0.06 * span)


def _has(inputs: RunReport, name: str) -> bool:
    return len(series(inputs.metrics, name)[0]) > 0


def _end(curve: Line2D) -> tuple[float, float]:
    """The last point of a curve that is within its axis."""
    x, y = (np.asarray(data, dtype=np.float64) for data in curve.get_data())
    last = np.flatnonzero(np.isfinite(y))[-1]
    return float(x[last]), float(y[last])


def _label_end(ax: Axes, curve: Line2D, text: str, *, above: bool) -> None:
    """The name of a curve, beside its right end, instead of a legend."""
    ax.annotate(
        text, _end(curve), (6, 0), textcoords="offset points", va="bottom" if above else "top", color=curve.get_color(),
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


def loss(inputs: RunReport) -> tuple[Section, Figure | None]:
    """The training loss of each step."""
    title = "Loss"
    if not _has(inputs, "loss"):
        return Section("loss", title, missing="the run logged no loss"), None
    figure, (ax,) = new_figure(3.2)
    _curve(ax, inputs, "loss", BLUE)
    ax.set_ylabel("training loss")
    return Section(
        "loss",
        title,
        "Look for a steep fall at first and a slow one after it. A curve that stays flat from the first step means that "
        "the model only guesses; one that jumps up and stays there means that training broke down, mostly because "
        "the learning rate is too high. The loss alone says little about the features: the probe [[probe]] does.",
    ), figure


def positive_cosine(inputs: RunReport) -> tuple[Section, Figure | None]:
    """The agreement of views, and the effective rank beside it."""
    title = "Agreement of views, and how many directions the embeddings use"

    def draw_cosine(ax: Axes) -> None:
        _curve(ax, inputs, "positive_cosine", BLUE)
        ax.set_ylabel("cosine of a positive pair")
        _height(ax, ax.dataLim.y0, max(1.0, ax.dataLim.y1))

    def draw_rank(ax: Axes) -> None:
        _curve(ax, inputs, "effective_rank", PURPLE)
        ax.set_ylabel("directions in use")
        _height(ax, 0.0, ax.dataLim.y1)

    panels = []
    if _has(inputs, "positive_cosine"):
        text = (
            "how alike the embeddings of a positive pair are (two views of an image, or an image and its caption); 1 is the "
            "same direction. It should rise well above 0 and stay below 1."
        )
        panels.append(Panel("Positive cosine", draw_cosine, text))
    if _has(inputs, "effective_rank"):
        text = "over how many directions the embeddings spread."
        panels.append(Panel("Effective rank of the embeddings", draw_rank, text))
    if not panels:
        return Section("positive_cosine", title, missing="the run logged neither quantity"), None
    figure, text = _side_by_side(panels, 3.2)
    return Section(
        "positive_cosine",
        title,
        f"{text} A cosine next to 1 together with an effective rank next to 1 is collapse: every image gets the same "
        "embedding, and nothing was learned.",
    ), figure


def learning_rate(inputs: RunReport) -> tuple[Section, Figure | None]:
    """The schedules as they were planned, and the gradient norm of each step."""
    title = "Learning rate and gradient norm"
    rates, momenta = (inputs.schedules.get(name, ()) for name in ("learning_rate", "teacher_momentum"))

    def draw_rate(ax: Axes) -> None:
        _schedule(ax, rates, BLUE)
        ax.set_ylabel("learning rate")
        ax.yaxis.set_major_formatter("{x:g}")
        _height(ax, 0.0, max(rates))

    def draw_momentum(ax: Axes) -> None:
        _schedule(ax, momenta, PURPLE)
        ax.set_ylabel("part of itself it keeps a step")
        ax.yaxis.set_major_formatter("{x:g}")

    def draw_norm(ax: Axes) -> None:
        _curve(ax, inputs, "grad_norm", VERMILION)
        ax.set_ylabel("L2 norm of the whole gradient")
        norms = series(inputs.metrics, "grad_norm")[1]
        # Norms that span decades are read on a logarithmic axis.
        if norms.min() > 0 and norms.max() > 30 * norms.min():
            ax.set_yscale("log")
        else:
            _height(ax, 0.0, max(1e-9, norms.max()))

    panels = []
    if len(rates):
        rise = "a warm-up to the peak and " if np.argmax(rates) > 0 else ""
        panels.append(Panel("Learning rate", draw_rate, f"the plan, {rise}a cosine down to zero."))
    if len(momenta):
        text = "how slowly the teacher follows: at 1 it stands still."
        panels.append(Panel("Momentum of the teacher", draw_momentum, text))
    if _has(inputs, "grad_norm"):
        text = (
            "the size of the updates' raw material, before clipping. Single spikes are harmless; a norm that grows step by step "
            "announces a breakdown, one that is practically zero from the start means that no signal reaches the encoder."
        )
        panels.append(Panel("Gradient norm", draw_norm, text))
    if not panels:
        return Section("learning_rate", title, missing="the run logged neither quantity"), None
    figure, text = _side_by_side(panels, 3.0)
    return Section("learning_rate", title, text), figure


def throughput(inputs: RunReport) -> tuple[Section, Figure | None]:
    """Images a second, and where a step's time goes."""
    title = "Speed"
    cut = []

    def draw_rate(ax: Axes) -> None:
        _curve(ax, inputs, "images_per_s", GREEN)
        ax.set_ylabel("images / s")
        cut.append(_limit(ax, "images/s"))

    def draw_times(ax: Axes) -> None:
        step = _curve(ax, inputs, "step_time_ms", INK) if has_step else None
        wait = _curve(ax, inputs, "loader_wait_ms", VERMILION) if has_wait else None
        ax.set_ylabel("ms")
        cut.append(_limit(ax, "ms"))
        if step:
            _label_end(ax, step, "whole step", above=True)
        if wait:
            # Below its line, away from the step's label, unless the line lies on the floor.
            on_floor = _end(wait)[1] < 0.25 * ax.get_ylim()[1]
            _label_end(ax, wait, "waiting\nfor data", above=on_floor)

    has_step, has_wait = _has(inputs, "step_time_ms"), _has(inputs, "loader_wait_ms")
    panels = []
    if _has(inputs, "images_per_s"):
        text = "dips are work outside the steps or another program on the machine."
        panels.append(Panel("Throughput, all ranks", draw_rate, text))
    if has_step or has_wait:
        text = (
            "the waiting line should lie on the floor: then the loader keeps up and the model is what takes the time. Where it "
            "comes near the line of the whole step, the run is starved of data: give the loader more threads or store "
            "smaller images."
        )
        panels.append(Panel("Where a step's time goes", draw_times, text))
    if not panels:
        return Section("throughput", title, missing="the run logged no times"), None
    figure, text = _side_by_side(panels, 3.0)
    if any(cut):
        text += " A triangle at the upper edge stands for a value beyond it, mostly of the first step, which compiles."
    return Section("throughput", title, text), figure


def _limit(ax: Axes, unit: str) -> bool:
    """Let the axis start at 0 and leave outliers out, at most a tenth, which would squeeze everything else onto the floor: a
    mark at the edge stands for each of them, and a number for the highest. Whether there are any."""
    curves = list(ax.get_lines())
    values = [np.asarray(curve.get_ydata(), dtype=np.float64) for curve in curves]
    usual = max(max(2.5 * np.median(v), np.quantile(v, 0.9, method="lower")) for v in values)
    top = max(1e-9, min(np.concatenate(values).max(), usual))
    _height(ax, 0.0, top)
    edge, levels = ax.get_xaxis_transform(), dict[str, float]()
    highest = (0.0, 0.0, "")
    for curve, heights in zip(curves, values, strict=True):
        beyond = heights > top
        if not beyond.any():
            continue
        steps, color = np.asarray(curve.get_xdata(), dtype=np.float64), str(curve.get_color())
        level = levels.setdefault(color, 0.98 - 0.07 * len(levels))
        ax.plot(steps[beyond], np.full(beyond.sum(), level), "^", markersize=6, color=color, transform=edge)
        curve.set_ydata(np.where(beyond, np.nan, heights))
        highest = max(highest, (float(heights.max()), float(steps[heights.argmax()]), color))
    height, step, color = highest
    if not color:
        return False
    left = step < np.mean(ax.get_xlim())
    ax.annotate(
        f"{height:,.0f} {unit}", (step, levels[color]), (8 if left else -8, 0), xycoords=edge, textcoords="offset points",
        va="center", ha="left" if left else "right", color=color, fontsize=8.5, zorder=4,
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )  # fmt: skip
    return True


def probe(inputs: RunReport) -> tuple[Section, Figure | None]:
    """Scores of the probes beside their baselines."""
    title = "What the features are worth: the probe"
    probe = inputs.probe or {}
    if not is_number(probe.get("linear_top1")) and not is_number(probe.get("knn_top1")):
        return Section(
            "probe",
            title,
            missing="the dataset has no labels, which the classifiers need" if probe else "the run was not probed",
        ), None
    figure, axes = new_figure(3.8, columns=2)
    shown: list[float] = []
    for ax, name, title_of_ax in zip(axes, ("linear", "knn"), ("Linear classifier", "Nearest neighbours"), strict=True):
        points = [
            (float(line["epoch"]), float(line[f"{name}_top1"]))
            for line in [*probe.get("history", ()), probe]
            if is_number(line.get("epoch")) and is_number(line.get(f"{name}_top1"))
        ]
        points = sorted(dict(points).items())
        if not points and is_number(probe.get(f"{name}_top1")):
            points = [(0.0, float(probe[f"{name}_top1"]))]  # a probe file that names no epoch
        baselines = [
            (float(probe[key]), text, color)
            for key, text, color in (
                (f"raw_{name}_top1", "raw pixels", GREY),
                (f"init_{name}_top1", "untrained encoder", VERMILION),
            )
            if is_number(probe.get(key))
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
    return Section(
        "probe",
        title,
        "A simple classifier is trained on the frozen features and tested on images that the run never saw. Blue should end "
        "above both dashed lines: above raw pixels, or the encoder is useless, and above the same network before "
        "training, or the training was. A line that falls towards the end means that the features get worse while the loss "
        "still improves.",
    ), figure


def per_class(inputs: RunReport) -> tuple[Section, Figure | None]:
    """The accuracy of each class, or of the best and the worst of many."""
    title = "Which classes the features tell apart"
    probe = inputs.probe or {}
    scores = {name: _class_scores(probe.get(f"{name}_per_class")) for name in ("linear", "knn")}
    main = scores["linear"] or scores["knn"]
    if not main:
        return Section("per_class", title, missing="the probe has no scores of single classes"), None
    order = sorted(main, key=lambda label: (-main[label], label))
    is_part = len(order) > MAX_CLASSES
    shown = [*order[: MAX_CLASSES // 2], *order[-MAX_CLASSES // 2 :]] if is_part else order
    figure, (ax,) = new_figure(0.9 + 0.21 * len(shown))
    # A gap of one row between the best and the worst.
    rows = np.arange(len(shown)) + (np.arange(len(shown)) >= MAX_CLASSES // 2 if is_part else 0)
    if scores["linear"]:
        ax.barh(rows, [scores["linear"].get(label, 0.0) for label in shown], height=0.7, color=BLUE)
    if scores["knn"]:
        points = [scores["knn"].get(label, np.nan) for label in shown]
        ax.plot(points, rows, color=VERMILION, marker="o", markersize=5, linestyle="none", clip_on=False, zorder=3)
    ax.set_yticks(rows, [shorten(class_name(inputs, label), 28) for label in shown])
    ax.set_ylim(rows[-1] + 0.7, -0.7)
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    ax.set_xlabel("test images of the class classified right")
    ax.grid(axis="y", visible=False)
    which = (
        f"The {MAX_CLASSES // 2} best and the {MAX_CLASSES // 2} worst of {len(order)} classes"
        if is_part
        else "Classes"
    )
    marks = [
        text
        for name, text in (
            ("linear", "blue bars are the linear classifier's"),
            ("knn", "orange points those of the neighbours"),
        )
        if scores[name]
    ]
    return Section(
        "per_class",
        title,
        f"{which}, the best first; {', '.join(marks)}. A class at the bottom is one that the encoder mixes up with others: the "
        "map [[map]] shows with which.",
    ), figure


def _class_scores(values: object) -> dict[int, float]:
    """Scores by class; without those that have none, as no test image is of them."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        return {}
    return {label: float(value) for label, value in enumerate(values) if is_number(value)}
