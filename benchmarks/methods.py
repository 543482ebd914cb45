"""`python -m benchmarks.methods [RECIPE ...]`: what do the methods reach at the same budget?

Trains each recipe once for each seed (by default those on the photographs, seeds 0, 1 and 2, two CPU ranks), one after the
other, and writes a table of scores beside their baselines: mean and spread over seeds. A run that is finished already
in the folder is not repeated, so an interrupted benchmark goes on.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dist_contrastive import cli
from dist_contrastive.config import require
from dist_contrastive.metrics import read_metrics
from dist_contrastive.recipes import RECIPES

PROG = "python -m benchmarks.methods"
PHOTOS = tuple(name for name in RECIPES if name.startswith("photos"))
SCORES = ("linear_top1", "knn_top1", "init_linear_top1", "init_knn_top1", "raw_linear_top1", "raw_knn_top1")


@dataclass(frozen=True)
class Command:
    recipes: Annotated[tuple[str, ...], tyro.conf.Positional] = PHOTOS
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("runs/methods")
    """Runs go to OUT/RECIPE-SEED, the table to OUT/table.md, the numbers to OUT/methods.json."""
    launch_config: Path = Path("launch_configs/cpu.yaml")
    options: str = "--launch.ranks 2 --launch.device cpu --probe.every 0"
    """Further options of every run, in one string."""


def run(recipe: str, seed: int, command: Command) -> dict[str, Any]:
    """Scores of one run, trained now unless it is there."""
    folder = command.out / f"{recipe}-{seed}"
    if not (folder / "DONE").exists():
        arguments = [
            "accelerate", "launch", "--config_file", str(command.launch_config), "-m", "dist_contrastive.train", recipe,
            "--seed", str(seed), "--run-dir", str(folder), *command.options.split(),
        ]  # fmt: skip
        with open(command.out / f"{recipe}-{seed}.txt", "w", encoding="utf-8") as output:
            subprocess.run(
                [str(Path(sys.executable).parent / arguments[0]), *arguments[1:]],
                stdout=output,
                stderr=subprocess.STDOUT,
                check=True,
            )
    probe = json.loads((folder / "probe.json").read_text())
    metrics = read_metrics(folder / "metrics.jsonl")
    ranks = [line["effective_rank"] for line in metrics if "effective_rank" in line]
    config = json.loads((folder / "config.json").read_text())
    return {
        "recipe": recipe,
        "seed": seed,
        "method": config["method"]["name"],
        "epochs": config["epochs"],
        **{name: probe[name] for name in SCORES},
        "linear_holdout_top1": probe["linear_holdout_top1"],
        "effective_rank": ranks[-1],
        "first_effective_rank": ranks[0],
        "images_per_s": statistics.median(line["images_per_s"] for line in metrics),
        "duration_s": json.loads((folder / "machine.json").read_text()).get("duration_s"),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a recipe, mean ± standard deviation over its seeds."""
    lines = [
        "| recipe | linear | kNN | untrained linear | untrained kNN | raw linear | raw kNN | linear gain, points "
        "| effective rank, first to last | images/s |",
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
            f"{statistics.median(row['images_per_s'] for row in rows):.0f}",
        ]
        lines.append(f"| `{recipe}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    command = cli.parse(Command, argv, prog=PROG)
    for recipe in command.recipes:
        require(
            recipe in RECIPES, f"unknown recipe {recipe}{cli.nearest(recipe, RECIPES)}; recipes: {', '.join(RECIPES)}"
        )
    command.out.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in command.seeds:  # all recipes once before any a second time: an unfinished benchmark compares, too
        for recipe in command.recipes:
            start = time.monotonic()
            results.append(run(recipe, seed, command))
            last = results[-1]
            print(
                f"{recipe}, seed {seed}: linear {last['linear_top1']:.3f} (untrained {last['init_linear_top1']:.3f}), kNN "
                f"{last['knn_top1']:.3f} (untrained {last['init_knn_top1']:.3f}); {time.monotonic() - start:.0f} s",
                flush=True,
            )
            (command.out / "methods.json").write_text(json.dumps(results, indent=1))
            (command.out / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    sys.exit(cli.main_guard(main))
