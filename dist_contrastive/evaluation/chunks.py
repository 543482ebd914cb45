"""Features that may be larger than a device's memory, read in pieces of some rows.

Features are one tensor [N, D] of float32, float64 or bytes. It lies on the host, or on the device where it fits there
(`settle`); whoever computes with it sees floats on the device, a piece at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dist_contrastive import signals

FREE_PART = 0.5
"""Of a GPU's free memory, what features may fill."""
CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
"""Of a piece as floats: it stays in a processor's cache from one use to the next; for a GPU it is enough work."""


def settle(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device` where it fits well, in its own dtype; else where it is."""
    if x.device == device or device.type != "cuda":
        return x
    free, _ = torch.cuda.mem_get_info(device)
    return x.to(device) if x.nbytes <= FREE_PART * free else x


def floats(x: Tensor) -> torch.dtype:
    """What is computed in with features `x`: float32, or float64 where they are."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def chunk_rows(x: Tensor, device: torch.device) -> int:
    """How many rows of features `x` [N, D] make a piece."""
    return max(1, CHUNK_BYTES[device.type] // max(1, x.shape[1] * floats(x).itemsize))


def chunks(x: Tensor, device: torch.device, rows: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """All of features `x` [N, D] in order, `rows` at a time (by default `chunk_rows`): which, and they as floats on `device`.

    A piece may be a view of `x`: it is not for writing. `Stopped` between two pieces where the run was told to stop.
    """
    rows = rows or chunk_rows(x, device)
    for start in range(0, len(x), rows):
        signals.give_way()
        piece = x[start : start + rows]
        if device.type == "cuda" and piece.device.type == "cpu":
            piece = piece.pin_memory()  # its copy to the GPU runs on while the host fetches the next piece
        yield slice(start, start + len(piece)), piece.to(device, non_blocking=True).to(floats(x))
