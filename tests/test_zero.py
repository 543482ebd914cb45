"""ZeRO through DeepSpeed on gloo ranks: what it trains is what whole copies train, and what it can't is refused."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_contrastive.config import TrainConfig
from dist_contrastive.run import train
from tests.harness import run_ranks
from tests.runs import losses_of, tiny_config, train_on_rank, write_dataset

LENGTH = 10


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
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(("stage", "offload"), [(1, False), (2, False), (2, True)])
def test_the_first_losses_follow_those_of_whole_copies(
    stage: int, offload: bool, dataset: Path, tmp_path: Path
) -> None:
    whole = tiny_config(tmp_path / "whole", dataset, stop_after_steps=20)
    run_ranks(train_on_rank, 2, whole)
    sharded = replace(whole, run_dir=tmp_path / "sharded")
    run_ranks(train_sharded, 2, sharded, stage, offload)
    np.testing.assert_allclose(losses_of(sharded.run_dir), losses_of(whole.run_dir), rtol=0, atol=1e-4)
