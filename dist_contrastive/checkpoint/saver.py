"""Saving while the run goes on: a copy of the state to host memory, then the writing of it in a thread."""

import copy
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from dist_contrastive import distributed, liveness
from dist_contrastive.atomic import writing
from dist_contrastive.checkpoint.store import CheckpointStore
from dist_contrastive.checkpoint.tensor_file import HostCopy, Tensors
from dist_contrastive.config import UserError


class Saver:
    """Saves checkpoints one after the other, at most one of them under way.

    `save` and `settle` are collective; the thread, which rank 0 has, takes part in no collective.

    Attributes:
        has_failed: whether the checkpoint under way could not be written, which rank 0 knows and `settle` will tell all.
    """

    def __init__(self, store: CheckpointStore, goes_on: Callable[[], str]) -> None:
        """`goes_on` says how the run goes on after a failure (`atomic.writing`)."""
        self._store = store
        self._goes_on = goes_on
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._under_way: Path | None = None
        """The folder in which it is written, on all ranks."""

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def save(self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensors]) -> None:
        """Take a copy of everything, and write it from now on; returns once the run may go on to change it.

        Rank 0 writes `state` (JSON values) and `tensors` (by name of the file, without ending); the other ranks' arguments are
        not read, and what they have a share of in memory comes gathered.
        Raises `UserError` on all ranks where the checkpoint before it could not be written, or this one can't be begun.
        """
        self.settle()
        is_main = distributed.is_main()

        def begin() -> Path | None:
            with self._writing(step):
                return self._store.begin(step, secrets.token_hex(4)) if is_main else None

        self._under_way = folder = distributed.broadcast_object(distributed.together(begin))
        if is_main:
            arguments = (folder, step, self._copy(tensors), copy.deepcopy(dict(state)))
            self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True)
            self._thread.start()

    def settle(self) -> None:
        """Wait until the checkpoint under way is committed; `UserError` on all ranks where it can't be written."""
        if self._under_way is None:
            return
        try:
            distributed.together(self._join)
        except UserError:
            if distributed.is_main():
                shutil.rmtree(self._under_way, ignore_errors=True)
            raise
        finally:
            self._under_way = None

    def wait(self, timeout_s: float | None = None) -> None:
        """On rank 0 wait until it is written, or has failed, or for so many seconds; not collective."""
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _join(self) -> None:
        if self._thread:
            with liveness.busy(f"writes {self._under_way}"):
                self.wait()
        self._thread, error, self._error = None, self._error, None
        if error:
            raise error

    def _run(self, folder: Path, step: int, tensors: dict[str, Tensors], state: dict[str, Any]) -> None:
        try:
            with self._writing(step):
                self._store.commit(folder, step, self._store.write(folder, tensors), state)
        except BaseException as error:  # raised where all ranks hear of it
            self._error = error

    def _writing(self, step: int) -> AbstractContextManager[None]:
        return writing(f"{self._store.path(step)}, the checkpoint of step {step},", self._goes_on)
