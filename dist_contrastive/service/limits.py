"""What a service takes from its clients at most, and how it says no."""

from collections.abc import Mapping
from dataclasses import dataclass

from dist_contrastive.config import require, require_positive


@dataclass(frozen=True, kw_only=True)
class Limits:
    """All options of a service that bound or guard it; beside each the status code of who goes beyond."""

    max_body_mib: float = 16.0
    """A request's body (413)."""
    max_pixels: int = 25_000_000
    """An image's pixels, known from its header before anything is decoded (413)."""
    max_images: int = 64
    """Images in one request (413)."""
    max_neighbours: int = 100
    """The largest k of a search (422)."""
    max_text: int = 2_000
    """Characters of a text (422)."""
    max_queue: int = 128
    """Requests under way at once (429)."""
    timeout_s: float = 20.0
    """From a request's body to its answer (503)."""
    receive_s: float = 10.0
    """For a client to send a request's head (it is hung up on), and as much again for the body (408)."""
    max_batch: int = 32
    """Images that go through the model at once."""
    batch_wait_ms: float = 3.0
    """How long an image waits, at most, for others that are under way; alone it doesn't wait. 0: no waiting."""
    decode_threads: int = 2
    """Threads that decode images."""
    token: str = ""
    """Clients must send `Authorization: Bearer TOKEN` with it (401); empty: none. The variable DIST_CONTRASTIVE_TOKEN says it
    without showing it in lists of processes."""
    cors: tuple[str, ...] = ()
    """Origins (https://example.org) whose pages may ask, by their browsers' leave."""

    def __post_init__(self) -> None:
        for name in ("max_body_mib", "timeout_s", "receive_s"):
            require_positive(f"--{name.replace('_', '-')}", getattr(self, name))
        for name in (
            "max_pixels", "max_images", "max_neighbours", "max_text", "max_queue", "max_batch", "decode_threads",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')} {value}: give 1 or more")
        require(0 <= self.batch_wait_ms < 1e4, f"--batch-wait-ms {self.batch_wait_ms:g}: give 0 to 10,000")
        require(self.token.isascii() and self.token == self.token.strip(), "--token: give ASCII without spaces around")

    @property
    def max_body(self) -> int:
        """Bytes"""
        return int(self.max_body_mib * 2**20)


class RefusedError(Exception):
    """A request that is answered with a status code and one sentence.

    Attributes:
        status: the code.
        kind: a word for the count of errors.
        headers: what else the answer has.
    """

    def __init__(self, status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.kind, self.headers = status, kind, dict(headers or {})


def bad_request(detail: str) -> RefusedError:
    return RefusedError(422, "bad_request", detail)


def bad_image(detail: str) -> RefusedError:
    return RefusedError(422, "bad_image", detail)
