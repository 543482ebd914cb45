"""What may happen to the folder of a run under way, in real runs: the same state as without, or one clear line."""

import errno
import fcntl
import io
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from dist_contrastive import distributed, signals
from dist_contrastive.checkpoint import CheckpointStore, store, tensor_file
from dist_contrastive.config import CheckpointConfig, TrainConfig
from dist_contrastive.metrics import read_metrics
from dist_contrastive.run import train
from dist_contrastive.run_folder.folder import RunFolder
from dist_contrastive.trainer import Trainer
from tests.harness import RankError, run_ranks
from tests.runs import (
    STEPS_PER_EPOCH,
    Outcome,
    assert_one_line,
    assert_same_state,
    metrics_of,
    newest_checkpoint,
    outcome_on_rank,
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


def train_with_fault(rank: int, config: TrainConfig, step: int, fault: Fault, on_rank: int = 0) -> Outcome:
    """What comes of a run in which `fault` comes to a rank after so many steps."""
    update = Trainer.update

    def disturbed(self: Trainer, *arguments: Any) -> Any:
        result = update(self, *arguments)
        if self.step == step and distributed.rank() == on_rank:
            fault(config)
        return result

    Trainer.update = disturbed  # type: ignore[assignment, method-assign]
    return outcome_on_rank(rank, config)


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
    assert [outcome.status for outcome in outcomes] == [0, 0]
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
    outcomes = run_ranks(outcome_on_rank, 2, replace(config, stop_after_steps=2))
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
    return outcome_on_rank(rank, config).error


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
