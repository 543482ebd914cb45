"""What a run's folder tells of it, whatever launched it and however it ended; and the command that reads it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dist_contrastive import processes
from dist_contrastive.batch import Batch
from dist_contrastive.config import UserError
from dist_contrastive.run import train
from dist_contrastive.run_folder.folder import RunFolder
from dist_contrastive.run_folder.status import SILENT_S, RunStatus, StatusFile, read_file, read_status
from dist_contrastive.trainer import NonFiniteError, StepReport, Trainer
from tests.harness import run_ranks
from tests.runs import STEPS_PER_EPOCH, tiny_config, train_on_rank, write_dataset
from tests.test_command import TIMEOUT_S, run_module
from tests.test_liveness import Launched, driver, launch  # noqa: F401 - fixtures


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def told(run_dir: Path) -> tuple[int, str, dict[str, Any]]:
    """What the command says of a run: its exit status, its line, and what --json has."""
    line = run_module("dist_contrastive.status", str(run_dir))
    full = run_module("dist_contrastive.status", str(run_dir), "--json")
    assert line.returncode == full.returncode
    assert len(line.stdout.splitlines()) == 1
    return line.returncode, line.stdout, json.loads(full.stdout)


def write(folder: Path, status: RunStatus) -> None:
    (folder / "status.json").write_text(json.dumps(asdict(status)))


def here(**changes: Any) -> RunStatus:
    """The status of a run whose rank 0 is this process."""
    pid = os.getpid()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    known = RunStatus("running", step=3, when=now, host="here", pid=pid, machine=processes.machine())
    return replace(known, started=processes.started(pid), **changes)


# What runs write


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_stopped_then_done(num_ranks: int, dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", dataset, epochs=1)
    run_ranks(train_on_rank, num_ranks, replace(config, stop_after_steps=2))
    status, line, found = told(config.run_dir)
    assert status == 75
    assert f"{config.run_dir}: stopped at step 2 of {STEPS_PER_EPOCH} (--stop-after-steps 2)" in line
    assert (found["state"], found["step"], found["total_steps"]) == ("stopped", 2, STEPS_PER_EPOCH)
    assert found["ranks"] == num_ranks
    assert abs(datetime.fromisoformat(found["when"]) - datetime.now(UTC)) < timedelta(hours=1)

    run_ranks(train_on_rank, num_ranks, config)
    status, line, found = told(config.run_dir)
    assert (status, found["state"], found["step"]) == (0, "done", STEPS_PER_EPOCH)
    with pytest.raises(UserError, match="holds a finished run"):
        train(config)
    assert told(config.run_dir) == (status, line, found)


def diverge(rank: int, config: Any) -> None:
    def update(self: Trainer, batch: Batch) -> list[StepReport]:
        raise NonFiniteError("step 1: the loss is not finite;\nlower the rate")

    Trainer.update = update  # type: ignore[method-assign]
    with pytest.raises(UserError):
        train(config)


def test_a_users_mistake_in_mid_run_is_told_in_its_words(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", dataset)
    run_ranks(diverge, 2, config)
    status, line, found = told(config.run_dir)
    assert (status, found["state"]) == (1, "failed")
    assert "failed at step 0 of 24 (step 1: the loss is not finite; lower the rate)" in line


def test_a_run_that_is_refused_leaves_the_status_as_it_is(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", dataset, stop_after_steps=1)
    train(config)
    before = (config.run_dir / "status.json").read_bytes()
    with pytest.raises(UserError, match="another config"):
        train(replace(config, seed=7))
    assert (config.run_dir / "status.json").read_bytes() == before
    holder = RunFolder(config.run_dir)
    with pytest.raises(UserError, match="is in use by"):
        train(config)
    holder.close()
    assert (config.run_dir / "status.json").read_bytes() == before


def test_a_run_that_can_not_go_on_has_failed_where_it_stood(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", dataset, stop_after_steps=2)
    train(config)
    (state,) = (config.run_dir / "checkpoints").glob("*/state.json")
    state.write_bytes(b"{}")
    with pytest.raises(UserError, match="none can be used"):
        train(config)
    _, line, found = told(config.run_dir)
    assert found["state"] == "failed"
    assert "failed at step 2 of 24" in line
    assert "state.json was altered" in found["reason"]


def test_a_finished_run_that_can_not_become_longer_is_still_done(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, dataset)
    folder = RunFolder(tmp_path)
    folder.open(config)
    folder.claim(config)
    folder.status.begin(step=24, total_steps=24, ranks=1)
    folder.finish()
    folder.close()
    folder = RunFolder(tmp_path)
    assert folder.open(replace(config, epochs=9)) == "resume"
    with pytest.raises(UserError), folder.status.tells_faults():
        raise UserError("has done 24 steps of a run of 4 epochs, which can't become one of 9")
    folder.close()
    assert read_status(tmp_path).state == "done"
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"


def test_the_signal_is_named(launch: Callable[..., Launched]) -> None:  # noqa: F811
    launched = launch()
    launched.wait_for_step(2)
    status, line, _ = told(launched.run_dir)
    assert status == 1
    assert "running at step" in line
    launched.ranks[0].send_signal(signal.SIGTERM)
    launched.wait_until_all_is_over()
    status, _, found = told(launched.run_dir)
    assert launched.process.returncode == 1, "what accelerate makes of it"
    assert (status, found["state"], found["reason"]) == (75, "stopped", "SIGTERM")


def test_rank_0_tells_of_a_rank_that_died(launch: Callable[..., Launched]) -> None:  # noqa: F811
    launched = launch()
    launched.wait_for_step(3)
    launched.ranks[1].send_signal(signal.SIGKILL)
    launched.wait_until_all_is_over()
    status, _, found = told(launched.run_dir)
    assert (status, found["state"]) == (1, "failed")
    assert found["reason"].startswith("rank 1 died (rank 0 waited for it at step")


def test_an_internal_fault_of_another_rank_is_told(
    launch: Callable[..., Launched],  # noqa: F811
    driver: Callable[[str], list[str]],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    launched = launch(program=driver("raise KeyError('injected fault')"))
    launched.wait_until(lambda: launched.process.poll() is not None, TIMEOUT_S)
    _, _, found = told(launched.run_dir)
    assert found["state"] == "failed"
    assert found["reason"].startswith("rank 1 failed (rank 0 waited for it at step 5)")


def test_a_run_that_was_killed_has_died(launch: Callable[..., Launched]) -> None:  # noqa: F811
    launched = launch()
    launched.wait_for_step(3)
    launched.ranks[0].send_signal(signal.SIGKILL)
    launched.wait_until_all_is_over()
    status, line, found = told(launched.run_dir)
    assert (status, found["state"], found["pid"]) == (1, "died", launched.ranks[0].pid)
    assert f"its process {launched.ranks[0].pid} is gone" in line


# Who reads


def test_a_number_that_another_process_has_by_now_is_no_life(tmp_path: Path) -> None:
    write(tmp_path, here())
    assert read_status(tmp_path).state == "running"
    write(tmp_path, replace(here(), started=1))
    assert read_status(tmp_path).state == "died"


def test_a_process_that_has_ended_and_is_not_yet_reaped_is_gone(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    status = replace(here(), pid=process.pid, started=processes.started(process.pid))
    write(tmp_path, status)
    assert read_status(tmp_path).state == "running"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert read_status(tmp_path).state == "died"
    process.wait()


def test_a_run_on_another_machine_lives_while_it_is_heard_of(tmp_path: Path) -> None:
    elsewhere = here(machine="another boot", pid=1)
    write(tmp_path, elsewhere)
    assert read_status(tmp_path).state == "running"
    long_ago = datetime.now(UTC) - timedelta(seconds=2 * SILENT_S)
    write(tmp_path, replace(elsewhere, when=long_ago.isoformat()))
    found = read_status(tmp_path)
    assert (found.state, found.reason) == ("died", "here has not been heard of for 10 min")


def test_only_done_is_done(tmp_path: Path) -> None:
    write(tmp_path, here(state="done"))
    assert read_status(tmp_path).state == "unknown"
    (tmp_path / "DONE").touch()
    assert read_status(tmp_path).state == "done"
    (tmp_path / "status.json").unlink()
    assert read_status(tmp_path).state == "done", "as an earlier version left it"


@pytest.mark.parametrize("text", [None, "", "[]", '{"state": "running", "colour": 3}'])
def test_a_run_without_a_status_is_unknown(text: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    if text is not None:
        (tmp_path / "status.json").write_text(text)
    status, line, _ = told(tmp_path)
    assert status == 1
    assert line.startswith(f"{tmp_path}: unknown (there is no status.json that can be read")


@pytest.mark.parametrize("name", ["gone", "file", "empty"])
def test_what_is_no_run_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    found = run_module("dist_contrastive.status", str(tmp_path / name))
    assert found.returncode == 2
    assert found.stderr.startswith(f"error: {tmp_path / name} ")
    assert len(found.stderr.splitlines()) == 1


def test_the_command_is_light() -> None:
    check = "import sys, dist_contrastive.status; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'psutil')))"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=TIMEOUT_S)


# Who writes


def test_a_fault_after_another_run_took_the_folder_is_not_told(tmp_path: Path) -> None:
    file = StatusFile(tmp_path)
    file.begin(step=1, total_steps=9, ranks=2)
    file.close()
    file.fail("a peer closed the connection")
    file.fail("rank 1 died")
    known = read_file(tmp_path)
    assert known
    assert (known.state, known.reason) == ("failed", "rank 1 died")
    write(tmp_path, replace(known, state="running", reason="", started=1))
    file.fail("late")
    assert read_file(tmp_path) == replace(known, state="running", reason="", started=1)


def test_what_comes_after_the_end_changes_nothing(tmp_path: Path) -> None:
    file = StatusFile(tmp_path)
    file.begin(step=1, total_steps=9, ranks=2)
    file.end("stopped", "SIGUSR1")
    file.fail("rank 1 left first")
    known = read_file(tmp_path)
    assert known
    assert (known.state, known.reason) == ("stopped", "SIGUSR1")


def test_slurms_job_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    StatusFile(tmp_path).begin(step=1, total_steps=9, ranks=2)
    known = read_file(tmp_path)
    assert known
    assert (known.job, known.restarts) == ("17", 2)


def test_steps_are_noted_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_contrastive.run_folder.status.BEAT_S", 0.01)
    file = StatusFile(tmp_path)
    file.begin(step=0, total_steps=9, ranks=1)
    file.step = 4
    for _ in range(1000):
        known = read_file(tmp_path)
        if known and known.step == 4:
            break
        file._closed.wait(0.01)
    assert known
    assert known.step == 4
    file.close()
