"""`python -m benchmarks.loss`: what do the contrastive losses take, in time and in memory?

Value and gradient of NT-Xent over 2B embeddings at one rank, from embeddings that are there already: this package's loss, as it
chooses to compute it on the device (on GPUs also without its kernels); plain torch over the whole matrix of similarities;
lightly's `NTXentLoss`. Then queries against a queue of 65,536 keys, by the same ones. A contender whose matrices do not fit into
the free memory is not run.

    python -m benchmarks.loss
    python -m benchmarks.loss --rows 1024 131072 --queries --rounds 1
    python -m benchmarks.loss --device cpu --rows 512 1024 --queries 64 --queue 4096 --rounds 2
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.frame import (
    Budget,
    Record,
    Turns,
    at_least,
    begin,
    choose_device,
    comparison,
    curves,
    timed_turns,
)
from dist_contrastive.cli import main_guard
from dist_contrastive.config import require
from dist_contrastive.losses import fused
from dist_contrastive.losses.infonce import nt_xent, queue_nce
from dist_contrastive.simulate.patches import patched
from dist_contrastive.step.memory import TensorCount, measure_peak

QUESTION = "what do the contrastive losses take, in time and in memory?"
MS, TENSORS, MEMORY = "ms, forward and backward", "MB of tensors beyond inputs", "MB of memory beyond inputs"
OURS, BLOCKS, DENSE, LIGHTLY = "ours", "ours, in blocks", "whole matrix", "lightly"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEMPERATURE = 0.1
ROWS = (1024, 4096, 8192, 16384, 32768, 65536, 131072)
MOST_ROWS_ON_CPU = 32768
"""Of the default ones: four times as many take sixteen times as long."""
MATRICES = {DENSE: 4, LIGHTLY: 5}  # of float32
"""About how many matrices of all similarities are held at once: logits, masks, their softmax, gradients."""
FREE_PART = 0.6
"""Of the free memory, which may be filled."""
MB = 1e6
Loss = Callable[[Tensor], Tensor]
"""Of embeddings [2, B, E]: the value."""


@dataclass(frozen=True)
class Command(Turns):
    rows: tuple[int, ...] = ()
    """2B, all embeddings of a batch of pairs; without any: 1,024 to 131,072, on processors to 32,768."""
    dimension: int = 128
    """Of an embedding."""
    queries: tuple[int, ...] = (256, 2048)
    """How many queries are compared with the queue; none leaves it out."""
    queue: int = 65536
    """Keys in the queue."""
    case_seconds: float = 30.0
    """Take fewer rounds of a case where all of them would take longer than this."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the losses are computed."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the embeddings; training hands them over in fp32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 4, "rows")
        at_least(self, 1, "dimension", "queries", "queue")
        for rows in self.rows:
            require(rows % 2 == 0, f"--rows {rows}: give an even number, two views of each sample")
        require(self.case_seconds > 0, f"--case-seconds {self.case_seconds:g}: give a positive number")


def our_nt_xent(embeddings: Tensor) -> Tensor:
    rows = F.normalize(embeddings, dim=-1).flatten(0, 1)
    return nt_xent(rows, rows, offset=0, num_views=2, temperature=TEMPERATURE)


def in_blocks(loss: Loss) -> Loss:
    """One of ours without its kernels."""

    def value(embeddings: Tensor) -> Tensor:
        with patched(fused, "_can_choose", lambda anchors, others: False):
            return loss(embeddings)

    return value


def dense_nt_xent(embeddings: Tensor) -> Tensor:
    """Equation 1 of SimCLR in plain torch."""
    rows = F.normalize(embeddings, dim=-1).flatten(0, 1)
    logits = rows @ rows.T / TEMPERATURE
    logits = logits.masked_fill(torch.eye(len(rows), dtype=torch.bool, device=rows.device), -torch.inf)
    positives = torch.arange(len(rows), device=rows.device).roll(len(rows) // 2)
    return F.cross_entropy(logits, positives)


def lightly_nt_xent() -> Loss:
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=TEMPERATURE)

    def value(embeddings: Tensor) -> Tensor:
        found: Tensor = loss(*embeddings)
        return found

    return value


def our_queue(queue: Tensor) -> Loss:
    """Of queries and keys [2, B, E]; gradient reaches the queries alone."""

    def value(embeddings: Tensor) -> Tensor:
        queries, keys = F.normalize(embeddings, dim=-1)
        return queue_nce(queries, keys, queue, temperature=TEMPERATURE)

    return value


def dense_queue(queue: Tensor) -> Loss:
    """Algorithm 1 of MoCo in plain torch."""

    def value(embeddings: Tensor) -> Tensor:
        queries, keys = F.normalize(embeddings, dim=-1)
        positive = (queries * keys.detach()).sum(1, keepdim=True)
        logits = torch.cat([positive, queries @ queue.T], dim=1) / TEMPERATURE
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))

    return value


