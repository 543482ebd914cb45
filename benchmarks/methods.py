"""`python -m benchmarks.methods [RECIPE ...]`: what do the methods reach at the same budget?

Trains each recipe once for each seed, by default those on the photographs with seeds 0, 1 and 2, one rank a run and as many
runs at a time as there are cores, each on a core of its own, and writes a table of scores beside their baselines: mean and
spread over seeds. A run that is finished already in the folder is not repeated, so an interrupted benchmark goes on.

    python -m benchmarks.methods
    python -m benchmarks.methods photos photos_byol --seeds 0 1 2 3 4 --out runs/two_methods
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

from dist_contrastive import cli
from dist_contrastive.metrics import read_metrics
from dist_contrastive.recipes import RECIPES, build_recipe

PROG = "python -m benchmarks.methods"
PHOTOS = tuple(name for name in RECIPES if name.startswith("photos"))
SCORES = ("linear_top1", "knn_top1", "init_linear_top1", "init_knn_top1", "raw_linear_top1", "raw_knn_top1")


@dataclass(frozen=True)
class Command:
    recipes: Annotated[tuple[str, ...], tyro.conf.Positional] = PHOTOS
    """The recipes to train."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of each recipe for each."""
    out: Path = Path("runs/methods")
    """Runs go to OUT/RECIPE-SEED, the table to OUT/table.md, the numbers to OUT/methods.json."""
    workers: int = 0
    """Runs at a time, which share the cores evenly; 0: one a core."""
    options: str = "--launch.device cpu"
    """Further options of every run, in one string."""


def run(recipe: str, seed: int, command: Command, cores: Collection[int]) -> dict[str, Any]:
    """Scores of one run, trained now on `cores` unless it is there."""
    folder = command.out / f"{recipe}-{seed}"
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
        with open(command.out / f"{recipe}-{seed}.txt", "w", encoding="utf-8") as output:
            subprocess.run(
                [sys.executable, "-m", "dist_contrastive.train", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                check=True,
                preexec_fn=partial(os.sched_setaffinity, 0, cores),
            )
        (folder / "duration_s").write_text(f"{time.monotonic() - start:.0f}")
    probe = json.loads((folder / "probe.json").read_text())
    metrics = read_metrics(folder / "metrics.jsonl")
    ranks = [line["effective_rank"] for line in metrics if "effective_rank" in line]
    return {
        "recipe": recipe,
        "seed": seed,
        **{name: probe[name] for name in SCORES},
        "linear_holdout_top1": probe["linear_holdout_top1"],
        "first_effective_rank": ranks[0],
        "effective_rank": ranks[-1],
        "duration_s": int((folder / "duration_s").read_text()),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a recipe, mean ± standard deviation over its seeds."""
    lines = [
        "| recipe | linear | kNN | untrained linear | untrained kNN | raw linear | raw kNN | linear gain, points "
        "| effective rank, first to last step | seconds a run |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe in dict.fromkeys(result["recipe"] for result in results):
        rows = [result for result in results if result["recipe"] == recipe]

        def spread(name: str, scale: float = 1.0, digits: int = 3, rows: list[dict[str, Any]] = rows) -> str:
            values = [row[name] * scale for row in rows]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"

        gains = [{"gain": row["linear_top1"] - row["init_linear_top1"]} for row in rows]
        cells = [
            *(spread(name) for name in SCORES),
            spread("gain", 100, 1, gains),
            f"{spread('first_effective_rank', 1, 0)} to {spread('effective_rank', 1, 0)}",
            f"{statistics.mean(row['duration_s'] for row in rows):.0f}",
        ]
        lines.append(f"| `{recipe}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    command = cli.parse(Command, argv, prog=PROG, about=__doc__)
    for recipe in command.recipes:
        build_recipe(recipe)  # a mistyped name is refused before the first run
    command.out.mkdir(parents=True, exist_ok=True)
    available = sorted(os.sched_getaffinity(0))
    workers = command.workers or len(available)
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
    (command.out / "methods.json").write_text(json.dumps(in_order, indent=1))
    (command.out / "table.md").write_text(table(in_order))
    print(table(in_order))


if __name__ == "__main__":
    sys.exit(cli.main_guard(main))
