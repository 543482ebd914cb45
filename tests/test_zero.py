"""ZeRO through DeepSpeed on gloo ranks: what it trains is what whole copies train, and what it can't is refused."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from dist_contrastive import distributed
from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import TrainConfig, UserError
from dist_contrastive.launch import connect
from dist_contrastive.methods import METHODS
from dist_contrastive.methods.base import Embeddings, Losses
from dist_contrastive.preflight import zero_launch
from dist_contrastive.run import train
from dist_contrastive.step.gradient import StepGradient
from dist_contrastive.step.memory_plan import example
from dist_contrastive.step.replicas import DataParallel, Passed
from dist_contrastive.step.zero import FIRST_SCALE, ShardedOptimizer
from dist_contrastive.trainer import NonFiniteError, Trainer
from tests.harness import run_ranks
from tests.runs import (
    assert_same_state,
    losses_of,
    newest_checkpoint,
    tiny_config,
    train_on_rank,
    write_dataset,
)
from tests.steps import DONE, clock_at, with_small


def launched(stage: int, offload: bool = False) -> None:
    """What `accelerate launch` tells its ranks where its config asks for DeepSpeed."""
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)
    os.environ["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] = "cpu" if offload else "none"


def train_sharded(rank: int, config: TrainConfig, stage: int, offload: bool = False) -> bool:
    launched(stage, offload)
    return train(config)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), captions=True)


def of_method(name: str, run_dir: Path, dataset: Path, **changes: object) -> TrainConfig:
    return with_small(tiny_config(run_dir, dataset, norm="group", **changes), name)


# Whole runs.


def follow(dataset: Path, tmp_path: Path, stage: int, *, offload: bool = False, micro: int = 0) -> None:
    whole = tiny_config(tmp_path / "whole", dataset, stop_after_steps=20)
    whole = replace(whole, batch=replace(whole.batch, micro=micro))
    run_ranks(train_on_rank, 2, whole)
    sharded = replace(whole, run_dir=tmp_path / "sharded")
    run_ranks(train_sharded, 2, sharded, stage, offload)
    assert len(losses_of(whole.run_dir)) == 20
    np.testing.assert_allclose(losses_of(sharded.run_dir), losses_of(whole.run_dir), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("stage", "micro"), [(1, 3), (2, 0)])
def test_the_first_losses_follow_those_of_whole_copies(stage: int, micro: int, dataset: Path, tmp_path: Path) -> None:
    follow(dataset, tmp_path, stage, micro=micro)


def test_they_do_so_with_the_optimizers_state_on_the_host(dataset: Path, tmp_path: Path) -> None:
    follow(dataset, tmp_path, 2, offload=True)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(stage: int, dataset: Path, tmp_path: Path) -> None:
    whole = tiny_config(tmp_path / "whole", dataset, stop_after_steps=8)
    run_ranks(train_sharded, 2, whole, stage)
    parts = replace(whole, run_dir=tmp_path / "parts", stop_after_steps=4)
    run_ranks(train_sharded, 2, parts, stage)
    run_ranks(train_sharded, 2, replace(parts, stop_after_steps=8), stage)
    assert_same_state(newest_checkpoint(parts.run_dir), newest_checkpoint(whole.run_dir))


def test_a_run_goes_on_under_zero_and_back_at_other_numbers_of_ranks(dataset: Path, tmp_path: Path) -> None:
    whole = tiny_config(tmp_path / "whole", dataset, norm="group", stop_after_steps=12)
    run_ranks(train_on_rank, 2, whole)
    mixed = replace(whole, run_dir=tmp_path / "mixed")
    run_ranks(train_on_rank, 1, replace(mixed, stop_after_steps=3))
    run_ranks(train_sharded, 2, replace(mixed, stop_after_steps=6), 2)
    run_ranks(train_sharded, 4, replace(mixed, stop_after_steps=9), 1)
    run_ranks(train_on_rank, 2, mixed)
    np.testing.assert_allclose(losses_of(mixed.run_dir), losses_of(whole.run_dir), rtol=0, atol=1e-4)


# Single steps.


def trainer_of(config: TrainConfig, stage: int) -> Trainer:
    """Whole copies at stage 0."""
    if stage:
        launched(stage)
    AcceleratorState._reset_state(reset_partial_state=True)  # it may be the ranks' second
    trainer = Trainer(config, connect(config), steps_per_epoch=100, dataset_sha256="")
    assert isinstance(trainer.replicas, ShardedOptimizer if stage else DataParallel)
    return trainer


def noise(config: TrainConfig, seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    rank_batch = config.batch.size // distributed.world_size()
    whole = example(config, config.batch.size)
    return whole.part(slice(distributed.rank() * rank_batch, (distributed.rank() + 1) * rank_batch))


def parameters_of(trainer: Trainer) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in trainer.method.parameters()]).numpy().copy()


def updates(rank: int, configs: list[TrainConfig], stage: int) -> list[np.ndarray]:
    """Every parameter of each config's method after two updates; under DistributedDataParallel at stage 0."""
    found = []
    for config in configs:
        trainer = trainer_of(config, stage)
        for step in range(2):
            trainer.update(noise(config, step))
        found.append(parameters_of(trainer))
    return found


