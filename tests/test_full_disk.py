"""A disk that fills, at any moment of a run: one line on all ranks that says what, and how it goes on once there is room."""

import contextlib
import io
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dist_contrastive.config import CheckpointConfig, ProbeConfig, TrainConfig, UserError
from dist_contrastive.metrics import MetricsLog, read_metrics
from tests.harness import run_ranks
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

PROBE = ProbeConfig(knn_k=5, strengths=(1e-2,))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def train_in_little_room(rank: int, config: TrainConfig, num_bytes: int) -> Outcome:
    """What comes of a run of which no file can grow beyond `num_bytes`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    return outcome_on_rank(rank, config)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_between_checkpoints(num_ranks: int, dataset: Path, tmp_path: Path) -> None:
    # The limit is for every file, that through which the ranks find one another, too, which has some 3 kB: by then the metrics
    # have more.
    done = 2 * STEPS_PER_EPOCH + 1
    config = tiny_config(tmp_path / "run", dataset, stop_after_steps=3 * STEPS_PER_EPOCH + 4)
    run_ranks(train_on_rank, num_ranks, replace(config, stop_after_steps=done))
    num_bytes = (config.run_dir / "metrics.jsonl").stat().st_size + 500  # ends in the midst of the third line from here
    outcomes = run_ranks(train_in_little_room, num_ranks, config, num_bytes)
    step = f"then the same command goes on from step {done}"
    assert_one_line(outcomes, f"{config.run_dir}/metrics.jsonl can't be written (File too large); make room, {step}")
    assert newest_checkpoint(config.run_dir).step == done
    run_ranks(train_on_rank, num_ranks, config)
    whole = replace(config, run_dir=tmp_path / "whole")
    run_ranks(train_on_rank, num_ranks, whole)
    assert_same_state(newest_checkpoint(config.run_dir), newest_checkpoint(whole.run_dir))
    assert metrics_of(config.run_dir) == metrics_of(whole.run_dir)


def test_before_the_first_checkpoint(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", dataset, checkpoint=CheckpointConfig(every=4))
    outcomes = run_ranks(train_in_little_room, 1, config, 4000)  # config.json has less
    assert_one_line(outcomes, "can't be written (File too large); make room, then the same command starts over")


@pytest.fixture(scope="module")
def almost_done(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run that has done its last step, and has yet to be concluded."""
    config = tiny_config(tmp_path_factory.mktemp("runs") / "run", dataset, epochs=1, probe=PROBE)
    run_ranks(train_on_rank, 1, replace(config, stop_after_steps=STEPS_PER_EPOCH))
    return config


# The name under which a file is written before it gets its own; what is written to /dev/full meets a full disk.
@pytest.mark.parametrize(
    ("temporary", "name", "num_ranks"),
    [
        (".config.json.incomplete", "config.json", 2),
        (".probe.json.incomplete", "probe.json", 2),
        (".encoder.safetensors.incomplete", "encoder.safetensors", 2),
        (".report.html.incomplete", "report.html", 1),
    ],
)
def test_while_a_file_is_written(
    temporary: str, name: str, num_ranks: int, almost_done: TrainConfig, tmp_path: Path
) -> None:
    config = replace(almost_done, run_dir=tmp_path / "run")
    shutil.copytree(almost_done.run_dir, config.run_dir)
    full = config.run_dir / temporary
    full.symlink_to("/dev/full")
    outcomes = run_ranks(outcome_on_rank, num_ranks, config)
    goes_on = f"make room, then the same command goes on from step {STEPS_PER_EPOCH}"
    assert_one_line(outcomes, f"{config.run_dir / name} can't be written (No space left on device); {goes_on}")
    assert not (config.run_dir / "DONE").exists()


def log_in_little_room(rank: int, folder: Path, through: str) -> tuple[str, int, str]:
    """What TensorBoard's thread met, raised in `through`; the last step that was logged; what stood on stderr."""
    output = io.StringIO()
    log = MetricsLog(folder, 0, lambda: "it goes on")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    error = ""
    with contextlib.redirect_stderr(output):
        try:
            if through == "flush":
                log._tensorboard.add_text("more than fits", "x" * 5000)
            else:  # a line in metrics.jsonl is shorter than TensorBoard's, and all of them fit
                for step in range(1, 101):
                    log.write(step, 0, {"x": 1.0})
            log.flush()
        except UserError as caught:
            error = str(caught)
        with contextlib.suppress(UserError):
            log.write(999, 0, {})
        log.close()
    return error, read_metrics(folder / "metrics.jsonl")[-1]["step"], output.getvalue()


@pytest.mark.parametrize("through", ["a later call", "flush"])
def test_tensorboards_thread_is_heard(through: str, tmp_path: Path) -> None:
    line = f"{tmp_path}/tensorboard can't be written (File too large); make room, then it goes on"
    assert run_ranks(log_in_little_room, 1, tmp_path, through) == [(line, 999, "")]
