"""`python -m benchmarks.large_batch [RECIPE ...]`: what does gradient caching cost in memory and time?

A step at the full global batch in micro-batches, beside a plain step at the micro-batch's size: the most memory that each
holds at once, resident (each in a fresh process) and in tensors, and the time an image takes, in turns within one process.

    python -m benchmarks.large_batch
    python -m benchmarks.large_batch photos --size 1024 --micro 64 --out records/large_batch
"""

import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import torch
import tyro
from accelerate import Accelerator

from benchmarks.frame import Record, Turns, at_least, bars, begin, ratios, seconds, spread, take_turns
from dist_contrastive import cli
from dist_contrastive.batch import Batch
from dist_contrastive.config import BatchConfig, require
from dist_contrastive.recipes import build_recipe
from dist_contrastive.step.memory import TensorCount, measure_peak
from dist_contrastive.step.memory_plan import example
from dist_contrastive.trainer import Trainer

QUESTION = "what does gradient caching cost in memory and time?"
PLAIN, CACHED = "plain step", "cached step"
CPU = torch.device("cpu")
MIB = 2**20
RESIDENT, TENSORS, EMBEDDINGS, TIME = "MiB resident", "MiB in tensors", "MiB of embeddings", "ms an image"


@dataclass(frozen=True)
class Command(Turns):
    recipes: Annotated[tuple[str, ...], tyro.conf.Positional] = ("cifar10_cpu", "photos", "photos_mocov3")
    """The recipes to measure."""
    size: int = 4096
    """Global batch."""
    micro: int = 128
    """Samples of a micro-batch, and of the plain step beside it."""
    rounds: int = 3
    """How often the two are measured in turns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "size", "micro")
        require(self.size % self.micro == 0, f"--micro {self.micro}: give a divisor of --size {self.size}")


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

    resident = measure_peak(step, CPU)
    trainer.method.zero_grad(set_to_none=True)
    with TensorCount() as tensors:
        step()
    embedding = trainer.gradient.embedding_bytes(batch.part(slice(0, 2))) / 2 * size
    return {RESIDENT: resident / MIB, TENSORS: tensors.peak / MIB, EMBEDDINGS: embedding / MIB}


def timed(recipe: str, command: Command) -> dict[str, list[float]]:
    """Milliseconds an image takes, in plain steps at the micro-batch's size and in cached steps, round by round."""
    trainer, batch = trainer_and_batch(recipe, command.size, command.micro)

    def steps(parts: int) -> None:
        size = command.size // parts
        for number in range(parts):
            part = batch.part(slice(number * size, (number + 1) * size))
            trainer.gradient.compute(part, trainer.clock, logged=False)
            trainer.method.zero_grad(set_to_none=True)

    def ms_an_image(parts: int) -> float:
        return 1e3 * seconds(partial(steps, parts), CPU) / command.size

    contenders = {PLAIN: partial(ms_an_image, command.size // command.micro), CACHED: partial(ms_an_image, 1)}
    return take_turns(contenders, command.rounds, warmup=0)


def compare(recipe: str, command: Command, record: Record) -> None:
    """Everything about one recipe; memory as often as time, each in a fresh process."""
    sizes = {PLAIN: command.micro, CACHED: command.size}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        calls = {name: partial(pool.apply, memory, (recipe, size, command.micro)) for name, size in sizes.items()}
        runs = take_turns(calls, command.rounds, warmup=0)
    for name, values in timed(recipe, command).items():
        record.add(recipe, name, TIME, values)
        for kind in (RESIDENT, TENSORS, EMBEDDINGS):
            record.add(recipe, name, kind, [run[kind] for run in runs[name]])


def shares(record: Record, recipe: str, kind: str) -> list[float]:
    """Memory of the cached step beside that of the plain one and the embeddings, round by round."""
    cached, plain = (record.values(recipe, name, kind) for name in (CACHED, PLAIN))
    embeddings = record.values(recipe, CACHED, EMBEDDINGS)
    return ratios(cached, [p + e for p, e in zip(plain, embeddings, strict=True)])


def table(record: Record, recipes: Sequence[str]) -> str:
    """Markdown: a row a recipe."""
    kinds = {RESIDENT: "resident", TENSORS: "in tensors"}
    lines = [
        f"| recipe, all measured | {' | '.join(f'MiB {name}: plain, cached' for name in kinds.values())} | embeddings, MiB | "
        f"{' | '.join(f'cached ÷ (plain + embeddings), {name}' for name in kinds.values())} | time an image, cached ÷ plain |",
        f"|{'---|' * 7}",
    ]
    for recipe in recipes:
        medians = [
            ", ".join(f"{statistics.median(record.values(recipe, name, kind)):.0f}" for name in (PLAIN, CACHED))
            for kind in kinds
        ]
        cells = [
            recipe,
            *medians,
            f"{statistics.median(record.values(recipe, CACHED, EMBEDDINGS)):.1f}",
            *(spread(shares(record, recipe, kind)).format() for kind in kinds),
            spread(ratios(*(record.values(recipe, name, TIME) for name in (CACHED, PLAIN)))).format(),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    command, record = begin(Command, "large_batch", argv, __doc__, question=QUESTION)
    for recipe in command.recipes:
        build_recipe(recipe)  # a mistyped name is refused before the first measurement
    for recipe in command.recipes:
        compare(recipe, command, record)
        print(table(record, [recipe]).splitlines()[-1], flush=True)
    body = (
        f"A step at {command.size} in micro-batches of {command.micro}, beside plain steps at {command.micro}; medians (min to "
        f"max) of {command.rounds} rounds.\n\n{table(record, command.recipes)}"
    )
    record.write("What gradient caching costs", body, {"time": bars(record, TIME), "memory": bars(record, RESIDENT)})


if __name__ == "__main__":
    sys.exit(cli.main_guard(main))
