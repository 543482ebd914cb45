"""Which process is meant: a number alone is given to others later, on other machines at the same time."""

import os
import socket
from pathlib import Path

ENDED = ("Z", "X")
"""States of a process that has ended and is only still listed."""


def machine() -> str:
    """What only processes share that see each other's numbers: the running kernel and the space of process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"


def started(pid: int) -> int | None:
    """When a process of this machine was started, in the kernel's ticks since it booted; None where it runs no more.

    No clock that someone may set is asked, unlike `psutil.Process.create_time`.
    """
    try:
        # The name, in brackets, may hold spaces and brackets itself; state and start time follow it as fields 3 and 22.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ENDED else int(fields[19])
