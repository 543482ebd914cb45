"""`python -m benchmarks.all`: all that there is to know of a machine's throughput, within a time.

Runs the benchmarks of throughput one after the other on the hardware at hand (on several GPUs the step on all of them, too), each
with its share of the time that is left, and puts their tables and plots on one page; each keeps its own record in a folder below.
A benchmark that takes longer than its share leaves out rounds and cases, and says so; one that does not fit is left out.

    python -m benchmarks.all --minutes 9
    python -m benchmarks.all --minutes 30 --only loader step time_to_accuracy --out records/throughput
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.frame import ROOT, Options, Record, begin, choose_device, only_known
from dist_contrastive.cli import EXIT_USER_ERROR, main_guard
from dist_contrastive.config import require
from dist_contrastive.preflight import launched_ranks

QUESTION = "what is this machine's throughput, stage by stage, beside what one would use instead?"
GRACE_S = 20.0
"""What a benchmark may take beyond its time, for imports and the round that it is in."""
PAGE_S = 10.0
"""What the page takes at the end."""


@dataclass(frozen=True)
class Part:
    """A benchmark and what it is told."""

    name: str
    share: float
    """Of the time, beside those of the others."""
    least_s: float
    """What it takes at least, in seconds, to be worth starting."""
    on_cpu: tuple[str, ...] = ()
    on_gpu: tuple[str, ...] = ()


LOADER = ("--photographs", "300", "--cases", "small", "photographs", "--fresh-rounds", "0")
"""What FFCV compiles for multi-crop takes a minute, and as much again in each fresh process."""
PARTS = (
    Part("augment", 1.0, 20, on_gpu=("--device", "cuda")),
    Part("loss", 1.2, 20, ("--rows", "1024", "4096", "8192", "16384", "--case-seconds", "12"), ("--case-seconds", "10")),
    Part("step", 2.5, 40, ("--encoders", "demo", "resnet18"), ("--encoders", "resnet18", "resnet50", "demo")),
    Part("scaling", 1.5, 60, ("--rank-batch", "64", "--rounds", "2"), ("--rank-batch", "256", "--rounds", "2")),
    Part("loader", 1.5, 40, LOADER, LOADER),
    Part("time_to_accuracy", 1.8, 80, ("--seeds", "0"), ("--seeds", "0", "--options", "--launch.device cuda")),
)  # fmt: skip
"""In this order: what fits least comes last."""


@dataclass(frozen=True)
class Command(Options):
    minutes: float = 9.0
    """What all of it may take."""
    only: tuple[str, ...] = ()
    """Some of the benchmarks alone; without any, all."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What is measured; auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        require(self.minutes > 0, f"--minutes {self.minutes:g}: give a positive number")
        only_known(self.only, [part.name for part in PARTS], "--only")


def launcher(ranks: int) -> tuple[str, ...]:
    """What starts a benchmark on so many GPUs of this machine."""
    if ranks == 1:
        return (sys.executable, "-m")
    config = str(ROOT / "launch_configs" / "node_8gpu.yaml")
    return (
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", str(ranks), "-m",
    )  # fmt: skip


def run(words: Sequence[str], output: Path, limit_s: float, environment: Mapping[str, str]) -> int | None:
    """The exit status of a benchmark, whose output goes to a file; None where it was ended after `limit_s`."""
    with open(output, "wb") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True, env=environment
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):  # with all that it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def chosen(parts: Mapping[str, Part], seconds: float) -> list[str]:
    """Those that get what they take at least, when all of them divide so many seconds by their shares."""
    names = list(parts)
    while names:
        whole = sum(parts[name].share for name in names)
        needed = {name: parts[name].least_s * whole / parts[name].share for name in names}
        neediest = max(names, key=lambda name: needed[name])
        if needed[neediest] <= seconds:
            break
        names.remove(neediest)
    return names


