"""`python -m benchmarks.large_batch`: what does gradient caching cost in memory and time?

A step at the full global batch in micro-batches, beside a plain step at the micro-batch's size: the most memory that each
holds at once, resident (each in a fresh process) and in tensors, and the time an image takes, in turns within one process.
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
from typing import Any

import torch
from accelerate import Accelerator

from dist_contrastive import cli
from dist_contrastive.batch import Batch
from dist_contrastive.config import BatchConfig, require
from dist_contrastive.memory_plan import TensorCount, example, measure_peak
from dist_contrastive.recipes import RECIPES
from dist_contrastive.trainer import Trainer

PROG = "python -m benchmarks.large_batch"
MIB = 2**20


@dataclass(frozen=True)
class Command:
    recipe: str = "photos"
    size: int = 4096
    """Global batch."""
    micro: int = 128
    rounds: int = 3
    """How often the two are timed in turns."""
    out: Path = Path("large_batch.json")


def trainer_and_batch(recipe: str, size: int, micro: int) -> tuple[Trainer, Batch]:
    """One rank on the CPU with a batch of noise, past its first steps, which make gradients and caches."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = replace(RECIPES[recipe](), batch=BatchConfig(size=size, micro=micro))
    trainer = Trainer(config, Accelerator(cpu=True), steps_per_epoch=1, dataset_sha256="")
    warm = example(config, 2 * micro)
    for _ in range(2):
        trainer.large_batch.step(warm, 0)
        trainer.method.zero_grad(set_to_none=True)
    return trainer, example(config, size)


def memory(recipe: str, size: int, micro: int) -> dict[str, float]:
    """Peak of one step in MiB beyond what is held before it: resident memory, and tensors."""
    trainer, batch = trainer_and_batch(recipe, size, micro)

    def step() -> None:
        trainer.large_batch.step(batch, 0)

    resident = measure_peak(step, torch.device("cpu"))
    trainer.method.zero_grad(set_to_none=True)
    with TensorCount() as tensors:
        step()
    embedding = trainer.large_batch.embedding_bytes(batch.samples(slice(0, 2))) / 2 * size
    return {"resident_mib": resident / MIB, "tensors_mib": tensors.peak / MIB, "embeddings_mib": embedding / MIB}


def timed(command: Command) -> dict[str, list[float]]:
    """Milliseconds an image takes, in plain steps at the micro-batch's size and in cached steps, round by round."""
    trainer, batch = trainer_and_batch(command.recipe, command.size, command.micro)
    times: dict[str, list[float]] = {"plain": [], "cached": []}
    for _ in range(command.rounds):
        for name, parts in (("plain", command.size // command.micro), ("cached", 1)):
            start = time.perf_counter()
            for number in range(parts):
                size = command.size // parts
                trainer.large_batch.step(batch.samples(slice(number * size, (number + 1) * size)), 0)
                trainer.method.zero_grad(set_to_none=True)
            times[name].append(1e3 * (time.perf_counter() - start) / command.size)
    return times


def main(argv: Sequence[str] | None = None) -> None:
    command = cli.parse(Command, argv, prog=PROG)
    require(command.recipe in RECIPES, f"unknown recipe {command.recipe}{cli.nearest(command.recipe, RECIPES)}")
    require(command.size % command.micro == 0, f"--micro {command.micro}: give a divisor of --size {command.size}")
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        plain, cached = (
            pool.apply(memory, (command.recipe, size, command.micro)) for size in (command.micro, command.size)
        )
    times = timed(command)
    allowed = {kind: plain[kind] + cached["embeddings_mib"] for kind in ("resident_mib", "tensors_mib")}
    ratios = [c / p for c, p in zip(times["cached"], times["plain"], strict=True)]
    result: dict[str, Any] = {
        "recipe": command.recipe,
        "size": command.size,
        "micro": command.micro,
        "plain": plain,
        "cached": cached,
        "memory_ratio": {kind: cached[kind] / allowed[kind] for kind in allowed},
        "ms_an_image": times,
        "time_ratio": ratios,
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "load_average_1min": os.getloadavg()[0],
    }
    command.out.write_text(json.dumps(result, indent=1))
    print(
        f"plain step at {command.micro}: {plain['resident_mib']:.0f} MiB resident, {plain['tensors_mib']:.0f} in tensors"
    )
    print(
        f"cached step at {command.size} in micro-batches of {command.micro}: {cached['resident_mib']:.0f} MiB resident, "
        f"{cached['tensors_mib']:.0f} in tensors, of which embeddings {cached['embeddings_mib']:.0f}"
    )
    for kind, ratio in result["memory_ratio"].items():
        print(f"cached / (plain + embeddings), {kind.removesuffix('_mib')}: {ratio:.2f}")
    print(
        f"time an image: plain {statistics.median(times['plain']):.2f} ms, cached {statistics.median(times['cached']):.2f} ms; "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    sys.exit(cli.main_guard(main))
