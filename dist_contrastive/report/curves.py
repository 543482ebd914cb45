"""Pictures of what changed during the run: metrics and scores."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dist_contrastive.report.inputs import RunReport, Section, is_number, series
from dist_contrastive.report.style import BLUE, GREEN, GREY, INK, PURPLE, VERMILION, new_figure


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
    steps, values = series(inputs.metrics, name)
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


def loss(inputs: RunReport) -> tuple[Section, Figure | None]:
    """The training loss."""
    title = "Loss"
    figure, (ax,) = new_figure(3.2)
    if not _curve(ax, inputs, "loss", BLUE):
        return Section("loss", title, missing="the run logged no loss"), None
    ax.set_ylabel("training loss (nats)")
    return Section(
        "loss",
        title,
        "Look for a steep fall at first and a slow one after it. A curve that stays flat from the first step means that "
        "the model only guesses; one that jumps up and stays there means that training broke down, mostly because "
        "the learning rate is too high. The loss alone says little about the features: the probe below does.",
    ), figure


def positive_cosine(inputs: RunReport) -> tuple[Section, Figure | None]:
    """The agreement of views, and the effective rank beside it."""
    title = "Agreement of views, and how many directions the embeddings use"
    figure, (left, right) = new_figure(3.2, columns=2)
    has_cosine = _curve(left, inputs, "positive_cosine", BLUE)
    has_rank = _curve(right, inputs, "effective_rank", PURPLE)
    if not has_cosine and not has_rank:
        return Section("positive_cosine", title, missing="the run logged neither quantity"), None
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
    return Section(
        "positive_cosine",
        title,
        "Left: how alike the embeddings of two views of one image are; 1 is the same direction. It should rise well "
        "above 0 and stay below 1. Right: over how many directions the embeddings spread. A cosine next to 1 together with "
        "an effective rank next to 1 is collapse: every image gets the same embedding, and nothing was learned.",
    ), figure


def learning_rate(inputs: RunReport) -> tuple[Section, Figure | None]:
    """Learning rate and gradient norm."""
    title = "Learning rate and gradient norm"
    figure, (left, right) = new_figure(3.0, columns=2)
    has_rate = _curve(left, inputs, "learning_rate", BLUE, noisy=False)
    has_norm = _curve(right, inputs, "grad_norm", VERMILION)
    if not has_rate and not has_norm:
        return Section("learning_rate", title, missing="the run logged neither quantity"), None
    left.set_title("Learning rate")
    left.set_ylabel("learning rate")
    left.yaxis.set_major_formatter("{x:g}")
    left.set_ylim(bottom=0)
    right.set_title("Gradient norm")
    right.set_ylabel("L2 norm of the whole gradient")
    norms = series(inputs.metrics, "grad_norm")[1]
    # Norms that span decades are read on a logarithmic axis.
    if has_norm and norms.min() > 0 and norms.max() > 30 * norms.min():
        right.set_yscale("log")
    elif has_norm:
        right.set_ylim(bottom=0)
    return Section(
        "learning_rate",
        title,
        "Left: the plan, a warm-up to the peak and a cosine down to zero. Right: the size of the updates' raw material, "
        "before clipping. Single spikes are harmless; a norm that grows step by step announces a breakdown, one that is "
        "practically zero from the start means that no signal reaches the encoder.",
    ), figure


def throughput(inputs: RunReport) -> tuple[Section, Figure | None]:
    """Images a second, and where a step's time goes."""
    title = "Speed"
    figure, (left, right) = new_figure(3.0, columns=2)
    has_rate = _curve(left, inputs, "images_per_s", GREEN)
    has_step = _curve(right, inputs, "step_time_ms", INK)
    if has_step:
        _label_end(right, "whole step", above=True)
    has_wait = _curve(right, inputs, "loader_wait_ms", VERMILION)
    if not has_rate and not has_step and not has_wait:
        return Section("throughput", title, missing="the run logged no times"), None
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
    return Section(
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


def probe(inputs: RunReport) -> tuple[Section, Figure | None]:
    """Scores of the probes beside their baselines."""
    title = "What the features are worth: the probe"
    probe = inputs.probe or {}
    if not is_number(probe.get("linear_top1")) and not is_number(probe.get("knn_top1")):
        return Section("probe", title, missing="the run was not probed"), None
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
        "A simple classifier is trained on the frozen features and tested on images that the run never saw. The blue line "
        "should rise above both dashed lines: above raw pixels, or the encoder is useless, and above the same "
        "network before training, or the training was. A line that falls towards the end means that the features get "
        "worse while the loss still improves.",
    ), figure
