"""`python -m benchmarks.checkpoint`: what does a checkpoint cost a run, how soon is a run back, and what does a kill lose?

Four questions, each on real runs of two ranks under `accelerate launch` (the last one in this process):

- cost: the loop's time with a checkpoint after each epoch (the default) beside the same run with none, in turns;
- resume: from the start of the command to the first new step in metrics.jsonl;
- kill: everything of a run that saves every few steps is killed with SIGKILL at a random moment; the steps that were done
  and are not in its newest checkpoint;
- size: a state of 300 MB in memory: copying it, writing it, reading it back, and the memory that each takes beyond the state.

It takes about five minutes on two cores, on which nothing else should run, and the dataset of the demo, which
`python -m dist_contrastive.pack photos data/photos.beton` packs.

    python -m benchmarks.checkpoint
    python -m benchmarks.checkpoint --data elsewhere/photos.beton --kills 10
"""

import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from benchmarks.frame import ROOT, Options, Peak, Record, at_least, bars, begin, ratios, spread, take_turns
from dist_contrastive.batch import steps_per_epoch
from dist_contrastive.checkpoint import CheckpointStore, Saver, load_module, load_optimizer, optimizer_tensors
from dist_contrastive.cli import main_guard
from dist_contrastive.data.beton import open_dataset
from dist_contrastive.metrics import read_metrics
from dist_contrastive.recipes import build_recipe

QUESTION = "what does a checkpoint cost, how soon is a run back, what does a kill lose?"
RECIPE = "photos"
NO_CHECKPOINTS = ("--checkpoint.every", "100000")
TIMEOUT_S = 300.0
MILLION_PARAMETERS = 25
LOOP, WAITED, MORE, RESUMED = "s of the loop", "% of the loop waited", "% more than without", "s until back"


@dataclass(frozen=True)
class Command(Options):
    data: Path = Path("data/photos.beton")
    """The packed dataset of the recipe photos."""
    epochs: int = 3
    """Length of the runs whose loops are compared, in epochs."""
    pairs: int = 2
    """How often they are compared."""
    kills: int = 2
    """How often a run is killed."""
    every_steps: int = 10
    """Steps between the checkpoints of the runs that are killed."""

    def __post_init__(self) -> None:
        at_least(self, 1, "epochs", "pairs", "kills", "every_steps")


def command_of(config: Command, run_dir: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch_configs" / "cpu.yaml"),
        "-m", "dist_contrastive.train", RECIPE, "--data.path", str(config.data), "--run-dir", str(run_dir),
        "--launch.device", "cpu", "--probe.no-enabled", *more,
    ]  # fmt: skip


def launch(config: Command, run_dir: Path, *more: str) -> tuple[subprocess.Popen[bytes], float]:
    """A run that has begun, and when it did."""
    output = open(run_dir.with_suffix(".txt"), "ab")  # noqa: SIM115 - the process has it
    return subprocess.Popen(command_of(config, run_dir, *more), stdout=output, stderr=output), time.monotonic()


def last_step(run_dir: Path) -> int:
    return max((line["step"] for line in read_metrics(run_dir / "metrics.jsonl")), default=0)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "a run does not come on"
        assert process.poll() is None or condition(), "a run ended by itself; its output lies beside its folder"
        time.sleep(0.01)


def stopped_run(config: Command, run_dir: Path, steps: int, *more: str) -> dict[str, float]:
    """Train so many steps and stop; where the time of rank 0 went, in seconds."""
    process, _ = launch(config, run_dir, "--stop-after-steps", str(steps), *more)
    process.wait(TIMEOUT_S)
    seconds: dict[str, float] = json.loads((run_dir / "machine.json").read_text())["seconds"]
    return seconds


def resume_s(config: Command, run_dir: Path) -> float:
    """Seconds from the command to the first step that is done after the newest checkpoint."""
    step = CheckpointStore(run_dir / "checkpoints", keep=2).steps()[-1]
    process, began = launch(config, run_dir, "--stop-after-steps", str(step + 1))
    # Before it goes on, the run takes lines of steps that are to be done again out of the file.
    wait_for(lambda: f"goes on after step {step} " in run_dir.with_suffix(".txt").read_text(errors="replace"), process)
    wait_for(lambda: last_step(run_dir) > step, process)
    took = time.monotonic() - began
    process.wait(TIMEOUT_S)
    return took


def loop_s(seconds: dict[str, float]) -> float:
    return sum(seconds.get(part, 0.0) for part in ("training", "waiting_for_data", "checkpoints"))


def cost_of_checkpoints(config: Command, folder: Path, per_epoch: int) -> dict[str, Any]:
    """The seconds of each run, with and without, and those until they were back."""
    steps = config.epochs * per_epoch + 1
    numbers = itertools.count()
    resumes: list[float] = []

    def with_checkpoints() -> dict[str, float]:
        run_dir = folder / f"with-{next(numbers)}"
        found = stopped_run(config, run_dir, steps, "--checkpoint.every", "1")
        resumes.append(resume_s(config, run_dir))
        return found

    def without() -> dict[str, float]:
        return stopped_run(config, folder / f"without-{next(numbers)}", steps, *NO_CHECKPOINTS)

    runs = take_turns({"with": with_checkpoints, "without": without}, config.pairs, warmup=0)
    return {"steps": steps, **runs, "resume_s": resumes}


