"""What benchmarks share: their options, how contenders take turns, statistics, and the record that each leaves.

A benchmark is a module `benchmarks/NAME.py` with a dataclass `Command` (of `Options` or `Turns`) and a `main(argv)` that calls
`begin`, measures, hands every repetition to the record (`Record.add`) and ends with `Record.write`.
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar, cast

import psutil
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from dist_contrastive import distributed
from dist_contrastive.atomic import write_atomic
from dist_contrastive.cli import parse, speaks_for_host
from dist_contrastive.config import UserError, require
from dist_contrastive.launch import source_commit
from dist_contrastive.preflight import PRECISIONS, device_for_use, launched_ranks
from dist_contrastive.report.style import BLUE, CLASS_COLORS, GREY, STYLE, WIDTH, new_figure
from dist_contrastive.simulate import Precision

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "records"
PACKAGES = ("torch", "numpy", "dist_contrastive")
"""Whose versions each record has, beside Python's."""
MAKERS = {"nvidia", "amd", "tesla", "geforce", "quadro", "instinct"}
Kind = Literal["measured", "simulated", "projected"]
"""Measured: timed or counted on this machine. Simulated: counted on tensors without values. Projected: computed from others."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every benchmark takes."""

    out: Path | None = None
    """Folder of the record; without one, its place in benchmarks/records, named by date, hardware and theme."""


@dataclass(frozen=True, kw_only=True)
class Turns(Options):
    """Of benchmarks whose contenders take turns."""

    rounds: int = 5
    """How often each contender is measured; they take turns, and the order rotates."""
    minutes: float = 0.0
    """Begin no round and no case once so many minutes are over; 0: measure all."""

    def __post_init__(self) -> None:
        at_least(self, 1, "rounds")
        require(self.minutes >= 0, f"--minutes {self.minutes:g}: give 0 (no limit) or more")


C = TypeVar("C", bound=Options)


def at_least(command: Options, least: float, *names: str) -> None:
    """`UserError` where an option of `command` is below `least`; of a tuple, any of its numbers."""
    for name in names:
        value = getattr(command, name)
        for number in value if isinstance(value, tuple) else (value,):
            require(number >= least, f"--{name.replace('_', '-')} {number:g}: give at least {least:g}")


