"""Arithmetic of the probes: the same wherever they run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products and convolutions in whole fp32, whatever training asked for (TF32, autocast), without gradients."""
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before_in_convolutions = convolutions.fp32_precision
    torch.set_float32_matmul_precision("highest")
    convolutions.fp32_precision = "ieee"
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        convolutions.fp32_precision = before_in_convolutions
