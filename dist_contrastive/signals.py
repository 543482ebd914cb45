"""What SIGINT, SIGTERM and SIGUSR1 do to a run: it stops at the next safe point, saved, and says so with exit status 75.

Who wants the machine back sends one of them some time before SIGKILL: a scheduler SIGUSR1 or SIGTERM, `accelerate launch` and
`torchrun`, when they are told to end, SIGTERM to each rank, with SIGKILL 30 s later (TORCH_ELASTIC_SHUTDOWN_TIMEOUT, in
seconds, gives more). A signal only says that the run is to stop. The ranks agree on it where nothing is half done, at the end
of a step, and in long work that is done again when the run goes on (a probe, say), which gives way. So what a notice has to
suffice for is one step, or one batch of a probe, and a checkpoint.

Whatever else comes once the run is stopping changes nothing, as it could only harm the checkpoint that is being written; but
whoever presses Ctrl-C for the third time gets an end at once.

Signals are heard by a thread of their own: the main thread may be in compiled code or wait for another rank.
"""

import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

from dist_contrastive import cli

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAME_PRESS_S = 2.0
"""A terminal sends Ctrl-C to the launcher and its ranks, and the launcher passes it on: within this time it is the same one."""
PATIENT_PRESSES = 2


class Stopped(BaseException):
    """The run is to stop, and what it is at gives way. No `Exception`: nobody but the run itself has an answer to it."""


@dataclass
class _Heard:
    """What this process has been told.

    Attributes:
        phase: `early`: nothing is to be lost, a signal ends the process at once; `running`: it waits for a safe point;
            `over`: there is nothing left to stop.
        kept: what is told of that safe point: `with a checkpoint of all that is done`.
    """

    phase: Literal["early", "running", "over"] = "early"
    kept: str = ""
    reason: str = ""
    presses: int = 0
    last_press: float = -SAME_PRESS_S


_heard = _Heard()


def requested() -> bool:
    """Whether this rank knows that the run is to stop."""
    return bool(_heard.reason)


def reason() -> str:
    """The signal that came first; empty where none has."""
    return _heard.reason


def request(reason: str) -> None:
    """Let the run stop, for `reason`, as a signal does; what came first counts."""
    _heard.reason = _heard.reason or reason


def give_way() -> None:
    """`Stopped` where the run is to stop. For work that one rank does by itself, and that is done again when the run goes on.

    The ranks may hear of a signal at different times: `distributed.together` raises on all of them what is raised on one.
    """
    if requested():
        raise Stopped


@contextmanager
def handled() -> Iterator[None]:
    """Within the context, of the main thread, a process hears the signals; each ends it at once, but within `deferred`."""
    global _heard
    _heard = _Heard()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = {number: signal.getsignal(number) for number in NUMBERS}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for number in NUMBERS:
        signal.signal(number, lambda number, frame: None)  # the number goes to the socket
    listener = threading.Thread(target=_listen, args=(reader,), daemon=True)
    listener.start()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that is not Python's
        signal.set_wakeup_fd(wakeup)
        writer.close()
        listener.join()
        reader.close()


@contextmanager
def deferred(kept: str = "with a checkpoint of all that is done") -> Iterator[None]:
    """Within the context, which is left once, a signal waits for the run to come to a safe point; `kept` is told of it."""
    _heard.phase, _heard.kept = "running", kept
    try:
        yield
    finally:
        _heard.phase = "over"


def _listen(reader: socket.socket) -> None:
    while numbers := reader.recv(64):
        for number in numbers:
            if number in NUMBERS:
                _hear(signal.Signals(number))


def _hear(number: signal.Signals) -> None:
    if _heard.phase == "early":
        _say(f"{number.name}: stopped before the first step")
        cli.exit_at_once(cli.EXIT_STOPPED)
    first = not requested() and _heard.phase == "running"
    request(number.name)
    if first:
        _say(f"{number.name}: stops at the next safe point, {_heard.kept}")
    if number == signal.SIGINT:
        _press()


def _press() -> None:
    now = time.monotonic()
    again, _heard.last_press = now - _heard.last_press >= SAME_PRESS_S, now
    _heard.presses += again
    if again and _heard.presses > PATIENT_PRESSES:
        _say("error: interrupted; what was saved is kept")
        cli.exit_at_once(cli.EXIT_INTERRUPTED)
    if again and _heard.presses == PATIENT_PRESSES:
        _say("it is stopping already; Ctrl-C once more ends it at once, without a checkpoint of the last steps")


def _say(text: str) -> None:
    if cli.speaks_for_host():
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)
