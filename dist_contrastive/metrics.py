"""Metrics of a run: one JSON object a line in metrics.jsonl, the same numbers in TensorBoard. Units are in the names."""

import json
import math
from pathlib import Path
from typing import Any

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
        """Log `values` after update number `step` (from 1) of `epoch` (from 0); non-finite numbers become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "epoch": epoch, **finite}) + "\n")
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
