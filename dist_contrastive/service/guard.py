"""What stands around the service's routes: limits of body and time, the token, the queue's length, and every answer's form."""

import asyncio
import hmac
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from dist_contrastive.service.limits import Limits, RefusedError
from dist_contrastive.service.metrics import ServiceMetrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/", "/docs", "/healthz", "/readyz", "/openapi.json", "/page.js", "/page.css")
"""What needs no token: it tells nothing of the data."""
DRAIN_S = 2.0
"""How long the rest of a refused body is read, so that its sender reads the answer rather than meet a closed connection."""
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'"),
)
log = logging.getLogger("dist_contrastive.service")


class Disconnected(Exception):
    """The client went away."""


class Guard:
    """An ASGI application around another, which gets whole bodies within the limits, and which ends when its client does."""

    def __init__(self, app: App, limits: Limits, metrics: ServiceMetrics, routes: frozenset[str]) -> None:
        """`routes`: what there is, for the counters; all else is counted as one."""
        self._app, self._limits, self._metrics, self._routes = app, limits, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        answer, began = _Answer(send), time.monotonic()
        is_work = scope["method"] == "POST"
        try:
            try:
                self._admit(scope, is_work)
                self._metrics.in_flight += is_work
                try:
                    body = await self._body(scope, receive)
                    await self._answer(scope, body, receive, answer)
                finally:
                    self._metrics.in_flight -= is_work
            except RefusedError as error:
                self._metrics.failed(error.kind)
                await self._drain(receive, scope)
                await answer.refuse(error.status, str(error), error.headers)
            except Disconnected:
                self._metrics.failed("disconnected")
                answer.status = 499  # what nginx notes of clients that closed the connection
            except Exception as error:
                name = secrets.token_hex(4)
                log.error("error %s: %s %s", name, scope["method"], scope["path"], exc_info=error)
                self._metrics.failed("internal")
                await answer.refuse(
                    500, f"The service failed on this request; its log has the reason under {name}.", {}
                )
        finally:
            path = scope["path"]
            route = path if path in self._routes else "/picture" if path.startswith("/picture/") else "other"
            self._metrics.answered(route, answer.status, time.monotonic() - began)

    def _admit(self, scope: Scope, is_work: bool) -> None:
        headers = dict(scope["headers"])
        if self._limits.token and scope["path"] not in OPEN and scope["method"] != "OPTIONS":
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._limits.token.encode()):
                raise RefusedError(
                    401, "token", "This service needs a token: send the header Authorization: Bearer TOKEN.",
                    {"www-authenticate": "Bearer"},
                )  # fmt: skip
        if is_work and self._metrics.in_flight >= self._limits.max_queue:
            raise RefusedError(
                429, "queue", f"{self._limits.max_queue} requests are under way already: try again in a second.",
                {"retry-after": "1"},
            )  # fmt: skip
        if int(headers.get(b"content-length", b"0")) > self._limits.max_body:
            raise self._too_large()

    def _too_large(self) -> RefusedError:
        return RefusedError(413, "body", f"A request's body has at most {self._limits.max_body:,} bytes here.")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        if scope["method"] in ("GET", "HEAD"):
            return b""
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._limits.receive_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        scope["body_done"] = True
                        raise Disconnected
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._limits.max_body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        scope["body_done"] = True
                        return b"".join(parts)
        except TimeoutError:
            scope["body_done"] = True  # nothing more is waited for
            raise RefusedError(
                408, "slow_client", f"The request's body took longer than {self._limits.receive_s:g} s.",
                {"connection": "close"},
            ) from None  # fmt: skip

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, answer: "_Answer") -> None:
        """Let the routes answer, no longer than the limit and than the client is there."""
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def whole() -> Message:
            return next(messages, None) or await receive()

        if scope["method"] in ("GET", "HEAD"):
            await self._app(scope, whole, answer)
            return
        work = asyncio.ensure_future(self._app(scope, whole, answer))
        gone = asyncio.ensure_future(receive())  # after the body there comes but one message: the client went away
        try:
            await asyncio.wait((work, gone), timeout=self._limits.timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
            elif gone.done():
                raise Disconnected
            else:
                raise RefusedError(
                    503, "timeout", f"This took longer than {self._limits.timeout_s:g} s: the service is busy.",
                    {"retry-after": "1"},
                )  # fmt: skip
        finally:
            for task in (work, gone):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    async def _drain(self, receive: Receive, scope: Scope) -> None:
        """Drop what still comes of a body, some seconds and some bytes long."""
        if scope.get("body_done") or scope["method"] in ("GET", "HEAD"):
            return
        size = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while size <= 4 * self._limits.max_body:
                    message = await receive()
                    size += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return


class _Answer:
    """What goes to the client; knows whether it has begun."""

    def __init__(self, send: Send) -> None:
        self._send, self.status = send, 500
        self._has_begun = self._is_failing = self._refuses = False

    async def __call__(self, message: Message) -> None:
        # Starlette's own answer to what nobody foresaw; it raises the error again, and the guard answers.
        self._is_failing |= message.get("status") == 500 and not self._refuses
        if self._is_failing:
            return
        if message["type"] == "http.response.start":
            self.status, self._has_begun = message["status"], True
            message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
        await self._send(message)

    async def refuse(self, status: int, detail: str, headers: dict[str, str]) -> None:
        if self._has_begun:
            return
        self._refuses, self._is_failing = True, False
        body = json.dumps({"detail": detail}).encode()
        fields = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        fields += [(name.encode(), value.encode()) for name, value in headers.items()]
        await self({"type": "http.response.start", "status": status, "headers": fields})
        await self({"type": "http.response.body", "body": body})
