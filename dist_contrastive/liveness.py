"""Which ranks are still there: a rank that died or fell silent is named, and no rank outlives its launcher.

A collective whose rank is gone fails with an error about a connection, or after its time-out, and neither says which rank it
was; over NCCL it may not fail at all. So each rank has a thread that beats: it writes to the ranks' store that it is alive
and how many collectives this rank has come to, reads the same of the others, and looks at the processes on its own host.
The lowest rank that is left prints one line, each one its traceback, and all end with status 1.

The same way goes what a rank has to tell without a collective: that it is at work by itself (`busy`), for which the others
wait as long as it beats; that it was asked to stop (`signals`); and the user's mistake by which it ends.
"""

import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import psutil
import torch.distributed as dist

from dist_contrastive import cli, distributed, processes, signals
from dist_contrastive.config import UserError

PARENT_CHECK_S = 0.5
STOPPING_S = 30.0
"""What launchers leave their ranks between SIGTERM and SIGKILL, and a rank itself where its launcher is gone already."""
BUSY_LINE_S = 10.0
"""For a rank that is at work by itself others wait without a word so long."""
GRACE_S = 3.0
"""How long the main thread may take to end by itself, with the error of the collective that it waits in."""
MARGIN = 0.1
"""Part of the collectives' time-out by which silence is noticed before the backend notices it, which may abort the process."""
STORE_TIMEOUT_S = 10.0
HERE, LEFT, FAILED, REFUSED = "here", "left", "failed", "refused"
OF_COMMUNICATION = re.compile(r"gloo|nccl|connection|peer|socket|timed? ?out|store", re.IGNORECASE)
LAUNCHERS = ("accelerate", "torchrun", "torch.distributed")
REAPERS = ("init", "systemd", "tini", "docker-init", "dumb-init", "slurmstepd")
"""Who inherits the children of a process that is gone."""

_step = 0
_watches = 0
_listener: Callable[[str], None] | None = None
_work = ""
"""What this rank does by itself; empty where it does nothing but what all do."""


def at_step(step: int) -> None:
    """Say which update (from 1) this rank works on, for the line about a rank that does not take part in it."""
    global _step
    _step = step


@contextmanager
def busy(work: str) -> Iterator[None]:
    """Within the context this rank does something long by itself, as in `verifies data/photos.beton`.

    The others wait for it as long as it is heard of; rank 0 prints a line when that gets long.
    """
    global _work
    before, _work = _work, work
    try:
        yield
    finally:
        _work = before


def tell_faults(listener: Callable[[str], None]) -> None:
    """From now on `listener` gets the line that this process prints when ranks are missing or its launcher is gone."""
    global _listener
    _listener = listener


def _tell(line: str, rest: str) -> None:
    """Print an error, and what to know of it beside."""
    if _listener:
        _listener(line)
    print(f"error: {line}; {rest}", file=sys.stderr, flush=True)


def run_rank(main: Callable[[], object]) -> NoReturn:
    """Run an entry point as `cli.main_guard` does, and end the process.

    After an internal fault this rank is still in the process group (`distributed.shut_down` was not reached, or did not come
    to its end): other ranks may wait for it, and what libraries do at exit may wait for them. Then the process ends at once, so
    that the launcher sees it and ends the others.
    """
    with signals.handled():  # until the last line is printed: a launcher ends all ranks as soon as one has ended
        try:
            status = cli.main_guard(main)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except Exception:
            traceback.print_exc()
            status = 1
        if distributed.is_distributed():
            cli.exit_at_once(status)
    sys.exit(status)


def finish(work: Callable[[], bool | None]) -> None:
    """Do an entry point's `work`, which says False where it was stopped before its end, and leave the other ranks.

    The process exits with the status of what was stopped where it was; after an error that nobody foresaw it stays in the
    group, for `run_rank`.
    """
    try:
        finished = work()
    except (UserError, KeyboardInterrupt):
        distributed.shut_down()
        raise
    distributed.shut_down()
    # A launcher that restarts its ranks takes any status but 0 for a failure, and would not let them stop.
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if finished is False and not restarts:
        sys.exit(cli.EXIT_STOPPED)


def end_with_launcher() -> None:
    """From now on this process and its children end when the launcher that started it does, however that ended.

    A process that no launcher started (from a shell, with nohup, by srun) goes on when its parent ends.
    """
    parent = psutil.Process(os.getppid())
    elastic = "TORCHELASTIC_RUN_ID" in os.environ
    with suppress(psutil.Error):
        if elastic and (parent.pid == 1 or parent.name() in REAPERS) and not _is_launcher(parent):
            _end_without_launcher()  # it was killed while this process was starting
        if elastic or ("ACCELERATE_MIXED_PRECISION" in os.environ and _is_launcher(parent)):
            threading.Thread(target=_watch_parent, args=(parent.pid,), daemon=True).start()


def _is_launcher(process: psutil.Process) -> bool:
    command = " ".join(process.cmdline())
    return any(name in command for name in LAUNCHERS)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    if signals.requested():  # a launcher that was told to stop, too, may not have waited for the last checkpoint
        time.sleep(STOPPING_S)
    _end_without_launcher()


