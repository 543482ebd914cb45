"""What a run's data passes through is compiled before the first batch, and by one of the processes of a machine alone."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dist_contrastive.data.compiled import compile_in_turns
from tests.runs import write_dataset

ONE_PROCESS = """
import json, sys
from pathlib import Path
import torch
from dist_contrastive.batch import Share
from dist_contrastive.config import AugmentConfig, DataConfig
from dist_contrastive.data import crops
from dist_contrastive.data.augment import Augment, draws
from dist_contrastive.data.augment import cpu as views
from dist_contrastive.data.beton import open_dataset
from dist_contrastive.data.ready import get_ready
from dist_contrastive.data.loader import Loader
from dist_contrastive.data.resident import ResidentLoader

functions = {
    "crops": crops.crop_samples, "views": views._augment, "draws": draws._draw, "boxes": crops._draw_boxes,
    "decoding": crops.decode_samples,
}

def compiled():
    return {name: sum(function.stats.cache_misses.values()) for name, function in functions.items()}

cpu, augment = torch.device("cpu"), AugmentConfig()
dataset = open_dataset(Path(sys.argv[1]))
get_ready(dataset, augment, cpu, resident=True, process=int(sys.argv[2])).result()
before, signatures = compiled(), [len(function.signatures) for function in functions.values()]
for kind in (Loader, ResidentLoader):
    with kind(dataset, DataConfig(image_size=8), augment, seed=0, share=Share(4), threads=1) as loader:
        Augment(augment)(next(loader.epoch(0)), cpu)
assert [len(function.signatures) for function in functions.values()] == signatures, "the first batch compiles"
print(json.dumps(before))
"""


def test_of_two_processes_one_compiles_each_part_and_the_first_batch_finds_all_done(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_PROCESS, str(dataset), str(number)],
            stdout=subprocess.PIPE, text=True, env=environment,
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    first, second = map(json.loads, outputs)
    assert {name: first[name] + second[name] for name in first} == dict.fromkeys(first, 1)


@pytest.mark.parametrize("lacks", ["locks", "folder"])
def test_where_there_are_no_locks_all_is_compiled_all_the_same(
    lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if lacks == "locks":
        monkeypatch.setattr(fcntl, "flock", no_locks)
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    done: list[int] = []
    compile_in_turns([lambda: done.append(0), lambda: done.append(1), lambda: done.append(2)], 2)
    assert done == [2, 0, 1]


def test_what_a_call_raises_is_not_taken_for_a_missing_lock() -> None:
    def fail() -> None:
        raise OSError("the cache is full")

    with pytest.raises(OSError, match="the cache is full"):
        compile_in_turns([fail], 0)