def lightly_queue(num_keys: int, dimension: int, device: torch.device, dtype: torch.dtype) -> Loss:
    """Its memory bank takes the keys of each call in, too."""
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=TEMPERATURE, memory_bank_size=(num_keys, dimension)).to(device, dtype)

    def value(embeddings: Tensor) -> Tensor:
        queries, keys = embeddings
        found: Tensor = loss(queries, keys.detach())
        return found

    return value


def free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def fits(name: str, case: str, pairs: int, device: torch.device, record: Record) -> bool:
    """Whether a contender's matrices of so many numbers do, at once; where they don't, a line says so."""
    needed = 4 * MATRICES.get(name, 0) * pairs
    if needed <= FREE_PART * free_bytes(device):
        return True
    matrices = f"{MATRICES[name]} matrices of {4 * pairs / 1e9:.1f} GB at once"
    record.leave_out(
        f"{name} at {case}", f"it holds {matrices}, too much for the {free_bytes(device) / 1e9:.1f} GB free"
    )
    return False


def measure(
    case: str, losses: dict[str, Loss], num: int, pairs: int, command: Command, device: torch.device, budget: Budget,
    record: Record,
) -> None:  # fmt: skip
    """Time and memory of each loss at embeddings [2, num, E]."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, num, command.dimension, generator=generator)
    embeddings = embeddings.to(device, DTYPES[command.dtype]).requires_grad_()

    def both_passes(loss: Loss) -> Callable[[], None]:
        def run() -> None:
            embeddings.grad = None
            loss(embeddings).backward()

        return run

    runs = {name: both_passes(loss) for name, loss in losses.items() if fits(name, case, pairs, device, record)}
    times = timed_turns(runs, device, command.rounds, at_least_s=0.1, at_most_s=command.case_seconds, budget=budget)
    for name, run in runs.items():
        record.add(case, name, MS, [1e3 * took for took in times[name]])
        embeddings.grad = None
        record.add(case, name, MEMORY, [measure_peak(run, device) / MB])
        if sum(times[name]) / len(times[name]) < command.case_seconds / 4:
            embeddings.grad = None
            with TensorCount() as tensors:
                run()
            record.add(case, name, TENSORS, [tensors.peak / MB])


def measure_all(command: Command, device: torch.device, record: Record) -> None:
    budget = Budget(command.minutes)
    has_lightly = record.has_peer("lightly", "lightly.loss")
    most = MOST_ROWS_ON_CPU if device.type == "cpu" else max(ROWS)
    for rows in command.rows or [rows for rows in ROWS if rows <= most]:
        losses: dict[str, Loss] = {OURS: our_nt_xent, DENSE: dense_nt_xent}
        if device.type == "cuda":
            losses[BLOCKS] = in_blocks(our_nt_xent)
        if has_lightly:
            losses[LIGHTLY] = lightly_nt_xent()
        case = f"NT-Xent, 2B = {rows:,}"
        if record.series and budget.is_over():
            record.leave_out(case, "the time was over")
            continue
        measure(case, losses, rows // 2, rows**2, command, device, budget, record)
    generator = torch.Generator().manual_seed(1)
    queue = F.normalize(torch.randn(command.queue, command.dimension, generator=generator), dim=1)
    queue = queue.to(device, DTYPES[command.dtype])
    for queries in command.queries:
        losses = {OURS: our_queue(queue), DENSE: dense_queue(queue)}
        if device.type == "cuda":
            losses[BLOCKS] = in_blocks(losses[OURS])
        if has_lightly:
            losses[LIGHTLY] = lightly_queue(command.queue, command.dimension, device, DTYPES[command.dtype])
        case = f"queue of {command.queue:,}, B = {queries:,}"
        if record.series and budget.is_over():
            record.leave_out(case, "the time was over")
            continue
        measure(case, losses, queries, queries * command.queue, command, device, budget, record)


def rows_of(case: str) -> float | None:
    """2B of a case of NT-Xent."""
    return float(case.rpartition(" ")[2].replace(",", "")) if case.startswith("NT-Xent") else None


def main(argv: Sequence[str] | None = None) -> None:
    command, record = begin(Command, "loss", argv, __doc__, question=QUESTION)
    device = choose_device(command.device)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    measure_all(command, device, record)
    body = (
        f"On {device.type}; {command.dimension} dimensions, {command.dtype}.\n\n"
        f"{comparison(record, (MS, MEMORY, TENSORS), OURS)}\n"
        "Memory: how far the process's resident memory, on a GPU what is allocated, rises in both passes over what is held when "
        "they begin, the embeddings; their gradient is in it. Tensors: the most that live at once, counted.\n"
    )
    figures = {
        name: curves(record, metric, rows_of, xlabel="2B, embeddings of the batch")
        for name, metric in (("time", MS), ("memory", MEMORY))
    }
    record.write("What the contrastive losses take", body, figures)


if __name__ == "__main__":
    sys.exit(main_guard(main))