def choose_device(asked: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of this rank; `UserError` where a GPU is asked for and there is none."""
    if device_for_use(asked) == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def choose_precision(asked: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """What `auto` stands for: what `accelerate launch` was told, if anything; else 16 bits on a GPU, bf16 where it has that, and
    fp32 on processors."""
    if asked != "auto":
        return asked
    launched = PRECISIONS.get(os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), "fp32")
    if launched != "fp32" or device.type == "cpu":
        return cast(Precision, launched)
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def hardware(device: torch.device) -> dict[str, Any]:
    """What numbers are measured on; the load average tells whether the machine was idle."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    found = {
        "system": platform.platform(),
        "cpu": models[0] if models else platform.processor(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average_1min": os.getloadavg()[0],
        "device": device.type,
        "ranks": launched_ranks(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    return found


def short_name(machine: Mapping[str, Any]) -> str:
    """The machine in the name of a record: `2cpu`, `t4`, `8xh100`."""
    if machine["device"] == "cpu":
        return f"{machine['usable_cores']}cpu"
    words = [word for word in re.split(r"[^a-z0-9]+", machine["gpu"].lower()) if word and word not in MAKERS]
    # A series and its number are two words: RTX 4090.
    name = "".join(words[:2]) if len(words) > 1 and not re.search(r"\d", words[0]) else words[0]
    return name if machine["ranks"] == 1 else f"{machine['ranks']}x{name}"


class Spread(NamedTuple):
    """Of the repetitions of one number."""

    median: float
    low: float
    high: float
    num: int

    def format(self, digits: int = 3) -> str:
        """`median (low to high)`; the median alone where all are equal."""
        if self.low == self.high:
            return number(self.median, digits)
        return f"{number(self.median, digits)} ({number(self.low, digits)} to {number(self.high, digits)})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values), len(values))


def ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Round by round, so that what slows down a whole round is in both."""
    return [value / other for value, other in zip(values, reference, strict=True)]


def number(value: float, digits: int = 3) -> str:
    """With so many digits, no power of ten from 0.001 up, and commas between thousands."""
    if value == 0 or not 1e-3 <= abs(value) < 10**15:
        return f"{value:.{digits}g}"
    decimals = digits - 1 - int(f"{abs(value):.{digits - 1}e}".partition("e")[2])
    return f"{round(value, decimals):,.{max(0, decimals)}f}"


class Budget:
    """The time that a benchmark may take, from now on.

    All ranks ask together and get one answer.
    """

    def __init__(self, minutes: float) -> None:
        self._deadline = time.monotonic() + 60 * minutes if minutes else float("inf")

    def is_over(self) -> bool:
        return distributed.any_rank(time.monotonic() > self._deadline)


def take_turns(
    contenders: Mapping[str, Callable[[], T]], rounds: int, *, warmup: int = 1, budget: Budget | None = None
) -> dict[str, list[T]]:
    """What each contender returns in each round: all of them once a round, in an order that rotates, so that a noisy neighbour
    and what a contender leaves behind meet them all.

    `warmup` rounds come first and are forgotten. Rounds after the first are left out once the `budget` is over.
    """
    names = list(contenders)
    found: dict[str, list[T]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        if turn > 0 and budget is not None and budget.is_over():
            break
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            result = contenders[name]()
            if turn >= 0:
                found[name].append(result)
    return found


def wait_for_device(device: torch.device) -> None:
    """Until it has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, *, at_least_s: float = 0.0) -> float:
    """Seconds of one call, the device's work included; of several in a row, as many as fill `at_least_s`, their mean."""
    calls = 0
    wait_for_device(device)
    begin = time.perf_counter()
    while True:
        # Twice as many each time: a GPU is waited for seldom.
        for _ in range(max(1, calls)):
            call()
            calls += 1
        wait_for_device(device)
        took = time.perf_counter() - begin
        if took >= at_least_s:
            return took / calls


def timed_turns(
    contenders: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    *,
    at_least_s: float,
    at_most_s: float,
    budget: Budget | None = None,
) -> dict[str, list[float]]:
    """Seconds of each contender's call in each round, in turns; calls that are short are repeated (`seconds`).

    As many of the `rounds` as fit into `at_most_s`, after one that warms up. Where not even two do, the first is all there is.
    """
    calls = {name: partial(seconds, call, device, at_least_s=at_least_s) for name, call in contenders.items()}
    begin = time.monotonic()
    first = take_turns(calls, 1, warmup=0)
    took = time.monotonic() - begin
    if took > at_most_s / 2:
        return first
    return take_turns(calls, min(rounds, int(at_most_s / took) - 1), warmup=0, budget=budget)


class Peak:
    """Within the context: how far the anonymous memory (what no file gives back) of this process rose, with all that its own
    processes have to themselves; `mb` afterwards, in MB. On any device, memory of the host alone."""

    CHILDREN_EVERY = 25
    """Looks at this process for one look at its processes, which takes longer."""

    def __enter__(self) -> Self:
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._base = self._top = self._own() + self._childrens()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.mb = (max(self._top, self._own() + self._childrens()) - self._base) / 1e6

    def _own(self) -> int:
        memory = self._process.memory_info()
        return int(memory.rss - memory.shared)

    def _childrens(self) -> int:
        total = 0
        for child in self._process.children(recursive=True):
            with suppress(psutil.Error):
                # Until a new process runs its own program, its memory is that of its parent (vfork).
                if time.time() - child.create_time() > 0.2:
                    total += child.memory_full_info().uss
        return total

    def _watch(self) -> None:
        looks, of_children = 0, 0
        while not self._stop.wait(0.002):
            if looks % self.CHILDREN_EVERY == 0:
                of_children = self._childrens()
            self._top = max(self._top, self._own() + of_children)
            looks += 1


@dataclass(frozen=True)
class Series:
    """Every repetition of one number."""

    case: str
    """What was asked of all contenders: `32 px, 2 views`."""
    contender: str
    metric: str
    """What was found, with its unit: `images/s`."""
    values: tuple[float, ...]
    """In the order of the rounds."""
    kind: Kind = "measured"


@dataclass
class Record:
    """What a benchmark found, and all that is needed to judge it.

    Attributes:
        folder: where it goes.
        series: every repetition of every number.
        details: further raw numbers, as JSON values.
        left_out: what was not measured and why, a line each.
    """

    name: str
    question: str
    settings: dict[str, Any]
    folder: Path
    machine: dict[str, Any]
    command: str
    versions: dict[str, str]
    series: list[Series] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def add(self, case: str, contender: str, metric: str, values: Iterable[float], kind: Kind = "measured") -> None:
        self.series.append(Series(case, contender, metric, tuple(float(value) for value in values), kind))

    def leave_out(self, what: str, why: str) -> None:
        """Say that `what` is not measured; known to the record, too."""
        line = f"{what} is left out: {why}"
        if line not in self.left_out:
            self.left_out.append(line)
            if speaks_for_host():
                print(line, flush=True)

    def has_peer(self, package: str, module: str) -> bool:
        """Whether a peer's `module` can be imported; its version is recorded, and where there is none, a line says so."""
        try:
            found = importlib.util.find_spec(module.partition(".")[0]) is not None
        except ValueError:  # known to be missing
            found = False
        if not found:
            self.leave_out(package, "it is not installed (pip install '.[bench]')")
            return False
        self.versions[package] = version(package)
        return True

    def of(self, metric: str, case: str | None = None) -> list[Series]:
        """The series of a metric, of one case or of all."""
        return [one for one in self.series if one.metric == metric and case in (None, one.case)]

    def values(self, case: str, contender: str, metric: str) -> tuple[float, ...]:
        return next(one.values for one in self.of(metric, case) if one.contender == contender)

    def to_json(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "command": self.command,
            "settings": self.settings,
            "series": [asdict(one) for one in self.series],
            "details": self.details,
            "left_out": self.left_out,
            "hardware": self.machine,
            "versions": self.versions,
            "commit": source_commit(),
        }

    def write(self, title: str, body: str, figures: Mapping[str, Figure | None]) -> None:
        """Print the page's `body`, and leave NAME.json, README.md and the `figures` that there are, by their names, in the
        folder; rank 0 does."""
        if os.environ.get("RANK", "0") != "0":
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / f"{self.name}.json", (json.dumps(self.to_json(), indent=1) + "\n").encode())
        drawn = {name: figure for name, figure in figures.items() if figure is not None}
        for name, figure in drawn.items():
            figure.savefig(self.folder / f"{name}.png")
        machine = self.machine
        gpus = f"{machine['ranks']} × {machine['gpu']}, " if "gpu" in machine else ""
        plots = "".join(f"![{name}]({name}.png)\n\n" for name in drawn)
        missing = "\n".join(f"- {line}" for line in self.left_out) + "\n\n" if self.left_out else ""
        page = (
            f"# {title}\n\n{self.question[0].upper()}{self.question[1:]}\n\n"
            f"`{self.command}` on {gpus}{machine['usable_cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB, "
            f"{machine['ranks']} rank(s); load average {machine['load_average_1min']:.1f} over the minute before; commit "
            f"{source_commit() or 'unknown'}; {', '.join(f'{name} {text}' for name, text in self.versions.items())}.\n\n"
            f"{body.strip()}\n\n{plots}{missing}"
            f"Every repetition: `{self.name}.json`.\n"
        )
        write_atomic(self.folder / "README.md", page.encode())
        print(f"\n{body.strip()}\n\nwritten: {self.folder}", flush=True)


def begin(
    command_type: type[C],
    name: str,
    argv: Sequence[str] | None,
    about: str | None,
    *,
    question: str,
    packages: Sequence[str] = (),
) -> tuple[C, Record]:
    """The options of `python -m benchmarks.NAME`, and its record.

    Called first: the load average in it is that of the minute before. `UserError` where an option is wrong, or where there is a
    record in the folder already.
    """
    command = parse(command_type, argv, prog=f"python -m benchmarks.{name}", about=about)
    machine = hardware(choose_device(getattr(command, "device", "cpu")))
    folder = command.out or RECORDS / f"{date.today()}_{short_name(machine)}_{name}"
    require(not (folder / f"{name}.json").exists(), f"{folder} has a record already: delete it, or give another --out")
    settings = {key: _json_value(value) for key, value in vars(command).items() if key != "out"}
    words = _without_out(sys.argv[1:] if argv is None else argv)
    versions = {"python": platform.python_version()} | {p: version(p) for p in (*PACKAGES, *packages)}
    typed = shlex.join(["python", "-m", f"benchmarks.{name}", *words])
    return command, Record(name, question, settings, folder, machine, typed, versions)


def _without_out(words: Sequence[str]) -> list[str]:
    """A command line but for where its record goes: whoever repeats it has folders of his own."""
    kept, rest = [], iter(words)
    for word in rest:
        if word == "--out":
            next(rest, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return kept


def _json_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_json_value(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def comparison(record: Record, metrics: Sequence[str], reference: str | None, *, digits: int = 3) -> str:
    """Markdown: a row for each case and contender: median (min to max) of each metric, and the first metric beside that of the
    `reference`, if there is one, in the same rounds.

    A number that is not measured says so. Nothing where there are no such numbers.
    """
    ratio_heading = [f"{metrics[0]} ÷ {reference}"] if reference else []
    headings = ["case", "contender", *metrics, *ratio_heading, "rounds"]
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    pairs = dict.fromkeys((one.case, one.contender) for one in record.series if one.metric in metrics)
    if not pairs:
        return ""
    for case, contender in pairs:
        of_case = {(one.contender, one.metric): one for one in record.series if one.case == case}
        found = [of_case.get((contender, metric)) for metric in metrics]
        cells = [_cell(one, digits) for one in found]
        if reference:
            first, other = found[0], of_case.get((reference, metrics[0]))
            comparable = first and other and first.kind == other.kind and len(first.values) == len(other.values)
            cells.append(spread(ratios(first.values, other.values)).format(digits) if comparable else "")  # type: ignore[union-attr]
        rounds = max(len(one.values) for one in found if one)
        lines.append(f"| {' | '.join([case, contender, *cells, str(rounds)])} |")
    return "\n".join(lines) + "\n"


def _cell(one: Series | None, digits: int) -> str:
    if one is None:
        return ""
    return f"{spread(one.values).format(digits)}{'' if one.kind == 'measured' else f', {one.kind}'}"


def bars(record: Record, metric: str) -> Figure | None:
    """A panel a case, a bar a contender: the median, and the lowest and highest as a whisker; hatched if not measured."""
    cases = list(dict.fromkeys(one.case for one in record.of(metric)))
    if not cases:
        return None
    heights = [1.1 + 0.3 * len(record.of(metric, case)) for case in cases]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, sum(heights)))
        panels = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights).flat
        for panel, case in zip(panels, cases, strict=True):
            of_case = record.of(metric, case)[::-1]
            found_spreads = [spread(one.values) for one in of_case]
            medians = [one.median for one in found_spreads]
            whiskers = [
                [s.median - s.low for s in found_spreads],
                [s.high - s.median for s in found_spreads],
            ]
            hatches = ["" if one.kind == "measured" else "//" for one in of_case]
            names = [one.contender if one.kind == "measured" else f"{one.contender} ({one.kind})" for one in of_case]
            panel.barh(
                names, medians, xerr=whiskers, color=BLUE, hatch=hatches, edgecolor="white", ecolor=GREY, capsize=3
            )
            panel.set(title=case, xlabel=metric)
    return figure


