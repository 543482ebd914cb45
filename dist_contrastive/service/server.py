"""The process of a service: what it opens, its socket, its signals and its end."""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from dist_contrastive.config import UserError, require
from dist_contrastive.exporting.model import ExportedModel
from dist_contrastive.exporting.names import FACTS
from dist_contrastive.exporting.packages import require_packages
from dist_contrastive.run_folder.names import CONFIG, DONE, EXPORT
from dist_contrastive.searching.index_file import SearchIndex
from dist_contrastive.service.app import Served, Service, require_same_encoder
from dist_contrastive.service.limits import Limits

BACKLOG = 512
PACKAGES = ("onnxruntime", "fastapi", "uvicorn", "prometheus_client", "python_multipart")
GRACE_S = 5.0
"""What clients get, beyond a request's own time, to take their answers when the service ends."""


def serve(
    folder: Path, *, index: Path | None, host: str, port: int, int8: bool | None, threads: int, limits: Limits
) -> None:
    """Answer requests until SIGTERM or SIGINT, then finish those under way."""
    require_packages(*PACKAGES)
    model = ExportedModel(export_folder(folder), int8=int8, threads=threads)
    opened = None if index is None else SearchIndex(index)
    if opened is not None:
        require_same_encoder(model, opened)
    with listening(host, port) as listener:
        service = Service(Served(model, opened, limits))
        name, number = listener.getsockname()[:2]
        url = f"http://{f'[{name}]' if ':' in name else name}:{number}"
        searched = "no index" if opened is None else f"an index of {len(opened):,} vectors ({opened.facts.kind})"
        form = "int8" if model.is_int8 else "fp32"
        _run(service, listener, f"{url}  {form} on {model.provider}, {searched}", limits)


def export_folder(folder: Path) -> Path:
    """The export that `folder` is, or has as a run's folder; `UserError` where there is none."""
    require(folder.is_dir(), f"{folder} is no folder: give an export, or a run that has one")
    if (folder / FACTS).is_file() or not (folder / CONFIG).is_file():
        return folder  # opening it says what is missing
    require(
        (folder / DONE).is_file(), f"{folder} is a run that is not done: it has no {DONE}; finish it, then export it"
    )
    require(
        (folder / EXPORT).is_dir(), f"{folder} has no {EXPORT}: python -m dist_contrastive.export {folder} makes one"
    )
    return folder / EXPORT


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens there; `UserError` where that can't be."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # Of sockets of this protocol alone asyncio knows that small pieces may be sent at once. Else an answer's body waits until
        # the client's system has acknowledged its head, which takes 40 ms.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise UserError(f"--host {host}: {error.strerror}") from error
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)  # here, as two that only bound to a port don't notice each other
        except OSError as error:
            raise UserError(f"can't listen on {host}:{port} ({error.strerror}): give another --port") from error
        yield listener


def _run(service: Service, listener: socket.socket, line: str, limits: Limits) -> None:
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        """Hangs up on who takes too long to send a request's head, which uvicorn awaits without end."""

        waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.expect_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.expect_head()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            if self.waiting is not None:
                self.waiting.cancel()
            super().connection_lost(exc)

        def expect_head(self) -> None:
            is_awaited = self.cycle is None or self.cycle.response_complete
            if not is_awaited and self.waiting is not None:
                self.waiting.cancel()
                self.waiting = None
            elif is_awaited and self.waiting is None and not self.transport.is_closing():
                self.waiting = self.loop.call_later(limits.receive_s, self.transport.close)

    class Server(uvicorn.Server):
        """Says when it listens; ends with status 0 where a signal asks for it, which uvicorn would pass on."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                print(line, flush=True)

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            def stop(number: int, frame: FrameType | None) -> None:
                service.is_ready = False
                self.handle_exit(number, frame)

            before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("python_multipart").setLevel(
        logging.ERROR
    )  # a line for each broken body would let clients fill the log
    config = uvicorn.Config(
        service.app, http=Protocol, loop="asyncio", ws="none", lifespan="on", log_config=None, access_log=False,
        server_header=False, backlog=BACKLOG, timeout_keep_alive=max(1, round(limits.receive_s)),
        timeout_graceful_shutdown=round(limits.receive_s + limits.timeout_s + GRACE_S),
    )  # fmt: skip
    Server(config).run(sockets=[listener])
