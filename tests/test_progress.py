"""What a person is told of a run: the time that is left once that means something, and what is waited for."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_contrastive.progress import TIMED_STEPS, WARM_UP_STEPS, TrainingProgress
from tests.runs import write_dataset

VALUES = {"loss": 1.0, "images_per_s": 100.0}


def lines_of(num_steps: int, capsys: pytest.CaptureFixture[str], done: int = 0) -> list[str]:
    """What a run of two steps an epoch prints where there is no terminal; its first step takes long."""
    progress = TrainingProgress(1000, done, 500, visible=True)
    with progress:
        time.sleep(0.3)
        for step in range(done + 1, done + num_steps + 1):
            progress.advance(step, (step - 1) // 2, VALUES)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("done", [0, 600])
def test_the_time_left_is_said_once_enough_steps_were_timed(done: int, capsys: pytest.CaptureFixture[str]) -> None:
    first = WARM_UP_STEPS + TIMED_STEPS
    lines = lines_of(2 * first, capsys, done)
    assert len(lines) == first, "a line an epoch"
    for number, line in enumerate(lines):
        assert line.startswith(f"epoch {done // 2 + number + 1}/500, step {done + 2 * number + 1}: loss 1.000")
        assert line.endswith(" images/s" if 2 * number + 1 < first else " s left")
    # The slow first step does not count: at its pace the rest would take minutes.
    assert lines[-1].endswith(", 0 min 00 s left")


READ = """
import sys
from pathlib import Path
import numpy as np
from dist_contrastive.config import DataConfig
from dist_contrastive.data.beton import open_dataset
from dist_contrastive.data.compiled import announced_compilation
from tests.betons import open_loader
with announced_compilation(print):
    for _ in range(2):
        list(open_loader(open_dataset(Path(sys.argv[1])), DataConfig(image_size=8)).centered(np.arange(4), batch_size=4))
"""


def test_a_compilation_is_announced_once_and_only_where_there_is_one(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    outputs = [
        subprocess.run(
            [sys.executable, "-c", READ, str(dataset)],
            capture_output=True, text=True, timeout=240, check=True, env=environment,
        ).stdout
        for _ in range(2)
    ]  # fmt: skip
    assert outputs == ["compiling the loader and the augmentation: about 10 s, the first time on this machine\n", ""]
