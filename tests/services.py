"""A service as its own process, over an untrained run's export and index, for tests that talk to it over HTTP."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

from dist_contrastive import index
from dist_contrastive.exporting.write import export
from dist_contrastive.run_folder.names import EXPORT
from tests.runs import leave_untrained, tiny_config, write_dataset
from tests.steps import with_small

DEADLINE_S = 60.0


class Exported(NamedTuple):
    """An image-text run with its export, and an index of its embeddings, with pictures."""

    run: Path
    export: Path
    neighbours: Path


def make_indexed(folder: Path, *, seed: int = 0) -> Exported:
    """The same but for the export, which is to come."""
    config = with_small(tiny_config(folder / "run", write_dataset(folder, captions=True), seed=seed), "clip")
    leave_untrained(config)
    words = [config.run_dir, config.data.path, folder / "index", "--output", "embedding", "--device", "cpu"]
    index.main([str(word) for word in words])
    return Exported(config.run_dir, config.run_dir / EXPORT, folder / "index")


def make_exported(folder: Path) -> Exported:
    made = make_indexed(folder)
    export(made.run, checkpoint=None, data=None, out=None, int8=False, max_images=100, say=lambda line: None)
    return made


class Running(NamedTuple):
    """A service that listens."""

    process: subprocess.Popen[str]
    line: str
    """What it printed."""
    url: str
    log: Path
    """Its standard error."""

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=DEADLINE_S, **options)  # type: ignore[arg-type]

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", int(self.url.rpartition(":")[2])


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "dist_contrastive.serve", *(str(word) for word in words)]


@contextmanager
def running(log: Path, *words: object) -> Iterator[Running]:
    """`serve` with `words` on a free port, until the context ends."""
    with open(log, "w") as errors:
        process = subprocess.Popen(
            command(*words, "--port", 0, "--threads", 1), stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()
        yield Running(process, line, line.split()[0], log)
    finally:
        process.terminate()
        try:
            process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
