"""Signals to a run: it stops where nothing is half done, says so, and goes on as if nothing had happened. Real launches."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dist_contrastive import cli, distributed, signals
from dist_contrastive.checkpoint import CheckpointStore
from dist_contrastive.run_folder.status import read_status
from tests.harness import run_ranks
from tests.runs import STEPS_PER_EPOCH, assert_same_state, metrics_of, newest_checkpoint, write_dataset
from tests.test_command import TIMEOUT_S
from tests.test_liveness import SOON_S, Launched, processes_of

MODULE = ["-m", "dist_contrastive.train"]
RUN = ["--epochs", "3", "--checkpoint.every", "1", "--probe.enabled", "--probe.every", "1"]
TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


# A process by itself

PROGRAM = """
import sys, time
from dist_contrastive import cli, signals

def main():
    print("early", flush=True)
    {early}
    with signals.deferred():
        print("running", flush=True)
        while not signals.requested():
            time.sleep(0.01)
        print(signals.reason(), flush=True)
        time.sleep(60)

with signals.handled():
    main()
"""


WAIT_FOR_EVER = """
    import ctypes
    lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)
"""
"""In compiled code, as where a rank waits for others: no handler of Python's is called there."""


class Program:
    def __init__(self, early: str = "pass") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(early=early)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def wait_for(self, line: str) -> None:
        assert self.process.stdout
        assert self.process.stdout.readline().strip() == line

    def errors(self) -> list[str]:
        return self.process.communicate(timeout=SOON_S)[1].splitlines()


@pytest.fixture
def program() -> Iterator[Callable[..., Program]]:
    started: list[Program] = []

    def start(**where: str) -> Program:
        started.append(Program(**where))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


@pytest.mark.parametrize("number", [TERM, USR1, INT])
def test_a_signal_before_there_is_anything_to_lose_ends_the_process(
    program: Callable[..., Program], number: signal.Signals
) -> None:
    one = program(early=WAIT_FOR_EVER)
    one.wait_for("early")
    one.process.send_signal(number)
    assert one.errors() == [f"{number.name}: stopped before the first step"]
    assert one.process.returncode == cli.EXIT_STOPPED


def test_other_signals_are_noted_only_and_the_third_ctrl_c_ends_it(program: Callable[..., Program]) -> None:
    one = program()
    one.wait_for("early")
    one.wait_for("running")
    one.process.send_signal(USR1)
    one.wait_for("SIGUSR1")
    for number in (TERM, USR1, TERM, INT, INT, INT):  # a launcher passes on what the terminal has sent already
        one.process.send_signal(number)
        time.sleep(0.1)
    for _ in range(2):
        assert one.process.poll() is None
        time.sleep(signals.SAME_PRESS_S + 0.5)
        one.process.send_signal(INT)
    stops, patience, interrupted = one.errors()
    assert stops.startswith("SIGUSR1: stops at the next safe point")
    assert "Ctrl-C once more" in patience
    assert interrupted.startswith("error: interrupted")
    assert one.process.returncode == cli.EXIT_INTERRUPTED


def stop_together(rank: int) -> str:
    if rank == 1:
        signals.request("SIGUSR1")
    try:
        distributed.together(signals.give_way)
    except signals.Stopped:
        return f"stopped, {distributed.gather_objects(signals.reason())}"
    return "went on"


def test_all_ranks_stop_where_one_was_asked_to() -> None:
    assert run_ranks(stop_together, 2) == ["stopped, ['', 'SIGUSR1']"] * 2


# Runs of two ranks

DRIVER = """
import os, time
from pathlib import Path
from dist_contrastive import distributed, liveness, signals
from dist_contrastive.train import main

FOLDER, MOMENT = Path(os.environ["HOLD_FOLDER"]), os.environ["HOLD_AT"]

def hold(moment, until):
    note = FOLDER / f"at-{{moment}}"
    if distributed.is_main() and not note.exists():
        note.touch()
        deadline = time.monotonic() + {timeout}
        while not until() and time.monotonic() < deadline:
            time.sleep(0.05)

if MOMENT == "step":
    from dist_contrastive import trainer
    update = trainer.Trainer.update
    def with_pause(self, batch):
        if self.step_in_epoch == 2:
            hold("step", signals.requested)
        return update(self, batch)
    trainer.Trainer.update = with_pause
if MOMENT == "probe":
    from dist_contrastive.evaluation import protocol
    linear_probe = protocol.linear_probe
    def with_pause(*args, **kwargs):
        hold("probe", signals.requested)
        return linear_probe(*args, **kwargs)
    protocol.linear_probe = with_pause
fsync = os.fsync
def with_pause_of_save(file):
    if "/checkpoints/" in os.readlink(f"/proc/self/fd/{{file if isinstance(file, int) else file.fileno()}}"):
        # A save of an epoch's end, in which the first signal comes, or that which a signal has brought about.
        until = signals.requested if MOMENT == "save" else lambda: (FOLDER / "go").exists()
        hold("save", until)
    return fsync(file)
os.fsync = with_pause_of_save
liveness.run_rank(main)
"""


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody has stopped."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    launched = Launched(dataset, run_dir, *RUN)
    try:
        launched.wait_until(lambda: launched.process.poll() is not None, TIMEOUT_S)
        assert launched.process.returncode == 0, launched.text()
    finally:
        launched.clear()
    return run_dir


