"""Arithmetic of the probes: the same wherever they run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products and convolutions in whole fp32, whatever training asked for (TF32, autocast), without gradients."""
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    of_cudnn = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = False
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        # Torch has this in older words and in newer ones, and refuses to be asked where the two differ.
        cudnn.allow_tf32 = of_cudnn[0] == "tf32"
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = of_cudnn  # type: ignore[attr-defined]
