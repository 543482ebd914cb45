"""What may happen to the folder of a run under way, in real runs: the same state as without, or one clear line."""

import contextlib
import errno
import fcntl
import io
import json
import os
import pickle
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_contrastive import cli, distributed, signals
from dist_contrastive.checkpoint import Checkpoint, CheckpointStore, store, tensor_file
from dist_contrastive.config import CheckpointConfig, TrainConfig, UserError
from dist_contrastive.metrics import read_metrics
from dist_contrastive.run import train
from dist_contrastive.run_folder import RunFolder
from dist_contrastive.trainer import Trainer
from tests.harness import RankError, run_ranks
from tests.runs import (
    STEPS_PER_EPOCH,
    assert_same_state,
    metrics_of,
    newest_checkpoint,
    tiny_config,
    train_on_rank,
    write_dataset,
)  # fmt: skip
from tests.test_checkpoint import Trap

EVERY_4 = CheckpointConfig(every=100, every_steps=4)
LAST_STEP = 2 * STEPS_PER_EPOCH - 1
"""In mid-epoch, and of no cadence of these tests."""
Fault = Callable[[TrainConfig], None]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, TrainConfig]:
    """A run up to LAST_STEP that nothing happens to, on one rank and on two."""
    folder = tmp_path_factory.mktemp("undisturbed")
    configs = {ranks: tiny_config(folder / str(ranks), dataset, stop_after_steps=LAST_STEP) for ranks in (1, 2)}
    for ranks, config in configs.items():
        run_ranks(train_on_rank, ranks, config)
    return configs


def assert_as_undisturbed(config: TrainConfig, undisturbed: TrainConfig) -> None:
    assert_same_state(newest_checkpoint(config.run_dir), newest_checkpoint(undisturbed.run_dir))
    assert metrics_of(config.run_dir) == metrics_of(undisturbed.run_dir)


def train_with_fault(rank: int, config: TrainConfig, step: int, fault: Fault, on_rank: int = 0) -> tuple[int, str, str]:
    """Exit status, the error's text, and what stood on stderr, where `fault` comes to a rank after so many steps."""
    errors, output = [], io.StringIO()
    update = Trainer.update

    def disturbed(self: Trainer, *arguments: Any) -> Any:
        result = update(self, *arguments)
        if self.step == step and distributed.rank() == on_rank:
            fault(config)
        return result

    def run() -> None:
        try:
            train(config)
        except UserError as error:
            errors.append(str(error))
            raise

    Trainer.update = disturbed  # type: ignore[assignment, method-assign]
    with contextlib.redirect_stderr(output):
        status = cli.main_guard(run)
    return status, "".join(errors), output.getvalue()


def assert_one_line(outcomes: list[tuple[int, str, str]], *words: str) -> None:
    for status, message, output in outcomes:
        assert status == 2
        assert "\n" not in message
        assert "Traceback" not in output
        assert "Exception in thread" not in output
        for word in words:
            assert word in message, message
    assert outcomes[0][2].count("error: ") == 1


# --- the disk, while a checkpoint is written in the background --------------------------------------------------------


def full(config: TrainConfig) -> None:
    fail_to_write(errno.ENOSPC)


def read_only(config: TrainConfig) -> None:
    fail_to_write(errno.EROFS)


