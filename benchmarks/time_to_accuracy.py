"""`python -m benchmarks.time_to_accuracy [RECIPE ...]`: how long does training take until the probes reach a given score?

Trains each recipe once for each seed by its own command, with probes every few epochs, and finds the first of them in which kNN
and the linear probe reach what is asked. Warm-up (start, compilation, the first step), training and evaluation are accounted for
apart: a run that is scored more often is not slower. A run that is finished already in the folder of runs is not repeated,
and the record says so.

    python -m benchmarks.time_to_accuracy
    python -m benchmarks.time_to_accuracy photos photos_vicreg --linear 0.74 --knn 0.66 --seeds 0 1 2 3 4
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.frame import Budget, Record, at_least, bars, begin, spread
from benchmarks.methods import TrainingOptions, train
from dist_contrastive.cli import main_guard
from dist_contrastive.config import require
from dist_contrastive.data.packing import write_dataset
from dist_contrastive.data.sources import open_source
from dist_contrastive.recipes import build_recipe

QUESTION = "how long does training take until the probes reach a given score?"
TRAINING, WARMUP, EVALUATION, EPOCHS = "s of training", "s of warm-up", "s of evaluation", "epochs"
LOOP = ("training", "waiting_for_data", "checkpoints")
EVALUATED = ("probes",)
AFTERWARDS = ("report",)
"""Parts of a run's time in machine.json. What of the command's time is none of these is warm-up: imports, compilation, the first
step."""


@dataclass(frozen=True)
class Command(TrainingOptions):
    recipes: Annotated[tuple[str, ...], tyro.conf.Positional] = ("photos",)
    """The recipes to train."""
    linear: float = 0.72
    """What the linear probe is to reach."""
    knn: float = 0.64
    """What kNN is to reach."""
    every: int = 1
    """Epochs between probes."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of each recipe for each."""
    data: Path | None = None
    """Packed dataset of all recipes; without one each has its own, and the demo's patches are packed where it is not there."""
    runs: Path = Path("runs/time_to_accuracy")
    """Runs go to RUNS/RECIPE-SEED."""
    minutes: float = 0.0
    """Begin no run once so many minutes are over; 0: train all."""

    def __post_init__(self) -> None:
        at_least(self, 1, "ranks", "every")
        at_least(self, 0, "seeds", "minutes")
        for name in ("linear", "knn"):
            value = getattr(self, name)
            require(0 < value <= 1, f"--{name} {value:g}: give an accuracy from 0 to 1")


def reached(history: Sequence[Mapping[str, Any]], score: str, target: float) -> Mapping[str, Any] | None:
    """The first entry whose score is not below the target."""
    return next((entry for entry in history if entry.get(score, 0.0) >= target), None)


def account(
    whole: float, seconds: Mapping[str, float], history: Sequence[Mapping[str, Any]], entry: Mapping[str, Any]
) -> dict[str, float]:
    """Seconds of each kind until `entry` of a run's probes: steps and probes at their mean times.

    The command took `whole` seconds, and of these the run knows the parts `seconds`.
    """
    total_steps = history[-1]["step"]
    probes = sum(1 for other in history if other["step"] <= entry["step"])
    known = {*LOOP, *EVALUATED, *AFTERWARDS}
    return {
        TRAINING: sum(seconds.get(part, 0.0) for part in LOOP) * entry["step"] / total_steps,
        WARMUP: whole - sum(took for part, took in seconds.items() if part in known),
        EVALUATION: sum(seconds.get(part, 0.0) for part in EVALUATED) * probes / len(history),
        EPOCHS: float(entry["epoch"]),
    }


def table(record: Record, command: Command) -> str:
    """Markdown: a row for each recipe and score."""
    metrics = (TRAINING, WARMUP, EVALUATION, EPOCHS)
    lines = [f"| recipe | until | {' | '.join(metrics)} | runs that got there |", f"|{'---|' * 7}"]
    for one in record.of(TRAINING):
        cells = (spread(record.values(one.case, one.contender, metric)).format() for metric in metrics)
        lines.append(
            f"| `{one.case}` | {one.contender} | {' | '.join(cells)} | {len(one.values)} of {len(command.seeds)} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    command, record = begin(Command, "time_to_accuracy", argv, __doc__, question=QUESTION)
    for recipe in command.recipes:
        build_recipe(recipe)  # a mistyped name is refused before the first run
    command.runs.mkdir(parents=True, exist_ok=True)
    budget = Budget(command.minutes)
    cores = sorted(os.sched_getaffinity(0))
    targets = {
        f"kNN {command.knn:g}": ("knn_top1", command.knn),
        f"linear {command.linear:g}": ("linear_top1", command.linear),
    }
    for recipe in command.recipes:
        data = command.data or build_recipe(recipe).data.path
        if not data.exists() and data.name == "photos.beton":
            data = command.runs / "photos.beton"
            if not data.exists():
                write_dataset(open_source("photos"), data)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in targets}
        options = f"{command.options} --data.path {data} --probe.every {command.every}"
        for seed in command.seeds:
            if budget.is_over():
                record.leave_out(f"{recipe} with seed {seed}", "the time was over")
                continue
            folder = command.runs / f"{recipe}-{seed}"
            was_there = (folder / "DONE").exists()
            train(folder, recipe, seed, replace(command, options=options), cores)
            machine = json.loads((folder / "machine.json").read_text())
            seconds = machine["seconds"]
            if was_there:
                known = f"commit {machine.get('commit', 'unknown')}, {machine.get('gpu', machine['cpu'])}"
                record.leave_out(f"another run of {recipe} with seed {seed}", f"{folder.name} is there, of {known}")
            history = json.loads((folder / "probe.json").read_text())["history"]
            whole = float((folder / "duration_s").read_text())
            record.details[f"{recipe}-{seed}"] = {"whole": whole, "seconds": seconds, "history": history}
            for name, (score, target) in targets.items():
                entry = reached(history, score, target)
                if entry is None:
                    best = max(other[score] for other in history)
                    record.leave_out(f"{recipe} with seed {seed} until {name}", f"its best was {best:.3f}")
                else:
                    found[name].append(account(whole, seconds, history, entry))
        for name, accounts in found.items():
            for metric in accounts[0] if accounts else ():
                record.add(recipe, name, metric, [one[metric] for one in accounts])
    body = (
        f"{command.ranks} rank(s), a probe every {command.every} epoch(s), all measured: medians over seeds (min to max); steps "
        f"and probes of a run at the run's mean times.\n\n{table(record, command)}"
    )
    record.write("Time to a given score", body, {"training": bars(record, TRAINING)})


if __name__ == "__main__":
    sys.exit(main_guard(main))
