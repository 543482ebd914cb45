"""Whatever goes wrong on one rank stops all of them, in time and with its own message."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_contrastive import distributed
from dist_contrastive.batch import Samples
from dist_contrastive.config import CheckpointConfig, TrainConfig
from dist_contrastive.data.beton import open_dataset
from dist_contrastive.data.format import manifest_path
from dist_contrastive.methods import METHODS
from dist_contrastive.methods.base import Embeddings, Losses
from dist_contrastive.methods.simclr import SimCLR
from dist_contrastive.run import train
from dist_contrastive.trainer import NonFiniteError
from tests.betons import jpeg, picture, write_beton
from tests.harness import RankError, run_ranks
from tests.runs import STEPS_PER_EPOCH, metrics_of, newest_checkpoint, tiny_config, train_on_rank, write_dataset

BAD_STEP = STEPS_PER_EPOCH + 2


def poison_loss(method: SimCLR, losses: Losses) -> None:
    losses["loss"] = losses["loss"] * torch.nan


def poison_gradient(method: SimCLR, losses: Losses) -> None:
    def spoil(gradient: Tensor) -> Tensor:
        return gradient * torch.nan

    next(method.encoder.parameters()).register_hook(spoil)


def train_with_poison(
    rank: int, config: TrainConfig, bad_step: int, poison: Callable[[SimCLR, Losses], None]
) -> tuple[str, bool]:
    """Train with `poison` on rank 1 at a step; this rank's error, and whether its weights stayed as they were."""
    before: dict[str, Tensor] = {}
    methods = []

    class Poisoned(SimCLR):
        calls = 0

        def loss(self, embeddings: Embeddings, samples: Samples) -> Losses:
            losses = super().loss(embeddings, samples)
            self.calls += 1
            if self.calls == bad_step:
                methods.append(self)
                before.update({name: p.detach().clone() for name, p in self.named_parameters()})
                if distributed.rank() == 1:
                    poison(self, losses)
            return losses

    METHODS["simclr"] = Poisoned
    try:
        train(config)
    except NonFiniteError as error:
        (method,) = methods
        return str(error), all(torch.equal(p, before[name]) for name, p in method.named_parameters())
    raise AssertionError("the run went on")


each_poison = pytest.mark.parametrize(
    ("poison", "what"), [(poison_loss, "the loss is not finite on rank(s) [1]"), (poison_gradient, "the gradient")]
)


@each_poison
# A step's numbers are waited for where it is logged, and else read when the next one is on its way.
@pytest.mark.parametrize("log_every", [1, 100])
def test_a_nan_on_one_rank_stops_all_and_nothing_is_updated(
    poison: Callable[[SimCLR, Losses], None], what: str, log_every: int, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", write_dataset(tmp_path), norm="group", log_every=log_every)
    for message, unchanged in run_ranks(train_with_poison, 2, config, BAD_STEP, poison):
        assert message.startswith(f"step {BAD_STEP}: {what}")
        assert f"step-{STEPS_PER_EPOCH:08d}" in message
        assert unchanged
    assert newest_checkpoint(config.run_dir).step == STEPS_PER_EPOCH
    assert [line["step"] for line in metrics_of(config.run_dir)] == list(range(1, BAD_STEP))


@pytest.mark.parametrize(
    ("bad_step", "changes"),
    [
        (STEPS_PER_EPOCH, {}),
        (4, {"checkpoint": CheckpointConfig(every_steps=4)}),
        (4, {"stop_after_steps": 4}),
    ],
    ids=["the last step of an epoch", "a checkpoint in mid-epoch", "a stop"],
)
def test_no_checkpoint_is_made_of_a_step_whose_numbers_are_still_to_be_read(
    bad_step: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", write_dataset(tmp_path), norm="group", log_every=100, **changes)
    for message, unchanged in run_ranks(train_with_poison, 2, config, bad_step, poison_loss):
        assert message.startswith(
            f"step {bad_step}: the loss is not finite on rank(s) [1]; nothing was updated; there is no"
        )
        assert unchanged
    assert not (config.run_dir / "checkpoints").exists() or not list((config.run_dir / "checkpoints").iterdir())
    assert [line["step"] for line in metrics_of(config.run_dir)] == list(range(1, bad_step))


def test_an_error_in_a_loaders_thread_ends_the_run_as_itself(tmp_path: Path) -> None:
    path = write_beton(tmp_path / "bad.beton", [jpeg(picture(24, 24, seed)) for seed in range(40)], num_test=4)
    dataset = open_dataset(path)
    content = bytearray(path.read_bytes())
    content[dataset.pointers[7] : dataset.pointers[7] + dataset.sizes[7]] = bytes(int(dataset.sizes[7]))
    path.write_bytes(content)
    manifest = json.loads(manifest_path(path).read_text())
    manifest_path(path).write_text(json.dumps({**manifest, "sha256": hashlib.sha256(content).hexdigest()}))
    config = tiny_config(tmp_path / "run", path)
    with pytest.raises(RankError, match=r"sample 7 of .* is not a readable JPEG"):
        run_ranks(train_on_rank, 2, replace(config, batch=replace(config.batch, size=36)))
