"""Saving while the run goes on: a copy of the state to host memory, then the writing of it in a thread."""

import copy
import json
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from dist_contrastive import distributed, liveness
from dist_contrastive.atomic import write_atomic, writing
from dist_contrastive.checkpoint.store import CheckpointStore, shard_name
from dist_contrastive.checkpoint.tensor_file import HostCopy, Tensors
from dist_contrastive.config import UserError, require

POLL_S = 0.1


class Saver:
    """Saves checkpoints one after the other, at most one of them under way.

    `save` and `settle` are collective. What is done in the thread is not: the ranks' threads meet in the checkpoint's folder
    alone, where rank 0 waits for the others' files before it commits the whole.

    Attributes:
        has_failed: whether this rank's part of the checkpoint under way could not be written, which `settle` will tell all.
    """

    def __init__(self, store: CheckpointStore, goes_on: Callable[[], str], timeout_s: float) -> None:
        """`goes_on` says how the run goes on after a failure (`atomic.writing`); `timeout_s` is how long rank 0 waits for
        the files of other ranks after it has written its own."""
        self._store = store
        self._goes_on = goes_on
        self._timeout_s = timeout_s
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._under_way: Path | None = None
        """The folder in which it is written, on all ranks."""
        self._is_sharded = False
        self._given_up = threading.Event()

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def save(
        self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensors], shards: Mapping[str, Tensors]
    ) -> None:
        """Take a copy of everything, and write it from now on; returns once the run may go on to change it.

        Rank 0 writes `state` (JSON values) and `tensors` (by name of the file, without ending), for which the other ranks'
        arguments are not read. `shards` are each rank's own, under the same names on all ranks.
        Raises `UserError` on all ranks where the checkpoint before it could not be written, or this one can't be begun.
        """
        self.settle()
        is_main, rank = distributed.is_main(), distributed.rank()

        def begin() -> Path | None:
            with self._writing(step):
                return self._store.begin(step, secrets.token_hex(4)) if is_main else None

        self._under_way = folder = distributed.broadcast_object(distributed.together(begin))
        self._is_sharded = bool(shards) and distributed.world_size() > 1
        own = {shard_name(group, rank): shard for group, shard in shards.items()}
        copies = self._copy({**tensors, **own} if is_main else own)
        if is_main or own:
            arguments = (folder, step, copies, copy.deepcopy(dict(state)))
            self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True)
            self._thread.start()

    def settle(self) -> None:
        """Wait until the checkpoint under way is committed; `UserError` on all ranks where it can't be written."""
        if self._under_way is None:
            return
        is_main = distributed.is_main()
        try:
            if self._is_sharded:  # rank 0's thread waits for the others' files: it hears first whether they come
                distributed.together(lambda: None if is_main else self._join())
            distributed.together(lambda: self._join() if is_main else None)
        except UserError:
            self._given_up.set()
            self.wait()
            self._thread = self._error = None
            self._given_up.clear()
            if is_main:
                shutil.rmtree(self._under_way, ignore_errors=True)
            raise
        finally:
            self._under_way = None

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until this rank's part is written, or has failed, or for so many seconds; not collective."""
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _join(self) -> None:
        assert self._under_way
        with liveness.busy(f"writes {self._under_way}"):
            self.wait()
        self._thread, error, self._error = None, self._error, None
        if error:
            raise error

    def _run(self, folder: Path, step: int, tensors: dict[str, Tensors], state: dict[str, Any]) -> None:
        try:
            with self._writing(step):
                sums = self._store.write(folder, tensors)
                if distributed.is_main():
                    self._store.commit(folder, step, {**sums, **self._sums_of_others(folder)}, state)
                else:
                    write_atomic(folder / _receipt(distributed.rank()), json.dumps(sums).encode())
        except BaseException as error:  # raised where all ranks hear of it
            self._error = error

    def _writing(self, step: int) -> AbstractContextManager[None]:
        return writing(f"{self._store.path(step)}, the checkpoint of step {step},", self._goes_on)

    def _sums_of_others(self, folder: Path) -> dict[str, str]:
        """What the other ranks have written, once all have; without shards, nothing."""
        sums: dict[str, str] = {}
        left = set(range(1, distributed.world_size())) if self._is_sharded else set()
        deadline = time.monotonic() + self._timeout_s
        while left:
            for rank in [rank for rank in left if (folder / _receipt(rank)).exists()]:
                sums.update(json.loads((folder / _receipt(rank)).read_bytes()))
                (folder / _receipt(rank)).unlink()
                left.remove(rank)
            if left:
                require(
                    time.monotonic() < deadline and not self._given_up.wait(POLL_S),
                    f"{folder} lacks the files of rank(s) {sorted(left)} after {self._timeout_s:.0f} s: is it on one disk for "
                    "all hosts?",
                )
        return sums


def _receipt(rank: int) -> str:
    """The file with which a rank says that its own are there, and what their sums are."""
    return f"rank-{rank:05d}.json"
