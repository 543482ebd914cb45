"""`python -m benchmarks.loss_memory`: what do CLIP's and SigLIP's losses hold at a large global batch?

Value and gradient of each loss at one rank on the CPU, from embeddings of images and texts that are there already, in a process
of its own: the most bytes of tensors held at once, embeddings and their gradients included, and the most resident memory beyond
what the process takes once everything is imported. Beside them the same loss in plain torch over the whole matrix of logits, at
a smaller batch; at the large one its tensors are counted without being made, as its memory may not be there.

    python -m benchmarks.loss_memory
    python -m benchmarks.loss_memory --size 8192 --dense-size 2048 --rounds 3 --out records/loss_memory
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.frame import Kind, Record, Turns, at_least, bars, begin, comparison, take_turns
from dist_contrastive.batch import Samples
from dist_contrastive.cli import main_guard
from dist_contrastive.config import EncoderConfig, HeadConfig, TextConfig
from dist_contrastive.methods import METHODS
from dist_contrastive.methods.base import MethodSettings
from dist_contrastive.models.encoders import build_encoder
from dist_contrastive.step.memory import TensorCount, measure_peak

QUESTION = "what do CLIP's and SigLIP's losses hold at a large global batch?"
BLOCKS, DENSE, COUNTED = "in blocks", "whole matrix", "whole matrix, counted"
"""How a loss is computed: as this package does; in plain torch; the same on tensors without values."""
NAMES = {"clip": "CLIP", "siglip": "SigLIP"}
GB = 1e9
TENSORS, RESIDENT, SECONDS = "GB of tensors at once", "GB resident beyond the imports", "s"


@dataclass(frozen=True)
class Command(Turns):
    size: int = 32768
    """Global batch: pairs of an image and a text."""
    dimension: int = 512
    """Of an embedding."""
    dense_size: int = 4096
    """Global batch at which the whole matrix is measured."""
    rounds: int = 1
    """How often each case is measured, each time in a process of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 2, "size", "dense_size")
        at_least(self, 1, "dimension")


def loss_in_blocks(name: str, size: int, dimension: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The method's own loss, with its learnt scale and bias; its towers are as small as they may be."""
    head = HeadConfig(layers=1, output_size=dimension)
    text = TextConfig(vocabulary=300, context=8, width=16, layers=1, heads=1)
    config = METHODS[name].Config(projector=head, text=text)  # type: ignore[call-arg]
    encoder = build_encoder(EncoderConfig(name="resnet10_w16", stem="small"), 16)
    method = METHODS[name](MethodSettings(config, encoder, seed=0, global_batch=size))
    numbers = torch.arange(size)
    samples = Samples(labels=torch.zeros(size, dtype=torch.int64), indices=numbers, epoch=0)
    return lambda images, texts: method.loss({"z": images[None], "text": texts[None]}, samples)["loss"]


def loss_of_matrix(name: str, images: Tensor, texts: Tensor) -> Tensor:
    """What the papers' pseudocode computes, by torch's own functions; scale and bias are learnt, too."""
    log_scale, bias = (torch.full((), x, device=images.device).requires_grad_() for x in (2.659, -10.0))
    own = torch.arange(len(images), device=images.device)
    if name == "clip":
        logits = log_scale.exp() * images @ texts.T
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    logits = log_scale.exp() * images @ texts.T + bias
    signs = 2 * torch.eye(len(images), device=images.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(images)


def measure(name: str, how: str, size: int, dimension: int) -> dict[str, float]:
    """One pass: GB of tensors at once, GB resident beyond the imports (none where tensors are only counted), seconds."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = torch.device("meta" if how == COUNTED else "cpu")
    in_blocks = loss_in_blocks(name, size, dimension)
    counts: list[int] = []

    def run() -> None:
        with TensorCount() as tensors:  # of all tensors: the embeddings are made within it
            generator = None if how == COUNTED else torch.Generator().manual_seed(0)
            images, texts = (
                F.normalize(torch.randn(size, dimension, generator=generator, device=device), dim=1).requires_grad_()
                for _ in range(2)
            )
            loss = in_blocks(images, texts) if how == BLOCKS else loss_of_matrix(name, images, texts)
            loss.backward()
            assert images.grad is not None
            assert texts.grad is not None
            counts.append(tensors.peak)

    start = time.perf_counter()
    if how == COUNTED:
        run()
        return {TENSORS: counts[0] / GB}
    resident = measure_peak(run, device)
    return {TENSORS: counts[0] / GB, RESIDENT: resident / GB, SECONDS: time.perf_counter() - start}


def measure_all(command: Command, record: Record) -> None:
    """Each case in processes of its own, one after the other."""
    sizes = ((BLOCKS, command.size), (BLOCKS, command.dense_size), (DENSE, command.dense_size), (COUNTED, command.size))
    cases = [(name, how, size) for name in NAMES for how, size in sizes]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        calls = {
            f"{NAMES[name]}, {size:,} pairs/{how}": partial(pool.apply, measure, (name, how, size, command.dimension))
            for name, how, size in cases
        }
        for key, runs in take_turns(calls, command.rounds, warmup=0).items():
            case, _, how = key.partition("/")
            kind: Kind = "simulated" if how == COUNTED else "measured"
            for metric in runs[0]:
                record.add(case, how, metric, [run[metric] for run in runs], kind)


def main(argv: Sequence[str] | None = None) -> None:
    command, record = begin(Command, "loss_memory", argv, __doc__, question=QUESTION)
    measure_all(command, record)
    inputs_gb = 4 * command.size * command.dimension * 4 / GB
    body = (
        f"{command.dimension} dimensions, float32, one rank.\n\n"
        f"{comparison(record, (TENSORS, RESIDENT, SECONDS), DENSE)}\n"
        f"Tensors: all that live at once, the two embeddings and their gradients ({inputs_gb:.3f} GB at the large "
        "batch) included. Resident: the process's peak beyond what it takes with everything imported and before the embeddings "
        "are made, so that libraries' own work space is in it. Whole matrix: the papers' pseudocode in plain torch. Counted: its "
        "tensors at the large batch, on a device without memory. Seconds include making the embeddings and counting.\n"
    )
    figure = bars(record, TENSORS)
    record.write("What the losses over pairs of images and texts hold", body, {"memory": figure})


if __name__ == "__main__":
    sys.exit(main_guard(main))
