"""Ranks of a real launcher that die, fall silent or fail, and a launcher that dies: all ends soon, and one line says why."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dist_contrastive.metrics import read_metrics
from tests.runs import write_dataset
from tests.test_command import LAUNCH_CONFIG, TIMEOUT_S, options

MODULE = ["-m", "dist_contrastive.train"]
SOON_S = 60.0
"""Far less than any time-out that would end it otherwise; on a quiet machine it takes a few seconds."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


class Launched:
    """`accelerate launch` of two ranks that train without end; what they print goes to a file."""

    def __init__(self, dataset: Path, run_dir: Path, *more: str, program: list[str] = MODULE) -> None:
        self.run_dir = run_dir
        self.output = run_dir.with_suffix(".log")
        arguments = options(
            dataset, run_dir, "--epochs", "100000", "--checkpoint.every", "10", "--probe.no-enabled", *more
        )
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(LAUNCH_CONFIG),
            *program,
            *arguments,
        ]
        with self.output.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        self.ranks: list[psutil.Process] = []

    def wait_for_step(self, step: int) -> None:
        def done() -> bool:
            lines = read_metrics(self.run_dir / "metrics.jsonl")
            return bool(lines) and int(lines[-1]["step"]) >= step

        self.wait_until(lambda: done() or self.process.poll() is not None, TIMEOUT_S)
        assert self.process.poll() is None, self.text()
        self.find_ranks()

    def find_ranks(self) -> None:
        children = [
            p for p in psutil.Process(self.process.pid).children() if "dist_contrastive" in " ".join(p.cmdline())
        ]
        self.ranks = sorted(children, key=lambda p: int(p.environ()["RANK"]))
        assert len(self.ranks) == 2

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.1)

    def wait_until_all_is_over(self) -> None:
        self.wait_until(lambda: self.process.poll() is not None and not any(map(alive, self.ranks)), SOON_S)

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def lines(self) -> list[str]:
        """Our lines, in order."""
        return [line for line in self.text().splitlines() if line.startswith("error: ")]

    def stopped_line(self) -> str:
        """What the run says of its stop, without what to do."""
        (line,) = [line for line in self.text().splitlines() if line.startswith("stopped ")]
        return line.partition(";")[0]

    def clear(self) -> None:
        for process in [*self.ranks, psutil.Process(self.process.pid)] if self.process.poll() is None else self.ranks:
            if alive(process):
                process.kill()
        self.process.wait(timeout=TIMEOUT_S)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def launch(dataset: Path, tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    started: list[Launched] = []

    def start(*more: str, program: list[str] = MODULE) -> Launched:
        started.append(Launched(dataset, tmp_path / "run", *more, program=program))
        return started[-1]

    yield start
    for launched in started:
        launched.clear()


def test_a_rank_that_is_killed_is_named_before_the_traceback(launch: Callable[..., Launched]) -> None:
    launched = launch()
    launched.wait_for_step(3)
    launched.ranks[1].send_signal(signal.SIGKILL)
    launched.wait_until_all_is_over()
    assert launched.process.returncode == 1
    (line,) = launched.lines()
    assert re.match(r"error: rank 1 died \(rank 0 waited for it at step \d+\); what was saved is kept", line)
    assert "Traceback" in launched.text().partition(line)[2]


def test_rank_0_is_named_by_the_next_one(launch: Callable[..., Launched]) -> None:
    launched = launch()
    launched.wait_for_step(3)
    launched.ranks[0].send_signal(signal.SIGKILL)
    launched.wait_until_all_is_over()
    (line,) = launched.lines()
    assert re.match(r"error: rank 0 died \(rank 1 waited for it at step \d+\)", line)


def test_a_rank_that_is_silent_is_named_when_the_time_is_over(launch: Callable[..., Launched]) -> None:
    launched = launch("--launch.timeout-minutes", "0.2")
    launched.wait_for_step(3)
    launched.ranks[1].send_signal(signal.SIGSTOP)
    launched.wait_until(lambda: bool(launched.lines()), SOON_S)
    launched.wait_until(lambda: not alive(launched.ranks[0]), SOON_S)
    launched.ranks[1].send_signal(signal.SIGKILL)  # the launcher's own patience with it is half a minute
    launched.wait_until_all_is_over()
    assert launched.process.returncode == 1
    (line,) = launched.lines()
    assert re.match(r"error: rank 1 silent for 1[12] s \(rank 0 waited for it at step \d+\)", line)
    assert "Traceback" in launched.text().partition(line)[2]


DRIVER = """
import os, sys, time
from dist_contrastive import distributed, liveness, trainer
from dist_contrastive.train import main

update = trainer.Trainer.update

def with_fault(self, batch):
    if self.step == 4 and distributed.rank() == int(os.environ.get("FAULTY_RANK", 1)):
        {fault}
    return update(self, batch)

trainer.Trainer.update = with_fault
liveness.run_rank(main)
"""


@pytest.fixture
def driver(tmp_path: Path) -> Callable[[str], list[str]]:
    def write(fault: str) -> list[str]:
        path = tmp_path / "dist_contrastive_driver.py"
        path.write_text(DRIVER.format(fault=fault))
        return [str(path)]

    return write


def test_an_internal_fault_on_one_rank_ends_all_with_its_traceback(
    launch: Callable[..., Launched], driver: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    launched = launch(program=driver("raise KeyError('injected fault')"))
    launched.wait_until(lambda: launched.process.poll() is not None, TIMEOUT_S)
    assert launched.process.returncode == 1
    assert "KeyError: 'injected fault'" in launched.text()
    assert [line.partition(" (")[0] for line in launched.lines()] == ["error: rank 1 failed"]
    assert not processes_of(launched.run_dir)


def test_a_rank_that_does_not_come_is_named_though_its_process_is_well(
    launch: Callable[..., Launched], driver: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    launched = launch("--launch.timeout-minutes", "0.2", program=driver("time.sleep(1000)"))
    launched.wait_until(lambda: launched.process.poll() is not None, TIMEOUT_S)
    (line,) = launched.lines()
    assert re.match(r"error: rank 1 silent for 1[12] s \(rank 0 waited for it at step 5\)", line)
    assert not processes_of(launched.run_dir)


SLEEPS = """
        with liveness.busy("counts its sheep"):
            time.sleep({seconds})
"""
"""Far longer than the time-out of this run's collectives."""


def test_a_rank_that_says_what_it_does_is_waited_for(
    launch: Callable[..., Launched], driver: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    launched = launch("--launch.timeout-minutes", "0.2", program=driver(SLEEPS.format(seconds=18).strip()))
    launched.wait_for_step(6)
    assert launched.text().count("waiting for rank 1, which counts its sheep") == 1
    assert not launched.lines()


def test_a_rank_that_says_what_it_does_and_is_not_heard_of_any_more_is_named(
    launch: Callable[..., Launched], driver: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    launched = launch("--launch.timeout-minutes", "0.2", program=driver(SLEEPS.format(seconds=1000).strip()))
    waits = "waiting for rank 1, which counts its sheep"
    launched.wait_until(lambda: waits in launched.text() or launched.process.poll() is not None, TIMEOUT_S)
    launched.find_ranks()
    launched.ranks[1].send_signal(signal.SIGSTOP)
    launched.wait_until(lambda: bool(launched.lines()), SOON_S)
    launched.ranks[1].send_signal(signal.SIGKILL)
    launched.wait_until_all_is_over()
    (line,) = launched.lines()
    assert re.match(r"error: rank 1 silent for 1[12] s \(rank 0 waited for it at step 5\)", line)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_users_mistake_that_one_rank_meets_is_the_one_line(
    rank: int, launch: Callable[..., Launched], driver: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    fault = "from dist_contrastive.config import UserError; raise UserError('--data.path of this host is another file')"
    monkeypatch.setenv("FAULTY_RANK", str(rank))
    launched = launch(program=driver(fault))
    launched.wait_until(lambda: launched.process.poll() is not None, TIMEOUT_S)
    assert launched.lines() == ["error: --data.path of this host is another file"]
    assert "Traceback of rank" not in launched.text()
    assert "RuntimeError" not in launched.text()
    assert not processes_of(launched.run_dir)


def processes_of(run_dir: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(run_dir) in (process.info["cmdline"] or []) and alive(process):
            found.append(process)
    return found


def test_ranks_end_with_a_launcher_that_was_killed_and_the_run_goes_on(launch: Callable[..., Launched]) -> None:
    launched = launch("--checkpoint.every", "1")
    launched.wait_for_step(7)
    launched.process.kill()
    launched.process.wait(timeout=TIMEOUT_S)
    again = launch("--checkpoint.every", "1")
    launched.wait_until(lambda: not any(map(alive, launched.ranks)), SOON_S)
    # Whichever rank 0 sees first: that its launcher is gone, or that rank 1 ended for the same reason.
    assert re.search(r"launcher of rank 0 is gone|rank 1 died", launched.text())
    again.wait_until(lambda: "goes on after step" in again.text() or again.process.poll() is not None, TIMEOUT_S)
    assert again.process.poll() is None, again.text()


def test_a_run_that_a_shell_left_behind_goes_on(dataset: Path, tmp_path: Path) -> None:
    """As with nohup: the shell that started it ends in mid-run, and no launcher was there."""
    run_dir = tmp_path / "run"
    command = " ".join([sys.executable, *MODULE, *options(dataset, run_dir, "--epochs", "6", "--probe.no-enabled")])
    shell = f"setsid {command} >/dev/null 2>&1 & while [ ! -s {run_dir}/metrics.jsonl ]; do sleep 0.05; done"
    subprocess.run(["sh", "-c", shell], check=True, timeout=TIMEOUT_S)
    deadline = time.monotonic() + TIMEOUT_S
    while not (run_dir / "DONE").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
