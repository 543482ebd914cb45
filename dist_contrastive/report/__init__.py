"""A run's report: pictures in `plots/` and one page, `report.html`, that needs nothing else.

The page is for somebody who did not watch the run: the scores beside their baselines on top, then the pictures, each
with what to look for and how a failure would look, then when it ran and where its time went, the machine and the
configuration. Whatever the run lacks (it had no probe, it logged one line) or what fails leaves its section out and the page
says so; what a run can't have (attention of a ResNet, captions without a text tower) is not spoken of.

Figures are made without pyplot, so nothing of matplotlib's global state is left behind.
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dist_contrastive import signals
from dist_contrastive.atomic import write_atomic
from dist_contrastive.report.captions import retrieval
from dist_contrastive.report.curves import learning_rate, loss, per_class, positive_cosine, probe, throughput
from dist_contrastive.report.embedding import embedding_map, spectrum
from dist_contrastive.report.images import attention, neighbours, views
from dist_contrastive.report.inputs import RunReport, Section, failure
from dist_contrastive.report.page import build_page
from dist_contrastive.report.style import STYLE
from dist_contrastive.run_folder.names import PLOTS, REPORT

__all__ = ["PLOT_NAMES", "RunReport", "write_report"]

PLOT_NAMES = (
    "probe", "per_class", "loss", "positive_cosine", "learning_rate", "throughput", "spectrum", "map", "neighbours", "attention",
    "views",
)  # fmt: skip
SECTIONS: tuple[Callable[[RunReport], tuple[Section, Figure | None] | None], ...] = (
    probe, per_class, loss, positive_cosine, embedding_map, neighbours, attention, retrieval, spectrum, views, learning_rate,
    throughput,
)  # fmt: skip


def write_report(inputs: RunReport) -> Path:
    """Write `plots/*.png` and `report.html` into the run's folder and return the page's path.

    Pictures of an earlier report go first, so that what lies in `plots/` belongs to this page. Takes about 10 s on two
    cores, of which the map takes a third.
    """
    plots = inputs.run_dir / PLOTS
    plots.mkdir(parents=True, exist_ok=True)
    for name in PLOT_NAMES:
        (plots / f"{name}.png").unlink(missing_ok=True)
    sections = []
    with matplotlib.rc_context(STYLE):
        for draw in SECTIONS:
            signals.give_way()
            try:
                drawn = draw(inputs)
            except Exception as error:  # of any kind: one section is no reason to lose a run that is done
                name = draw.__name__
                drawn = Section(name, name.replace("_", " ").capitalize(), missing=failure(error)), None
            if drawn is None:
                continue
            section, figure = drawn
            if figure is not None:
                FigureCanvasAgg(figure).print_figure(plots / f"{section.name}.png")
            sections.append(section)
    page = inputs.run_dir / REPORT
    write_atomic(page, build_page(inputs, sections, plots).encode())
    return page
