"""The randomness and checkpoint contracts on whole runs: parity of world sizes, and resuming as if nothing had happened."""

import contextlib
import io
import secrets
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_contrastive.config import BatchConfig, ProbeConfig, TrainConfig
from dist_contrastive.methods import METHODS
from dist_contrastive.run import train
from dist_contrastive.trainer import Trainer
from tests.harness import run_ranks
from tests.runs import (
    STEPS_PER_EPOCH,
    assert_same_state,
    losses_of,
    metrics_of,
    newest_checkpoint,
    tiny_config,
    train_on_rank,
    write_dataset,
)  # fmt: skip

LAST_STEP = 3 * STEPS_PER_EPOCH - 1


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def losses_at_one_rank(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The first 20 losses of the tiny run with GroupNorm at one rank."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    run_ranks(train_on_rank, 1, tiny_config(run_dir, dataset, norm="group", stop_after_steps=20))
    return losses_of(run_dir)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_more_ranks_follow_one(num_ranks: int, dataset: Path, losses_at_one_rank: list[float], tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", dataset, norm="group", stop_after_steps=20)
    run_ranks(train_on_rank, num_ranks, config)
    assert len(losses_at_one_rank) == 20
    np.testing.assert_allclose(losses_of(config.run_dir), losses_at_one_rank, rtol=0, atol=1e-4)


def test_the_losses_move(losses_at_one_rank: list[float]) -> None:
    """Parity would be cheap between runs that stand still."""
    assert np.ptp(losses_at_one_rank) > 0.1


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(num_ranks: int, dataset: Path, tmp_path: Path) -> None:
    # In mid-epoch, anywhere but at an epoch's end: k is drawn anew each time, and named where the test fails.
    k = secrets.choice([k for k in range(1, LAST_STEP) if k % STEPS_PER_EPOCH])
    probe = ProbeConfig(every=1, knn_k=5, strengths=(1e-2,))
    whole = tiny_config(tmp_path / "whole", dataset, stop_after_steps=LAST_STEP, probe=probe)
    run_ranks(train_on_rank, num_ranks, whole)
    parts = tiny_config(tmp_path / "parts", dataset, stop_after_steps=k, probe=probe)
    run_ranks(train_on_rank, num_ranks, parts)
    assert newest_checkpoint(parts.run_dir).step == k
    run_ranks(train_on_rank, num_ranks, replace(parts, stop_after_steps=LAST_STEP))
    assert_same_state(newest_checkpoint(parts.run_dir), newest_checkpoint(whole.run_dir))
    assert metrics_of(parts.run_dir) == metrics_of(whole.run_dir), f"k = {k}"
    steps = [line["step"] for line in metrics_of(parts.run_dir) if "loss" in line]
    assert steps == list(range(1, LAST_STEP + 1))
    starts = newest_checkpoint(parts.run_dir).state["extra"]["starts"]
    assert [start["step"] for start in starts] == [0, k]


@pytest.mark.parametrize("log_every", [1, 3, 50])
def test_every_step_is_logged_and_what_costs_now_and_then(log_every: int, dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", dataset, stop_after_steps=7, log_every=log_every)
    run_ranks(train_on_rank, 1, config)
    lines = metrics_of(config.run_dir)
    assert [line["step"] for line in lines] == list(range(1, 8))
    for line in lines:
        assert {"loss", "learning_rate", "grad_norm"} <= line.keys()
    costly = [line["step"] for line in lines if "effective_rank" in line]
    assert costly == [step for step in range(1, 8) if step == 1 or step % log_every == 0]


def test_a_stopped_runs_tensorboard_has_all_its_steps(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", dataset, stop_after_steps=4)
    run_ranks(train_on_rank, 1, config)
    events = EventAccumulator(str(config.run_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]


def test_a_stop_at_an_epochs_end_leaves_its_probe_in(dataset: Path, tmp_path: Path) -> None:
    probe = ProbeConfig(every=1, knn_k=5, strengths=(1e-2,))
    config = tiny_config(tmp_path / "run", dataset, stop_after_steps=STEPS_PER_EPOCH, probe=probe)
    run_ranks(train_on_rank, 1, config)
    (entry,) = newest_checkpoint(config.run_dir).state["extra"]["scores"]["history"]
    assert (entry["epoch"], entry["step"]) == (1, STEPS_PER_EPOCH)


def test_two_ranks_go_on_from_one(dataset: Path, losses_at_one_rank: list[float], tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", dataset, norm="group", stop_after_steps=8)
    run_ranks(train_on_rank, 1, config)
    run_ranks(train_on_rank, 2, replace(config, stop_after_steps=20))
    np.testing.assert_allclose(losses_of(config.run_dir), losses_at_one_rank, rtol=0, atol=1e-4)


def what_is_said(rank: int, config: TrainConfig) -> str:
    """What a run prints, on one of several ranks."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        train(config)
    return output.getvalue()


WARNING = "warning: BatchNorm now sees other groups of samples"


@pytest.mark.parametrize(
    ("norm", "micro", "num_ranks", "warned"),
    [
        ("batch", 0, 2, True),
        ("batch", 4, 1, True),
        ("batch", 0, 1, False),
        ("sync", 0, 2, False),
        ("group", 4, 2, False),
    ],
)
def test_a_resume_says_so_where_batch_norm_sees_other_samples_together(
    norm: str, micro: int, num_ranks: int, warned: bool, dataset: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", dataset, norm=norm, stop_after_steps=1)
    run_ranks(what_is_said, 1, config)
    more = replace(config, stop_after_steps=2, batch=replace(config.batch, micro=micro))
    said = run_ranks(what_is_said, num_ranks, more)
    assert said[0].count(WARNING) == warned
    assert not any(WARNING in other for other in said[1:])


def trainer_groups(rank: int, name: str, norm: str, before: tuple[int, int], micro: int) -> bool:
    """Whether a trainer on these ranks says that it puts other samples together than `before` (ranks, micro-batch)."""
    config = tiny_config(Path("unused"), Path("unused"), norm=norm, batch=BatchConfig(size=16, micro=micro))
    config = replace(config, method=METHODS[name].Config())
    trainer = Trainer(config, Accelerator(cpu=True), steps_per_epoch=1, dataset_sha256="")
    return WARNING in trainer.normalization_change(*before)


@pytest.mark.parametrize(
    ("name", "norm", "before", "micro", "changed"),
    [
        ("simclr", "batch", (1, 8), 0, False),  # the same eight samples, in two passes or on two ranks
        ("simclr", "sync", (1, 0), 4, True),
        ("simclr", "sync", (2, 4), 4, False),
        ("moco", "batch", (1, 8), 8, False),
        ("moco", "sync", (1, 0), 0, True),  # it keeps groups of its own within a rank
    ],
)
def test_which_samples_share_their_statistics(
    name: str, norm: str, before: tuple[int, int], micro: int, changed: bool
) -> None:
    assert run_ranks(trainer_groups, 2, name, norm, before, micro) == [changed, changed]


def test_an_altered_newest_checkpoint_makes_it_go_on_from_the_one_before(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", dataset, stop_after_steps=LAST_STEP)
    whole = replace(config, run_dir=tmp_path / "whole")
    run_ranks(train_on_rank, 1, whole)
    run_ranks(train_on_rank, 1, replace(config, stop_after_steps=STEPS_PER_EPOCH + 2))
    damaged = newest_checkpoint(config.run_dir).path / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    with pytest.warns(UserWarning, match="skipping a bad checkpoint"):
        assert newest_checkpoint(config.run_dir).step == STEPS_PER_EPOCH
    run_ranks(train_on_rank, 1, config)
    assert_same_state(newest_checkpoint(config.run_dir), newest_checkpoint(whole.run_dir))
    assert metrics_of(config.run_dir) == metrics_of(whole.run_dir)
