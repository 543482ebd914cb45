"""`python -m benchmarks.export EXPORT --run RUN`: what does an exported model cost beside torch, in fp32 and int8, and what is it
worth?

The same uint8 images, of the size that the encoder takes, through torch, through ONNX in fp32 and in int8: milliseconds for one
image, images a second for many. Sizes of files and scores are those that the export noted.

    python -m benchmarks.export runs/demo/export --run runs/demo
    python -m benchmarks.export exports/photos --run runs/photos --batch 256 --rounds 3
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

import dist_contrastive
from benchmarks.frame import Budget, Record, Turns, at_least, bars, begin, comparison, timed_turns
from dist_contrastive.cli import main_guard
from dist_contrastive.config import require
from dist_contrastive.exporting.model import ExportedModel
from dist_contrastive.exporting.names import MODEL, MODEL_INT8, TIMM_WEIGHTS

QUESTION = "what does an exported model cost beside torch, in fp32 and in int8, and what is it worth?"
LATENCY, THROUGHPUT, SIZE = "ms, one image", "images/s", "MB"
TORCH, FP32, INT8 = "torch fp32", "ONNX fp32", "ONNX int8"
CASE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Command(Turns):
    """What is compared."""

    export: Annotated[Path, tyro.conf.Positional]
    """The folder of an export."""
    run: Path
    """The run that it came from."""
    batch: int = 64
    """Images of a call where throughput is measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "batch")


def measure(command: Command, record: Record) -> None:
    """Fill the record."""
    module = dist_contrastive.load(command.run)
    fp32 = ExportedModel(command.export, int8=False)
    facts = fp32.facts
    found = {part: module.run.sha256(part) for part in ("encoder", "projector")}
    require(
        facts["run"]["weights_sha256"] | found == facts["run"]["weights_sha256"],
        f"{command.export} is not an export of {command.run}: their weights differ",
    )
    models = {FP32: fp32}
    if facts["int8"]["offered"]:
        models[INT8] = ExportedModel(command.export, int8=True)
    else:
        record.leave_out(INT8, facts["int8"]["why"])
    record.details = {name: facts[name] for name in ("run", "scores", "processor", "versions")}
    record.details["int8"] = {name: value for name, value in facts["int8"].items() if name != "tried"}
    side, generator = module.view.size, np.random.default_rng(0)
    budget = Budget(command.minutes)
    for num, metric in ((1, LATENCY), (command.batch, THROUGHPUT)):
        images = list(generator.integers(0, 256, (num, side, side, 3), dtype=np.uint8))
        contenders: dict[str, Callable[[], object]] = {TORCH: lambda images=images: module.embed(images)}  # type: ignore[misc]
        for name, model in models.items():
            contenders[name] = lambda model=model, images=images: model.embed(images)  # type: ignore[misc]
        times = timed_turns(
            contenders, torch.device("cpu"), command.rounds, at_least_s=0.5, at_most_s=CASE_S, budget=budget
        )
        for name, seconds in times.items():
            values = [1000 * s for s in seconds] if num == 1 else [num / s for s in seconds]
            record.add(f"batch {num}", name, metric, values)
    for name, file in ((TORCH, TIMM_WEIGHTS), (FP32, MODEL), (INT8, MODEL_INT8)):
        if file in facts["files"]:
            record.add("file", name, SIZE, [facts["files"][file]["bytes"] / 1e6])
    for name, key in ((TORCH, "torch"), (FP32, "onnx"), (INT8, "int8")):
        for score, value in facts["scores"].get(key, {}).items():
            record.add("scores", name, score, [value])


def main(argv: Sequence[str] | None = None) -> None:
    command, record = begin(
        Command, "export", argv, __doc__, question=QUESTION, packages=("onnx", "onnxruntime", "timm")
    )
    measure(command, record)
    metrics = list(dict.fromkeys(series.metric for series in record.series))
    record.write(
        QUESTION,
        comparison(record, metrics, FP32),
        {"time": bars(record, LATENCY), "images": bars(record, THROUGHPUT)},
    )


if __name__ == "__main__":
    sys.exit(main_guard(main))