def _end_without_launcher() -> NoReturn:
    signal.alarm(5)  # the kernel ends the process should anything below wait
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()
    with suppress(OSError, ValueError):
        _tell(f"the launcher of rank {os.environ.get('RANK', 0)} is gone", "what was saved is kept")
    cli.exit_at_once(1)


@dataclass
class _Peer:
    """What is known of another rank."""

    process: psutil.Process | None
    """None where it can't be seen from here."""
    state: str = HERE
    beats: int = 0
    arrivals: int = 0
    work: str = ""
    """What it does by itself."""
    mistake: str = ""
    """The user's, by which it ends."""
    silent_beats: int = 0
    """Own beats since the last news of its."""
    late_beats: int = 0
    """Own beats in which this rank waited for it, and it did nothing that it had announced."""

    def is_gone(self) -> bool:
        """Whether its process is known to have ended."""
        try:
            return self.process is not None and (
                not self.process.is_running() or self.process.status() == psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return True


def _visible_process(host: str, number: int) -> psutil.Process | None:
    try:
        return psutil.Process(number) if host == processes.machine() else None
    except psutil.NoSuchProcess:  # gone already: its silence will tell
        return None


@contextmanager
def watch(timeout_s: float) -> Iterator[None]:
    """Within the context a rank that is missing is named. All ranks enter it together; they may leave it one by one.

    `timeout_s` is the time-out of collectives.
    """
    if distributed.world_size() == 1:
        yield
        return
    watching = _Watch(timeout_s)
    watching.start()
    try:
        yield
    except UserError as error:
        watching.refuse(str(error))
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if mistake := watching.explain(error):
            raise UserError(mistake) from None
        raise
    finally:
        watching.stop()


class _Watch:
    def __init__(self, timeout_s: float) -> None:
        global _watches
        _watches += 1
        self.rank = distributed.rank()
        self.limit_s = timeout_s * (1 - MARGIN)
        # All ranks read of all others at each beat: the store's host should not be busy with that.
        self.beat_s = min(timeout_s / 40, max(1.0, distributed.world_size() / 64))
        self._store = dist.PrefixStore(
            f"liveness {_watches}", dist.distributed_c10d._get_default_store().clone()
        )  # of its own: another thread may wait in the ranks' for long
        self._store.set_timeout(timedelta(seconds=STORE_TIMEOUT_S))
        self._state = HERE
        self._mistake = ""
        self._beats = 0
        self._waited_for: dict[int, int] = {}
        """Ranks at work by themselves, for how many beats others have waited for each."""
        self._arrivals = 0
        self._store_failures = 0
        self._named = False
        self._line = ""
        """How it was named, where this rank said so."""
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._write()
        # After this all have written.
        known = distributed.gather_objects((processes.machine(), os.getpid()))
        self._peers = {rank: _Peer(_visible_process(*where)) for rank, where in enumerate(known) if rank != self.rank}

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._say_farewell()

    def refuse(self, mistake: str) -> None:
        """Tell the others by which mistake of the user this rank ends; they may not know of it, and wait for it."""
        with self._lock:
            self._state, self._mistake = REFUSED, mistake
        self._say_farewell()
        # Until they have heard of it: with rank 0 the store may go, and with any rank the connection to it.
        until = time.monotonic() + GRACE_S + 4 * self.beat_s
        while time.monotonic() < until and any(peer.state == HERE for peer in self._peers.values()):
            time.sleep(0.1)
            self._missing()

    def _mistake_of_others(self) -> str:
        """The user's mistake by which another rank has ended; empty where none has."""
        return next((peer.mistake for peer in self._peers.values() if peer.mistake), "")

    def explain(self, error: BaseException) -> str:
        """Name the ranks that are missing, where `error` may come from that; else tell the others that this rank failed.

        Where it may come from another rank's end by a mistake of the user, nothing is printed, and the mistake returned.
        """
        waited = isinstance(error, RuntimeError) and bool(OF_COMMUNICATION.search(str(error)))
        missing = self._missing()
        until = time.monotonic() + max(2.0, 4 * self.beat_s)
        while waited and not missing and time.monotonic() < until:
            time.sleep(0.1)
            missing = self._missing()
        if waited and not missing:  # another host's ranks can't be seen, but a living one has been heard of by now
            missing = self._missing(elsewhere_s=3 * self.beat_s)
        if waited and (mistake := self._mistake_of_others()):
            if _listener:
                _listener(mistake)
            return mistake
        missing = {rank: fate for rank, fate in missing.items() if fate != REFUSED}
        if self._line and _listener:  # named by now, and the error that came of it was told since
            _listener(self._line)
        self._name(missing)
        if not missing:
            self._state = FAILED
        return ""

    def _run(self) -> None:
        while not self._stopped.wait(self.beat_s):
            with self._lock:
                self._beat()
                missing = self._missing()
            if missing and self._state == HERE and not self._stopped.is_set():
                self._end(missing)

    def _end(self, missing: dict[int, str]) -> None:
        if mistake := self._mistake_of_others():
            if not self._stopped.wait(GRACE_S):  # most often all ranks meet the same one
                self._state, self._mistake = REFUSED, mistake
                self._say_farewell()
                if _listener:
                    _listener(mistake)
                cli.tell_mistake(mistake)
                cli.exit_at_once(cli.EXIT_USER_ERROR)
            return
        self._name(missing)
        # Its own error tells more, where there is one; after that this thread is not heard any more.
        if self._stopped.wait(GRACE_S):
            return
        main = sys._current_frames().get(threading.main_thread().ident or 0)
        print(f"Traceback of rank {self.rank}, where it waits:", file=sys.stderr)
        traceback.print_stack(main, file=sys.stderr)
        self._say_farewell()
        cli.exit_at_once(1)

    def _say_farewell(self) -> None:
        with self._lock, suppress(Exception):
            self._state = LEFT if self._state == HERE else self._state
            self._write()

    def _write(self) -> None:
        told = (self._state, self._beats, distributed.arrivals(), _work, signals.reason(), self._mistake)
        self._store.set(str(self.rank), json.dumps(told))

    def _beat(self) -> None:
        """Tell the others, and count how long they have not been heard of: in beats, as this process may be suspended, too."""
        self._beats += 1
        arrivals = distributed.arrivals()
        went_on, self._arrivals = arrivals != self._arrivals, arrivals
        for peer in self._peers.values():
            peer.silent_beats += 1
            peer.late_beats = 0 if went_on or peer.work or peer.arrivals >= arrivals else peer.late_beats + 1
        if self.rank == 0:
            self._tell_of_work()
        with suppress(Exception):
            self._write()

    def _tell_of_work(self) -> None:
        """A line for each rank for whose own work others have been waiting for long, once."""
        works = {0: (_work, self._arrivals), **{rank: (peer.work, peer.arrivals) for rank, peer in self._peers.items()}}
        furthest = max(arrivals for _, arrivals in works.values())
        for rank, (work, arrivals) in works.items():
            before, now = (self._waited_for.get(rank, 0) + n for n in (0, 1))
            self._waited_for[rank] = now if work and arrivals < furthest else 0
            if before * self.beat_s < BUSY_LINE_S <= self._waited_for[rank] * self.beat_s:
                print(f"waiting for rank {rank}, which {work}", flush=True)

    def _read(self) -> None:
        try:
            values = self._store.multi_get([str(rank) for rank in self._peers])
        except Exception:
            self._store_failures += 1
            return
        self._store_failures = 0
        for peer, value in zip(self._peers.values(), values, strict=True):
            state, beats, arrivals, work, stop, mistake = json.loads(value)
            if beats != peer.beats or state != peer.state:
                peer.silent_beats = 0
            peer.state, peer.beats, peer.arrivals = state, beats, arrivals
            peer.work, peer.mistake = work, mistake
            if stop:
                signals.request(stop)

    def _missing(self, elsewhere_s: float | None = None) -> dict[int, str]:
        """Ranks that have gone without saying so, or are not heard of any more, and what became of each.

        `elsewhere_s` is how long ranks that can't be seen may have been silent, in seconds; None: as long as the others.
        """
        with self._lock:
            gone = {rank for rank, peer in self._peers.items() if peer.is_gone()}
            self._read()  # after that: what it said last, which may be that it leaves
            missing: dict[int, str] = {}
            for rank, peer in self._peers.items():
                limit_s = self.limit_s if elsewhere_s is None or peer.process else elsewhere_s
                silent_s = peer.silent_beats * self.beat_s
                late_s = peer.late_beats * self.beat_s if peer.arrivals < self._arrivals and not peer.work else 0.0
                if peer.state == LEFT:
                    continue
                if peer.state in (FAILED, REFUSED):
                    missing[rank] = peer.state
                elif rank in gone and self._store_failures != 1:  # a store that is gone, too, gets a second look
                    missing[rank] = "died"
                elif self._store_failures == 0 and (silent_s > limit_s or late_s > self.limit_s):
                    missing[rank] = f"silent for {max(silent_s, late_s):.0f} s"
            return missing

    def _name(self, missing: dict[int, str]) -> None:
        """One line about all of them, once, by the lowest rank that is left."""
        with self._lock:
            if self._named or not missing:
                return
            self._named = True
            if self.rank != min(rank for rank in (self.rank, *self._peers) if rank not in missing):
                return
        by_fate: dict[str, list[str]] = {}
        for rank, fate in missing.items():
            by_fate.setdefault(fate, []).append(str(rank))
        what = ", ".join(f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)} {fate}" for fate, ranks in by_fate.items())
        where = f"at step {_step}" if _step else "before the first step"
        self._line = f"{what} (rank {self.rank} waited for {'it' if len(missing) == 1 else 'them'} {where})"
        _tell(
            self._line,
            "what was saved is kept, and the same command goes on from there",
        )
