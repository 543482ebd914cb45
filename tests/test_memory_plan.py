"""The memory plan: what it counts, what it chooses, that ranks agree on it and that it leaves no trace."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_contrastive.config import BatchConfig, TrainConfig, UserError
from dist_contrastive.launch import connect
from dist_contrastive.step import memory
from dist_contrastive.step.memory import TensorCount, measure_peak
from dist_contrastive.step.memory_plan import StepMemory, rounded
from dist_contrastive.trainer import Trainer
from tests.harness import RankError, run_ranks
from tests.runs import losses_of, newest_checkpoint, tiny_config, train_on_rank, write_dataset

MIB = 2**20


def test_tensors_are_counted_once_while_they_live() -> None:
    outside = torch.ones(MIB)
    with TensorCount() as tensors:
        first = outside + 1
        assert tensors.live == 4 * MIB
        view = first.view(2, -1).T
        second = view * 2
        assert tensors.live == 8 * MIB
        del first, view
        assert tensors.live == 4 * MIB
        second.add_(1)
        outside.mul_(2)
        del second
        assert tensors.live == 0
    assert tensors.peak == 8 * MIB


def test_what_autograd_saves_is_counted() -> None:
    x = torch.ones(MIB, requires_grad=True)
    with TensorCount() as tensors:
        loss = x.exp().exp().sum()
        assert tensors.live >= 8 * MIB, "both results are kept for backward"
        loss.backward()
        assert tensors.live == 4 * MIB + 4, "the gradient and the loss"


def test_the_peak_of_a_call_is_measured() -> None:
    device = torch.device("cpu")
    few = measure_peak(lambda: None, device)

    def fill() -> None:
        torch.ones(64 * MIB).sum()

    peak = measure_peak(fill, device)
    assert 250 * MIB < peak - few < 300 * MIB


@pytest.mark.parametrize("limit_mib", [5, 10, 30, 100, 1000, 5000])
def test_the_largest_micro_batch_fits_and_the_next_does_not(limit_mib: int) -> None:
    memory = StepMemory(fixed=4e6, per_sample=1e6, whole=3e6, embeddings=1e6, optimizer=2e6)
    limit, rank_batch = limit_mib * MIB, 512
    micro = memory.largest(limit, rank_batch)
    if micro == 0:
        assert memory.peak(1, rank_batch) > limit
        return
    assert memory.peak(micro, rank_batch) <= limit
    assert micro == rank_batch or memory.peak(min(rank_batch, micro + (8 if micro >= 8 else 1)), rank_batch) > limit
    assert micro == rounded(micro)


def test_the_whole_batch_at_once_holds_loss_and_graph_together() -> None:
    memory = StepMemory(fixed=1.0, per_sample=1.0, whole=100.0, embeddings=2.0, optimizer=0.0)
    assert memory.peak(7, 8) == 101  # first the loss over all embeddings, then a micro-batch: never both
    assert memory.peak(8, 8) == 109


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def auto_config(run_dir: Path, dataset: Path, memory_gib: float, *, norm: str = "group", size: int = 96) -> TrainConfig:
    config = tiny_config(run_dir, dataset, norm=norm, stop_after_steps=2)
    data = replace(config.data, image_size=32)
    return replace(config, data=data, batch=BatchConfig(size=size, micro="auto", memory_gib=memory_gib))


def plan_of(run_dir: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((run_dir / "machine.json").read_text())["memory_plan"]
    return plan


def test_a_run_stays_within_the_memory_it_is_given(dataset: Path, tmp_path: Path) -> None:
    config = auto_config(tmp_path / "auto", dataset, 0.06)
    run_ranks(train_on_rank, 2, config)
    plan = plan_of(config.run_dir)
    assert 1 <= plan["micro"] < 48
    assert plan["rank_batch"] == 48
    assert plan["measured_mib"] <= plan["limit_mib"] == pytest.approx(0.06 * 1024)
    assert plan["predicted_mib"] > 0
    assert newest_checkpoint(config.run_dir).state["micro"] == plan["micro"]
    # The same negatives: the losses of the whole batch at once.
    whole = replace(config, run_dir=tmp_path / "whole", batch=BatchConfig(size=96))
    run_ranks(train_on_rank, 2, whole)
    np.testing.assert_allclose(losses_of(config.run_dir), losses_of(whole.run_dir), rtol=0, atol=1e-4)


def test_with_memory_enough_there_is_one_forward_pass(dataset: Path, tmp_path: Path) -> None:
    config = auto_config(tmp_path / "run", dataset, 0.0)
    run_ranks(train_on_rank, 1, config)
    assert plan_of(config.run_dir)["micro"] == 96


def test_a_resumed_run_keeps_its_micro_batch(dataset: Path, tmp_path: Path) -> None:
    config = auto_config(tmp_path / "run", dataset, 0.06, norm="batch", size=48)
    run_ranks(train_on_rank, 1, replace(config, stop_after_steps=1))
    micro = newest_checkpoint(config.run_dir).state["micro"]
    run_ranks(train_on_rank, 1, config)
    assert newest_checkpoint(config.run_dir).state["micro"] == micro
    assert "memory_plan" not in json.loads((config.run_dir / "machine.json").read_text())


def test_too_little_memory_names_the_queue(dataset: Path, tmp_path: Path) -> None:
    config = auto_config(tmp_path / "run", dataset, 0.0005)
    with pytest.raises(RankError, match=r"UserError: --batch.micro auto: 1 MiB hold no step of 48 .*--method.queue"):
        run_ranks(train_on_rank, 2, config)


def train_where_nothing_tells(rank: int, config: TrainConfig) -> None:
    if rank == 1:
        memory.RESET_PEAK = Path("/nonexistent")
    train_on_rank(rank, config)


def test_where_no_memory_can_be_measured_the_message_says_what_to_give(dataset: Path, tmp_path: Path) -> None:
    config = auto_config(tmp_path / "run", dataset, 0.0)
    with pytest.raises(RankError, match=r"UserError: --batch.micro auto: this system does not tell .*--batch.micro N"):
        run_ranks(train_where_nothing_tells, 2, config)


def state_around_planning(rank: int, config: TrainConfig) -> list[str]:
    trainer = Trainer(config, connect(config), steps_per_epoch=1, dataset_sha256="")
    before = {name: value.clone() for name, value in trainer.method.state_dict().items()}
    trainer.plan_memory()
    assert all(p.grad is None for p in trainer.method.parameters())
    assert not trainer.replicas.optimizer.state
    return [name for name, value in trainer.method.state_dict().items() if not torch.equal(value, before[name])]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_planning_leaves_no_trace(num_ranks: int, dataset: Path, tmp_path: Path) -> None:
    config = auto_config(tmp_path / "run", dataset, 0.06, norm="batch")
    assert run_ranks(state_around_planning, num_ranks, config) == [[]] * num_ranks


def plan_with_fewest(rank: int, config: TrainConfig, fewest: int) -> int | str:
    trainer = Trainer(config, connect(config), steps_per_epoch=1, dataset_sha256="", fewest=fewest)
    try:
        return trainer.plan_memory().micro
    except UserError as error:
        return str(error)


def test_a_plan_has_no_pass_of_fewer_samples_than_the_method_can_take(dataset: Path, tmp_path: Path) -> None:
    config = auto_config(tmp_path / "run", dataset, 0.06)
    (free,) = run_ranks(plan_with_fewest, 1, config, 1)
    assert isinstance(free, int)
    assert free < 96, "the memory does not hold all"
    (bound,) = run_ranks(plan_with_fewest, 1, config, 96)
    assert isinstance(bound, str)
    assert "hold no step of 96 samples a rank" in bound


@pytest.mark.parametrize("value", [-1.0])
def test_negative_memory_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"^--batch.memory-gib"):
        BatchConfig(memory_gib=value)
