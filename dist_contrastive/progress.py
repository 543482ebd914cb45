"""What a person sees of a run: a live line on rank 0, or a plain line an epoch where there is no terminal; the bar of other
commands."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

WARM_UP_STEPS = 3
"""First steps of a process, which compile and fill caches: they tell nothing of the time that is left."""
TIMED_STEPS = 5
"""How many steps after them the time left is taken from at least."""


@contextmanager
def bar(what: str, *, visible: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Within the context, what is given shows how many are done, of how many, and the time left; where there is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (visible and console.is_terminal)) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class TrainingProgress:
    """A context manager around the training loop; silent on ranks other than 0."""

    def __init__(self, total_steps: int, done_steps: int, epochs: int, *, visible: bool) -> None:
        self._console = Console()
        self._epochs = epochs
        self._visible = visible
        self._live = visible and self._console.is_terminal
        self._last_epoch = -1
        self._total_steps = total_steps
        self._last_step_at = time.monotonic()
        self._num_steps = 0
        self._step_seconds: deque[float] = deque(maxlen=100)
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=done_steps, epoch="", numbers="", left="")

    def __enter__(self) -> "TrainingProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, step: int, epoch: int, values: dict[str, float] | None) -> None:
        """`step` updates are done, the last in `epoch` (from 0); `values` are its metrics where it was logged."""
        now = time.monotonic()
        self._num_steps += 1
        if self._num_steps > WARM_UP_STEPS:
            self._step_seconds.append(now - self._last_step_at)
        self._last_step_at = now
        left = self._time_left(step)
        self._progress.update(self._task, completed=step, epoch=f"{epoch + 1}/{self._epochs}", left=left)
        if values is None:
            return
        numbers = f"loss {values['loss']:.3f}  {values['images_per_s']:,.0f} images/s"
        self._progress.update(self._task, numbers=numbers)
        if self._visible and not self._live and epoch != self._last_epoch:
            parts = [f"epoch {epoch + 1}/{self._epochs}, step {step}: {numbers}", *([left] if left else [])]
            print(", ".join(parts), flush=True)
            self._last_epoch = epoch

    def _time_left(self, step: int) -> str:
        """Of training alone: the median leaves out the pauses for probes and checkpoints. Empty before enough was timed."""
        if len(self._step_seconds) < TIMED_STEPS:
            return ""
        minutes, seconds = divmod(round(statistics.median(self._step_seconds) * (self._total_steps - step)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes:02d} min left" if hours else f"{minutes} min {seconds:02d} s left"

    def say(self, text: str) -> None:
        """Print a line above the live one."""
        if self._visible:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


NAMES = {
    "linear_top1": "linear", "knn_top1": "kNN", "alignment": "alignment", "uniformity": "uniformity",
    "effective_rank": "effective rank", "zero_shot_top1": "zero-shot",
    **{f"{name}_recall_at_{k}": f"recall@{k} of {name}s" for name in ("text", "image") for k in (1, 5, 10)},
}  # fmt: skip
"""What scores are called, in the order in which they are shown."""


def describe_scores(scores: Mapping[str, Any]) -> str:
    """The scores of one probe in a line."""
    return ", ".join(f"{text} {scores[name]:.3f}" for name, text in NAMES.items() if name in scores)


def print_scores(probe: Mapping[str, Any]) -> None:
    """The scores of a probe.json beside their baselines, as a table; linear and kNN are fractions classified right (top-1)."""
    table = Table(title="scores on the test images", title_justify="left")
    columns = {"this run": "", "untrained encoder": "init_", "raw pixels": "raw_", "chance": "chance_"}
    shown = {name: text for name, text in NAMES.items() if name in probe}
    columns = {heading: prefix for heading, prefix in columns.items() if any(prefix + name in probe for name in shown)}
    for heading in ("", *columns):
        table.add_column(heading, justify="left" if not heading else "right")
    k = probe["protocol"].get("knn_k")
    for name, text in shown.items():
        values = [probe.get(f"{prefix}{name}") for prefix in columns.values()]
        label = f"{text}, k = {k}" if name == "knn_top1" else text
        table.add_row(label, *("" if value is None else f"{value:.3f}" for value in values))
    Console().print(table)
