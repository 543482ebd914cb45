"""`python -m benchmarks.memory RECIPE [--memory-gib 16]`: what would the memory plan choose on another machine?

Counts the tensors of a step on the CPU, in bfloat16 where the other machine would use a 16-bit precision, and prints for
each micro-batch what a step is predicted to take. Nothing is measured: convolution workspaces and the allocator's waste are
not in it, which is why the plan fills no more than nine tenths.

    python -m benchmarks.memory cifar10_simclr_4096_t4 cifar10_moco_t4
    python -m benchmarks.memory imagenet_simclr_4096 --memory-gib 80 --ranks 8 --out records/memory
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
import tyro
from accelerate import Accelerator

from benchmarks.frame import Options, at_least, begin, curves
from dist_contrastive import cli
from dist_contrastive.batch import Share
from dist_contrastive.recipes import build_recipe
from dist_contrastive.step.memory import USABLE
from dist_contrastive.step.memory_plan import predict
from dist_contrastive.trainer import Trainer

QUESTION = "what would the memory plan choose on another machine?"
PEAK = "GiB at the worst moment of a step"
GIB = 2**30
CONTEXT_GIB = 0.5
"""What CUDA itself takes on a GPU before the first tensor (about; it differs from driver to driver)."""


@dataclass(frozen=True)
class Command(Options):
    recipes: Annotated[tuple[str, ...], tyro.conf.Positional]
    """The recipes to plan for."""
    memory_gib: float = 16.0
    """Memory of the card, in the units its maker uses (10⁹ bytes)."""
    precision: Literal["fp32", "fp16"] = "fp16"
    """What the other machine computes in."""
    ranks: int = 1
    """How many ranks share the global batch."""
    micros: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    """Sizes of micro-batches, in samples of a rank, to predict for."""

    def __post_init__(self) -> None:
        at_least(self, 1, "ranks", "micros", "memory_gib")


def plan(name: str, command: Command) -> dict[str, Any]:
    """Predicted memory of one recipe, in GiB."""
    config = build_recipe(name)
    accelerator = Accelerator(cpu=True, mixed_precision="no" if command.precision == "fp32" else "bf16")
    trainer = Trainer(config, accelerator, steps_per_epoch=1, dataset_sha256="")
    rank_batch = Share(config.batch.size, num_ranks=command.ranks).rank_batch
    memory = predict(trainer.gradient, config, rank_batch)
    held = sum(t.numel() * t.element_size() for t in trainer.method.state_dict().values())
    usable = USABLE * (command.memory_gib * 1e9 - held - CONTEXT_GIB * GIB)
    micro = memory.largest(usable, rank_batch)
    micros = sorted({min(m, rank_batch) for m in (*command.micros, rank_batch)})
    return {
        "recipe": name,
        "rank_batch": rank_batch,
        "precision": command.precision,
        "held_gib": held / GIB,
        "per_sample_mib": memory.per_sample / 2**20,
        "step": {key: value / GIB for key, value in asdict(memory).items() if key != "per_sample"},
        "usable_gib": usable / GIB,
        "micro": micro,
        "peak_gib": memory.peak(micro, rank_batch) / GIB if micro else None,
        "peaks_gib": {m: memory.peak(m, rank_batch) / GIB for m in micros},
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each recipe and micro-batch."""
    lines = ["| recipe, all simulated | samples a rank | held, GiB | micro-batch | GiB a step | |", f"|{'---|' * 6}"]
    for result in results:
        for micro, peak in result["peaks_gib"].items():
            fits = "fits" if peak <= result["usable_gib"] else f"more than the {result['usable_gib']:.2f} usable"
            held = f"{result['held_gib']:.2f}"
            lines.append(f"| {result['recipe']} | {result['rank_batch']} | {held} | {micro} | {peak:.2f} | {fits} |")
    return "\n".join(lines) + "\n"


def describe(result: dict[str, Any]) -> str:
    """What the plan makes of a recipe."""
    chosen = (
        f"micro-batches of {result['micro']}, predicted {result['peak_gib']:.2f} GiB"
        if result["micro"]
        else "none: nothing fits"
    )
    return f"- `{result['recipe']}`: the plan takes {chosen}; {result['usable_gib']:.2f} GiB are usable\n"


def main(argv: Sequence[str] | None = None) -> None:
    command, record = begin(Command, "memory", argv, __doc__, question=QUESTION, packages=("timm",))
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    results = [plan(name, command) for name in command.recipes]
    record.details["plans"] = results
    for result in results:
        for micro, peak in result["peaks_gib"].items():
            record.add(f"micro-batch {micro}", result["recipe"], PEAK, [peak], "simulated")
    body = (
        f"{command.precision}, {command.memory_gib:g} GB, {command.ranks} rank(s). Tensors are counted on the CPU; nothing is "
        f"measured.\n\n{table(results)}\n{''.join(map(describe, results))}"
    )
    figure = curves(record, PEAK, lambda case: float(case.split()[-1]), xlabel="samples of a micro-batch")
    record.write("What the memory plan would choose", body, {"memory": figure})


if __name__ == "__main__":
    sys.exit(cli.main_guard(main))