def fail_to_write(number: int) -> None:
    """From now on the disk takes the first pieces of a file of tensors, and then no more."""

    class Disk(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 0:
                raise OSError(number, os.strerror(number))
            return super().write(data)

    tensor_file.open = lambda path, mode, buffering=-1: Disk(path, mode)  # type: ignore[attr-defined]


def lose_what_is_being_written(config: TrainConfig) -> None:
    """From now on the folder of a checkpoint is gone before its first file is written."""
    write_tensors = tensor_file.write_tensors

    def write(path: Path, *arguments: Any) -> str:
        shutil.rmtree(path.parent, ignore_errors=True)
        return write_tensors(path, *arguments)

    store.write_tensors = write  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("fault", "num_ranks", "reason"),
    [
        (full, 2, "(No space left on device); make room"),
        (read_only, 1, "(Read-only file system); mend that"),
        (lose_what_is_being_written, 2, "(No such file or directory); mend that"),
    ],
)
def test_a_disk_that_fails_in_mid_epoch_stops_all_ranks_with_one_line(
    fault: Fault, num_ranks: int, reason: str, dataset: Path, undisturbed: dict[int, TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", dataset, checkpoint=EVERY_4, stop_after_steps=LAST_STEP)
    outcomes = run_ranks(train_with_fault, num_ranks, config, 5, fault)
    what = f"{config.run_dir}/checkpoints/step-00000008, the checkpoint of step 8, can't be written {reason}"
    assert_one_line(outcomes, f"{what}, then the same command goes on from step 4")
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["step-00000004"]
    run_ranks(train_on_rank, num_ranks, config)
    assert_as_undisturbed(config, undisturbed[num_ranks])


# --- the run's folder -------------------------------------------------------------------------------------------------


def delete_run(config: TrainConfig) -> None:
    shutil.rmtree(config.run_dir)


def move_run(config: TrainConfig) -> None:
    config.run_dir.rename(config.run_dir.with_name("elsewhere"))


def replace_run(config: TrainConfig) -> None:
    move_run(config)
    config.run_dir.mkdir()


@pytest.mark.parametrize("fault", [delete_run, move_run, replace_run])
def test_a_run_whose_folder_is_gone_ends_with_one_line(fault: Fault, dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", dataset)
    outcomes = run_ranks(train_with_fault, 2, config, 3, fault)
    assert_one_line(outcomes, f"{config.run_dir} was deleted, moved or taken over while the run was under way")
    assert not config.run_dir.exists() or list(config.run_dir.iterdir()) == []


def delete_checkpoints(config: TrainConfig) -> None:
    shutil.rmtree(config.run_dir / "checkpoints")


def test_a_run_whose_checkpoints_are_deleted_makes_new_ones(
    dataset: Path, undisturbed: dict[int, TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", dataset, stop_after_steps=LAST_STEP)
    outcomes = run_ranks(train_with_fault, 2, config, STEPS_PER_EPOCH + 2, delete_checkpoints)
    assert [status for status, _, _ in outcomes] == [0, 0]
    assert_as_undisturbed(config, undisturbed[2])


# --- SIGKILL ----------------------------------------------------------------------------------------------------------


def die(config: TrainConfig) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(config: TrainConfig, step: int) -> None:
    """Train on one rank, which is killed after its update `step`."""
    process = get_context("forkserver").Process(target=train_with_fault, args=(0, config, step, die), daemon=True)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("checkpoint", "steps"),
    [(EVERY_4, {4, 8}), (CheckpointConfig(every=100, every_minutes=1e-5), {7, 8})],
    ids=["steps", "minutes"],
)
def test_after_a_kill_the_run_goes_on_from_its_last_checkpoint_bit_for_bit(
    checkpoint: CheckpointConfig,
    steps: set[int],
    dataset: Path,
    undisturbed: dict[int, TrainConfig],
    tmp_path: Path,
) -> None:
    config = tiny_config(tmp_path / "run", dataset, checkpoint=checkpoint)
    train_and_die(config, 9)
    # That of step 8 may be under way then, and the one before it is whole.
    assert newest_checkpoint(config.run_dir).step in steps
    run_ranks(train_on_rank, 1, replace(config, stop_after_steps=LAST_STEP))
    assert_as_undisturbed(config, undisturbed[1])


# --- a checkpoint with other bytes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_checkpoints(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> CheckpointStore:
    config = tiny_config(tmp_path_factory.mktemp("two") / "run", dataset, stop_after_steps=STEPS_PER_EPOCH + 2)
    run_ranks(train_on_rank, 1, config)
    return CheckpointStore(config.run_dir / "checkpoints", keep=2)


def newest_or_line(root: Path) -> Checkpoint | str:
    """The checkpoint that is taken, after one line for each that is not; or the line with which none is."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = CheckpointStore(root, keep=2).newest()
    except UserError as error:
        return str(error)
    assert found is not None
    assert ["\n" in str(warning.message) for warning in caught] == [False] * (found.step != max(found_steps(root)))
    return found


def found_steps(root: Path) -> list[int]:
    return CheckpointStore(root, keep=2).steps()


@pytest.mark.parametrize("harm", ["cut short", "a bit flipped"])
def test_at_50_offsets_whatever_is_wrong_is_never_taken(two_checkpoints: CheckpointStore, harm: str) -> None:
    root = two_checkpoints.root
    older, newer = two_checkpoints.steps()
    good = two_checkpoints.load(newer)
    files = sorted(two_checkpoints.path(newer).iterdir())
    assert [path.name for path in files] == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"
    ]  # fmt: skip
    generator = np.random.default_rng(10)
    num_older = 0
    for number in range(50):
        path = files[number % len(files)]
        content = path.read_bytes()
        # The first and the last byte of each file, and others.
        offset = {0: 0, 1: len(content) - 1}.get(number // len(files), int(generator.integers(len(content))))
        bit = 1 << int(generator.integers(8))
        flipped = content[:offset] + bytes([content[offset] ^ bit]) + content[offset + 1 :]
        path.write_bytes(content[:offset] if harm == "cut short" else flipped)
        found = newest_or_line(root)
        path.write_bytes(content)
        where = f"{path.name}, {harm} at {offset}, bit {bit}"
        if isinstance(found, str):
            assert path.name == "manifest.json", where
            assert "\n" not in found
            assert "nothing was changed" in found
        elif found.step == older:
            num_older += 1
        else:  # a byte of the manifest that nothing is read by: of a version, say
            assert path.name == "manifest.json", where
            assert found.state == good.state
            for group, tensors in good.tensors.items():
                for name, tensor in tensors.items():
                    assert torch.equal(tensor, found.tensors[group][name]), where
    assert num_older >= 37, "each of the other three files"


def test_a_run_goes_on_from_the_one_before_bit_for_bit(
    dataset: Path, undisturbed: dict[int, TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", dataset, checkpoint=EVERY_4, stop_after_steps=LAST_STEP - 1)
    run_ranks(train_on_rank, 2, config)
    path = newest_checkpoint(config.run_dir).path / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    run_ranks(train_on_rank, 2, replace(config, stop_after_steps=LAST_STEP))
    assert_as_undisturbed(config, undisturbed[2])


def test_files_that_a_checkpoint_may_not_hold_are_never_opened(
    dataset: Path, undisturbed: dict[int, TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", dataset, stop_after_steps=LAST_STEP - 1)
    run_ranks(train_on_rank, 1, config)
    folder = newest_checkpoint(config.run_dir).path
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    for name in ("model.pt", "optimizer.bin", "state.pkl", "__init__.py", "pickle.json"):
        (folder / name).write_bytes(trap)
    os.mkfifo(folder / "pipe.pkl")  # whoever opens it waits for ever
    run_ranks(train_on_rank, 1, replace(config, stop_after_steps=LAST_STEP))
    assert_as_undisturbed(config, undisturbed[1])
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["pipe.pkl", "../../pipe.safetensors", "pipe.safetensors", "state.json"])
def test_a_manifest_that_lists_what_no_run_writes_is_refused_unopened(
    two_checkpoints: CheckpointStore, tmp_path: Path, name: str
) -> None:
    root = tmp_path / "run" / "checkpoints"
    shutil.copytree(two_checkpoints.root, root)
    store = CheckpointStore(root, keep=2)
    older, newer = store.steps()
    path = store.path(newer) / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    manifest = json.loads((store.path(newer) / "manifest.json").read_text())
    manifest["sha256"][name] = "0" * 64
    (store.path(newer) / "manifest.json").write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match="skipping a bad checkpoint"):
        found = store.newest()
    assert found is not None
    assert found.step == older


# --- logs and clocks --------------------------------------------------------------------------------------------------


def test_a_metrics_file_that_is_cut_in_mid_line_is_whole_again(
    dataset: Path, undisturbed: dict[int, TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", dataset, checkpoint=EVERY_4)
    train_and_die(config, 11)
    path = config.run_dir / "metrics.jsonl"
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 11))
    path.write_bytes(path.read_bytes()[:-20])
    run_ranks(train_on_rank, 1, replace(config, stop_after_steps=LAST_STEP))
    assert_as_undisturbed(config, undisturbed[1])


def a_file(tensorboard: Path) -> None:
    tensorboard.write_text("")


def an_unwritable_folder(tensorboard: Path) -> None:
    tensorboard.symlink_to("/proc")


@pytest.mark.parametrize("harm", [a_file, an_unwritable_folder])
def test_a_tensorboard_that_can_not_be_written_is_named(
    harm: Callable[[Path], None], dataset: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", dataset, stop_after_steps=1)
    run_ranks(train_on_rank, 1, config)
    shutil.rmtree(config.run_dir / "tensorboard")
    harm(config.run_dir / "tensorboard")
    outcomes = run_ranks(train_with_fault, 2, replace(config, stop_after_steps=2), 0, delete_run)
    assert_one_line(outcomes, f"{config.run_dir}/tensorboard can't be written", "goes on from step 1")


def train_with_jumping_clock(rank: int, config: TrainConfig) -> bool:
    """`train(config)` while the clock jumps by days, back and ahead, each time somebody looks."""
    true_time, jumps = time.time, iter(range(1, 10**9))
    time.time = lambda: true_time() + 86_400 * (-1) ** next(jumps) * (rank + 1)
    return train(config)


# The second one saves after each step, which both ranks know by the same clock, or would wait for each other.
@pytest.mark.parametrize(("minutes", "steps"), [(60, [LAST_STEP]), (1e-5, [LAST_STEP - 1, LAST_STEP])])
def test_a_clock_that_jumps_changes_nothing(
    minutes: float, steps: list[int], dataset: Path, undisturbed: dict[int, TrainConfig], tmp_path: Path
) -> None:
    checkpoint = CheckpointConfig(every=100, every_minutes=minutes)
    config = tiny_config(tmp_path / "run", dataset, checkpoint=checkpoint, stop_after_steps=LAST_STEP)
    run_ranks(train_with_jumping_clock, 2, config)
    assert CheckpointStore(config.run_dir / "checkpoints", keep=2).steps() == steps
    assert_as_undisturbed(config, undisturbed[2])


# --- two launches at once ---------------------------------------------------------------------------------------------


def no_locks(*arguments: Any) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def train_on_system(rank: int, config: TrainConfig, has_locks: bool) -> str:
    """The error of `train(config)`, empty where there is none."""
    if not has_locks:
        fcntl.flock = no_locks
    try:
        train(config)
    except UserError as error:
        return str(error)
    return ""


def train_first(config: TrainConfig, has_locks: bool, results: Any) -> None:
    with signals.handled():
        results.send(train_on_system(0, config, has_locks))


@pytest.mark.parametrize("has_locks", [True, False])
def test_the_second_of_two_launches_is_refused_and_harms_nothing(
    has_locks: bool, dataset: Path, undisturbed: dict[int, TrainConfig], tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", dataset, epochs=1000, checkpoint=EVERY_4)
    context = get_context("forkserver")
    mine, others = context.Pipe()
    process = context.Process(target=train_first, args=(config, has_locks, others), daemon=True)
    process.start()
    deadline = time.monotonic() + 120
    while not read_metrics(config.run_dir / "metrics.jsonl"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for again in (config, replace(config, overwrite=True)):
        for message in run_ranks(train_on_system, 2, again, has_locks):
            assert f"{config.run_dir} is in use by process {process.pid} on " in message
    assert process.is_alive()
    process.terminate()  # it stops after the step under way, with a checkpoint
    assert mine.poll(120)
    assert mine.recv() == ""
    process.join(60)
    assert newest_checkpoint(config.run_dir).step == read_metrics(config.run_dir / "metrics.jsonl")[-1]["step"]
    if not has_locks:
        assert not (config.run_dir / ".lock-holder").exists()


# --- the end of a run -------------------------------------------------------------------------------------------------


def slow_down(seconds: float) -> None:
    write = CheckpointStore.write

    def slow(*arguments: Any) -> dict[str, str]:
        time.sleep(seconds)
        return write(*arguments)

    CheckpointStore.write = staticmethod(slow)  # type: ignore[assignment, method-assign]


def steps_at_the_end(rank: int, config: TrainConfig) -> list[int]:
    """The checkpoints that are there when DONE is written; writing one takes long."""
    slow_down(1.0)
    found: list[int] = []
    finish = RunFolder.finish

    def look(self: RunFolder) -> None:
        found.extend(CheckpointStore(self.path / "checkpoints", keep=2).steps())
        finish(self)

    RunFolder.finish = look  # type: ignore[method-assign]
    assert train(config)
    return found


def test_a_run_is_done_after_its_last_checkpoint(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", dataset, epochs=1)
    assert run_ranks(steps_at_the_end, 2, config) == [[STEPS_PER_EPOCH], []]


def break_slowly(rank: int, config: TrainConfig) -> None:
    slow_down(1.0)
    update = Trainer.update

    def broken(self: Trainer, *arguments: Any) -> Any:
        if self.step == 4:
            raise ZeroDivisionError("a fault of the trainer")
        return update(self, *arguments)

    Trainer.update = broken  # type: ignore[assignment, method-assign]
    train(config)


def test_a_fault_waits_for_the_checkpoint_under_way(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", dataset, checkpoint=EVERY_4)
    with pytest.raises(RankError, match="a fault of the trainer"):
        run_ranks(break_slowly, 1, config)
    assert newest_checkpoint(config.run_dir).step == 4


def lose_a_rank(rank: int, config: TrainConfig) -> None:
    slow_down(1.0)
    train_with_fault(rank, config, 5, die, on_rank=1)


def test_a_rank_that_is_killed_takes_no_checkpoint_under_way_with_it(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", dataset, checkpoint=EVERY_4)
    with pytest.raises(RankError, match="rank 0 of 2"):
        run_ranks(lose_a_rank, 2, config)
    assert newest_checkpoint(config.run_dir).step == 4