class Chain:
    """A run that is stopped again and again."""

    def __init__(self, dataset: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dataset, self.run_dir, self.folder = dataset, folder / "run", folder
        self.driver = folder / "dist_contrastive_driver.py"
        self.driver.write_text(DRIVER.format(timeout=TIMEOUT_S))
        self.environment = monkeypatch
        monkeypatch.setenv("PYTHONPATH", os.getcwd())
        monkeypatch.setenv("HOLD_FOLDER", str(folder))
        self.launched: list[Launched] = []

    def launch(self, program: list[str]) -> Launched:
        self.launched.append(Launched(self.dataset, self.run_dir, *RUN, program=program))
        self.launched[-1].output.write_text("")
        return self.launched[-1]

    def stop(self, moment: str, number: signal.Signals, rank: int) -> None:
        """Launch, send `number` to `rank` at `moment`, and all signals to all ranks once it saves for that reason."""
        for note in self.folder.glob("at-*"):
            note.unlink()
        self.environment.setenv("HOLD_AT", moment)
        launched = self.launch([str(self.driver)])

        def wait_for(note: str) -> None:
            launched.wait_until(
                lambda: (self.folder / f"at-{note}").exists() or launched.process.poll() is not None, TIMEOUT_S
            )
            assert launched.process.poll() is None, launched.text()

        wait_for(moment)
        launched.find_ranks()
        launched.ranks[rank].send_signal(number)
        if moment != "save":
            wait_for("save")
            for again in (USR1, TERM, INT):
                for process in launched.ranks:
                    process.send_signal(again)
            (self.folder / "go").touch()
        launched.wait_until_all_is_over()
        assert not launched.lines(), launched.text()
        status = read_status(self.run_dir)
        assert (status.state, status.reason) == ("stopped", number.name), launched.text()
        newest = newest_checkpoint(self.run_dir)
        assert (newest.step, f"stopped after step {status.step}") == (status.step, launched.stopped_line())
        (self.folder / "go").unlink(missing_ok=True)

    def finish(self) -> None:
        launched = self.launch(MODULE)
        launched.wait_until(lambda: launched.process.poll() is not None, TIMEOUT_S)
        assert launched.process.returncode == 0, launched.text()


@pytest.fixture
def chain(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chain]:
    chain = Chain(dataset, tmp_path, monkeypatch)
    yield chain
    for launched in chain.launched:
        launched.clear()


@pytest.mark.timeout(900)  # five launches, the undisturbed run's among them
@pytest.mark.parametrize(
    "stops",
    [
        [("step", TERM, 1), ("save", USR1, 0), ("probe", INT, 1)],
        [("step", USR1, 0), ("save", INT, 1), ("probe", TERM, 0)],
        [("step", INT, 0), ("save", TERM, 1), ("probe", USR1, 1)],
    ],
    ids=["TERM-USR1-INT", "USR1-INT-TERM", "INT-TERM-USR1"],
)
def test_a_run_that_signals_stopped_ends_as_one_that_none_did(
    stops: list[tuple[str, signal.Signals, int]], chain: Chain, undisturbed: Path
) -> None:
    for moment, number, rank in stops:
        chain.stop(moment, number, rank)
    chain.finish()
    assert_same_state(newest_checkpoint(chain.run_dir), newest_checkpoint(undisturbed))
    assert metrics_of(chain.run_dir) == metrics_of(undisturbed)
    begun, in_step, in_save, in_probe = (
        start["step"] for start in newest_checkpoint(chain.run_dir).state["extra"]["starts"]
    )
    assert (begun, in_step) == (0, 3)
    # The first epoch's end is saved while the run goes on, as far as the signal lets it.
    assert STEPS_PER_EPOCH <= in_save < 2 * STEPS_PER_EPOCH
    assert in_probe == 2 * STEPS_PER_EPOCH, "the second epoch's probe is left for the next start"


def test_a_probe_that_gave_way_leaves_no_scores(chain: Chain) -> None:
    chain.stop("probe", TERM, 0)
    newest = newest_checkpoint(chain.run_dir)
    assert newest.step == STEPS_PER_EPOCH
    assert newest.state["extra"]["scores"] == {"baselines": {}, "history": []}


def test_a_launcher_that_is_told_to_end_lets_its_ranks_save(dataset: Path, tmp_path: Path) -> None:
    launched = Launched(dataset, tmp_path / "run", "--checkpoint.every", "100000")
    try:
        launched.wait_for_step(3)
        launched.process.send_signal(TERM)
        launched.wait_until_all_is_over()
        status = read_status(launched.run_dir)
        assert (status.state, status.reason) == ("stopped", "SIGTERM"), launched.text()
        assert CheckpointStore(launched.run_dir / "checkpoints", keep=2).steps() == [status.step]
    finally:
        launched.clear()


def test_ranks_whose_launcher_died_of_the_signal_save_all_the_same(dataset: Path, tmp_path: Path) -> None:
    """SIGUSR1 to all of a job's processes: `accelerate launch` has no handler for it."""
    launched = Launched(dataset, tmp_path / "run", "--checkpoint.every", "100000")
    try:
        launched.wait_for_step(3)
        for process in (psutil.Process(launched.process.pid), *launched.ranks):
            process.send_signal(USR1)
        launched.wait_until_all_is_over()
        status = read_status(launched.run_dir)
        assert (status.state, status.reason) == ("stopped", "SIGUSR1"), launched.text()
        assert not processes_of(launched.run_dir)
    finally:
        launched.clear()
