"""`python -m benchmarks.methods [RECIPE ...]`: what do the methods reach at the same budget?

Trains each recipe once for each seed, by default those on the photographs with seeds 0, 1 and 2, one rank a run and as many
runs at a time as there are cores, each on a core of its own, and writes a table of scores beside their baselines: mean and
spread over seeds. With `--ranks` a run is what the recipe's own command starts, one after the other, so that its time is that of
the command. A run that is finished already in the folder is not repeated, so an interrupted benchmark goes on.

    python -m benchmarks.methods
    python -m benchmarks.methods photos photos_byol --seeds 0 1 2 3 4 --runs runs/two_methods
    python -m benchmarks.methods photos_dino photos_swav photo_captions --ranks 2
"""

import json
import os
import queue
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.frame import Options, at_least, bars, begin
from dist_contrastive import cli
from dist_contrastive.metrics import read_metrics
from dist_contrastive.recipes import RECIPES, build_recipe

QUESTION = "what do the methods reach at the same budget?"
PHOTOS = tuple(name for name in RECIPES if name.startswith("photos"))
SCORES = ("linear_top1", "knn_top1", "init_linear_top1", "init_knn_top1", "raw_linear_top1", "raw_knn_top1")
PAIRS = ("zero_shot_top1", "text_recall_at_5", "image_recall_at_5")
"""Further scores, of runs on images with captions, where each of them, too, has one of the untrained towers beside it."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """How runs are started."""

    ranks: int = 1
    """Processes of a run, on CPUs; more than one are started by accelerate."""
    options: str = "--launch.device cpu"
    """Further options of every run, in one string."""


@dataclass(frozen=True)
class Command(TrainingOptions):
    recipes: Annotated[tuple[str, ...], tyro.conf.Positional] = PHOTOS
    """The recipes to train."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of each recipe for each."""
    runs: Path = Path("runs/methods")
    """Runs go to RUNS/RECIPE-SEED."""
    workers: int = 0
    """Runs at a time, which share the cores evenly; 0: as many as there are cores for."""

    def __post_init__(self) -> None:
        at_least(self, 1, "ranks")
        at_least(self, 0, "workers", "seeds")


LAUNCHED = ("-m", "accelerate.commands.launch", "--config_file", "launch_configs/cpu.yaml", "--num_processes")


def train(folder: Path, recipe: str, seed: int, command: TrainingOptions, cores: Collection[int]) -> None:
    """A run into `folder` on `cores`, unless it is there; its output to `folder`.txt, what it took to `folder`/duration_s."""
    if not (folder / "DONE").exists():
        arguments = [
            recipe,
            "--seed",
            str(seed),
            "--run-dir",
            str(folder),
            "--probe.every",
            "0",
            *command.options.split(),
        ]
        start = time.monotonic()
        launcher = () if command.ranks == 1 else (*LAUNCHED, str(command.ranks))
        with open(f"{folder}.txt", "w", encoding="utf-8") as output:
            subprocess.run(
                [sys.executable, *launcher, "-m", "dist_contrastive.train", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                check=True,
                preexec_fn=partial(os.sched_setaffinity, 0, cores),
            )
        (folder / "duration_s").write_text(f"{time.monotonic() - start:.1f}")


def run(recipe: str, seed: int, command: Command, cores: Collection[int]) -> dict[str, Any]:
    """Scores of one run, trained now unless it is there."""
    folder = command.runs / f"{recipe}-{seed}"
    train(folder, recipe, seed, command, cores)
    probe = json.loads((folder / "probe.json").read_text())
    metrics = read_metrics(folder / "metrics.jsonl")
    ranks = [line["effective_rank"] for line in metrics if "effective_rank" in line]
    return {
        "recipe": recipe,
        "seed": seed,
        **{name: probe[name] for name in SCORES},
        **{name: probe[name] for key in PAIRS for name in (key, f"init_{key}") if name in probe},
        "linear_holdout_top1": probe["linear_holdout_top1"],
        "first_effective_rank": ranks[0],
        "effective_rank": ranks[-1],
        "duration_s": round(float((folder / "duration_s").read_text())),
    }


def _mean_and_spread(values: Sequence[float], digits: int = 3) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a recipe, mean ± standard deviation over its seeds."""
    lines = [
        "| recipe | linear | kNN | untrained linear | untrained kNN | raw linear | raw kNN | linear gain, points "
        "| effective rank, first to last step | seconds a run |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe in dict.fromkeys(result["recipe"] for result in results):
        rows = [result for result in results if result["recipe"] == recipe]

        def spread(name: str, digits: int = 3, rows: list[dict[str, Any]] = rows) -> str:
            return _mean_and_spread([row[name] for row in rows], digits)

        gains = [100 * (row["linear_top1"] - row["init_linear_top1"]) for row in rows]
        cells = [
            *(spread(name) for name in SCORES),
            _mean_and_spread(gains, 1),
            f"{spread('first_effective_rank', 0)} to {spread('effective_rank', 0)}",
            spread("duration_s", 0),
        ]
        lines.append(f"| `{recipe}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" + _pairs_table([result for result in results if PAIRS[0] in result])


def _pairs_table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a recipe, of the scores that only images with captions have, each beside that of the untrained towers."""
    if not results:
        return ""
    lines = [
        "",
        "| recipe | zero-shot top-1 | untrained | recall@5 of captions | untrained | recall@5 of images | untrained |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe in dict.fromkeys(result["recipe"] for result in results):
        rows = [result for result in results if result["recipe"] == recipe]
        cells = [_mean_and_spread([row[name] for row in rows]) for key in PAIRS for name in (key, f"init_{key}")]
        lines.append(f"| `{recipe}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    command, record = begin(Command, "methods", argv, __doc__, question=QUESTION)
    for recipe in command.recipes:
        build_recipe(recipe)  # a mistyped name is refused before the first run
    command.runs.mkdir(parents=True, exist_ok=True)
    available = sorted(os.sched_getaffinity(0))
    workers = command.workers or max(len(available) // command.ranks, 1)
    free: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for worker in range(workers):
        free.put(available[worker::workers])
    results: dict[tuple[int, str], dict[str, Any]] = {}

    def job(seed: int, recipe: str) -> None:
        cores = free.get()
        try:
            result = run(recipe, seed, command, cores)
        finally:
            free.put(cores)
        results[seed, recipe] = result
        print(
            f"{recipe}, seed {seed}: linear {result['linear_top1']:.3f} (held out {result['linear_holdout_top1']:.3f}, untrained "
            f"{result['init_linear_top1']:.3f}), kNN {result['knn_top1']:.3f} (untrained {result['init_knn_top1']:.3f}); "
            f"{result['duration_s']} s",
            flush=True,
        )

    # All recipes once before any a second time: an unfinished benchmark compares, too.
    jobs = [(seed, recipe) for seed in command.seeds for recipe in command.recipes]
    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(job, *arguments) for arguments in jobs]:
            future.result()
    in_order = [results[arguments] for arguments in jobs]
    record.details["runs"] = in_order
    for recipe in command.recipes:
        rows = [row for row in in_order if row["recipe"] == recipe]
        for score in SCORES:
            record.add(f"seeds {', '.join(map(str, command.seeds))}", recipe, score, [row[score] for row in rows])
    body = f"Mean ± standard deviation over seeds, all measured.\n\n{table(in_order)}"
    record.write("Methods at the same budget", body, {"linear": bars(record, "linear_top1")})


if __name__ == "__main__":
    sys.exit(cli.main_guard(main))
