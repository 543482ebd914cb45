"""Metrics of a run: one JSON object a line in metrics.jsonl, the same numbers in TensorBoard. Units are in the names."""

import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from dist_contrastive.atomic import write_atomic


class MetricsLog:
    """The two logs of a run; rank 0 alone makes one. `step` is how many updates the run resumes after (0: fresh)."""

    def __init__(self, run_dir: Path, step: int) -> None:
        path = run_dir / "metrics.jsonl"
        # Steps after the checkpoint are run again: their lines go, so that no step stands in the file twice.
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - closed in `close`; a line is on disk once written
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Log `values` once `step` updates are done, the last in `epoch` (from 0); non-finite numbers become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "epoch": epoch, **finite}) + "\n")
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers that have a file of their own (the probe's), for TensorBoard alone."""
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none if there is no file. A half line at the end, of a run that was killed, is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class StepTimer:
    """Throughput since the last reading: what a step took, and how much of it was waiting for the loader."""

    def __init__(self, global_batch: int, device: torch.device) -> None:
        self._global_batch = global_batch
        self._device = device
        self.restart()

    def restart(self) -> None:
        """Forget what went before: what follows a probe or a checkpoint is not a step's time."""
        self._start, self._steps, self._wait_ms = time.perf_counter(), 0, 0.0

    def count(self, wait_ms: float) -> None:
        """A step is done, `wait_ms` of which this rank waited for its batch."""
        self._steps += 1
        self._wait_ms += wait_ms

    def read(self) -> dict[str, float]:
        """Means over the steps since the last reading, then start again.

        `images_per_s` counts samples of the global batch (not views) a second; `peak_memory_mib` is this rank's: allocated
        on the GPU, or resident on the CPU.
        """
        seconds = time.perf_counter() - self._start
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device) / 2**20
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        values = {
            "images_per_s": self._steps * self._global_batch / seconds,
            "step_time_ms": 1e3 * seconds / self._steps,
            "loader_wait_ms": self._wait_ms / self._steps,
            "peak_memory_mib": peak,
        }
        self.restart()
        return values
