"""`status.json` in a run's folder: what became of the run, whatever launched it. Launchers turn exit statuses into others.

Rank 0 writes it, whole or not at all: `running` when the run claims the folder, and again every now and then with the steps
that are done; then `stopped`, `failed` or `done`. A process that was killed writes nothing: whoever reads finds out that it
is gone.
"""

import dataclasses
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from dist_contrastive import processes
from dist_contrastive.atomic import write_atomic
from dist_contrastive.config import UserError, require
from dist_contrastive.run_folder.names import CONFIG, DONE, STATUS

BEAT_S = 30.0
"""Between two notes that the run is still there."""
SILENT_S = 300.0
"""After this long without one, a run on a machine whose processes can't be seen from here counts as ended."""
LONGEST_REASON = 500

State = Literal["running", "stopped", "failed", "done", "died", "unknown"]


@dataclass(frozen=True)
class RunStatus:
    """What is known of a run. The states `died` and `unknown` are found by `read_status` and never written."""

    state: State
    reason: str = ""
    """In one line why it stopped, failed or is taken for dead."""
    step: int | None = None
    """Updates that were done by then; None where the run had not got so far as to know."""
    total_steps: int | None = None
    """Of the whole run."""
    when: str = ""
    """UTC, ISO 8601."""
    host: str = ""
    pid: int = 0
    """Of rank 0's process on `host`."""
    machine: str = ""
    """The running kernel and the space in which `pid` counts (`processes.machine`)."""
    started: int | None = None
    """When that process was started (`processes.started`)."""
    ranks: int = 1
    job: str | None = None
    """Slurm's number of the job."""
    restarts: int = 0
    """How often Slurm has requeued that job."""


class StatusFile:
    """The status of the run that holds the folder `folder`. Rank 0 alone makes one.

    Attributes:
        step: updates that are done, for the next note.
    """

    def __init__(self, folder: Path) -> None:
        self.step = 0
        self._folder = folder
        self._now: RunStatus | None = None
        self._closed = threading.Event()
        # A handler of signals may come in the midst of a note, and have one itself; it does not return then.
        self._lock = threading.RLock()

    def take_over(self) -> None:
        """The unfinished run of the folder goes on; nothing is written before `begin`, unless it fails until then."""
        known = read_file(self._folder) or RunStatus("unknown")
        self.step = known.step or 0
        self._now = dataclasses.replace(_of_this_process(), total_steps=known.total_steps)

    def begin(self, *, step: int, total_steps: int, ranks: int) -> None:
        """The run has claimed the folder. Raises OSError where that can't be written."""
        self.step = step
        self._write(dataclasses.replace(_of_this_process(), total_steps=total_steps, ranks=ranks))
        threading.Thread(target=self._beat, daemon=True).start()

    def end(self, state: Literal["stopped", "done"], reason: str = "") -> None:
        """The run is over. Raises OSError where that can't be written."""
        assert self._now, "a run that ends has begun"
        self._write(dataclasses.replace(self._now, state=state, reason=reason))

    def fail(self, reason: str) -> None:
        """The run ends by a fault, for `reason`; what is told last counts. That the disk won't take it is no other fault."""
        with self._lock, suppress(OSError):
            if self._now is None or self._now.state not in ("running", "failed"):
                return
            if self._closed.is_set() and not _is_same(read_file(self._folder), self._now):
                return  # the folder is another run's by now
            self._write(dataclasses.replace(self._now, state="failed", reason=reason))

    @contextmanager
    def tells_faults(self) -> Iterator[None]:
        """Within the context whatever is raised is what the run failed by."""
        try:
            yield
        except UserError as error:
            self.fail(str(error))
            raise
        except BaseException as error:
            self.fail(f"{type(error).__name__}: {error}".rstrip(": "))
            raise

    def close(self) -> None:
        """No note that the run is still there comes after this."""
        self._closed.set()
        with self._lock:
            pass

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            with self._lock, suppress(OSError):
                if self._now and self._now.state == "running" and not self._closed.is_set():
                    self._write(self._now)

    def _write(self, status: RunStatus) -> None:
        reason = " ".join(status.reason.split())[:LONGEST_REASON]
        when = datetime.now(UTC).isoformat(timespec="seconds")
        with self._lock:
            self._now = dataclasses.replace(status, reason=reason, when=when, step=self.step)
            write_atomic(self._folder / STATUS, json.dumps(dataclasses.asdict(self._now), indent=1).encode())


def _of_this_process() -> RunStatus:
    """That this process runs, as far as it knows by itself."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    pid = os.getpid()
    return RunStatus(
        "running",
        host=socket.gethostname(),
        pid=pid,
        machine=processes.machine(),
        started=processes.started(pid),
        job=f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID"),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
    )


def _is_same(one: RunStatus | None, other: RunStatus) -> bool:
    """Whether both are of one process."""
    return one is not None and (one.machine, one.pid, one.started) == (other.machine, other.pid, other.started)


def read_file(folder: Path) -> RunStatus | None:
    """What `status.json` says; None where it is not there or says nothing that can be read."""
    try:
        return RunStatus(**json.loads((folder / STATUS).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def read_status(folder: Path) -> RunStatus:
    """What became of the run in `folder`; `UserError` where there is none. Nothing is written, and no lock taken."""
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UserError(
            f"{folder} can't be read ({error.strerror}); give a run's folder (--run-dir of training)"
        ) from error
    require(bool(names & {STATUS, CONFIG, DONE}), f"{folder} holds no run; give a run's folder (--run-dir of training)")
    status = read_file(folder)
    if DONE in names:  # the only sign of success, whatever came after it
        return dataclasses.replace(status or RunStatus("done"), state="done", reason="")
    if status is None:
        return RunStatus(
            "unknown", f"there is no {STATUS} that can be read: it has not begun, or an earlier version ran it"
        )
    if status.state == "done":
        return dataclasses.replace(status, state="unknown", reason=f"it was done, but its {DONE} is gone")
    gone = _why_gone(status) if status.state == "running" else ""
    return dataclasses.replace(status, state="died", reason=gone) if gone else status


def _why_gone(status: RunStatus) -> str:
    """Why the process of a run that said that it runs is taken for dead; empty where it is not."""
    if status.machine == processes.machine():
        runs = processes.started(status.pid) == status.started
        return "" if runs else f"its process {status.pid} is gone"
    try:
        silent_s = (datetime.now(UTC) - datetime.fromisoformat(status.when)).total_seconds()
    except (ValueError, TypeError):
        return ""
    return f"{status.host} has not been heard of for {silent_s / 60:.0f} min" if silent_s > SILENT_S else ""
