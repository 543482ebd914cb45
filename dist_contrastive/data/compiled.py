"""Compiled functions whose machine code is kept on disk, who compiles them, and the line that says that one is being compiled."""

import fcntl
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

import numba
from numba.core import event


def cached(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled at its first call; the code is kept on disk for other processes.

    Each function compiled so is called with one signature alone: two processes that compile it at once then write the
    same code, whichever comes last. The cache does not notice changes in the functions of other files.
    """
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder that numba could write to: compile in every process
        return numba.njit(nogil=True)(function)


class _Announcement(event.Listener):
    """Says once that something is being compiled."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._said = False

    def on_start(self, event: event.Event) -> None:
        if not self._said:
            self._said = True
            self._say("compiling the loader and the augmentation: about 10 s, the first time on this machine")

    def on_end(self, event: event.Event) -> None:
        pass


def announced_compilation(say: Callable[[str], object]) -> AbstractContextManager[object]:
    """Within it, `say` is called with one line when something has to be compiled: what one waits for then."""
    return event.install_listener("numba:compile", _Announcement(say))


def compile_in_turns(calls: Sequence[Callable[[], object]], first: int) -> None:
    """Make `calls`, each of which compiles something that is kept on disk, from number `first` on, in a circle.

    Of several processes of one user that do so at once, each with another `first`, no two compile the same: what one is at, the
    others wait for, and then read. Where there are no locks, or no folder for their files, none waits: the same work is done
    more than once.
    """
    for number in range(len(calls)):
        turn = (first + number) % len(calls)
        with ExitStack() as held:
            with suppress(OSError):
                lock = Path(tempfile.gettempdir()) / f"dist_contrastive-{os.getuid()}-{turn}.lock"
                fcntl.flock(held.enter_context(lock.open("w")), fcntl.LOCK_EX)
            calls[turn]()
