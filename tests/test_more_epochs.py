"""More epochs for a run: where its steps are the first ones of the longer run, bit for bit, and nowhere else."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_contrastive.config import EncoderConfig, OptimConfig, ProbeConfig, UserError
from dist_contrastive.methods import METHODS
from dist_contrastive.methods.byol import BYOLConfig
from dist_contrastive.optim import learning_rate
from dist_contrastive.schedules import Schedule
from dist_contrastive.schedules import learning_rate as rate_at
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
from tests.steps import DONE, build, clock_at, share_of_batch, student_of

CONSTANT = OptimConfig(learning_rate=1e-2, warmup_epochs=1, schedule="constant")
WSD = replace(CONSTANT, schedule="wsd", decay_epochs=1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def test_a_finished_run_goes_on_as_the_longer_one_bit_for_bit(dataset: Path, tmp_path: Path) -> None:
    probe = ProbeConfig(every=1, knn_k=5, strengths=(1e-2,))
    short = tiny_config(tmp_path / "run", dataset, epochs=2, optim=CONSTANT, probe=probe)
    long = replace(short, epochs=3)
    run_ranks(train_on_rank, 2, short)
    assert (short.run_dir / "DONE").exists()
    run_ranks(train_on_rank, 2, long)
    assert (short.run_dir / "DONE").exists()
    whole = replace(long, run_dir=tmp_path / "whole")
    run_ranks(train_on_rank, 2, whole)
    assert_same_state(newest_checkpoint(long.run_dir), newest_checkpoint(whole.run_dir))
    assert metrics_of(long.run_dir) == metrics_of(whole.run_dir)
    for name in ("encoder.safetensors", "probe.json"):
        # The encoder's file names its config, and with it the folder.
        cut = (whole.run_dir / name).read_bytes().find(b"}}") if name.startswith("encoder") else 0
        assert (long.run_dir / name).read_bytes()[cut:][-1000:] == (whole.run_dir / name).read_bytes()[cut:][-1000:]


def test_wsd_goes_on_before_its_decay(dataset: Path, tmp_path: Path) -> None:
    stop = 3 * STEPS_PER_EPOCH
    short = tiny_config(tmp_path / "run", dataset, epochs=4, optim=WSD, stop_after_steps=stop)
    long = replace(short, epochs=6, stop_after_steps=stop + 3)
    run_ranks(train_on_rank, 1, short)
    run_ranks(train_on_rank, 1, long)
    whole = replace(long, run_dir=tmp_path / "whole")
    run_ranks(train_on_rank, 1, whole)
    assert_same_state(newest_checkpoint(long.run_dir), newest_checkpoint(whole.run_dir))


@pytest.mark.parametrize(
    ("changes", "stop", "epochs", "reason"),
    [
        ({}, 0, 2, "the learning rate of steps that are done would be another"),
        ({"optim": WSD, "epochs": 2}, 0, 3, "the learning rate of steps that are done would be another"),
        (
            {"optim": CONSTANT, "method": BYOLConfig()},
            2,
            2,
            "the teacher momentum of steps that are done would be another",
        ),
        ({"optim": CONSTANT, "epochs": 3}, 2 * STEPS_PER_EPOCH, 1, f"an epoch has {STEPS_PER_EPOCH} steps"),
    ],
)
def test_any_other_is_refused_and_keeps_what_it_has(
    changes: dict, stop: int, epochs: int, reason: str, dataset: Path, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", dataset, **{"epochs": 1, "optim": OptimConfig(warmup_epochs=0), **changes})
    run_ranks(train_on_rank, 1, replace(config, stop_after_steps=stop))
    # status.json says that this start failed.
    aside = (".lock", "status.json")
    before = {
        path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file() and path.name not in aside
    }
    with pytest.raises(RankError, match=reason) as caught:
        run_ranks(train_on_rank, 1, replace(config, epochs=epochs))
    message = str(caught.value).strip().splitlines()[-1]
    assert f"--from {config.run_dir} --run-dir ANOTHER" in message
    assert "--overwrite" in message
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_what_a_step_takes_from_the_runs_length_is_the_teachers_momentum(name: str) -> None:
    """What `after_step` does at one progress and at another, from the same state."""
    states, momenta = [], []
    for progress in (0.25, 0.5):
        method = build(name, EncoderConfig(name="resnet10_w16", norm="group"))
        with torch.no_grad():
            for parameter in student_of(method).parameters():
                parameter.add_(0.1)
        embeddings = {key: value.detach() for key, value in method.embed_all(share_of_batch(method)).items()}
        method.after_step(clock_at(progress), embeddings, DONE)
        states.append(method.state_dict())
        momenta.append(method.teacher_momentum(progress))
    equal = all(torch.equal(one, other) for one, other in zip(*(state.values() for state in states), strict=True))
    assert equal == (momenta[0] == momenta[1])


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_the_plateau_says_nothing_of_the_length(schedule: Schedule) -> None:
    short, long = ([rate_at(s, total, 5, 2.0, schedule, 10) for s in range(31)] for total in (40, 70))
    assert short == long
    assert short[5:] == [2.0] * 26


def test_wsd_goes_down_linearly_to_zero_at_the_end() -> None:
    rates = [rate_at(s, 40, 5, 2.0, "wsd", 10) for s in range(41)]
    np.testing.assert_allclose(rates[30:], np.linspace(2.0, 0.0, 11), atol=1e-12)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[30:]))


def test_epochs_become_steps() -> None:
    config = tiny_config(Path("unused"), Path("unused"), epochs=4, optim=WSD)
    rates = [learning_rate(config, 10, step) for step in range(40)]
    peak = 1e-2 * config.batch.size / 256
    assert rates[9:31] == [peak] * 22
    assert rates[0] == pytest.approx(peak / 10)
    assert rates[39] == pytest.approx(peak / 10)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"schedule": "wsd"}, "--optim.decay-epochs 0.0"),
        ({"schedule": "constant", "decay_epochs": 1.0}, "--optim.decay-epochs 1.0"),
        ({"schedule": "wsd", "decay_epochs": 3.5, "warmup_epochs": 1.0}, "--optim.decay-epochs 3.5"),
    ],
)
def test_a_decay_that_does_not_fit_is_refused(changes: dict, option: str) -> None:
    with pytest.raises(UserError, match=option):
        tiny_config(Path("unused"), Path("unused"), epochs=4, optim=OptimConfig(**changes))
