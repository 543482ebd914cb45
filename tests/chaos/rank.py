"""An entry point like `dist_contrastive.train` whose rank does itself an injury: CHAOS holds which, where and when, as JSON."""

import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from dist_contrastive import distributed, liveness
from dist_contrastive.batch import Batch
from dist_contrastive.data import loader
from dist_contrastive.train import main
from dist_contrastive.trainer import StepReport, Trainer


def fail(trainer: Trainer, batch: Batch) -> None:
    raise KeyError("injected fault")


def not_a_number(trainer: Trainer, batch: Batch) -> None:
    parameter = next(p for p in trainer.method.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * float("nan"))


def out_of_memory(trainer: Trainer, batch: Batch) -> None:
    """Once, in the forward pass: the step is repeated in smaller micro-batches."""
    forward = trainer.replicas.forward

    def failing(*arguments: Any, **options: Any) -> Any:
        trainer.replicas.forward = forward  # type: ignore[method-assign]
        raise torch.OutOfMemoryError("injected")

    trainer.replicas.forward = failing  # type: ignore[method-assign]


def no_memory_for_the_optimizer(trainer: Trainer, batch: Batch) -> None:
    def failing(left_out: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("injected")

    trainer.replicas.update = failing  # type: ignore[method-assign]


def clock_jumps(trainer: Trainer, batch: Batch) -> None:
    """An hour back; what measures how long something took must not ask this clock."""
    true = time.time
    time.time = lambda: true() - 3600.0


def come_late(trainer: Trainer, batch: Batch) -> None:
    """This rank's process is well, and does not come."""
    time.sleep(1000)


def loader_dies(trainer: Trainer, batch: Batch) -> None:
    """The thread that reads ahead ends with an error of its own."""

    def failing(*arguments: Any, **options: Any) -> Any:
        raise OSError("injected: the disk is gone")

    loader.Crops.cut = failing  # type: ignore[method-assign]


def linger(trainer: Trainer, batch: Batch) -> None:
    """From here on steps take long: the run is still there when another launch comes to its folder."""
    compute = trainer.gradient.compute

    def slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(2.0)
        return compute(*arguments, **options)

    trainer.gradient.compute = slowly  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[Trainer, Batch], None]] = {
    function.__name__: function
    for function in (
        fail, not_a_number, out_of_memory, no_memory_for_the_optimizer, clock_jumps, come_late, loader_dies, linger
    )
}  # fmt: skip


def install(kind: str, rank: int, step: int) -> None:
    """Let `kind` happen to `rank` before the update that follows `step` others, once."""
    update = Trainer.update
    lock = threading.Lock()
    done = False

    def disturbed(self: Trainer, batch: Batch) -> list[StepReport]:
        nonlocal done
        with lock:
            due = not done and self.step == step and distributed.rank() == rank
            done = done or due
        if due:
            FAULTS[kind](self, batch)
        return update(self, batch)

    Trainer.update = disturbed  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ.get("CHAOS"):
        install(**json.loads(os.environ["CHAOS"]))
    liveness.run_rank(main)
