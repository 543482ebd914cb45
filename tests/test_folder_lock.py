"""One holder of a folder at a time: with the file system's locks, and on a file system that has none."""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from dist_contrastive import folder_lock, processes
from dist_contrastive.config import UserError
from dist_contrastive.folder_lock import HOLDER, lock_folder


def no_locks(*arguments: Any) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def hasten() -> None:
    """Heartbeats and waits as tests can wait for."""
    folder_lock.HEARTBEAT_S, folder_lock.SILENCE_S, folder_lock.SETTLE_S = 0.1, 2.0, 0.3


@pytest.fixture(params=["locks", "no locks"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the file system offers."""
    for name in ("HEARTBEAT_S", "SILENCE_S", "SETTLE_S"):
        monkeypatch.setattr(folder_lock, name, getattr(folder_lock, name))
    hasten()
    if request.param == "no locks":
        monkeypatch.setattr(fcntl, "flock", no_locks)
    return str(request.param)


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEARTBEAT_S", "SILENCE_S", "SETTLE_S"):
        monkeypatch.setattr(folder_lock, name, getattr(folder_lock, name))
    hasten()
    monkeypatch.setattr(fcntl, "flock", no_locks)


def hold(path: str, system: str, pipe: Connection) -> None:
    """Another process: lock the folder, say so, and hold it until told to end."""
    hasten()
    if system == "no locks":
        fcntl.flock = no_locks
    lock = lock_folder(Path(path))
    pipe.send(os.getpid())
    pipe.recv()
    lock.release()


def other_holder(path: Path, system: str) -> tuple[Any, Connection, int]:
    context = get_context("forkserver")
    mine, others = context.Pipe()
    process = context.Process(target=hold, args=(str(path), system, others), daemon=True)
    process.start()
    assert mine.poll(120)
    return process, mine, mine.recv()


@pytest.mark.parametrize("end", ["released", "killed"])
def test_one_process_at_a_time(tmp_path: Path, system: str, end: str) -> None:
    process, pipe, number = other_holder(tmp_path, system)
    with pytest.raises(UserError, match=f"is in use by process {number} on {socket.gethostname()}; wait for it"):
        lock_folder(tmp_path)
    if end == "killed":
        process.kill()
    else:
        pipe.send("end")
    process.join(60)
    lock = lock_folder(tmp_path)
    assert lock.is_held()
    lock.release()


def test_the_same_process_can_not_hold_it_twice(tmp_path: Path, system: str) -> None:
    lock = lock_folder(tmp_path)
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on "):
        lock_folder(tmp_path)
    lock.release()
    lock_folder(tmp_path).release()


@pytest.mark.parametrize("harm", ["deleted", "moved", "replaced"])
def test_a_lock_on_a_folder_that_is_gone_is_not_held(tmp_path: Path, system: str, harm: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lock = lock_folder(folder)
    assert lock.is_held()
    if harm == "deleted":
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    else:
        folder.rename(tmp_path / "elsewhere")
    other = None
    if harm == "replaced":
        folder.mkdir()
        other = lock_folder(folder)
    assert not lock.is_held()
    lock.release()
    assert other is None or other.is_held()


def test_other_errors_are_no_reason_to_do_without_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UserError, match="can't be locked"):
        lock_folder(tmp_path)


# --- a file in place of a lock ----------------------------------------------------------------------------------------


def pretend(path: Path, **facts: Any) -> None:
    """A holder's file, as another host would have left it."""
    holder = {"host": "far", "process": os.getpid(), "started": 1, "machine": "another", "token": "t", **facts}
    (path / HOLDER).write_text(json.dumps(holder))


@pytest.mark.usefixtures("without_locks")
def test_a_line_says_that_there_are_no_locks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock_folder(tmp_path).release()
    said = capsys.readouterr().out
    assert said == (
        f"{tmp_path}: its file system has no locks ({os.strerror(errno.ENOLCK)}); a file that is kept alive stands in\n"
    )
    assert not (tmp_path / HOLDER).exists()


@pytest.mark.usefixtures("without_locks")
@pytest.mark.parametrize("text", [None, "", "{", "[]", "null"])
def test_a_holder_on_another_host_that_is_silent_is_gone(
    tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(tmp_path)
    if text is not None:
        (tmp_path / HOLDER).write_text(text)
    lock = lock_folder(tmp_path)
    assert lock.is_held()
    who = "process" if text is not None else f"process {os.getpid()} on far"
    assert "looks for up to 2 s whether" in (said := capsys.readouterr().out)
    assert who in said
    assert "which is gone" in said
    lock.release()


def beat(path: Path, stop: threading.Event, move: Callable[[int], int]) -> None:
    """Another host's heartbeat: its times of change are what `move` makes of the number of the beat."""
    number = 0
    while not stop.wait(0.2):
        number += 1
        os.utime(path, ns=(0, move(number)))


@pytest.mark.usefixtures("without_locks")
@pytest.mark.parametrize("move", [lambda n: 10**18 + n, lambda n: 10**18 - n], ids=["ahead", "back"])
def test_a_holder_on_another_host_that_beats_lives_whatever_its_clock_says(
    tmp_path: Path, move: Callable[[int], int]
) -> None:
    pretend(tmp_path)
    stop = threading.Event()
    thread = threading.Thread(target=beat, args=(tmp_path / HOLDER, stop, move))
    thread.start()
    try:
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on far"):
            lock_folder(tmp_path)
    finally:
        stop.set()
        thread.join()


@pytest.mark.usefixtures("without_locks")
def test_another_process_with_the_number_of_the_dead_holder_is_not_taken_for_it(tmp_path: Path) -> None:
    pretend(tmp_path, machine=processes.machine(), started=1)  # the number is this process's own
    began = time.monotonic()
    lock_folder(tmp_path).release()
    assert time.monotonic() - began < 30  # it was not watched for long


def take(path: str, pipe: Connection) -> None:
    hasten()
    fcntl.flock = no_locks
    try:
        lock = lock_folder(Path(path))
    except UserError as error:
        pipe.send(str(error))
    else:
        pipe.send("held")
        pipe.recv()
        assert lock.is_held()


def test_of_several_that_take_over_at_once_one_has_it(tmp_path: Path) -> None:
    pretend(tmp_path)
    context = get_context("forkserver")
    pipes = []
    processes = []
    for _ in range(4):
        mine, others = context.Pipe()
        processes.append(context.Process(target=take, args=(str(tmp_path), others), daemon=True))
        pipes.append(mine)
    for process in processes:
        process.start()
    outcomes = []
    for pipe in pipes:
        assert pipe.poll(120)
        outcomes.append(pipe.recv())
    assert outcomes.count("held") == 1, outcomes
    assert all(outcome == "held" or " is in use by process " in outcome for outcome in outcomes)
    pipes[outcomes.index("held")].send("end")
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