def curves(record: Record, metric: str, x_of: Callable[[str], float | None], *, xlabel: str) -> Figure | None:
    """A line a contender over the cases, each at `x_of` its name (None: not drawn), on logarithmic axes: medians, and a band from
    the lowest to the highest; dashed if not measured."""
    lines: dict[tuple[str, Kind], list[tuple[float, Spread]]] = {}
    for one in record.of(metric):
        x = x_of(one.case)
        if x is not None:
            lines.setdefault((one.contender, one.kind), []).append((x, spread(one.values)))
    if not lines:
        return None
    with rc_context(STYLE):
        figure, (panel,) = new_figure(4.2)
        for place, ((contender, kind), points) in enumerate(lines.items()):
            xs, spreads = zip(*sorted(points), strict=True)
            color = CLASS_COLORS[place % len(CLASS_COLORS)]
            label = contender if kind == "measured" else f"{contender} ({kind})"
            style = "-" if kind == "measured" else "--"
            panel.plot(xs, [s.median for s in spreads], marker="o", label=label, color=color, linestyle=style)
            panel.fill_between(xs, [s.low for s in spreads], [s.high for s in spreads], color=color, alpha=0.2)
        panel.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=metric)
        panel.legend()
    return figure


def only_known(asked: Sequence[str], known: Iterable[str], option: str) -> None:
    """`UserError` where an option names what there is not."""
    names = list(known)
    for name in asked:
        if name not in names:
            raise UserError(f"{option} {name}: there is no such one, only {', '.join(names)}")
