"""One run at a time in a folder: by a lock of its file system, or, where that has none, by a file that its holder keeps alive.

Many clusters mount NFS or Lustre without locks. There the holder is named by a file of its own, created in one step, whose
time of change it renews every few seconds. Whether a holder that is not here still lives is seen by watching that time
change, never by comparing it with a clock: clocks of hosts differ, and jump. Of two that take over from a dead holder at
the same moment the later one keeps the file; the other finds that out before it begins.
"""

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from dist_contrastive import processes
from dist_contrastive.config import UserError

LOCK = ".lock"
HOLDER = ".lock-holder"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What flock says on a file system that has no locks."""
HEARTBEAT_S = 5.0
SILENCE_S = 30.0
"""A holder whose file has not changed for so long is gone."""
SETTLE_S = 2.0
"""More than it takes from a last look at a dead holder's file to another one in its place."""

_Seen = tuple[dict[str, Any], int]
"""Who holds a lock, as far as its file says, and when that was changed, in nanoseconds of the file system's clock."""


class FolderLock(Protocol):
    """A lock that this process holds."""

    def is_held(self) -> bool:
        """Whether it is still this process's: the folder is there, and not another in its place. Raises OSError."""
        ...

    def release(self) -> None: ...


def lock_folder(path: Path, instead: str = "--run-dir") -> FolderLock:
    """Lock the folder `path`; `UserError` where another process holds it, which says to choose another one for `instead`.

    Raises OSError where it can't be written.
    """
    # Held open: closing it gives the lock away.
    file = open(path / LOCK, "ab+", buffering=0)  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().decode(errors="replace").strip() or "another process"
        file.close()
        raise _in_use(path, holder, instead) from error
    except OSError as error:
        file.close()
        if error.errno not in NO_LOCKS:
            raise UserError(f"{path} can't be locked ({error.strerror}); choose another {instead}") from error
        print(
            f"{path}: its file system has no locks ({error.strerror}); a file that is kept alive stands in", flush=True
        )
        return _LockFile(path, instead)
    # Who holds it is a courtesy that a full disk may deny.
    with suppress(OSError):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    return _Flock(path, file)


def _in_use(path: Path, holder: str, instead: str) -> UserError:
    return UserError(f"{path} is in use by {holder}; wait for it or choose another {instead}")


class _Flock:
    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path = path / LOCK
        self._file = file

    def is_held(self) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def release(self) -> None:
        self._file.close()


class _LockFile:
    def __init__(self, folder: Path, instead: str) -> None:
        self._path, self._instead = folder / HOLDER, instead
        self._me = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": processes.started(os.getpid()),
            "machine": processes.machine(),
            "token": secrets.token_hex(8),
        }
        while not self._acquire(folder):
            pass
        self._released = threading.Event()
        threading.Thread(target=self._keep_alive, name="lock", daemon=True).start()

    def is_held(self) -> bool:
        try:
            return _read(self._path)[0].get("token") == self._me["token"]
        except (FileNotFoundError, NotADirectoryError):
            return False

    def release(self) -> None:
        self._released.set()
        with suppress(OSError):
            if self.is_held():
                self._path.unlink()

    def _write(self, path: Path, flag: int) -> None:
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | flag, 0o644)
        try:
            os.write(descriptor, json.dumps(self._me).encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _acquire(self, folder: Path) -> bool:
        """Take the lock; `UserError` where another process has it. False where its file has just changed: try again."""
        with suppress(FileExistsError):
            self._write(self._path, os.O_EXCL)
            return True
        seen = self._look()
        if seen and self._lives(folder, seen):
            raise _in_use(folder, _describe(seen[0]), self._instead)
        if not seen or self._look() != seen:
            return False
        mine = self._path.with_name(f"{HOLDER}-{self._me['token']}")
        self._write(mine, os.O_EXCL)
        mine.rename(self._path)
        time.sleep(SETTLE_S)
        if not self.is_held():
            return False
        print(f"{folder}: taken over from {_describe(seen[0])}, which is gone", flush=True)
        return True

    def _lives(self, folder: Path, seen: _Seen) -> bool:
        """Whether the holder that was `seen` is there."""
        holder = seen[0]
        if holder.get("machine") == self._me["machine"]:
            return bool(holder.get("started") == processes.started(holder["process"]))
        # It is of another host, or its file is being written.
        print(f"{folder}: looks for up to {SILENCE_S:.0f} s whether {_describe(holder)} still holds it", flush=True)
        until = time.monotonic() + SILENCE_S
        while time.monotonic() < until:
            time.sleep(min(1.0, SILENCE_S / 10))
            if (now := self._look()) != seen:
                return now is not None
        return False

    def _look(self) -> _Seen | None:
        """What is seen of the holder now; None where there is none."""
        try:
            return _read(self._path)
        except FileNotFoundError:
            return None

    def _keep_alive(self) -> None:
        while not self._released.wait(HEARTBEAT_S):
            with suppress(OSError):  # the disk may be away for a moment
                if self.is_held():
                    os.utime(self._path)


def _read(path: Path) -> _Seen:
    # Opened each time: network file systems ask their server then, and may answer from memory else.
    with open(path, "rb") as file:
        text, changed = file.read(), os.fstat(file.fileno()).st_mtime_ns
    try:
        return dict(json.loads(text)), changed
    except (ValueError, TypeError):
        return {}, changed


def _describe(holder: dict[str, Any]) -> str:
    return (
        f"process {holder['process']} on {holder['host']}"
        if {"process", "host"} <= holder.keys()
        else "another process"
    )
