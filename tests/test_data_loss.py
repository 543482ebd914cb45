"""What is there stays: a run that can't go on, or may not start, changes nothing in its folder."""

from dataclasses import replace
from pathlib import Path

import pytest

from dist_contrastive.checkpoint import CheckpointStore
from dist_contrastive.config import AugmentConfig, CheckpointConfig, ViewConfig
from tests.harness import run_ranks
from tests.runs import (
    STEPS_PER_EPOCH,
    assert_one_line,
    newest_checkpoint,
    outcome_on_rank,
    tiny_config,
    train_on_rank,
    write_dataset,
)  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def contents(run_dir: Path) -> dict[str, bytes]:
    """All files but the lock and what tells how the last launch ended."""
    return {
        str(path.relative_to(run_dir)): path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file() and path.name not in (".lock", "status.json")
    }


def test_a_run_whose_checkpoints_are_all_bad_does_not_start_over(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", dataset, stop_after_steps=2 * STEPS_PER_EPOCH + 1)
    run_ranks(train_on_rank, 2, config)
    store = CheckpointStore(config.run_dir / "checkpoints", keep=2)
    for step in store.steps():
        (store.path(step) / "manifest.json").unlink()
    before = contents(config.run_dir)
    # Another value of a field that a resume may change: config.json would be written anew.
    again = replace(config, checkpoint=CheckpointConfig(keep=3))
    incomplete = [f"{store.path(step)} is incomplete" for step in store.steps()]
    assert_one_line(run_ranks(outcome_on_rank, 2, again), *incomplete, "--overwrite")
    assert contents(config.run_dir) == before
    run_ranks(train_on_rank, 2, replace(again, overwrite=True, stop_after_steps=1))
    assert newest_checkpoint(config.run_dir).step == 1


def test_overwrite_deletes_nothing_for_a_run_that_can_not_start(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", dataset, stop_after_steps=1)
    run_ranks(train_on_rank, 1, config)
    before = contents(config.run_dir)
    for mistake in (
        replace(config, augment=AugmentConfig((ViewConfig(),))),
        replace(config, encoder=replace(config.encoder, name="resnet19")),
        replace(config, init_from=tmp_path / "nowhere.safetensors"),
    ):
        assert_one_line(run_ranks(outcome_on_rank, 1, replace(mistake, overwrite=True)))
        assert contents(config.run_dir) == before


def test_what_was_skipped_is_still_there_when_the_run_has_gone_on(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", dataset, stop_after_steps=2 * STEPS_PER_EPOCH)
    run_ranks(train_on_rank, 1, config)
    skipped = newest_checkpoint(config.run_dir).path
    (skipped / "manifest.json").unlink()
    lost = contents(skipped)
    run_ranks(train_on_rank, 1, replace(config, stop_after_steps=2 * STEPS_PER_EPOCH + 2))
    assert contents(skipped.with_name(f"set-aside-{skipped.name}")) == lost