def section(name: str, folder: Path) -> str:
    """What the page of a benchmark says from its first table on, with links from the folder above; its plots, too."""
    title, _, rest = (folder / "README.md").read_text().partition("\n")
    table = rest[max(0, rest.find("\n|")) :].rpartition("Every repetition")[0].strip()
    return f"## {title.removeprefix('# ')}\n\n{table.replace('](', f']({name}/')}\n\n"


def measure(command: Command, record: Record) -> str:
    """Run the parts; the sections of the page."""
    device = choose_device(command.device)
    deadline = time.monotonic() + 60 * command.minutes - PAGE_S
    parts: dict[str, Part] = {}
    ranks_of: dict[str, int] = {}
    for part in PARTS:
        if command.only and part.name not in command.only:
            continue
        parts[part.name], ranks_of[part.name] = part, 1
        gpus = torch.cuda.device_count() if device.type == "cuda" else 1
        if part.name == "step" and gpus > 1:
            name = f"step_{gpus}_gpus"
            parts[name], ranks_of[name] = part, gpus
    names = chosen(parts, 60 * command.minutes - PAGE_S)
    for name in parts.keys() - set(names):
        why = f"it takes at least {parts[name].least_s:.0f} s, more than its share of {command.minutes:g} min"
        record.leave_out(name, why)
    record.folder.mkdir(parents=True, exist_ok=True)
    # A benchmark of processors is one on a machine with GPUs, too.
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {})
    sections = []
    for number, name in enumerate(names):
        part, ranks = parts[name], ranks_of[name]
        left = deadline - time.monotonic()
        share = left * part.share / sum(parts[other].share for other in names[number:])
        folder, output = record.folder / name, record.folder / f"{name}.txt"
        options = part.on_cpu if device.type == "cpu" else part.on_gpu
        minutes = ("--minutes", f"{max(1.0, share - GRACE_S) / 60:.3f}")
        words = [*launcher(ranks), f"benchmarks.{part.name}", *options, *minutes, "--out", str(folder.absolute())]
        print(f"{name}: {share:.0f} s", flush=True)
        start = time.monotonic()
        status = run(words, output, min(left, max(1.5 * share, share + GRACE_S)), environment)
        record.details[name] = {
            "seconds": time.monotonic() - start,
            "status": status,
            "command": [name, *options, *minutes],
        }
        if status != 0 or not (folder / f"{part.name}.json").exists():
            lines = output.read_text(errors="replace").strip().splitlines()
            why = (
                "it took longer than its share"
                if status is None
                else f"it failed: {lines[-1] if lines else 'silently'}"
            )
            if status == EXIT_USER_ERROR and lines:
                why = lines[-1]
            record.leave_out(name, why)
            continue
        take_over(record, name, json.loads((folder / f"{part.name}.json").read_text()))
        sections.append(section(name, folder))
    return "".join(sections)


def take_over(record: Record, name: str, found: dict[str, Any]) -> None:
    """Make a benchmark's numbers, versions and gaps those of the whole."""
    for one in found["series"]:
        record.add(f"{name}: {one['case']}", one["contender"], one["metric"], one["values"], one["kind"])
    record.versions.update(found["versions"])
    record.left_out += [f"{name}: {line}" for line in found["left_out"]]


def main(argv: Sequence[str] | None = None) -> None:
    command, record = begin(Command, "all", argv, __doc__, question=QUESTION)
    require(launched_ranks() == 1, "the benchmark starts ranks itself: use python -m, without a launcher")
    sections = measure(command, record)
    require(bool(sections), f"nothing could be measured; see {record.folder}/*.txt")
    spent = "\n".join(f"| {name} | {found['seconds']:.0f} |" for name, found in record.details.items())
    record.write("Throughput", f"{sections}## Where the time went\n\n| benchmark | s |\n|---|---|\n{spent}\n", {})


if __name__ == "__main__":
    sys.exit(main_guard(main))
