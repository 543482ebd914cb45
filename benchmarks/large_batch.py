"""`python -m benchmarks.large_batch [RECIPE ...]`: what does gradient caching cost in memory and time?

A step at the full global batch in micro-batches, beside a plain step at the micro-batch's size: the most memory that each
holds at once, resident (each in a fresh process) and in tensors, and the time an image takes, in turns within one process.

    python -m benchmarks.large_batch
    python -m benchmarks.large_batch photos --size 1024 --micro 64 --out large_batch.json
"""

import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from accelerate import Accelerator

from dist_contrastive import cli
from dist_contrastive.batch import Batch
from dist_contrastive.config import BatchConfig, require
from dist_contrastive.recipes import build_recipe
from dist_contrastive.step.memory import TensorCount, measure_peak
from dist_contrastive.step.memory_plan import example
from dist_contrastive.trainer import Trainer

PROG = "python -m benchmarks.large_batch"
MIB = 2**20


@dataclass(frozen=True)
class Command:
    recipes: Annotated[tuple[str, ...], tyro.conf.Positional] = ("cifar10_cpu", "photos", "photos_mocov3")
    """The recipes to measure."""
    size: int = 4096
    """Global batch."""
    micro: int = 128
    """Samples of a micro-batch, and of the plain step beside it."""
    rounds: int = 3
    """How often the two are measured in turns."""
    out: Path = Path("large_batch.json")
    """Where the numbers go as JSON."""


def trainer_and_batch(recipe: str, size: int, micro: int) -> tuple[Trainer, Batch]:
    """One rank on the CPU with a batch of noise, past its first steps, which make gradients and caches."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = replace(build_recipe(recipe), batch=BatchConfig(size=size, micro=micro))
    trainer = Trainer(config, Accelerator(cpu=True), steps_per_epoch=1, dataset_sha256="")
    warm = example(config, 2 * micro)
    for _ in range(2):
        trainer.gradient.compute(warm, trainer.clock, logged=False)
        trainer.method.zero_grad(set_to_none=True)
    return trainer, example(config, size)


def memory(recipe: str, size: int, micro: int) -> dict[str, float]:
    """Peak of one step in MiB beyond what is held before it: resident memory, and tensors."""
    trainer, batch = trainer_and_batch(recipe, size, micro)

    def step() -> None:
        trainer.gradient.compute(batch, trainer.clock, logged=False)

    resident = measure_peak(step, torch.device("cpu"))
    trainer.method.zero_grad(set_to_none=True)
    with TensorCount() as tensors:
        step()
    embedding = trainer.gradient.embedding_bytes(batch.part(slice(0, 2))) / 2 * size
    return {"resident_mib": resident / MIB, "tensors_mib": tensors.peak / MIB, "embeddings_mib": embedding / MIB}


def timed(recipe: str, command: Command) -> dict[str, list[float]]:
    """Milliseconds an image takes, in plain steps at the micro-batch's size and in cached steps, round by round."""
    trainer, batch = trainer_and_batch(recipe, command.size, command.micro)
    times: dict[str, list[float]] = {"plain": [], "cached": []}
    for _ in range(command.rounds):
        for name, parts in (("plain", command.size // command.micro), ("cached", 1)):
            start = time.perf_counter()
            for number in range(parts):
                size = command.size // parts
                trainer.gradient.compute(
                    batch.part(slice(number * size, (number + 1) * size)), trainer.clock, logged=False
                )
                trainer.method.zero_grad(set_to_none=True)
            times[name].append(1e3 * (time.perf_counter() - start) / command.size)
    return times


def compare(recipe: str, command: Command) -> dict[str, Any]:
    """Everything about one recipe; memory as often as time."""
    context = multiprocessing.get_context("spawn")
    sizes = {"plain": command.micro, "cached": command.size}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sizes}
    with context.Pool(1, maxtasksperchild=1) as pool:
        for _ in range(command.rounds):
            for name, size in sizes.items():
                runs[name].append(pool.apply(memory, (recipe, size, command.micro)))
    times = timed(recipe, command)
    ratios: dict[str, list[float]] = {
        kind: [c[kind] / (p[kind] + c["embeddings_mib"]) for c, p in zip(runs["cached"], runs["plain"], strict=True)]
        for kind in ("resident_mib", "tensors_mib")
    }
    ratios["time"] = [c / p for c, p in zip(times["cached"], times["plain"], strict=True)]
    return {
        "recipe": recipe,
        "size": command.size,
        "micro": command.micro,
        "memory": runs,
        "ms_an_image": times,
        "ratios": ratios,
    }


def describe(result: dict[str, Any]) -> str:
    def of(name: str, kind: str) -> float:
        return statistics.median(run[kind] for run in result["memory"][name])

    def spread(kind: str) -> str:
        values = result["ratios"][kind]
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    times = {name: statistics.median(values) for name, values in result["ms_an_image"].items()}
    return (
        f"{result['recipe']}, medians of {len(result['ratios']['time'])} rounds\n"
        f"  plain step at {result['micro']}: {of('plain', 'resident_mib'):.0f} MiB resident, {of('plain', 'tensors_mib'):.0f} in "
        f"tensors, {times['plain']:.2f} ms an image\n"
        f"  cached step at {result['size']} in micro-batches of {result['micro']}: {of('cached', 'resident_mib'):.0f} MiB "
        f"resident, {of('cached', 'tensors_mib'):.0f} in tensors, of which embeddings {of('cached', 'embeddings_mib'):.0f}; "
        f"{times['cached']:.2f} ms an image\n"
        f"  cached / (plain + embeddings): {spread('resident_mib')} resident, {spread('tensors_mib')} in tensors\n"
        f"  time an image, cached / plain: {spread('time')}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    command = cli.parse(Command, argv, prog=PROG, about=__doc__)
    for recipe in command.recipes:
        build_recipe(recipe)  # a mistyped name is refused before the first measurement
    require(command.size % command.micro == 0, f"--micro {command.micro}: give a divisor of --size {command.size}")
    load_average = os.getloadavg()[0]
    results = []
    for recipe in command.recipes:
        results.append(compare(recipe, command))
        print(describe(results[-1]), flush=True)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "load_average_1min_before": load_average,
    }
    command.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(cli.main_guard(main))