def lost_by_a_kill(config: Command, run_dir: Path, generator: random.Random) -> dict[str, Any]:
    """Kill a run in mid-flight; what was lost, and how soon it was back."""
    process, _ = launch(config, run_dir, "--checkpoint.every-steps", str(config.every_steps))
    least = generator.randrange(config.every_steps + 1, 3 * config.every_steps)
    wait_for(lambda: last_step(run_dir) >= least, process)
    time.sleep(generator.uniform(0, 0.3))
    # The launcher's ranks first: alone, they would end by themselves.
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait(TIMEOUT_S)
    reached = last_step(run_dir)
    newest = CheckpointStore(run_dir / "checkpoints", keep=2).newest()
    kept = newest.step if newest else 0
    return {"reached": reached, "kept": kept, "lost": reached - kept, "resume_s": resume_s(config, run_dir)}


def size_of_state(folder: Path) -> dict[str, float]:
    """Seconds and memory for a state of three times 100 MB: weights and AdamW's two moments."""
    module = nn.ParameterDict({str(n): nn.Parameter(torch.randn(2**20)) for n in range(MILLION_PARAMETERS)})
    optimizer = torch.optim.AdamW(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    store = CheckpointStore(folder / "size", keep=2)
    saver = Saver(store, lambda: "")
    result: dict[str, float] = {}
    for step in (1, 2):  # the first one makes the buffers
        moments, rest = optimizer_tensors(optimizer)
        with Peak() as peak:
            began = time.monotonic()
            saver.save(step, {"optimizer": rest}, {"model": module.state_dict(), "optimizer": moments})
            copied = time.monotonic()
            saver.settle()
        times = "first" if step == 1 else "later"
        result |= {f"{times}_copy_s": copied - began, "write_s": time.monotonic() - copied, f"{times}_peak_mb": peak.mb}
    with Peak() as peak:
        began = time.monotonic()
        found = store.load(2)
        load_module(module, found.tensors["model"])
        load_optimizer(optimizer, found.tensors["optimizer"], found.state["optimizer"])
    size = sum(path.stat().st_size for path in store.path(2).iterdir())
    return result | {"load_s": time.monotonic() - began, "load_peak_mb": peak.mb, "size_mb": size / 1e6}


def table(config: Command, record: Record) -> str:
    """Markdown: what was asked, what was found, what was aimed at."""
    size, kills = record.details["size"], record.details["kills"]
    lost = ", ".join(f"{kill['lost']} (of {kill['reached']})" for kill in kills)

    def found(metric: str) -> str:
        values = record.of(metric)[0].values
        return f"{spread(values).format()}, {len(values)} times"

    rows = [
        ("the loop waits for its checkpoints, one an epoch, % of its time", found(WAITED), "at most 5 %"),
        ("the loop with them beside the loop without, % more", found(MORE), "at most 5 %"),
        ("from the command to the first step of a resumed run, s", found(RESUMED), "at most 20 s"),
        (f"steps lost by SIGKILL, a checkpoint every {config.every_steps} steps", lost, "at most those"),
        (f"a state of {size['size_mb']:.0f} MB: the loop waits for the copy", f"{size['later_copy_s']:.3g} s", ""),
        ("the same: written in the background", f"{size['write_s']:.3g} s", ""),
        ("the same: verified and loaded", f"{size['load_s']:.3g} s", ""),
        (
            "memory beyond the state: first, later checkpoints, load",
            f"{size['first_peak_mb']:.0f}, {size['later_peak_mb']:.0f}, {size['load_peak_mb']:.0f} MB",
            "",
        ),
    ]
    lines = [
        "| all measured | median (min to max) | aim |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    config, record = begin(
        Command, "checkpoint", argv, __doc__, question=QUESTION, packages=("accelerate", "safetensors")
    )
    num_train = open_dataset(config.data).manifest.num_train
    generator = random.Random(10)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    cost = cost_of_checkpoints(config, folder, steps_per_epoch(num_train, build_recipe(RECIPE).batch.size))
    kills = [lost_by_a_kill(config, folder / f"killed-{number}", generator) for number in range(config.kills)]
    record.details = {"size": size_of_state(folder), "cost": cost, "kills": kills}
    shutil.rmtree(folder)
    loops = {name: [loop_s(run) for run in cost[name]] for name in ("with", "without")}
    for name, values in loops.items():
        record.add("two ranks", f"{name} checkpoints", LOOP, values)
    shares = [100 * run["checkpoints"] / loop_s(run) for run in cost["with"]]
    record.add("two ranks", "with checkpoints", WAITED, shares)
    record.add("two ranks", "with checkpoints", MORE, [100 * (r - 1) for r in ratios(loops["with"], loops["without"])])
    record.add("two ranks", "with checkpoints", RESUMED, [*cost["resume_s"], *(kill["resume_s"] for kill in kills)])
    body = (
        f"Recipe `{RECIPE}` on two ranks over gloo, {cost['steps']} steps a run.\n\n{table(config, record)}\n"
        "The first line is what rank 0 waited (copying the state, waiting for the checkpoint before it); the second one has what "
        "the writing took from the steps beside it, too, and the noise of two runs.\n"
    )
    record.write("What a checkpoint costs, and what a kill loses", body, {"loop": bars(record, LOOP)})


if __name__ == "__main__":
    sys.exit(main_guard(main))
