"""Requests that come together go through the model together, on the one thread that owns it."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

Vectors = tuple[np.ndarray, np.ndarray]
"""Features float32 [n, D] and embeddings float32 [n, E]."""


class Model(Protocol):
    """What turns pictures, uint8 [h, w, 3], and texts into vectors."""

    def embed(self, pictures: Sequence[np.ndarray]) -> Vectors: ...

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray: ...


@dataclass
class _Job:
    pictures: Sequence[np.ndarray] = ()
    texts: Sequence[str] = ()
    result: "Future[Vectors]" = field(default_factory=Future)


class Batcher:
    """Pictures of several requests through one call of the model. A request whose future was cancelled costs nothing more."""

    def __init__(
        self, model: Model, *, max_batch: int, wait_s: float, under_way: Callable[[], int], seen: Callable[[int], None]
    ) -> None:
        """`under_way`: how many requests may still bring pictures or have brought them; when all have, nobody waits.
        `seen` is told the size of each batch.
        """
        self._model, self._max_batch, self._wait_s = model, max_batch, wait_s
        self._under_way, self._seen = under_way, seen
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def embed(self, pictures: Sequence[np.ndarray]) -> "Future[Vectors]":
        return self._put(_Job(pictures=pictures))

    def embed_texts(self, texts: Sequence[str]) -> "Future[Vectors]":
        """The same, for both outputs: a text has embeddings alone."""
        return self._put(_Job(texts=texts))

    def close(self) -> None:
        """Do what was asked for so far, then end."""
        self._jobs.put(None)
        self._thread.join()

    def _put(self, job: _Job) -> "Future[Vectors]":
        self._jobs.put(job)
        return job.result

    def _work(self) -> None:
        while (first := self._jobs.get()) is not None:
            jobs, is_last = self._gathered(first)
            jobs = [job for job in jobs if job.result.set_running_or_notify_cancel()]
            for job in (job for job in jobs if job.texts):
                _settle([job], lambda job=job: _twice(self._model.embed_texts(job.texts)))  # type: ignore[misc]
            with_pictures = [job for job in jobs if not job.texts]
            if with_pictures:
                _settle(with_pictures, lambda jobs=with_pictures: self._embed(jobs))  # type: ignore[misc]
            if is_last:
                return

    def _gathered(self, first: _Job) -> tuple[list[_Job], bool]:
        """`first` and what comes within the wait, until the batch is full; whether that was all there will be."""
        jobs, size = [first], len(first.pictures)
        until = time.monotonic() + self._wait_s
        while size < self._max_batch:
            left = until - time.monotonic()
            try:
                if self._wait_s == 0:
                    break
                is_awaited = left > 0 and len(jobs) < self._under_way()
                job = self._jobs.get(timeout=left) if is_awaited else self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                return jobs, True
            jobs.append(job)
            size += len(job.pictures)
        return jobs, False

    def _embed(self, jobs: Sequence[_Job]) -> Vectors:
        pictures = [picture for job in jobs for picture in job.pictures]
        found = []
        for start in range(0, len(pictures), self._max_batch):
            part = pictures[start : start + self._max_batch]
            self._seen(len(part))
            found.append(self._model.embed(part))
        features, embeddings = zip(*found, strict=True)
        return np.concatenate(features), np.concatenate(embeddings)


def _settle(jobs: Sequence[_Job], work: Callable[[], Vectors]) -> None:
    """Give each of `jobs` its rows of what `work` finds for all, or the error that it ended with."""
    try:
        vectors = work()
    except Exception as error:  # the thread goes on: whoever asked is told
        for job in jobs:
            job.result.set_exception(error)
        return
    start = 0
    for job in jobs:
        stop = start + len(job.pictures or job.texts)
        job.result.set_result((vectors[0][start:stop], vectors[1][start:stop]))
        start = stop


def _twice(embeddings: np.ndarray) -> Vectors:
    return embeddings, embeddings
