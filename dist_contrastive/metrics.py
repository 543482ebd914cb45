"""Metrics of a run: one JSON object a line in metrics.jsonl, the same numbers in TensorBoard. Units are in the names.

Each step has a line with what is known on the host anyway (`loss`, `learning_rate`, `grad_norm`, ...), about 200 bytes; what
costs (`effective_rank`, times, memory) is in each `log_every`-th. A probe has a line of its own behind that of its step, with
its scores under `probe/`.
"""

import contextlib
import json
import math
import resource
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dist_contrastive.atomic import write_atomic, writing
from dist_contrastive.run_folder.names import METRICS, TENSORBOARD

PROBE_PREFIX = "probe/"
TENSORBOARD_THREAD = "tensorboard.summary.writer.event_file_writer"


class MetricsLog:
    """The two logs of a run; rank 0 alone makes one.

    Where the disk won't take what is written there is a `UserError` that names the log. TensorBoard writes in a thread of its
    own, whose error comes with a later call: `flush` is the last chance to hear of it.
    """

    def __init__(self, run_dir: Path, step: int, goes_on: Callable[[], str], probed: Collection[int] = ()) -> None:
        """`step` is how many updates the run resumes after (0: fresh), `probed` the steps whose probes it remembers, and
        `goes_on` says how the run goes on after a failure (`atomic.writing`)."""
        self._path, self._tensorboard_path, self._goes_on = run_dir / METRICS, run_dir / TENSORBOARD, goes_on
        with writing(self._path, goes_on):
            # What comes after the checkpoint is done again: its lines go, so that nothing stands in the file twice. The last
            # epoch's probe follows the checkpoint of its own step.
            kept = [
                line
                for line in read_metrics(self._path)
                if line["step"] <= step
                and (line["step"] in probed or not any(k.startswith(PROBE_PREFIX) for k in line))
            ]
            write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            # Closed in `close`. Without a buffer a line is on disk once written, and what the disk refused is not tried
            # again.
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        self._default_hook = threading.excepthook
        threading.excepthook = self._on_thread_error  # before TensorBoard's thread begins
        with writing(self._tensorboard_path, goes_on):
            self._tensorboard = SummaryWriter(str(self._tensorboard_path), purge_step=step + 1)
        self._probe_names: list[str] = []

    def write(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Log `values` once `step` updates are done, the last in `epoch` (from 0); non-finite numbers become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        text = memoryview((json.dumps({"step": step, "epoch": epoch, **finite}) + "\n").encode())
        with writing(self._path, self._goes_on):
            while text:
                text = text[self._file.write(text) :]
        with writing(self._tensorboard_path, self._goes_on):
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def write_probe(self, step: int, epoch: int, result: Mapping[str, Any]) -> None:
        """Log the numbers of a probe after `step` updates; what else it says is in probe.json."""
        numbers = {
            f"{PROBE_PREFIX}{name}": value
            for name, value in result.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._probe_names = list(numbers)
        self.write(step, epoch, numbers)

    def conclude(self, step: int, config: Mapping[str, Any], plots: Path) -> None:
        """For TensorBoard alone: the config (flat) for its table of runs, beside the last probe, and the pictures in `plots`."""
        plain = {k: v if v is None or isinstance(v, bool | int | float | str) else str(v) for k, v in config.items()}
        # `SummaryWriter.add_hparams` would make a second run of it, in a folder of its own.
        summaries = hparams(plain, dict.fromkeys(self._probe_names, 0.0))
        pictures = {}
        for path in sorted(plots.glob("*.png")):
            with Image.open(path) as picture:
                pictures[path.stem] = np.asarray(picture.convert("RGB"))
        with writing(self._tensorboard_path, self._goes_on):
            for summary in summaries:
                self._tensorboard._get_file_writer().add_summary(summary)
            for name, pixels in pictures.items():
                self._tensorboard.add_image(f"report/{name}", pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """Wait until TensorBoard has written what it was given."""
        with writing(self._tensorboard_path, self._goes_on):
            self._tensorboard.flush()

    def close(self) -> None:
        self._file.close()
        with contextlib.suppress(OSError):  # which `flush` has told
            self._tensorboard.close()
        threading.excepthook = self._default_hook

    def _on_thread_error(self, args: threading.ExceptHookArgs) -> None:
        # What a full disk says to TensorBoard's thread is raised again where the next line is written.
        if type(args.thread).__module__ != TENSORBOARD_THREAD or not isinstance(args.exc_value, OSError):
            self._default_hook(args)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none if there is no file. What is no such line is left out: the half line of a run that was
    killed, what a power failure made of some."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


class TimeSplit:
    """Where a run's time goes, in seconds by part; each moment belongs to one part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    @property
    def total(self) -> float:
        """Seconds up to now, what belongs to no part yet included."""
        return sum(self.seconds.values()) + time.monotonic() - self._last

    def lap(self, part: str, within: Mapping[str, float] | None = None) -> None:
        """What passed since the last lap went to `part`, but for the seconds of other parts in `within`."""
        now = time.monotonic()
        parts = {**(within or {})}
        parts[part] = max(0.0, now - self._last - sum(parts.values()))
        for name, seconds in parts.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._last = now


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
