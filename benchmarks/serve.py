"""`python -m benchmarks.serve EXPORT`: how fast does the service answer, from one client to many, and what does batching give?

Two services of one export take turns: one lets requests that come together go through the model together, the other takes each
by itself. The clients are another process; each has a connection of its own and asks for the similarity of two JPEGs, the next
time as soon as it has its answer. Time is from the first byte sent to the last one received; failed is every answer but 200.

`--soak-minutes 10` then leaves the batching service to the largest number of clients, and notes what memory it takes.

    python -m benchmarks.serve runs/demo/export
    python -m benchmarks.serve exports/resnet50 --clients 1 64 --side 224 --soak-minutes 10
"""

import asyncio
import io
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import psutil
import tyro
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.frame import Budget, Record, Turns, at_least, begin, comparison, curves, take_turns
from dist_contrastive.cli import main_guard
from dist_contrastive.config import UserError, require
from dist_contrastive.exporting.model import read_facts
from dist_contrastive.report.style import BLUE, STYLE, new_figure

QUESTION = "how fast does the service answer, from one client to many, and what does batching give?"
TOGETHER, ALONE = "batching", "one by one"
OPTIONS = {TOGETHER: (), ALONE: ("--max-batch", "1", "--batch-wait-ms", "0")}
REQUESTS, FAILED, MEMORY = "requests/s", "failed", "MiB"
QUANTILES = {"p50 ms": 50, "p95 ms": 95, "p99 ms": 99}
WARM_UP_S = 1.0
SAMPLE_S = 5.0
"""How often memory is noted."""
START_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Command(Turns):
    """What is asked, by whom, and for how long."""

    export: Annotated[Path, tyro.conf.Positional]
    """The folder of an export."""
    clients: tuple[int, ...] = (1, 8, 64)
    """Numbers of clients that ask at once."""
    seconds: float = 5.0
    """Of each measurement."""
    side: int = 0
    """Pixels a side of the images that are sent; 0: as many as the encoder sees."""
    soak_minutes: float = 0.0
    """How long the largest number of clients asks afterwards, with its memory noted; 0: not at all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "clients")
        at_least(self, 0, "side", "soak_minutes")
        require(self.seconds > 0, f"--seconds {self.seconds:g}: give more than 0")


class Answers(NamedTuple):
    """What clients got."""

    seconds: np.ndarray
    """float64 [n]: of each answer, in the order in which they came."""
    num_failed: int
    per_s: float


def jpeg(side: int, seed: int) -> bytes:
    """A picture of smooth blotches: what a decoder finds in photographs, not noise."""
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def similarity_request(images: Sequence[bytes]) -> bytes:
    """The bytes of a whole request."""
    boundary = b"----benchmark"
    parts = [
        b'--%s\r\ncontent-disposition: form-data; name="%s"; filename="%s.jpg"\r\n\r\n%s\r\n'
        % (boundary, name, name, image)
        for name, image in zip((b"a", b"b"), images, strict=True)
    ]
    body = b"".join(parts) + b"--%s--\r\n" % boundary
    head = (
        b"POST /similarity HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: multipart/form-data; boundary=%s\r\n"
        b"content-length: %d\r\n\r\n" % (boundary, len(body))
    )
    return head + body


async def _client(port: int, request: bytes, until: float, found: list[tuple[float, int]]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while (start := time.perf_counter()) < until:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:] if b": " in line)
            await reader.readexactly(int(fields[b"content-length"]))
            found.append((time.perf_counter() - start, int(head.split(b" ", 2)[1])))
    except (OSError, asyncio.IncompleteReadError):  # the service hung up
        found.append((time.perf_counter() - start, 0))
    finally:
        writer.close()


def ask(port: int, request: bytes, clients: int, seconds: float) -> Answers:
    """Let so many clients ask for so long; runs in a process of its own."""

    async def all_clients() -> Answers:
        found: list[tuple[float, int]] = []
        start = time.perf_counter()
        until = start + seconds
        await asyncio.gather(*(_client(port, request, until, found) for _ in range(clients)))
        took = time.perf_counter() - start
        statuses = [status for _, status in found]
        return Answers(
            np.array([s for s, _ in found]), sum(status != 200 for status in statuses), statuses.count(200) / took
        )

    return asyncio.run(all_clients())


@contextmanager
def service(export: Path, options: Sequence[str]) -> Iterator[tuple[psutil.Process, int]]:
    """A service of the export as a process of its own, and its port."""
    words = [sys.executable, "-m", "dist_contrastive.serve", str(export), "--port", "0", *options]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise UserError(f"the service of {export} did not start")
        yield psutil.Process(process.pid), int(line.split()[0].rpartition(":")[2])
    finally:
        process.terminate()
        process.wait(START_S)


def measure(command: Command, record: Record, pool: Executor) -> None:
    """Fill the record."""
    facts = read_facts(command.export)
    side = command.side or facts["view"]["size"]
    request = similarity_request([jpeg(side, 0), jpeg(side, 1)])
    record.details = {"run": facts["run"], "bytes of a request": len(request), "processor": facts["processor"]}
    budget = Budget(command.minutes)
    with ExitStack() as services:
        queue = ("--max-queue", str(2 * max(command.clients)))
        found = {
            name: services.enter_context(service(command.export, (*words, *queue))) for name, words in OPTIONS.items()
        }
        for clients in command.clients:
            asked = {
                name: partial(_asked, pool, port, request, clients, command.seconds)
                for name, (_, port) in found.items()
            }
            for name, answers in take_turns(asked, command.rounds, budget=budget).items():
                _add(record, f"{clients} client{'s' * (clients > 1)}", name, answers)
        process, port = found[TOGETHER]
        if command.soak_minutes:
            _soak(command, record, pool, process, port, request)


def _asked(pool: Executor, port: int, request: bytes, clients: int, seconds: float) -> Answers:
    return pool.submit(ask, port, request, clients, seconds).result()


def _add(record: Record, case: str, contender: str, answers: Sequence[Answers]) -> None:
    record.add(case, contender, REQUESTS, [one.per_s for one in answers])
    for name, share in QUANTILES.items():
        record.add(case, contender, name, [1000 * np.percentile(one.seconds, share) for one in answers])
    record.add(case, contender, FAILED, [one.num_failed for one in answers])


def _soak(command: Command, record: Record, pool: Executor, process: psutil.Process, port: int, request: bytes) -> None:
    """Memory over a long time under the largest load."""
    clients = max(command.clients)
    _asked(pool, port, request, clients, WARM_UP_S)
    start = time.monotonic()
    asking = pool.submit(ask, port, request, clients, 60 * command.soak_minutes)
    samples = []
    while not asking.done():
        samples.append((time.monotonic() - start, process.memory_info().rss / 2**20))
        time.sleep(min(SAMPLE_S, 6 * command.soak_minutes))
    answers = asking.result()
    case = f"{clients} clients, {command.soak_minutes:g} min"
    _add(record, case, TOGETHER, [answers])
    record.add(case, TOGETHER, MEMORY, [memory for _, memory in samples])
    record.details["memory"] = [{"s": round(s, 1), "mib": round(memory, 1)} for s, memory in samples]


def memory_curve(record: Record) -> Figure | None:
    """Resident memory over the long run."""
    samples = record.details.get("memory")
    if not samples:
        return None
    with rc_context(STYLE):
        figure, (panel,) = new_figure(3.2)
        panel.plot([one["s"] / 60 for one in samples], [one["mib"] for one in samples], color=BLUE)
        panel.set(xlabel="minutes", ylabel="resident memory, MiB")
        panel.set_ylim(0, 1.2 * max(one["mib"] for one in samples))
    return figure


def _clients_of(case: str) -> float | None:
    return None if "," in case else float(case.split()[0])


def main(argv: Sequence[str] | None = None) -> None:
    command, record = begin(
        Command, "serve", argv, __doc__, question=QUESTION, packages=("onnxruntime", "fastapi", "uvicorn")
    )
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(os.getpid).result()  # it is there, with all that it imports
        measure(command, record, pool)
    record.write(
        QUESTION,
        comparison(record, [REQUESTS, *QUANTILES, FAILED, MEMORY], ALONE),
        {"requests": curves(record, REQUESTS, _clients_of, xlabel="clients"),
         "latency": curves(record, "p95 ms", _clients_of, xlabel="clients"), "memory": memory_curve(record)},
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main_guard(main))
