"""`python -m benchmarks.embed`: how fast does embed turn images into vectors on the disk, beside the encoder alone?

The encoder alone: forward passes over a batch that lies on the device already, in eval mode and fp32, with the same batch size
and threads. Ours: all that `embed` does once the run and the dataset are open, that is reading, decoding, cutting, encoding,
projecting, and writing parts. Peak memory is that of ours over few images and over several times as many.

    python -m benchmarks.embed
    python -m benchmarks.embed --run runs/mine --data data/mine.beton --batch-size 64 --device cpu
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from benchmarks.frame import (
    Budget,
    Peak,
    Record,
    Turns,
    at_least,
    bars,
    begin,
    choose_device,
    comparison,
    ratios,
    seconds,
    spread,
    take_turns,
)
from dist_contrastive.cli import main_guard
from dist_contrastive.embedder import Embedder
from dist_contrastive.evaluation.precision import full_precision
from dist_contrastive.launch import connect_for_use
from dist_contrastive.run_folder.trained import open_run
from dist_contrastive.vectors.embedding import about, write_parts
from dist_contrastive.vectors.parts import Parts
from dist_contrastive.vectors.source import BadImages, VectorSource, open_vector_source

QUESTION = "how fast does embed turn images into vectors on the disk, beside the encoder alone?"
RATE, MEMORY = "images/s", "MB at most beyond what is held before"
OURS, ALONE = "embed", "encoder alone"


@dataclass(frozen=True)
class Command(Turns):
    run: Path = Path("runs/demo")
    """A finished run's folder."""
    data: Path = Path("data/photos.beton")
    """A packed dataset, or a folder of images."""
    batch_size: int = 256
    """Images that go through the encoder at once."""
    threads: int = 0
    """Threads that decode; 0 takes one for each core but one."""
    times: int = 4
    """How many times as many images the second measurement of memory has."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the encoder computes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "batch_size")
        at_least(self, 0, "threads")
        at_least(self, 2, "times")


def alone(embedder: Embedder, source: VectorSource, command: Command) -> Callable[[], object]:
    """The encoder over as many batches as the source has, always of the same images."""
    (chunk, *_) = source.chunks(range(min(command.batch_size, source.num_items)), command.batch_size)
    images = embedder.view.normalized(chunk.squares, embedder.device).contiguous(memory_format=torch.channels_last)
    whole, rest = divmod(source.num_items, len(images))

    def run() -> None:
        with full_precision(embedder.device):
            for size in [len(images)] * whole + [rest] * bool(rest):
                embedder.method.exported(images[:size])

    return run


def ours(embedder: Embedder, source: VectorSource, command: Command, times: int = 1) -> Callable[[], object]:
    """All parts of the source, so many times, into a folder that is removed."""

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            said = about(embedder.run, source, "all")
            parts = Parts(
                Path(folder) / "vectors.parquet", said,
                num_items=source.num_items, classes=source.classes, feature_size=embedder.feature_size,
            )  # fmt: skip
            with closing(parts):
                parts.open()
                numbers = list(range(len(parts.ranges))) * times
                write_parts(parts, numbers, source, embedder, command.batch_size, BadImages(source.num_items))

    return run


def measure(embedder: Embedder, source: VectorSource, command: Command, record: Record) -> None:
    case = f"{command.data.name}, {embedder.run.config.encoder.name}, {embedder.view.size} px"
    contenders = {OURS: ours(embedder, source, command), ALONE: alone(embedder, source, command)}
    calls = {name: partial(seconds, call, embedder.device) for name, call in contenders.items()}
    for name, took in take_turns(calls, command.rounds, budget=Budget(command.minutes)).items():
        record.add(case, name, RATE, [source.num_items / one for one in took])
    for times in (1, command.times):
        with Peak() as peak:
            ours(embedder, source, command, times)()
        record.add(f"{times * source.num_items:,} images", OURS, MEMORY, [peak.mb])


def main(argv: Sequence[str] | None = None) -> None:
    command, record = begin(Command, "embed", argv, __doc__, question=QUESTION, packages=("pyarrow", "timm"))
    choose_device(command.device)
    device = connect_for_use(command.device)
    embedder = Embedder(open_run(command.run)).to(device)
    config = embedder.run.config
    with open_vector_source(command.data, config, threads=command.threads, device=device) as source:
        measure(embedder, source, command, record)
        share = ratios(*(one.values for one in record.of(RATE)))
    few, many = (one.values[0] for one in record.of(MEMORY))
    body = (
        f"On {device.type}, batches of {command.batch_size}, {torch.get_num_threads()} threads of torch. embed reaches "
        f"{spread(share).format()} of the encoder alone; over {command.times} times as many images its memory rises by "
        f"{many:.0f} MB instead of {few:.0f} MB.\n\n{comparison(record, (RATE,), ALONE)}\n{comparison(record, (MEMORY,), None)}"
    )
    record.write("Images as vectors", body, {"images": bars(record, RATE)})


if __name__ == "__main__":
    sys.exit(main_guard(main))