def test_every_method_takes_the_updates_of_whole_copies(dataset: Path, tmp_path: Path) -> None:
    stage, configs = 2, []
    for name in sorted(METHODS):
        config = of_method(name, tmp_path, dataset)
        config = replace(config, optim=replace(config.optim, name="sgd", learning_rate=0.2, warmup_epochs=0))
        configs.append(replace(config, batch=replace(config.batch, micro=3)))
    whole, sharded = run_ranks(updates, 2, configs, 0), run_ranks(updates, 2, configs, stage)
    for ours, theirs in zip(sharded, whole, strict=True):
        for config, one, other in zip(configs, ours, theirs, strict=True):
            distance = np.linalg.norm(one - other) / np.linalg.norm(other)
            assert distance < 1e-5, f"{config.method.name}: {distance}"


def halve(rank: int, config: TrainConfig, stage: int) -> tuple[int, list[str], np.ndarray]:
    """Updates of which rank 1 can do only micro-batches of 2; what the micro-batch became, and what was said."""
    trainer = trainer_of(config, stage)
    forward = trainer.replicas.forward

    def failing(batch: Batch, what: Passed) -> dict[str, Tensor]:
        if rank == 1 and len(batch) > 2 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("injected")
        return forward(batch, what)

    trainer.replicas.forward = failing  # type: ignore[method-assign]
    said: list[str] = []
    trainer.gradient.say = said.append
    for step in range(2):
        trainer.update(noise(config, step))
    return trainer.gradient.micro, said, parameters_of(trainer)


@pytest.mark.parametrize("stage", [1, 2])
def test_out_of_memory_on_one_rank_makes_all_halve_and_repeat(stage: int, dataset: Path, tmp_path: Path) -> None:
    config = of_method("simclr", tmp_path, dataset)
    config = replace(config, batch=replace(config.batch, micro=4))
    expected = run_ranks(updates, 2, [replace(config, batch=replace(config.batch, micro=2))], stage)
    for (micro, said, parameters), (clean,) in zip(run_ranks(halve, 2, config, stage), expected, strict=True):
        assert micro == 2
        assert said == [
            "step 1: out of memory on rank(s) [1] (injected); repeated with micro-batches of 2 samples instead of 4"
        ]
        np.testing.assert_allclose(parameters, clean, rtol=0, atol=1e-6)


