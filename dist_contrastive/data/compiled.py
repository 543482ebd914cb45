"""Compiled functions whose machine code is kept on disk, and the line that says that one is being compiled."""

from collections.abc import Callable
from contextlib import AbstractContextManager
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
            self._say("compiling the loader: about 20 s, the first time on this machine")

    def on_end(self, event: event.Event) -> None:
        pass


def announced_compilation(say: Callable[[str], object]) -> AbstractContextManager[object]:
    """Within it, `say` is called with one line when the loader has to be compiled: what one waits for then."""
    return event.install_listener("numba:compile", _Announcement(say))