def overflow(rank: int, config: TrainConfig, stage: int) -> tuple[list[float], list[bool], float]:
    """fp16's loss scaler over three updates, of which the second overflows on rank 1: scales, what moved, the last norm."""
    trainer = trainer_of(config, stage)
    optimizer = torch.optim.SGD([p for p in trainer.method.parameters() if p.requires_grad], lr=0.1)
    # The scaler of fp16 over passes in fp32, which a CPU computes.
    replicas = ShardedOptimizer(trainer.method, optimizer, trainer.accelerator, "fp16")
    replicas.forward = lambda batch, what: replicas._engine.module(batch, what)  # type: ignore[method-assign]
    gradient = StepGradient(replicas, trainer.gradient._augmentation, seed=0, micro=0)
    scales, moved, norm = [], [], torch.zeros(())
    for step in range(3):
        gradient.compute(noise(config, step), clock_at(step=step))
        if step == 1 and rank == 1:
            for averaged in replicas._zero.averaged_gradients.values():
                averaged[0].fill_(float("inf"))
        before = parameters_of(trainer)
        norm = replicas.norm_and_clip(1.0)
        assert torch.isfinite(norm) == (step != 1)
        replicas.update(~DONE)
        moved.append(not np.array_equal(parameters_of(trainer), before))
        assert replicas.loss_scale is not None
        scales.append(replicas.loss_scale)
    return scales, moved, float(norm)


@pytest.mark.parametrize("stage", [1, 2])
def test_an_overflow_of_fp16_skips_the_update_on_all_ranks_and_halves_the_scale(
    stage: int, dataset: Path, tmp_path: Path
) -> None:
    config = of_method("simclr", tmp_path, dataset)
    outcomes = run_ranks(overflow, 2, config, stage)
    for scales, moved, norm in outcomes:
        assert scales == [FIRST_SCALE, FIRST_SCALE / 2, FIRST_SCALE / 2]
        assert moved == [True, False, True]
        assert 0 < norm < 1e3, "the norm is that of the gradient, not of the scaled one"


def not_a_number(rank: int, config: TrainConfig) -> tuple[str, bool]:
    """What an update says whose loss is not finite on rank 1, and whether it left the parameters alone."""
    trainer = trainer_of(config, 2)
    before = parameters_of(trainer)
    if rank == 1:
        loss = trainer.method.loss

        def broken(embeddings: Embeddings, samples: Samples) -> Losses:
            return {name: value * float("nan") for name, value in loss(embeddings, samples).items()}

        trainer.method.loss = broken  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError) as caught:
        trainer.update(noise(config))
    return str(caught.value), np.array_equal(parameters_of(trainer), before)


def test_a_loss_that_is_not_finite_updates_nothing(dataset: Path, tmp_path: Path) -> None:
    for message, same in run_ranks(not_a_number, 2, of_method("simclr", tmp_path, dataset)):
        assert "the loss is not finite on rank(s) [1]" in message
        assert same


def kept(rank: int, config: TrainConfig, stage: int) -> int:
    """Bytes of the optimizer's state on this rank after an update."""
    trainer = trainer_of(config, stage)
    trainer.update(noise(config))
    values = [v for state in trainer.replicas.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(v.numel() * v.element_size() for v in values if v.ndim)


def test_a_rank_keeps_its_share_of_the_optimizers_state(dataset: Path, tmp_path: Path) -> None:
    config = of_method("simclr", tmp_path, dataset)
    (whole,) = run_ranks(kept, 1, config, 0)
    for num_ranks in (2, 4):
        for share in run_ranks(kept, num_ranks, config, 1):
            assert share == pytest.approx(whole / num_ranks, rel=0.01)


# What can't be computed is refused in one line.


@pytest.fixture
def under_deepspeed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    return monkeypatch


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3", "zero_stage: 3 .* give 1 or 2"),
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0", "zero_stage: 0 .* give 1 or 2"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "nvme", "offload_optimizer_device: nvme .* none or cpu"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu", "offload_param_device: cpu"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps: 4 .* --batch.micro"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "gradient_clipping: 1.0 .* --optim.clip-norm"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json", "deepspeed_config_file: ds.json"),
    ],
)
def test_a_launch_that_cant_be_computed_is_refused(
    variable: str, value: str, words: str, under_deepspeed: pytest.MonkeyPatch, dataset: Path, tmp_path: Path
) -> None:
    under_deepspeed.setenv(variable, value)
    with pytest.raises(UserError, match=words):
        zero_launch(tiny_config(tmp_path, dataset))


def test_lars_is_refused(under_deepspeed: pytest.MonkeyPatch, dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, dataset)
    with pytest.raises(UserError, match=r"--optim.name lars under DeepSpeed: .* norm of each"):
        zero_launch(replace(config, optim=replace(config.optim, name="lars")))
